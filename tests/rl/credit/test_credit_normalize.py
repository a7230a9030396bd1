import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.check_credit import TOKEN_MEANS
from conf.errors import UnscoredNode
from conf.schema import Degenerate, Normalizer, TermConfig
from rl.credit.normalize import Moments, centered, normalized, ranked, whitened, zscore


def compared(values: list[float], groups: list[int] | None = None, **term) -> list[float]:
    """Normalised values; NaN is a value that was not scored."""
    value_N = torch.tensor(values, dtype=torch.float64)
    group_N = torch.tensor(groups or [0] * len(values), dtype=torch.int64)
    return normalized(value_N, ~value_N.isnan(), group_N, TermConfig(**term))[0].tolist()


def test_centre_is_the_mean_of_the_own_group():
    assert compared([1, 0, 5, 9], [0, 0, 1, 1], normalizer=Normalizer.center) == [0.5, -0.5, -2, 2]


def test_zscore_with_n_minus_one():
    # mean .25, squares .5625 + 3 * .0625 = .75, / 3 = .25, deviation .5
    assert compared([1, 0, 0, 0], eps=0.0) == [1.5, -0.5, -0.5, -0.5]


def test_zscore_of_the_population_and_eps():
    # deviation sqrt(.25) = .5, + .5 = 1
    assert compared([1, 0], ddof=0, eps=0.5) == [0.5, -0.5]


def test_two_siblings_are_a_deviation_apart_however_close_unless_it_has_a_floor():
    assert compared([0.51, 0.5], eps=0.0) == pytest.approx([math.sqrt(0.5), -math.sqrt(0.5)])
    assert compared([0.51, 0.5], eps=0.0, min_std=0.5) == pytest.approx([0.01, -0.01])


def test_no_normaliser_leaves_values_and_lone_values_as_they_are():
    assert compared([1, 0, 7], [0, 0, 1], normalizer=Normalizer.none) == [1, 0, 7]


def test_leave_one_out_compares_with_the_mean_of_the_others():
    # others of 1: 0, 0, .5, mean 1/6; of 0: 1, 0, .5, mean .5; of .5: 1, 0, 0, mean 1/3
    assert compared([1, 0, 0, 0.5], normalizer=Normalizer.leave_one_out) == pytest.approx([5 / 6, -0.5, -0.5, 1 / 6])


def test_leave_one_out_leaves_failed_values_out():
    assert compared([1, math.nan, 0], normalizer=Normalizer.leave_one_out) == [1, 0, -1]


COMPARING = [
    Normalizer.center,
    Normalizer.zscore,
    Normalizer.leave_one_out,
    Normalizer.rank,
    Normalizer.whiten,
    Normalizer.center_batch_std,
]


@pytest.mark.parametrize("normalizer", COMPARING)
def test_value_alone_in_its_group_is_zero_or_raw(normalizer):
    assert compared([3.0], normalizer=normalizer) == [0.0]
    assert compared([3.0], normalizer=normalizer, singleton=Degenerate.raw) == [3.0]


def spoken(values: list[float], groups: list[int], **term) -> list[bool]:
    """Whether the term speaks for each value."""
    value_N, group_N = torch.tensor(values, dtype=torch.float64), torch.tensor(groups)
    return normalized(value_N, ~value_N.isnan(), group_N, TermConfig(**term))[1].tolist()


@pytest.mark.parametrize("normalizer", COMPARING)
def test_values_that_are_all_equal_are_zero_raw_or_dropped(normalizer):
    values, groups = [3.0, 3.0, 1.0, 2.0], [0, 0, 1, 1]
    assert compared(values, groups, normalizer=normalizer)[:2] == [0, 0]
    assert compared(values, groups, normalizer=normalizer, zero_variance=Degenerate.raw)[:2] == [3, 3]
    assert spoken(values, groups, normalizer=normalizer, zero_variance=Degenerate.drop) == [False, False, True, True]
    assert spoken(values, groups, normalizer=normalizer) == [True] * 4


@pytest.mark.parametrize("normalizer", COMPARING)
def test_value_alone_in_its_group_can_be_dropped(normalizer):
    kept = spoken([3.0, 1.0, 2.0], [0, 1, 1], normalizer=normalizer, singleton=Degenerate.drop)
    assert kept == [False, True, True]


@pytest.mark.parametrize("normalizer", [Normalizer.none, Normalizer.max_return, Normalizer.running])
def test_normalisers_without_a_group_leave_nothing_alone(normalizer):
    options = {"singleton": Degenerate.drop, "zero_variance": Degenerate.drop}
    assert spoken([3.0, 3.0, 1.0], [0, 0, 1], normalizer=normalizer, **options) == [True] * 3


def test_place_in_the_group_runs_from_1_to_0_and_ties_share_the_better_place():
    values, groups = [14.0, 10.0, 12.0, 10.0, 5.0, 5.0, math.nan], [0, 0, 0, 0, 1, 1, 1]
    value_N = torch.tensor(values)
    assert ranked(value_N, ~value_N.isnan(), torch.tensor(groups)).tolist() == [1, 0, 0.5, 0, 0, 0, 0]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from([-1.0, 0.0, 0.5, 2.0])), max_size=9))
def test_places_agree_with_counting_the_greater_values(items):
    groups, values = [group for group, _ in items], [value for _, value in items]
    places = [1 + sum(other > value for g, other in items if g == group) for group, value in items]
    worst = [max(place for place, g in zip(places, groups, strict=True) if g == group) for group in groups]
    slow = [(w - place) / max(w - 1, 1) for place, w in zip(places, worst, strict=True)]
    value_N = torch.tensor(values, dtype=torch.float64)
    fast = ranked(value_N, torch.ones(len(items), dtype=torch.bool), torch.tensor(groups, dtype=torch.int64))
    assert fast.tolist() == pytest.approx(slow)


def test_values_that_differ_by_rounding_share_a_place():
    # .1 + .2 is not .3 in floating point
    assert compared([0.1 + 0.2, 0.3, 0.0], normalizer=Normalizer.rank, eps=0.0)[0] == pytest.approx(
        compared([0.3, 0.3, 0.0], normalizer=Normalizer.rank, eps=0.0)[0]
    )


def test_whitening_adds_to_the_variance_and_zscore_to_the_deviation():
    # 1 and 0 with the population's deviation .5
    assert compared([1, 0], normalizer=Normalizer.whiten, ddof=0)[0] == pytest.approx(0.5 / (0.25 + 1e-8) ** 0.5)
    assert compared([1, 0], normalizer=Normalizer.zscore, ddof=0, eps=0.1)[0] == pytest.approx(0.5 / 0.6)


def test_batch_deviation_scales_gaps_to_the_own_group():
    # gaps .5, -.5, 1, -1; all of 1, 0, 4, 2: mean 1.75, squares .5625 + 3.0625 + 5.0625 + .0625 = 8.75, / 3
    got = compared([1, 0, 4, 2], [0, 0, 1, 1], normalizer=Normalizer.center_batch_std, eps=0.0)
    assert got == pytest.approx([each / (8.75 / 3) ** 0.5 for each in (0.5, -0.5, 1, -1)])


def test_largest_value_of_the_scope_becomes_1():
    got = compared([2, -4, 0, 0], [0, 0, 1, 1], normalizer=Normalizer.max_return, eps=0.0)
    assert got == [0.5, -1, 0, 0]


def test_tokens_weigh_the_mean_and_the_deviation():
    # 1 over three tokens, -1 over one: mean .5, population variance (3 * .25 + 2.25) / 4 = .75
    value_N, group_N = torch.tensor([1.0, -1.0], dtype=torch.float64), torch.tensor([0, 0])
    term = TermConfig(normalizer=Normalizer.zscore, ddof=0, eps=0.0)
    weight_N = torch.tensor([3.0, 1.0], dtype=torch.float64)
    got, _ = normalized(value_N, torch.tensor([True, True]), group_N, term, weight_N=weight_N)
    assert got.tolist() == pytest.approx([0.5 / 0.75**0.5, -1.5 / 0.75**0.5])


def seen(*batches: list[float]) -> Moments:
    moments = Moments()
    for batch in batches:
        value_N = torch.tensor(batch, dtype=torch.float64)
        moments = moments.including(value_N, ~value_N.isnan())
    return moments


def test_running_moments_are_those_of_all_values_at_once():
    parts, whole = seen([1, 2], [], [math.nan], [6.0, -1.0, math.nan]), seen([1, 2, 6, -1])
    assert (parts.count, parts.mean) == (whole.count, whole.mean) == (4, 2)
    assert parts.squares == pytest.approx(whole.squares) == pytest.approx(1 + 0 + 16 + 9)


def test_running_zscore_compares_with_the_run_so_far_and_the_batch():
    # seen 0 and 2, now 4: mean 2, squares 4 + 0 + 4, deviation sqrt(8 / 2) = 2
    value_N, term = torch.tensor([4.0], dtype=torch.float64), TermConfig(normalizer=Normalizer.running, eps=0.0)
    got, _ = normalized(value_N, torch.tensor([True]), torch.tensor([0]), term, history=seen([0, 2]))
    assert got.tolist() == [1]


def test_value_whose_only_companion_failed_is_alone():
    assert compared([3.0, math.nan], singleton=Degenerate.raw) == [3.0, 0.0]


def test_value_that_was_not_scored_is_left_out_of_the_mean():
    assert compared([1, math.nan, 0], normalizer=Normalizer.center) == [0.5, 0.0, -0.5]


@pytest.mark.parametrize("normalizer", COMPARING)
@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e6 / 3])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_equal_values_have_no_advantage_not_even_from_rounding(normalizer, eps, value, count):
    assert compared([value] * count, normalizer=normalizer, eps=eps) == [0.0] * count


@pytest.mark.parametrize("normalizer", [each for each in Normalizer if each not in TOKEN_MEANS])
def test_nothing_scored_and_nothing_at_all_are_zeros(normalizer):
    assert compared([math.nan, math.nan], normalizer=normalizer) == [0.0, 0.0]
    assert compared([], normalizer=normalizer) == []


def test_groups_may_have_gaps():
    assert compared([1, 0], [5, 5], normalizer=Normalizer.center) == [0.5, -0.5]


@pytest.mark.parametrize("compare", [centered, zscore])
def test_value_said_to_be_scored_must_be_a_number(compare):
    with pytest.raises(UnscoredNode, match="the value of row 1 is nan"):
        compare(torch.tensor([0.0, torch.nan]), torch.tensor([True, True]), torch.tensor([0, 0]))


def white(values: list[float], weights: list[float]) -> list[float]:
    value_N, weight_N = (torch.tensor(each, dtype=torch.float64) for each in (values, weights))
    return whitened(value_N, weight_N).tolist()


def test_whitened_values_count_as_often_as_their_weights_say():
    # mean (3 * 1 - 1) / 4 = .5, variance (3 * .25 + 2.25) / (4 - 1) = 1
    assert white([1, -1], [3, 1]) == pytest.approx([0.5, -1.5])
    assert white([1, 1, 1, -1], [1, 1, 1, 1]) == pytest.approx([0.5, 0.5, 0.5, -1.5])


def test_whitening_leaves_out_what_does_not_count():
    assert white([1, math.nan, -1], [3, 0, 1]) == pytest.approx([0.5, 0, -1.5])


@pytest.mark.parametrize(("values", "weights"), [([], []), ([3], [1]), ([3, 4], [0, 0]), ([3, 4], [1, 0])])
def test_fewer_than_two_values_have_no_deviation(values, weights):
    assert white(values, weights) == [0] * len(values)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6 / 3])
def test_equal_values_are_whitened_to_nothing(value):
    assert white([value] * 7, [1] * 7) == [0] * 7


def test_whitened_value_that_counts_must_be_a_number():
    with pytest.raises(UnscoredNode, match="the value of row 1 is nan"):
        white([1, math.nan], [1, 1])
