import pytest
import torch
from credit_forests import balanced, names, per_leaf, per_node, per_pair, ragged

from rewards.drawn import parse_scored
from rewards.types import Score
from rl.credit.forest import forest_of
from rollout.types import StopReason


def test_every_step_knows_its_parent_depth_and_number_of_trajectories():
    tree = ragged()
    forest = forest_of([tree])
    assert names([tree], forest) == ["p", "q", "q1", "q2", "r", "r1", "r2"]
    assert forest.parent_N.tolist() == [-1, -1, 1, 1, -1, 4, 5]
    assert forest.depth_N.tolist() == [1, 1, 2, 2, 1, 2, 3]
    assert forest.num_leaves_N.tolist() == [1, 2, 1, 1, 1, 1, 1]
    assert per_leaf(forest, forest.length_L, tree) == {"p": 1, "q1": 2, "q2": 2, "r2": 3}


def test_pairs_follow_each_trajectory_from_its_first_step():
    tree = balanced()
    forest = forest_of([tree])
    pairs = list(per_pair(forest, forest.pair_leaf_P, tree))
    assert pairs == [
        ("a1", "a"), ("a1", "a1"), ("a2", "a"), ("a2", "a2"), ("b1", "b"), ("b1", "b1"), ("b2", "b"), ("b2", "b2")
    ]  # fmt: skip


def test_parents_and_prompts_of_a_second_tree_start_where_the_first_ends():
    forest = forest_of([parse_scored("one -> a -> a1"), parse_scored("two -> b -> b1")])
    assert forest.parent_N.tolist() == [-1, 0, -1, 2]
    assert forest.prompt_N.tolist() == [0, 0, 1, 1]
    assert forest.row_N.tolist() == [0, 1, 0, 1]


def test_branches_of_the_same_number_in_two_prompts_are_different_groups():
    trees = [parse_scored("one -> (a, b)", branches={"b": 1}), parse_scored("two -> (c, d)", branches={"d": 1})]
    forest = forest_of(trees)
    assert per_node(forest, forest.branch_N, *trees) == {"a": 0, "b": 1, "c": 2, "d": 3}
    assert forest.branch_L.tolist() == [0, 1, 2, 3]


def test_pruned_step_is_absent_and_does_not_count_as_a_trajectory():
    tree = balanced(pruned={"a2"})
    forest = forest_of([tree])
    assert names([tree], forest) == ["a", "a1", "b", "b1", "b2"]
    assert per_node(forest, forest.num_leaves_N, tree)["a"] == 1


@pytest.mark.parametrize("reason", [StopReason.deadline, StopReason.tool_crashed])
def test_trajectory_that_the_world_broke_is_absent_with_the_steps_that_only_it_took(reason):
    tree = ragged(stops={"r2": reason})
    forest = forest_of([tree])
    assert names([tree], forest) == ["p", "q", "q1", "q2"]


def test_only_a_scored_value_is_a_number_and_only_a_break_is_a_failure():
    steps = {"a": 0.5, "a1": None, "a2": Score.failed("judge is down"), "b": Score.timed_out("10 s")}
    tree = balanced(steps=steps)
    forest = forest_of([tree])
    value = per_node(forest, forest.step_signals["step"], tree)
    failed = per_node(forest, forest.step_failed["step"], tree)
    assert value["a"] == 0.5
    assert all(value[name] != value[name] for name in ("a1", "a2", "b", "b1", "b2"))  # NaN is not itself
    assert {name for name, is_failed in failed.items() if is_failed} == {"a2", "b"}


def test_signal_of_one_tree_is_nan_in_the_tree_that_lacks_it():
    forest = forest_of([parse_scored("one -> a", outcomes={"a": 1.0}), parse_scored("two -> b")])
    assert forest.leaf_signals["outcome"][0] == 1.0
    assert forest.leaf_signals["outcome"][1].isnan()


@pytest.mark.parametrize("trees", [[], [parse_scored("one -> a", pruned={"a"})]])
def test_batch_without_a_trained_trajectory_is_an_empty_forest(trees):
    forest = forest_of(trees)
    assert forest.parent_N.shape == forest.leaf_node_L.shape == forest.pair_node_P.shape == (0,)
    assert forest.parent_N.dtype == forest.num_leaves_N.dtype == torch.int64


def test_kept_leaf_behind_a_pruned_step_is_our_bug():
    tree = parse_scored("one -> a -> a1")
    tree.tree.nodes[0].kept = False
    with pytest.raises(AssertionError, match="every step before a kept leaf is kept"):
        forest_of([tree])


def test_sampled_tokens_of_each_step_are_counted_without_the_environments_reply():
    tree = balanced(observation_tokens=3)
    tree.tree.nodes[0].action_ids, tree.tree.nodes[0].action_logprobs = [10, 11], [-1.0, -1.0]
    forest = forest_of([tree])
    assert per_node(forest, forest.num_actions_N, tree) == {"a": 2, "a1": 1, "a2": 1, "b": 1, "b1": 1, "b2": 1}
