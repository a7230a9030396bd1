import pytest
import torch
from credit_forests import balanced, per_node, ragged

from conf.errors import ShapeError, UnscoredNode
from conf.schema import Backup
from rewards.drawn import parse_scored
from rewards.types import ScoredTree
from rl.credit.backup import backed_up, continuation_weights, decayed
from rl.credit.forest import forest_of


def of_steps(
    backup: Backup, scored: ScoredTree, gamma: float = 1.0, but: tuple[int, ...] = ()
) -> dict[str, float | None]:
    """Value of each step by name, None where no trajectory counts; leaves in `but` do not count."""
    forest = forest_of([scored])
    counts_L = torch.ones(len(forest.length_L), dtype=torch.bool)
    counts_L[list(but)] = False
    counts_P, depth_P = counts_L[forest.pair_leaf_P], forest.depth_N[forest.pair_node_P]
    value_P = decayed(forest.leaf_signals["outcome"], forest.length_L, depth_P, forest.pair_leaf_P, gamma=gamma)
    weight_P = continuation_weights(counts_P, forest.pair_node_P, forest.pair_leaf_P, forest.parent_N)
    value_N, valid_N = backed_up(backup, value_P, counts_P, weight_P, forest.pair_node_P, len(forest.parent_N))
    valid = per_node(forest, valid_N, scored)
    return {name: value if valid[name] else None for name, value in per_node(forest, value_N, scored).items()}


@pytest.mark.parametrize("backup", [Backup.leaf_mean, Backup.child_mean])
def test_step_is_worth_the_mean_of_the_leaves_below_it(backup):
    assert of_steps(backup, balanced()) == {"a": 0.5, "a1": 1, "a2": 0, "b": 0, "b1": 0, "b2": 0}


@pytest.mark.parametrize("backup", [Backup.max, Backup.any])
def test_step_is_worth_the_best_leaf_below_it(backup):
    assert of_steps(backup, balanced()) == {"a": 1, "a1": 1, "a2": 0, "b": 0, "b1": 0, "b2": 0}


UNEVEN = "q -> a -> (a1, a2 -> (a3, a4, a5))"


def test_each_continuation_counts_alike_in_the_mean_over_children_and_each_leaf_in_that_over_leaves():
    tree = parse_scored(UNEVEN, outcomes={"a1": 1.0, "a3": 0.0, "a4": 0.0, "a5": 0.0})
    assert of_steps(Backup.child_mean, tree)["a"] == pytest.approx(0.5)
    assert of_steps(Backup.leaf_mean, tree)["a"] == 0.25


def test_continuation_without_a_trajectory_that_counts_is_none():
    tree = parse_scored(UNEVEN, outcomes={"a1": 1.0, "a3": 0.0, "a4": 0.5, "a5": 0.5})
    # a3 does not count: a2 is worth .5, a (1 + .5) / 2; without all of a2, a is worth a1
    assert of_steps(Backup.child_mean, tree, but=(1,))["a"] == pytest.approx(0.75)
    assert of_steps(Backup.child_mean, tree, but=(1, 2, 3))["a"] == 1


def test_any_asks_whether_a_value_is_above_0_and_not_how_far():
    tree = ragged(outcomes={"p": 0.0, "q1": 0.25, "q2": -3.0, "r2": -1.0})
    assert of_steps(Backup.any, tree) == {"p": 0, "q": 1, "q1": 1, "q2": 0, "r": 0, "r1": 0, "r2": 0}


def test_decay_counts_the_steps_to_the_end_of_each_trajectory():
    value = of_steps(Backup.leaf_mean, ragged(), gamma=0.5)
    # r is two steps from the end of r2 and r1 one; q is one step from q1 = 1 and q2 = 0
    assert value == {"p": 1, "q": 0.25, "q1": 1, "q2": 0, "r": 0.25, "r1": 0.5, "r2": 1}


def test_decay_makes_the_best_of_wrong_leaves_the_farthest():
    tree = ragged(outcomes={"p": -1.0, "q1": -1.0, "q2": -1.0, "r2": -1.0})
    assert of_steps(Backup.max, tree, gamma=0.5)["r"] == -0.25


def test_no_decay_left_at_gamma_zero_but_the_last_step_keeps_its_own():
    assert of_steps(Backup.leaf_mean, ragged(), gamma=0.0)["r2"] == 1
    assert of_steps(Backup.leaf_mean, ragged(), gamma=0.0)["r1"] == 0


BACKUPS = [backup for backup in Backup if backup is not Backup.none]


@pytest.mark.parametrize("backup", BACKUPS)
def test_step_speaks_only_for_the_trajectories_that_count(backup):
    value = of_steps(backup, balanced(), but=(0,))  # a1, the only right one
    assert value["a"] == 0
    assert value["a1"] is None


@pytest.mark.parametrize("backup", BACKUPS)
def test_step_with_no_trajectory_that_counts_has_no_value(backup):
    assert set(of_steps(backup, balanced(), but=(0, 1, 2, 3)).values()) == {None}


def test_weights_of_the_trajectories_through_a_step_add_up_to_one():
    forest = forest_of([ragged(), balanced()])
    counts_P = torch.ones(len(forest.pair_node_P), dtype=torch.bool)
    weight_P = continuation_weights(counts_P, forest.pair_node_P, forest.pair_leaf_P, forest.parent_N)
    sum_N = torch.zeros(len(forest.parent_N), dtype=torch.float64).index_add(0, forest.pair_node_P, weight_P)
    assert sum_N.tolist() == pytest.approx([1.0] * len(forest.parent_N))


ONE = torch.ones(1, dtype=torch.float64)
FIRST = torch.zeros(1, dtype=torch.int64)


def test_value_said_to_count_must_be_a_number():
    with pytest.raises(UnscoredNode, match="the value of a pair of row 0 is nan"):
        backed_up(Backup.max, ONE * torch.nan, ONE > 0, ONE, FIRST, 1)


def test_arrays_must_be_of_one_forest():
    with pytest.raises(ShapeError, match="value_L has L=2 leaves but length_L has L=1"):
        decayed(torch.zeros(2), FIRST, FIRST, FIRST, gamma=1.0)
    with pytest.raises(ShapeError, match="valid_P has P=2"):
        backed_up(Backup.max, ONE, torch.ones(2) > 0, ONE, FIRST, 1)
