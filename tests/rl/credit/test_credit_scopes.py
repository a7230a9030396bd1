import pytest
import torch
from credit_forests import balanced, per_leaf, per_node

from conf.errors import ConfigError
from conf.schema import Level, Scope
from rewards.drawn import parse_scored
from rl.credit.forest import forest_of
from rl.credit.scopes import ended_before, group_ids, sibling_groups


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


def test_trajectories_have_no_siblings():
    with pytest.raises(ConfigError, match=r"level=trajectory and scope=siblings.*Use level=step"):
        group_ids(forest_of([balanced()]), Level.trajectory, Scope.siblings)


def test_turns_of_a_prompt_are_steps_of_one_depth():
    trees = [parse_scored("one -> (a -> a1, b)"), parse_scored("two -> c -> c1")]
    forest = forest_of(trees)
    turn = per_node(forest, group_ids(forest, Level.step, Scope.turn_index), *trees)
    assert turn["a"] == turn["b"]
    assert len({turn["a"], turn["a1"], turn["c"], turn["c1"]}) == 4


def test_turns_that_a_trajectory_ended_before_are_named():
    forest = forest_of([parse_scored("one -> (a -> a1 -> a2, b)"), parse_scored("two -> c -> c1")])
    turn_N = group_ids(forest, Level.step, Scope.turn_index)
    leaf, group = ended_before(forest)
    # trajectories a2, b, c1: b misses turns 2 and 3 of its prompt, c1 turn 3 of its own, which nobody has
    assert leaf.tolist() == [1, 1, 2]
    assert group[:2].tolist() == [int(turn_N[1]), int(turn_N[2])]
    assert int(group[2]) not in turn_N.tolist()


def test_state_is_the_observation_before_the_step():
    tree = parse_scored("q -> (a -> a1, b -> b1, c)", observation_tokens=2)
    tree.tree.nodes[2].observation_ids = [7]  # behind b
    forest = forest_of([tree, parse_scored("q -> d", observation_tokens=2)])
    state = dict(zip(["a", "a1", "b", "b1", "c", "d"], forest.state_N.tolist(), strict=True))
    assert state["a"] == state["b"] == state["c"]
    assert len({state["a"], state["a1"], state["b1"], state["d"]}) == 4


@pytest.mark.parametrize("scope", [Scope.ancestors, Scope.parent_value, Scope.critic])
def test_what_is_no_group_of_steps_is_refused(scope):
    with pytest.raises(ConfigError, match=f"level=step and scope={scope.value}, which does not group steps"):
        group_ids(forest_of([balanced()]), Level.step, scope)
