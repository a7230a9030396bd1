"""The shipped recipes on the two canonical trees, against advantages worked out apart from this code.

Format rewards of PORTool are 1 for every step but a2 and q2, which pass 3 of 5 checks: 2 * 0.6 - 1 = 0.2. They are
bounded by 0.95^4 / 2 = 0.4073.
"""

import pytest
from credit_forests import T1_OUTCOMES, balanced, credit_of, per_leaf, per_node, per_pair, ragged, recipe
from trees import parse_scored

from conf.schema import Backup, TokenWeight

TOLERANCE = 1e-4
FORMAT_T1 = {"a": 1.0, "a1": 1.0, "a2": 0.2, "b": 1.0, "b1": 1.0, "b2": 1.0}
FORMAT_T2 = {"p": 1.0, "q": 1.0, "q1": 1.0, "q2": 0.2, "r": 1.0, "r1": 1.0, "r2": 1.0}


def advantages(cfg, tree) -> dict[tuple[str, str], float]:
    forest, credit = credit_of(cfg, tree)
    return per_pair(forest, credit.advantage_P, tree)


def close(expected):
    return pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("backup", list(Backup))
def test_portool_on_the_balanced_tree(backup):
    assert advantages(recipe("portool", terms={"fork": {"backup": backup}}), balanced(steps=FORMAT_T1)) == close(
        {
            ("a1", "a"): 1.1036,
            ("a1", "a1"): 1.1036,
            ("a2", "a"): 0.1036,
            ("a2", "a2"): -0.6036,
            ("b1", "b"): -0.6036,
            ("b1", "b1"): -0.2500,
            ("b2", "b"): -0.6036,
            ("b2", "b2"): -0.2500,
        }
    )


def test_portool_on_the_ragged_tree_with_mean():
    assert advantages(recipe("portool"), ragged(steps=FORMAT_T2)) == close(
        {
            ("p", "p"): 0.5818,
            ("q1", "q"): -0.3251,
            ("q1", "q1"): 0.6036,
            ("q2", "q"): -1.3251,
            ("q2", "q2"): -1.1036,
            ("r2", "r"): 0.4933,
            ("r2", "r1"): 0.2500,
            ("r2", "r2"): 0.2500,
        }
    )


def test_portool_on_the_ragged_tree_with_max():
    tree = ragged(steps=FORMAT_T2)
    assert advantages(recipe("portool", terms={"fork": {"backup": "max"}}), tree) == close(
        {
            ("p", "p"): 0.7542,
            ("q1", "q"): 0.2415,
            ("q1", "q1"): 0.6036,
            ("q2", "q"): -0.7585,
            ("q2", "q2"): -1.1036,
            ("r2", "r"): -0.2457,
            ("r2", "r1"): 0.2500,
            ("r2", "r2"): 0.2500,
        }
    )


def test_portool_counts_a_shared_step_once_for_each_of_its_trajectories():
    tree = balanced(steps=FORMAT_T1)
    forest, credit = credit_of(recipe("portool"), tree)
    assert per_node(forest, credit.w0_N, tree) == {"a": 2, "a1": 1, "a2": 1, "b": 2, "b1": 1, "b2": 1}
    mean = per_node(forest, credit.advantage_N, tree)
    assert (mean["a"], mean["b"]) == close((0.6036, -0.6036))


def test_grpo_gives_every_step_the_advantage_of_its_trajectory():
    assert advantages(recipe("grpo"), balanced()) == close(
        {(leaf, step): 1.5 if leaf == "a1" else -0.5 for leaf in T1_OUTCOMES for step in (leaf[0], leaf)}
    )


def test_grpo_on_the_ragged_tree():
    # mean .75, deviation sqrt((3 * .0625 + .5625) / 3) = .5
    tree = ragged()
    forest, credit = credit_of(recipe("grpo"), tree)
    last_step = per_node(forest, credit.advantage_N, tree)
    assert [last_step[leaf] for leaf in ("p", "q1", "q2", "r2")] == close([0.5, 0.5, -1.5, 0.5])


def tree_grpo(cfg, tree) -> dict[str, dict[str, float]]:
    """term (and "sum") -> leaf -> advantage of its last step."""
    forest, credit = credit_of(cfg, tree)
    return {
        name: per_leaf(forest, per_leaf_step(forest, part_P), tree)
        for name, part_P in {**credit.parts, "sum": credit.advantage_P}.items()
    }


def per_leaf_step(forest, value_P):
    """Value at each trajectory's last step: pairs are sorted by leaf, then depth."""
    return value_P[forest.length_L.cumsum(0) - 1]


def test_tree_grpo_adds_the_prompts_and_the_own_trees_comparison():
    got = tree_grpo(recipe("tree_grpo"), balanced(branches={"b": 1}))
    assert got["prompt"] == close({"a1": 1.5, "a2": -0.5, "b1": -0.5, "b2": -0.5})
    assert got["tree"] == close({"a1": 0.7071, "a2": -0.7071, "b1": 0, "b2": 0})
    assert got["sum"] == close({"a1": 2.2071, "a2": -1.2071, "b1": -0.5, "b2": -0.5})


RAGGED_TREES = "prompt -> (a -> (a1, a2, a3), b -> b1)"


def test_tree_grpo_of_trees_with_three_and_one_trajectories():
    tree = parse_scored(RAGGED_TREES, branches={"b": 1}, outcomes={"a1": 1.0, "a2": 0.0, "a3": 1.0, "b1": 0.0})
    got = tree_grpo(recipe("tree_grpo"), tree)
    assert got["prompt"] == close({"a1": 0.8660, "a2": -0.8660, "a3": 0.8660, "b1": -0.8660})
    assert got["tree"] == close({"a1": 0.5773, "a2": -1.1547, "a3": 0.5773, "b1": 0})


@pytest.mark.parametrize(("singleton", "reward", "intra"), [("zero", 1.0, 0.0), ("raw", 1.0, 1.0), ("raw", 0.0, 0.0)])
def test_tree_grpo_of_a_lone_trajectory_is_zero_unless_parity_with_the_authors_code_is_asked_for(
    singleton, reward, intra
):
    tree = parse_scored(RAGGED_TREES, branches={"b": 1}, outcomes={"a1": 1.0, "a2": 0.0, "a3": 1.0, "b1": reward})
    got = tree_grpo(recipe("tree_grpo", terms={"tree": {"singleton": singleton}}), tree)
    assert got["tree"]["b1"] == close(intra)


def test_tree_step_on_the_balanced_tree():
    tree = balanced(steps={"a": 1.0, "a1": 1.0, "a2": -1.0, "b": 0.0, "b1": 0.0, "b2": 0.0})
    forest, credit = credit_of(recipe("tree_step"), tree)
    parts = {name: per_pair(forest, part_P, tree) for name, part_P in credit.parts.items()}
    # outcomes 1, 0, 0, 0: mean .25, population deviation sqrt(.75) / 2 = .4330; .75 / .4430 and -.25 / .4430
    assert (parts["trajectory"]["a1", "a"], parts["trajectory"]["a2", "a"]) == close((1.6929, -0.5643))
    # a is worth .5 + .5 * 1 = 1 and b 0: mean .5; a1 is worth 1 + .5 and a2 0 - .5: mean .5
    assert (parts["fork"]["a1", "a"], parts["fork"]["b1", "b"]) == close((0.5, -0.5))
    assert (parts["fork"]["a1", "a1"], parts["fork"]["a2", "a2"], parts["fork"]["b1", "b1"]) == close((1, -1, 0))
    # steps 1, 1, -1, 0, 0, 0: mean 1/6, population deviation sqrt(1/2 - 1/36) = .6872
    assert (parts["step"]["a1", "a"], parts["step"]["a2", "a2"]) == close((1.1953, -1.6734))
    # a is trained once, with the mean over its two trajectories: (1.6929 - .5643) / 2 + .5 + 1.1953
    assert per_node(forest, credit.advantage_N, tree)["a"] == close(2.2596)
    assert per_node(forest, credit.w0_N, tree) == dict.fromkeys(["a", "a1", "a2", "b", "b1", "b2"], 1.0)


def test_chain_step_is_tree_step_without_the_fork():
    tree = balanced(steps={"a": 1.0, "a1": 1.0, "a2": -1.0, "b": 0.0, "b1": 0.0, "b2": 0.0})
    forest, credit = credit_of(recipe("chain_step"), tree)
    # step a2: its trajectory earns -.5643 and the step itself -1.6734, as worked out above
    assert per_node(forest, credit.advantage_N, tree)["a2"] == close(-0.5643 - 1.6734)
    assert set(credit.parts) == {"trajectory", "step"}


def test_tree_step_is_the_recipe_that_trains_a_shared_step_once():
    rules = {
        name: recipe(name).shared_token_weight for name in ("grpo", "portool", "tree_grpo", "tree_step", "chain_step")
    }
    assert rules.pop("tree_step") is TokenWeight.unique
    assert set(rules.values()) == {TokenWeight.per_leaf}
