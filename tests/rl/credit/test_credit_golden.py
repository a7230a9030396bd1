"""The shipped recipes on the two canonical trees, against advantages worked out apart from this code.

Format rewards of PORTool are 1 for every step but a2 and q2, which pass 3 of 5 checks: 2 * 0.6 - 1 = 0.2. They are
bounded by 0.95^4 / 2 = 0.4073.
"""

import pytest
from credit_forests import (
    T1_OUTCOMES,
    balanced,
    credit_of,
    measured_credit,
    per_leaf,
    per_node,
    per_pair,
    ragged,
    recipe,
    with_lengths,
)

from conf.schema import Backup, TokenWeight
from rewards.drawn import parse_scored

TOLERANCE = 1e-4
FORMAT_T1 = {"a": 1.0, "a1": 1.0, "a2": 0.2, "b": 1.0, "b1": 1.0, "b2": 1.0}
FORMAT_T2 = {"p": 1.0, "q": 1.0, "q1": 1.0, "q2": 0.2, "r": 1.0, "r1": 1.0, "r2": 1.0}


def advantages(cfg, tree) -> dict[tuple[str, str], float]:
    forest, credit = credit_of(cfg, tree)
    return per_pair(forest, credit.advantage_P, tree)


def close(expected):
    return pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("backup", [Backup.leaf_mean, Backup.max])
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


# ---- baselines on four independent chains, against the numbers of verl and TRL ----

CHAINS = "prompt -> (a, b, c, d)"
REWARDS = {"a": 1.0, "b": 0.0, "c": 0.0, "d": 0.5}
SECOND_REWARDS = {"a": 0.2, "b": 0.6, "c": 0.1, "d": 0.9}


def chains(rewards=REWARDS, **arguments):
    return parse_scored(CHAINS, outcomes=rewards, **arguments)


def of_chains(cfg, tree, kl=None) -> list[float]:
    forest, credit = measured_credit(cfg, tree, kl=kl)
    return list(per_node(forest, credit.advantage_N, tree).values())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("grpo", [1.30558, -0.783348, -0.783348, 0.261116]),
        ("dr_grpo", [0.625, -0.375, -0.375, 0.125]),
        ("rloo", [0.833333, -0.5, -0.5, 0.166667]),
    ],
)
def test_baselines_on_four_chains(name, expected):
    assert of_chains(recipe(name), chains(), kl={}) == pytest.approx(expected, abs=1e-6)


def test_rloo_pays_the_outcome_less_the_kl_of_the_trajectory():
    tree = parse_scored("prompt -> (a -> a1, b)", outcomes={"a1": 1.0, "b": 0.0})
    # rewards 1 - .05 * (2 + 4) = .7 and 0 + .05 * 2 = .1; each less the other
    forest, credit = measured_credit(recipe("rloo"), tree, kl={"a": 2.0, "a1": 4.0, "b": -2.0})
    assert per_node(forest, credit.advantage_N, tree) == close({"a": 0.6, "a1": 0.6, "b": -0.6})


def test_reinforce_pp_baseline_lets_long_trajectories_count_more():
    tree = with_lengths(chains(), {"a": 3, "b": 1, "c": 2, "d": 3})
    assert of_chains(recipe("reinforce_pp_baseline"), tree) == pytest.approx(
        [1.154701, -1.154701, -1.154701, 0], abs=1e-6
    )


def test_reinforce_pp_compares_with_the_whole_batch_and_needs_no_group():
    # one trajectory a prompt with 2 and 1 tokens: mean 2/3, variance (2 / 9 + 4 / 9) / 2 = 1/3
    trees = [with_lengths(parse_scored("one -> a", outcomes={"a": 1.0}), {"a": 2})]
    trees += [parse_scored("two -> b", outcomes={"b": 0.0})]
    forest, credit = measured_credit(recipe("reinforce_pp"), *trees, kl={})
    assert per_node(forest, credit.advantage_N, *trees) == close({"a": 3**0.5 / 3, "b": -2 * 3**0.5 / 3})


def test_reinforce_pp_charges_for_the_kl_of_the_whole_trajectory():
    tree = parse_scored("one -> (a, b)", outcomes={"a": 1.0, "b": 1.0})
    forest, credit = measured_credit(recipe("reinforce_pp"), tree, kl={"a": 100.0})
    # rewards 0 and 1, one token each: deviation sqrt(.5)
    assert per_node(forest, credit.advantage_N, tree) == close({"a": -(0.5**0.5), "b": 0.5**0.5})


def test_gdpo_normalises_each_reward_before_it_adds_them():
    tree = chains({"a": 1.0, "b": 0.0, "c": 0.0, "d": 1.0})
    tree.leaf_signals |= chains(SECOND_REWARDS, outcome_signal="length").leaf_signals
    expected = [0.117138, -0.284104, -1.118936, 1.285903]
    assert of_chains(recipe("gdpo"), tree) == pytest.approx(expected, abs=1e-6)
    _, credit = credit_of(recipe("gdpo"), tree)
    assert (sum(credit.parts.values()) - credit.advantage_P).abs().max() < 1e-6


def test_gae_recipe_whitens_what_the_critic_makes_of_the_outcome():
    tree = with_lengths(parse_scored("prompt -> (a, b)", outcomes={"a": 1.0, "b": 0.0}), {"a": 2})
    forest, credit = measured_credit(recipe("gae"), tree, values={"a": [0.5, 0.5], "b": [0.25]})
    # a: 1 - .5 = .5, then .5 - .5 + .95 * .5 = .475; b: -.25; mean .241667, squares .054444, .066736, .241736
    # summing to .362917; deviation sqrt(.181458) = .425980
    assert credit.critic is not None
    assert per_node(forest, credit.advantage_N, tree) == close({"a": 0.5771, "b": -1.1542})
    assert credit.critic.target_T.tolist() == close([0.975, 1.0, 0.0])


def test_tree_step_is_the_recipe_that_trains_a_shared_step_once():
    rules = {
        name: recipe(name).shared_token_weight for name in ("grpo", "portool", "tree_grpo", "tree_step", "chain_step")
    }
    assert rules.pop("tree_step") is TokenWeight.unique
    assert set(rules.values()) == {TokenWeight.per_leaf}
