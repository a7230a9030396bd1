import pytest
import torch
from credit_forests import balanced, per_node, ragged

from conf.errors import ShapeError, UnscoredNode
from rewards.types import ScoredTree
from rl.credit.forest import forest_of
from rl.credit.returns import leaf_max, leaf_mean


def backed_up(backup, scored: ScoredTree, gamma: float = 1.0, but: tuple[int, ...] = ()) -> dict[str, float | None]:
    """Value of each step by name, None where no trajectory counts; leaves in `but` do not count."""
    forest = forest_of([scored])
    outcome_L = forest.leaf_signals["outcome"]
    valid_L = torch.ones(len(outcome_L), dtype=torch.bool)
    valid_L[list(but)] = False
    value_N, valid_N = backup(
        outcome_L, valid_L, forest.length_L, forest.depth_N, forest.pair_node_P, forest.pair_leaf_P, gamma=gamma
    )
    valid = per_node(forest, valid_N, scored)
    return {name: value if valid[name] else None for name, value in per_node(forest, value_N, scored).items()}


def test_step_is_worth_the_mean_of_the_leaves_below_it():
    assert backed_up(leaf_mean, balanced()) == {"a": 0.5, "a1": 1, "a2": 0, "b": 0, "b1": 0, "b2": 0}


def test_step_is_worth_the_best_leaf_below_it():
    assert backed_up(leaf_max, balanced()) == {"a": 1, "a1": 1, "a2": 0, "b": 0, "b1": 0, "b2": 0}


def test_decay_counts_the_steps_to_the_end_of_each_trajectory():
    value = backed_up(leaf_mean, ragged(), gamma=0.5)
    # r is two steps from the end of r2 and r1 one; q is one step from q1 = 1 and q2 = 0
    assert value == {"p": 1, "q": 0.25, "q1": 1, "q2": 0, "r": 0.25, "r1": 0.5, "r2": 1}


def test_decay_makes_the_best_of_wrong_leaves_the_farthest():
    tree = ragged(outcomes={"p": -1.0, "q1": -1.0, "q2": -1.0, "r2": -1.0})
    assert backed_up(leaf_max, tree, gamma=0.5)["r"] == -0.25


def test_no_decay_left_at_gamma_zero_but_the_last_step_keeps_its_own():
    assert backed_up(leaf_mean, ragged(), gamma=0.0)["r2"] == 1
    assert backed_up(leaf_mean, ragged(), gamma=0.0)["r1"] == 0


@pytest.mark.parametrize("backup", [leaf_mean, leaf_max])
def test_step_speaks_only_for_the_trajectories_that_count(backup):
    value = backed_up(backup, balanced(), but=(0,))  # a1, the only right one
    assert value["a"] == 0
    assert value["a1"] is None


@pytest.mark.parametrize("backup", [leaf_mean, leaf_max])
def test_step_with_no_trajectory_that_counts_has_no_value(backup):
    assert set(backed_up(backup, balanced(), but=(0, 1, 2, 3)).values()) == {None}


def test_value_said_to_count_must_be_a_number():
    one = torch.ones(1, dtype=torch.int64)
    with pytest.raises(UnscoredNode, match="the value of a trajectory of row 0 is nan"):
        leaf_mean(torch.tensor([torch.nan]), torch.tensor([True]), one, one, one - 1, one - 1)


def test_leaf_arrays_must_be_of_one_tree():
    one = torch.ones(1, dtype=torch.int64)
    with pytest.raises(ShapeError, match="value_L has L=2 leaves but valid_L has L=1"):
        leaf_max(torch.zeros(2), torch.tensor([True]), one, one, one - 1, one - 1)
