from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from loss_forests import credits_of, numbers, packed
from policy_trees import forests
from torch import Tensor
from torch.testing import assert_close

from conf.schema import Correction, LossConfig
from rl.policy.mismatch import correct, effective_share, importance_weight, mismatch_stats, sums_from_paths

DELTA = [0.1, 0.5, -1.5, 0.2]


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    "low, high, truncates, expected",
    [
        (0.0, 2.0, True, [1.105171, 1.648721, 0.22313, 1.221403]),  # TIS
        (0.0, 1.6, False, [1.105171, 0, 0.22313, 1.221403]),  # MIS
        (0.5, 2.0, False, [1.105171, 1.648721, 0, 1.221403]),  # IcePop
        (0.5, 1.6, True, [1.105171, 1.6, 0.5, 1.221403]),
    ],
)
def test_published_weights_of_tokens(low: float, high: float, truncates: bool, expected: list[float]):
    found = importance_weight(tensor(*DELTA), low, high, truncates=truncates)
    assert_close(found, tensor(*expected), atol=1e-6, rtol=0)


def test_published_weight_of_a_sequence():
    # e^(.1 + .5 - 1.5 + .2)
    assert importance_weight(tensor(sum(DELTA)), 0.0, 2.0, truncates=True).item() == pytest.approx(0.496585, abs=1e-6)
    assert importance_weight(tensor(sum(DELTA)), 0.5, 2.0, truncates=False).item() == 0.0


@pytest.mark.parametrize("delta", [1000.0, -1000.0, math.inf, -math.inf])
def test_a_weight_is_always_finite(delta: float):
    for truncates in (True, False):
        assert importance_weight(tensor(delta), 0.5, 2.0, truncates=truncates).item() in (0.0, 0.5, 2.0)


def test_a_weight_carries_no_gradient():
    assert not importance_weight(tensor(0.1).requires_grad_(), 0.5, 2.0, truncates=True).requires_grad


@settings(max_examples=15, deadline=None)
@given(forests())
def test_sums_over_trajectories_can_be_taken_anew(forest):
    table = numbers([each.tree for each in forest])
    batch, _ = packed(credits_of(forest), table, LossConfig())
    assert batch.paths is not None
    w_pos_E, w_neg_E = sums_from_paths(batch.paths, len(batch.w0_E))
    assert_close(w_pos_E, batch.w_pos_E)
    assert_close(w_neg_E, batch.w_neg_E)


@settings(max_examples=15, deadline=None)
@given(forests())
def test_an_engine_that_is_the_learner_needs_no_correction(forest):
    table = numbers([each.tree for each in forest])
    table.old = table.engine
    batch, _ = packed(credits_of(forest), table, LossConfig())
    for correction in Correction:
        found = correct(batch, LossConfig(correction=correction))
        assert found.cut_weight.item() == 0.0
        assert_close(found.batch.w_pos_E, batch.w_pos_E)
        assert_close(found.batch.w_neg_E, batch.w_neg_E)
        assert found.batch.w0_E is batch.w0_E


def test_statistics_by_hand():
    # Ratios 2 (weight 1) and 1/2 (weight 3): mean 3.5/4 and mean square 4.75/4.
    stats = mismatch_stats(tensor(2, 0.5).log(), tensor(1, 3), total_weight=4.0)
    assert stats.gap_nats.item() == pytest.approx(math.log(2))
    # e^d - 1 - d: 1 - log 2 once, log 2 - 1/2 three times
    assert stats.kl_nats.item() == pytest.approx((1 - math.log(2) + 3 * (math.log(2) - 0.5)) / 4)
    assert stats.ratio_max.item() == pytest.approx(2.0)
    share = effective_share(stats.ratio.item(), stats.ratio_square.item())
    assert share == pytest.approx((3.5 / 4) ** 2 / (4.75 / 4))


def test_one_sample_that_outweighs_a_hundred_is_worth_one():
    stats = mismatch_stats(tensor(10.0, *[-10.0] * 99), torch.ones(100), total_weight=100.0)
    assert effective_share(stats.ratio.item(), stats.ratio_square.item()) == pytest.approx(1 / 100, rel=1e-3)
