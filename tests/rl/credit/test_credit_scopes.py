import math

import pytest
import torch
from credit_forests import balanced, per_leaf, per_node
from trees import parse_scored

from conf.errors import ConfigError, UnscoredNode
from conf.schema import Level, Normalizer, Scope, Singleton, TermConfig
from rl.credit.forest import forest_of
from rl.credit.scopes import centered, group_ids, normalized, sibling_groups, whitened, zscore


def compared(values: list[float], groups: list[int] | None = None, **term) -> list[float]:
    """Normalised values; NaN is a value that was not scored."""
    value_N = torch.tensor(values, dtype=torch.float64)
    group_N = torch.tensor(groups or [0] * len(values), dtype=torch.int64)
    return normalized(value_N, ~value_N.isnan(), group_N, TermConfig(**term)).tolist()


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


COMPARING = [Normalizer.center, Normalizer.zscore, Normalizer.leave_one_out]


@pytest.mark.parametrize("normalizer", COMPARING)
def test_value_alone_in_its_group_is_zero_or_raw(normalizer):
    assert compared([3.0], normalizer=normalizer) == [0.0]
    assert compared([3.0], normalizer=normalizer, singleton=Singleton.raw) == [3.0]


def test_value_whose_only_companion_failed_is_alone():
    assert compared([3.0, math.nan], singleton=Singleton.raw) == [3.0, 0.0]


def test_value_that_was_not_scored_is_left_out_of_the_mean():
    assert compared([1, math.nan, 0], normalizer=Normalizer.center) == [0.5, 0.0, -0.5]


@pytest.mark.parametrize("normalizer", COMPARING)
@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e6 / 3])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_equal_values_have_no_advantage_not_even_from_rounding(normalizer, eps, value, count):
    assert compared([value] * count, normalizer=normalizer, eps=eps) == [0.0] * count


@pytest.mark.parametrize("normalizer", list(Normalizer))
def test_nothing_scored_and_nothing_at_all_are_zeros(normalizer):
    assert compared([math.nan, math.nan], normalizer=normalizer) == [0.0, 0.0]
    assert compared([], normalizer=normalizer) == []


def test_groups_may_have_gaps():
    assert compared([1, 0], [5, 5], normalizer=Normalizer.center) == [0.5, -0.5]


@pytest.mark.parametrize("compare", [centered, zscore])
def test_value_said_to_be_scored_must_be_a_number(compare):
    with pytest.raises(UnscoredNode, match="the value of row 1 is nan"):
        compare(torch.tensor([0.0, torch.nan]), torch.tensor([True, True]), torch.tensor([0, 0]))


def test_siblings_continue_the_same_step_and_first_steps_the_same_prompt():
    parent_N, prompt_N = torch.tensor([-1, -1, 0, 0, -1]), torch.tensor([0, 0, 0, 0, 1])
    a, b, a1, a2, other = sibling_groups(parent_N, prompt_N).tolist()
    assert a == b
    assert a1 == a2
    assert len({a, a1, other}) == 3


def test_pooled_steps_of_a_prompt_and_of_each_of_its_trees():
    trees = [balanced(branches={"b": 1}), parse_scored("two -> c")]
    forest = forest_of(trees)
    assert group_ids(forest, Level.step, Scope.prompt).tolist() == [0] * 6 + [1]
    by_tree = per_node(forest, group_ids(forest, Level.step, Scope.tree), *trees)
    assert by_tree == {"a": 0, "a1": 0, "a2": 0, "b": 1, "b1": 1, "b2": 1, "c": 2}


def test_trajectories_of_a_prompt_and_of_each_of_its_trees():
    trees = [balanced(branches={"b": 1}), parse_scored("two -> c")]
    forest = forest_of(trees)
    assert group_ids(forest, Level.trajectory, Scope.prompt).tolist() == [0, 0, 0, 0, 1]
    by_tree = per_leaf(forest, group_ids(forest, Level.trajectory, Scope.tree), *trees)
    assert by_tree == {"a1": 0, "a2": 0, "b1": 1, "b2": 1, "c": 2}


def test_a_batch_is_one_group_of_all_its_prompts():
    forest = forest_of([balanced(), parse_scored("two -> c")])
    assert group_ids(forest, Level.step, Scope.batch).tolist() == [0] * 7
    assert group_ids(forest, Level.trajectory, Scope.batch).tolist() == [0] * 5


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


def test_trajectories_have_no_siblings():
    with pytest.raises(ConfigError, match=r"level=trajectory and scope=siblings.*Use level=step"):
        group_ids(forest_of([balanced()]), Level.trajectory, Scope.siblings)
