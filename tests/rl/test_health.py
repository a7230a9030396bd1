import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest import approx
from torch import Tensor

from conf.schema import Config, CreditConfig, Keep, Level, Normalizer, Scope, SelectConfig, SignalUse, TermConfig
from rewards.drawn import parse_scored
from rewards.types import Score, ScoredTree
from rl.credited import credited
from rl.health import agreement, effective_number, health_metrics, silent_share, within_correlation
from rl.metrics import declared
from rl.shares import shares_of

small = st.integers(0, 3).map(float) | st.just(math.nan)
rows = st.lists(st.tuples(small, small, st.integers(0, 2)), max_size=9)


def tensors(drawn: list[tuple[float, float, int]]) -> tuple[Tensor, Tensor, Tensor]:
    columns = list(zip(*drawn, strict=True)) or [(), (), ()]
    first, second, group = columns
    return (
        torch.tensor(first, dtype=torch.float64),
        torch.tensor(second, dtype=torch.float64),
        torch.tensor(group, dtype=torch.int64),
    )


def test_agreement_counts_pairs_of_one_prompt_and_halves_ties():
    value = torch.tensor([0.9, 0.1, 0.1, 0.5, 0.0])
    outcome = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0])
    # first prompt: 0.9 > 0.1, 0.1 = 0.1, 0.9 > 0.5, 0.1 < 0.5; the second has no pair
    assert agreement(value, outcome, torch.tensor([0, 0, 0, 0, 1])) == (1 + 0.5 + 1 + 0) / 4


@settings(max_examples=60, deadline=None)
@given(rows)
def test_agreement_is_what_a_count_of_all_pairs_gives(drawn: list[tuple[float, float, int]]):
    pairs = [
        1.0 if first[0] > second[0] else 0.5 if first[0] == second[0] else 0.0
        for first in drawn
        for second in drawn
        if first[2] == second[2] and first[1] > second[1] and not math.isnan(first[0]) and not math.isnan(second[0])
    ]
    expected = sum(pairs) / len(pairs) if pairs else math.nan
    assert agreement(*tensors(drawn)) == approx(expected, nan_ok=True)


def test_correlation_within_prompts_does_not_see_that_hard_prompts_are_long():
    length = torch.tensor([1.0, 2.0, 11.0, 12.0])
    outcome = torch.tensor([0.0, 1.0, -10.0, -9.0])
    assert within_correlation(length, outcome, torch.tensor([0, 0, 1, 1])) == approx(1.0)
    assert within_correlation(length, outcome, torch.tensor([0, 0, 0, 0])) == approx(-99 / 101)


def test_a_constant_within_prompts_has_no_correlation_though_its_mean_is_rounded():
    constant = torch.tensor([0.1] * 3 + [0.7] * 3, dtype=torch.float64)
    outcome = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 1.0])
    assert math.isnan(within_correlation(constant, outcome, torch.tensor([0, 0, 0, 1, 1, 1])))


@settings(max_examples=30, deadline=None)
@given(rows, st.integers(-3, 3))
def test_a_constant_added_to_a_prompt_changes_no_correlation_and_no_agreement(
    drawn: list[tuple[float, float, int]], shift: int
):
    value, outcome, group = tensors(drawn)
    for measure in (agreement, within_correlation):
        shifted = measure(value + shift * group, outcome, group)
        assert shifted == approx(measure(value, outcome, group), nan_ok=True, abs=1e-9)


@pytest.mark.parametrize(("weights", "expected"), [([1.0] * 4, 4.0), ([5.0, 0.0, 0.0], 1.0), ([3.0, 1.0], 1.6)])
def test_effective_number_counts_equal_weights(weights: list[float], expected: float):
    assert effective_number(torch.tensor(weights)) == approx(expected)


def test_a_group_is_silent_when_none_of_its_values_is_told_apart():
    value = torch.tensor([0.0, 0.0, 1.0, -1.0, 0.0, math.nan, 0.0])
    group = torch.tensor([0, 0, 1, 1, 2, 2, 4])  # of group 2 one value is known, group 4 has one
    assert silent_share(value, group) == 0.5
    assert math.isnan(silent_share(value[4:], group[4:]))


def step_config(**select: Any) -> Config:
    fork = TermConfig(
        level=Level.step, signals={"step": SignalUse()}, scope=Scope.siblings, normalizer=Normalizer.center
    )
    terms = {"trajectory": TermConfig(signals={"outcome": SignalUse()}), "fork": fork}
    return Config(credit=CreditConfig(terms=terms), select=SelectConfig(**select))


def health_of(scored: list[ScoredTree], cfg: Config) -> dict[str, float]:
    found = credited(scored, cfg)
    return health_metrics(scored, found, shares_of(found, cfg), cfg.credit)


def batch() -> list[ScoredTree]:
    return [
        parse_scored(
            "q -> (a -> (a1, a2), b)",
            steps={"a": 1.0, "a1": 1.0, "a2": 0.0, "b": Score.failed("503")},
            outcomes={"a1": 1.0, "a2": 0.0, "b": 0.0},
        ),
        parse_scored("q -> (c, d)", steps={"c": 0.5, "d": 0.5}, outcomes={"c": 1.0, "d": 1.0}),
    ]


def test_health_of_a_small_batch():
    found = health_of(batch(), step_config())
    assert all(declared(name) for name in found)
    assert found["health/step_agreement_share"] == 1.0  # a1's mean 1.0 above a2's 0.5; nothing is known of b
    assert found["health/step_invalid_share"] == 1 / 6
    assert found["health/outcome_invalid_share"] == 0.0
    # lengths 2, 2, 1 and outcomes 1, 0, 0: covariance 1/3, variances 2/3 and 2/3
    assert found["health/outcome_steps_correlation"] == approx(0.5)
    assert found["health/trajectory_silent_share"] == 0.5
    assert found["health/fork_silent_share"] == 0.5  # c and d; a is alone, for b has no score
    assert found["health/no_credit_share"] == 2 / 6


def test_a_choice_by_agreement_does_not_flatter_the_agreement():
    tree = parse_scored(
        "q -> (a, b, c, d)",
        steps={"a": 1.0, "b": 0.0, "c": 1.0, "d": 0.0},
        outcomes={"a": 1.0, "b": 1.0, "c": 0.0, "d": 0.0},
    )
    cfg = step_config(keep=Keep.prof, num_kept=2, step_source="step", min_steps=1)
    assert credited([tree], cfg).selection.shares()["outranked"] == 0.5
    assert health_of([tree], cfg)["health/step_agreement_share"] == 0.5


def test_a_batch_without_a_trajectory_has_no_health():
    assert health_of([], step_config()) == {}
