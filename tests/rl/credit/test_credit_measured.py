"""What the learner measures becomes signals and values of the forest."""

import math

import pytest
from credit_forests import balanced, credit_config, measured_credit, per_leaf, per_node, recipe

from conf.errors import UnscoredNode
from rewards.drawn import parse_scored
from rl.credit.forest import forest_of
from rl.credit.measured import Measured, Needs, measurements_needed, with_measured


def test_kl_of_a_trajectory_is_the_sum_of_its_steps():
    tree = balanced()
    kl = [1.0, 0.5, -0.25, 0.0, 2.0, math.nan]  # a, a1, a2, b, b1, b2
    forest = with_measured(forest_of([tree]), [Measured(kl=kl)])
    assert per_leaf(forest, forest.leaf_signals["path_kl"], tree) == {
        "a1": 1.5,
        "a2": 0.75,
        "b1": 2,
        "b2": pytest.approx(math.nan, nan_ok=True),
    }
    assert per_node(forest, forest.step_failed["kl"], tree)["b2"]
    assert forest.step_signals["kl"][:5].tolist() == kl[:5]


def test_rows_off_the_trained_paths_are_not_read():
    tree = balanced(pruned={"a1"})
    values = [[0.5], [], [0.25], [0.5], [0.0], [1.0]]
    forest = with_measured(forest_of([tree]), [Measured(kl=[0.0, math.nan, 0.0, 0.0, 0.0, 0.0], value=values)])
    assert not forest.leaf_signals["path_kl"].isnan().any()
    assert forest.value_T is not None and forest.value_T.tolist() == [0.5, 0.25, 0.5, 0.0, 1.0]


def test_a_trajectory_whose_kl_is_no_number_trains_nothing():
    tree = parse_scored("q -> (a, b)", outcomes={"a": 1.0, "b": 0.0})
    forest, credit = measured_credit(recipe("rloo"), tree, kl={"a": math.inf, "b": 0.0})
    assert per_node(forest, credit.w0_N, tree) == {"a": 0, "b": 1}


def test_a_critic_that_has_diverged_is_told_by_step_and_tree():
    trees = [balanced(), parse_scored("q -> c", outcomes={"c": 1.0})]
    measured = [Measured(value=[[0.0]] * 6), Measured(value=[[math.nan]])]
    with pytest.raises(UnscoredNode, match=r"step 0 of tree 1 .* is worth nan: it has diverged.*critic.learning_rate"):
        with_measured(forest_of(trees), measured)


def test_values_that_do_not_fit_the_tokens_are_our_bug():
    with pytest.raises(AssertionError, match="one value per sampled token"):
        with_measured(forest_of([balanced()]), [Measured(value=[[0.0, 0.0]] * 6)])


def test_nothing_measured_changes_nothing():
    forest = forest_of([balanced()])
    assert with_measured(forest, [Measured()]) is forest


@pytest.mark.parametrize(
    ("credit", "needs"),
    [
        ({"terms": {"x": {"signals": {"outcome": {}}}}}, Needs(kl=False, value=False)),
        ({"terms": {"x": {"signals": {"path_kl": {}}, "weight": 0.0}}}, Needs(kl=True, value=False)),
        ({"gae": {"level": "token", "signals": {"outcome": {}}}}, Needs(kl=False, value=True)),
        ({"gae": {"level": "step", "signals": {"outcome": {}, "kl": {"scale": -0.05}}}}, Needs(kl=True, value=True)),
        ({"gae": {"level": "off", "signals": {"kl": {}}}}, Needs(kl=False, value=False)),
    ],
)
def test_only_what_credit_reads_is_measured(credit, needs):
    assert measurements_needed(credit_config(credit)) == needs
    assert bool(needs) is (needs.kl or needs.value)
