from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rl.policy.loss import (
    cispo,
    clipped,
    gspo,
    log_ratio,
    ppo_clip,
    reinforce,
    sequence_log_ratio,
    value_loss,
    weighted_mean,
)

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


@settings(max_examples=20, deadline=None)
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


def test_parts_of_a_mean_add_up():
    values, weights = tensor(1, 2, 3), tensor(1, 1, 2)
    whole = weighted_mean(values, weights, 4.0)
    assert whole.item() == 2.25  # (1 + 2 + 6) / 4
    assert (weighted_mean(values[:1], weights[:1], 4.0) + weighted_mean(values[1:], weights[1:], 4.0)).item() == 2.25


def test_published_losses_of_one_token():
    # PPO and DAPO's wider clip at A = 1, dual clip 3 and TRL's delta 1.5 at A = -1; ratios .5 .9 1.25 1.5 5.
    ratios, none, one = tensor(0.5, 0.9, 1.25, 1.5, 5), torch.zeros(5).double(), torch.ones(5).double()
    shift = ratios.log()
    torch.testing.assert_close(ppo_clip(shift, one, none, 0.2, 0.2), -tensor(0.5, 0.9, 1.2, 1.2, 1.2))
    torch.testing.assert_close(ppo_clip(shift, one, none, 0.2, 0.28), -tensor(0.5, 0.9, 1.25, 1.28, 1.28))
    torch.testing.assert_close(ppo_clip(shift, none, -one, 0.2, 0.2, 3.0), tensor(0.8, 0.9, 1.25, 1.5, 3))
    torch.testing.assert_close(ppo_clip(shift, none, -one, 0.2, 0.2, 1.5), tensor(0.8, 0.9, 1.25, 1.5, 1.5))
    # CISPO's weights, at log p = -1: above alone as in verl's example, and TRL's cap of 5.
    logprob = -one
    torch.testing.assert_close(cispo(logprob, shift, one, none, 1.0, 0.2), tensor(0.5, 0.9, 1.2, 1.2, 1.2))
    torch.testing.assert_close(cispo(logprob, shift, one, none, 1.0, 4.0), ratios)


def test_cispo_keeps_the_gradient_of_a_token_that_ppo_silences():
    logprob = tensor(-1.0, -1.0).requires_grad_()
    shift = log_ratio(logprob, tensor(-1.0, -1.0) - tensor(5.0, 0.5).log())
    ppo_clip(shift, tensor(2, 2), tensor(0, 0), LOW, HIGH).sum().backward()
    torch.testing.assert_close(logprob.grad, tensor(0, -1))  # -2 * 0.5 where the ratio is not above 1.28
    logprob.grad = None
    cispo(logprob, shift, tensor(2, 2), tensor(0, 0), 1.0, HIGH).sum().backward()
    torch.testing.assert_close(logprob.grad, tensor(-2.56, -1))


def test_reinforce_makes_a_rewarded_token_likelier():
    logprob = tensor(-1.0, -2.0).requires_grad_()
    loss = reinforce(logprob, tensor(2, 0), tensor(0, -3))
    torch.testing.assert_close(loss, tensor(2, -6))
    loss.sum().backward()
    torch.testing.assert_close(logprob.grad, tensor(-2, 3))


@settings(max_examples=20, deadline=None)
@given(finite, finite, pairs)
def test_cispo_and_reinforce_of_sums_are_those_of_every_trajectory(logprob, shift, copies):
    w_pos = tensor(sum(weight * max(advantage, 0.0) for weight, advantage in copies))
    w_neg = tensor(sum(weight * min(advantage, 0.0) for weight, advantage in copies))
    total = sum(weight * advantage for weight, advantage in copies)
    weighed = min(max(math.exp(shift), 1 - LOW), 1 + HIGH)
    expected = pytest.approx(-total * logprob, abs=1e-12)
    assert reinforce(tensor(logprob), w_pos, w_neg).item() == expected
    found = cispo(tensor(logprob), tensor(shift), w_pos, w_neg, LOW, HIGH).item()
    assert found == pytest.approx(-total * weighed * logprob, abs=1e-12)


def test_gspo_has_one_ratio_for_a_trajectory():
    # Ratios 1.1, .9, 1.2 of one trajectory and 1.5 of another: their geometric means are 1.059105 and 1.5.
    shift, path = tensor(1.1, 0.9, 1.2, 1.5).log().requires_grad_(), torch.tensor([0, 0, 0, 1])
    ratio = sequence_log_ratio(shift, tensor(0, 0, 0, 0), path, 2)
    torch.testing.assert_close(ratio.exp(), tensor(1.059105, 1.059105, 1.059105, 1.5), atol=1e-6, rtol=0)
    share = tensor(1, 1, 1, 3) / 6  # a mean over trajectories of the mean over tokens
    praise = gspo(ratio, tensor(1, 1, 1, 1), share, 3e-4, 4e-4)
    assert praise.sum().item() == pytest.approx(-1.0004)
    blame = gspo(ratio, -tensor(1, 1, 1, 1), share, 3e-4, 4e-4)
    assert blame.sum().item() == pytest.approx(1.279552, abs=1e-6)
    blame.sum().backward()
    # Each token's own log p, by the ratio of its trajectory.
    torch.testing.assert_close(shift.grad, share * ratio.detach().exp())


def test_a_huge_sequence_ratio_stays_finite():
    ratio = sequence_log_ratio(tensor(0.0), tensor(-1000.0), torch.tensor([0]), 1)
    assert gspo(ratio, tensor(-1), tensor(1), LOW, HIGH).item() == pytest.approx(math.exp(10))


def test_a_value_earns_nothing_by_moving_far():
    # v 1 and .1, before .2 and .2, returns .9 and 1, clip .5: max(.01, .04) and max(.81, .81), half of their mean.
    value, old, target = tensor(1, 0.1).requires_grad_(), tensor(0.2, 0.2), tensor(0.9, 1)
    loss = value_loss(value, old, target, 0.5)
    assert loss.mean().item() == pytest.approx(0.2125)
    loss.sum().backward()
    torch.testing.assert_close(value.grad, tensor(0, -0.9))
    torch.testing.assert_close(value_loss(value, old, target, 0.0), tensor(0.005, 0.405))


@settings(max_examples=20, deadline=None)
@given(finite, finite, finite, st.floats(0.01, 1))
def test_clipping_a_value_never_lowers_its_loss(value, old, target, clip):
    free = value_loss(tensor(value), tensor(old), tensor(target), 0.0).item()
    bound = value_loss(tensor(value), tensor(old), tensor(target), clip).item()
    assert bound >= free
    assert bound == pytest.approx(free) or abs(value - old) > clip


def test_praise_is_silenced_above_and_blame_below():
    shift = tensor(2.0, 0.5, 0.5, 4.0).log()
    below, above = clipped(shift, tensor(1, 1, 0, 0), tensor(0, 0, -1, -1), LOW, HIGH)
    assert (below.tolist(), above.tolist()) == ([False, False, True, False], [True, False, False, False])
    _, above = clipped(shift, tensor(1, 1, 0, 0), tensor(0, 0, -1, -1), LOW, HIGH, dual_clip=3.0)
    assert above.tolist() == [True, False, False, True]
