from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rl.policy.loss import k3_divergence, log_ratio, ppo_clip, update_stats, weighted_mean

LOW, HIGH = 0.2, 0.28


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_praise_is_clipped_above_and_blame_below():
    ratio = tensor(1.5, 1.5, 0.5, 0.5)
    loss = ppo_clip(ratio.log(), tensor(2, 0, 2, 0), tensor(0, -2, 0, -2), LOW, HIGH)
    # -2 * 1.28; 2 * 1.5; -2 * 0.5; 2 * 0.8
    torch.testing.assert_close(loss, tensor(-2.56, 3.0, -1.0, 1.6))


def test_dual_clip_bounds_blame():
    loss = ppo_clip(tensor(5.0, 2.0).log(), tensor(0, 0), tensor(-1, -1), LOW, HIGH, dual_clip=3.0)
    torch.testing.assert_close(loss, tensor(3.0, 2.0))


def test_a_token_praised_and_blamed_still_learns_from_the_blame():
    # Two trajectories through one token, A = +1 and -1, r = 1.5. Praise is clipped, blame is not: dL/dlog r = r.
    shift = tensor(1.5).log().requires_grad_()
    ppo_clip(shift, tensor(1), tensor(-1), LOW, HIGH).sum().backward()
    torch.testing.assert_close(shift.grad, tensor(1.5))
    # The summed advantage is 0, and clipping it afterwards would teach nothing.
    summed = tensor(1.5).log().requires_grad_()
    ppo_clip(summed, tensor(0), tensor(0), LOW, HIGH).sum().backward()
    torch.testing.assert_close(summed.grad, tensor(0))


finite = st.floats(-3, 3, allow_subnormal=False)
pairs = st.lists(st.tuples(st.floats(0, 2, allow_subnormal=False), finite), min_size=1, max_size=6)


@given(finite, pairs, st.sampled_from([0.0, 3.0]))
def test_two_sums_are_the_loss_of_every_trajectory(shift: float, copies: list[tuple[float, float]], dual_clip: float):
    ratio, expanded = math.exp(shift), 0.0
    for weight, advantage in copies:
        surrogate = min(ratio * advantage, min(max(ratio, 1 - LOW), 1 + HIGH) * advantage)
        if dual_clip and advantage < 0:
            surrogate = max(surrogate, dual_clip * advantage)
        expanded -= weight * surrogate
    w_pos = sum(weight * max(advantage, 0.0) for weight, advantage in copies)
    w_neg = sum(weight * min(advantage, 0.0) for weight, advantage in copies)
    loss = ppo_clip(tensor(shift), tensor(w_pos), tensor(w_neg), LOW, HIGH, dual_clip)
    assert loss.item() == pytest.approx(expanded, rel=1e-12, abs=1e-12)


def test_a_huge_ratio_stays_finite():
    shift = log_ratio(tensor(0.0), tensor(-1000.0))
    assert shift.item() == 20.0
    assert ppo_clip(shift, tensor(1), tensor(0), LOW, HIGH).item() == pytest.approx(-1.28)


@given(finite, finite)
def test_divergence_from_the_reference_is_never_negative(logprob: float, reference: float):
    assert k3_divergence(tensor(logprob), tensor(reference)).item() >= -1e-12


def test_divergence_from_the_reference_by_hand():
    # d = log 2: 2 - log 2 - 1
    assert k3_divergence(tensor(-math.log(2)), tensor(0.0)).item() == pytest.approx(1 - math.log(2))


def test_divergence_pulls_the_policy_to_the_reference():
    logprob = tensor(-1.0, -3.0).requires_grad_()
    k3_divergence(logprob, tensor(-2.0, -2.0)).sum().backward()
    # 1 - e^(reference - logprob): positive where the policy is too likely
    torch.testing.assert_close(logprob.grad, tensor(1 - math.exp(-1), 1 - math.exp(1)))


def test_parts_of_a_mean_add_up():
    values, weights = tensor(1, 2, 3), tensor(1, 1, 2)
    whole = weighted_mean(values, weights, 4.0)
    assert whole.item() == 2.25  # (1 + 2 + 6) / 4
    assert (weighted_mean(values[:1], weights[:1], 4.0) + weighted_mean(values[1:], weights[1:], 4.0)).item() == 2.25


def test_statistics_by_hand():
    stats = update_stats(
        tensor(2.0, 0.5, 0.5, 1.0).log(),
        tensor(1, 1, 2, 0),
        w_pos_E=tensor(1, 1, 0, 0),
        w_neg_E=tensor(0, 0, -1, -1),
        w0_E=tensor(1, 1, 2, 4),
        clip_low=LOW,
        clip_high=HIGH,
        dual_clip=0.0,
        total_weight=8.0,
    )
    # Clipped: praise at ratio 2 (weight 1) and blame at 0.5 (weight 2); praise at 0.5 is not.
    assert stats.clip_share == 3 / 8
    assert stats.entropy_nats == pytest.approx(6 / 8)
    assert stats.ratio_max == pytest.approx(2.0)
    # r - 1 - log r: 1 - log 2 once; -1/2 + log 2 three times; 0
    assert stats.approx_kl_nats == pytest.approx((1 - math.log(2) + 3 * (math.log(2) - 0.5)) / 8)


def test_dual_clip_counts_as_clipped():
    shared = {"w_pos_E": tensor(0), "w_neg_E": tensor(-1), "w0_E": tensor(1), "clip_low": LOW, "clip_high": HIGH}
    for dual_clip, clip_share in [(0.0, 0.0), (3.0, 1.0)]:
        stats = update_stats(tensor(4.0).log(), tensor(0), **shared, dual_clip=dual_clip, total_weight=1.0)
        assert stats.clip_share == clip_share
