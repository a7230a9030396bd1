"""GAE on forests: published vectors, a slow version that walks every trajectory, and rewards that are missing."""

import math

import pytest
import torch
from credit_forests import (
    balanced,
    credit_config,
    measured_credit,
    names,
    per_node,
    per_pair,
    per_token,
    with_lengths,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import ConfigError, ShapeError, UnscoredNode
from rewards.drawn import parse_scored
from rewards.types import Score, ScoredTree, ScoreStatus
from rl.credit.gae import depths, tree_gae
from rl.policy.pack import PathCredit, TokenCredit, TreeCredit, pack

laws = settings(max_examples=20, deadline=None)
FAILED = Score.failed("judge is down")


def gae(terms=None, **settings):
    """Credit by GAE on the outcome, unwhitened and Monte-Carlo unless said otherwise."""
    settings = {"level": "token", "signals": {"outcome": {}}, "lam": 1.0, "whiten": False, **settings}
    return credit_config({"terms": terms or {}, "gae": settings})


def advantages(reward, value, parent, leaves, gamma=1.0, lam=1.0) -> list[float]:
    reward_N, value_N = (torch.tensor(each, dtype=torch.float64) for each in (reward, value))
    return tree_gae(reward_N, value_N, torch.tensor(parent), torch.tensor(leaves), gamma=gamma, lam=lam).tolist()


# ---- the recursion ----


PUBLISHED = [(1.0, 1.0, [1.3, 1.1, 0.7, 0.4]), (1.0, 0.95, [1.1937, 1.046, 0.68, 0.4])]
PUBLISHED += [(0.99, 0.95, [1.162197, 1.027323, 0.6702, 0.4])]


@pytest.mark.parametrize(("gamma", "lam", "expected"), PUBLISHED)
def test_a_chain_has_the_published_advantages(gamma, lam, expected):
    # verl skips the observation between the second and the third token; here it is no node at all
    found = advantages([0, 0.5, 0, 1], [0.2, 0.4, 0.3, 0.6], [-1, 0, 1, 2], [1] * 4, gamma, lam)
    assert found == pytest.approx(expected, abs=1e-6)


def test_a_fork_looks_forward_to_the_mean_over_its_trajectories():
    # 0 forks into 1, which two trajectories take (2 and 3), and 4, which one takes
    found = advantages([0, 0, 1, 0, 1], [0.5, 0.25, 0.5, 0.5, 0.25], [-1, 0, 1, 1, 0], [3, 2, 1, 1, 1], lam=0.5)
    assert found[2:] == [0.5, -0.5, 0.75]
    assert found[1] == 0.5 - 0.25 + 0.5 * (0.5 - 0.5) / 2
    assert found[0] == pytest.approx(0.25 - 0.5 + 0.5 * (2 * 0.25 + 0.75) / 3)


def test_a_node_without_trajectories_that_count_is_as_good_as_absent():
    nan = math.nan
    found = advantages([0, 1, nan], [0.5, 0.25, nan], [-1, 0, 0], [1, 1, 0])
    assert found == [*advantages([0, 1], [0.5, 0.25], [-1, 0], [1, 1]), 0]


def test_nothing_has_no_advantages():
    empty = torch.zeros(0, dtype=torch.int64)
    assert tree_gae(torch.zeros(0), torch.zeros(0), empty, empty, gamma=1.0, lam=1.0).shape == (0,)


@pytest.mark.parametrize(("reward", "value", "what"), [([1.0], [math.nan], "critic"), ([math.inf], [1.0], "reward")])
def test_what_counts_must_be_a_number(reward, value, what):
    with pytest.raises(UnscoredNode, match=what):
        advantages(reward, value, [-1], [1])


def test_arrays_of_different_forests_are_refused():
    with pytest.raises(ShapeError, match="reward_N has N=2 nodes but value_N has N=1"):
        advantages([1.0, 0.0], [0.5], [-1, 0], [1, 1])


PARENTS = st.lists(st.integers(0, 99), min_size=1, max_size=12).map(
    lambda draws: [draw % (row + 1) - 1 for row, draw in enumerate(draws)]
)


@laws
@given(PARENTS)
def test_depth_is_the_number_of_nodes_before(parent):
    assert depths(torch.tensor(parent)).tolist() == [len(path_to(row, parent)) - 1 for row in range(len(parent))]


def path_to(row, parent) -> list[int]:
    return [] if row < 0 else [*path_to(parent[row], parent), row]


def slow_gae(reward, value, gamma, lam) -> list[float]:
    """Ordinary GAE of one trajectory."""
    advantage = next_value = 0.0
    found = []
    for earned, said in zip(reversed(reward), reversed(value), strict=True):
        advantage = earned + gamma * next_value - said + gamma * lam * advantage
        next_value = said
        found.append(advantage)
    return found[::-1]


@laws
@given(PARENTS, st.data())
def test_a_forest_has_the_mean_of_its_trajectories_own_advantages(parent, data):
    rows = range(len(parent))
    numbers = st.lists(st.floats(-1, 1), min_size=len(parent), max_size=len(parent))
    reward, value = data.draw(numbers), data.draw(numbers)
    gamma, lam = data.draw(st.sampled_from([0.0, 0.9, 1.0])), data.draw(st.sampled_from([0.0, 0.95, 1.0]))
    paths = [path_to(row, parent) for row in rows if row not in parent]
    seen = {row: [] for row in rows}
    for path in paths:
        own = slow_gae([reward[row] for row in path], [value[row] for row in path], gamma, lam)
        for row, advantage in zip(path, own, strict=True):
            seen[row].append(advantage)
    expected = [math.fsum(seen[row]) / len(seen[row]) for row in rows]
    found = advantages(reward, value, parent, [len(seen[row]) for row in rows], gamma, lam)
    assert found == pytest.approx(expected, abs=1e-12)


# ---- credit by GAE ----


def chain() -> ScoredTree:
    """Two steps of two tokens with an observation between them: 0.5 for the first, 1 at the end."""
    tree = parse_scored("q -> a -> b", steps={"a": 0.5}, outcomes={"b": 1.0}, observation_tokens=1)
    return with_lengths(tree, {"a": 2, "b": 2})


CHAIN_VALUES = {"a": [0.2, 0.4], "b": [0.3, 0.6]}
BOTH = {"outcome": {}, "step": {}}


@pytest.mark.parametrize(("gamma", "lam", "expected"), PUBLISHED)
def test_a_steps_reward_stands_at_its_last_action_token(gamma, lam, expected):
    tree, cfg = chain(), gae(signals=BOTH, gamma=gamma, lam=lam)
    forest, credit = measured_credit(cfg, tree, values=CHAIN_VALUES)
    found = per_token(forest, credit, tree)
    assert found["a"] + found["b"] == pytest.approx(expected, abs=1e-6)
    assert credit.critic is not None
    values = [value for values in CHAIN_VALUES.values() for value in values]
    assert credit.critic.value_T.tolist() == pytest.approx(values)
    assert credit.critic.target_T.tolist() == pytest.approx(
        [advantage + value for advantage, value in zip(expected, values, strict=True)], abs=1e-6
    )
    assert per_pair(forest, credit.parts["gae"], tree)["b", "a"] == pytest.approx(sum(expected[:2]) / 2, abs=1e-6)


def test_a_step_as_a_whole_is_worth_the_value_before_its_first_token():
    tree = chain()
    forest, credit = measured_credit(gae(signals=BOTH, level="step"), tree, values=CHAIN_VALUES)
    # b: 1 - .3 = .7; a: .5 + .3 - .2 + .7 = 1.3
    assert per_node(forest, credit.advantage_N, tree) == pytest.approx({"a": 1.3, "b": 0.7})
    assert credit.critic is not None
    assert credit.critic.extra_T.tolist() == [0, 0, 0, 0]
    assert credit.critic.target_T.tolist() == pytest.approx([1.5, 1.5, 1, 1])
    assert credit.critic.value_T.tolist() == pytest.approx([0.2, 0.4, 0.3, 0.6])


def test_a_shared_step_is_credited_with_the_mean_of_what_follows():
    tree = balanced()
    forest, credit = measured_credit(gae(), tree, values={"a": [0.25], "b": [0.25], "a1": [0.5], "a2": [0.5]})
    # Monte-Carlo: outcomes 1, 0, 0, 0 less the value before
    expected = {"a": 0.25, "a1": 0.5, "a2": -0.5, "b": -0.25, "b1": 0, "b2": 0}
    assert per_node(forest, credit.advantage_N, tree) == pytest.approx(expected)
    assert per_node(forest, credit.w0_N, tree) == {"a": 2, "a1": 1, "a2": 1, "b": 2, "b1": 1, "b2": 1}


def test_the_critics_advantages_are_whitened_over_tokens_each_once():
    # a has 3 tokens and advantage 1, b has 1 and -1: mean .5, variance (3 * .25 + 2.25) / 3 = 1
    tree = with_lengths(parse_scored("q -> (a, b)", outcomes={"a": 1.0, "b": -1.0}), {"a": 3})
    forest, credit = measured_credit(gae(whiten=True), tree, values={})
    assert per_token(forest, credit, tree) == {"a": pytest.approx([0.5] * 3), "b": pytest.approx([-1.5])}
    assert credit.critic is not None
    assert credit.critic.target_T.tolist() == [1, 1, 1, -1]  # the critic learns returns as they are


@pytest.mark.parametrize("level", ["step", "token"])
def test_the_only_token_of_a_batch_cannot_be_whitened(level):
    tree = parse_scored("q -> a", outcomes={"a": 1.0})
    _, credit = measured_credit(gae(whiten=True, level=level), tree, values={})
    assert (credit.advantage_P.tolist(), credit.weight_P.tolist()) == ([0], [1])


def test_terms_and_the_critic_add_up():
    tree = parse_scored("q -> (a, b)", outcomes={"a": 1.0, "b": 0.0})
    term = {"signals": {"outcome": {}}, "normalizer": "center"}
    forest, credit = measured_credit(gae({"group": term}), tree, values={"a": [0.25], "b": [0.25]})
    assert per_node(forest, credit.advantage_N, tree) == {"a": 0.5 + 0.75, "b": -0.5 - 0.25}
    assert list(credit.parts) == ["group", "gae"]


@pytest.mark.parametrize("level", ["step", "token"])
def test_a_batch_without_a_trained_trajectory_has_empty_credit(level):
    pruned = parse_scored("q -> a", outcomes={"a": 1.0}, pruned={"a"})
    _, credit = measured_credit(gae(level=level, whiten=True), pruned, values={"a": []})
    assert credit.critic is not None
    assert credit.advantage_P.shape == credit.weight_P.shape == credit.critic.extra_T.shape == (0,)


def test_a_trajectory_whose_reward_failed_trains_nothing_and_nobody_looks_forward_to_it():
    tree = balanced(outcomes={"a1": FAILED, "a2": 1.0, "b1": FAILED, "b2": FAILED})
    forest, credit = measured_credit(gae(), tree, values={})
    weight = per_pair(forest, credit.weight_P, tree)
    assert {pair for pair, value in weight.items() if value} == {("a2", "a"), ("a2", "a2")}
    assert per_node(forest, credit.advantage_N, tree) == {"a": 1, "a1": 0, "a2": 1, "b": 0, "b1": 0, "b2": 0}


def test_what_the_terms_know_of_a_trajectory_without_reward_is_not_trained_either():
    tree = parse_scored("q -> (a, b)", outcomes={"a": FAILED, "b": 1.0}, steps={"a": 1.0, "b": 0.0})
    term = {"level": "step", "signals": {"step": {}}, "normalizer": "none"}
    forest, credit = measured_credit(gae({"step": term}), tree, values={})
    assert per_node(forest, credit.w0_N, tree) == {"a": 0, "b": 1}


def test_a_failed_step_breaks_every_trajectory_through_it():
    tree = balanced(steps={"a": FAILED, "a1": 1.0, "a2": 1.0, "b": 0.25, "b1": 1.0, "b2": 0.0})
    forest, credit = measured_credit(gae(signals={"step": {}}), tree, values={})
    assert per_node(forest, credit.w0_N, tree) == {"a": 0, "a1": 0, "a2": 0, "b": 2, "b1": 1, "b2": 1}
    assert per_node(forest, credit.advantage_N, tree)["b"] == 0.25 + 0.5


def test_a_step_that_its_source_has_nothing_to_say_of_earns_nothing():
    tree = parse_scored("q -> a -> b", steps={"a": None, "b": 1.0})
    forest, credit = measured_credit(gae(signals={"step": {}}, gamma=0.5), tree, values={})
    assert per_node(forest, credit.advantage_N, tree) == {"a": 0.5, "b": 1.0}


def test_a_trajectory_that_no_signal_speaks_of_trains_nothing():
    tree = parse_scored("q -> (a, b)", steps={"a": None, "b": 1.0})
    forest, credit = measured_credit(gae(signals={"step": {}}), tree, values={})
    assert per_node(forest, credit.w0_N, tree) == {"a": 0, "b": 1}


SCORES = st.sampled_from([Score(1.0), Score(0.0), Score(-0.5), Score.not_applicable(), FAILED])
SHAPES = ["q -> a", "q -> (a -> b -> (c, d), e)", "q -> (a -> (b, c -> d), e -> f)"]


@laws
@given(st.data())
def test_credit_is_the_mean_of_ordinary_gae_on_each_trajectory(data):
    shape = data.draw(st.sampled_from(SHAPES))
    steps = [name for name in "abcdef" if name in shape]
    scored = parse_scored(shape, steps={name: data.draw(SCORES) for name in steps})
    tree = scored.tree
    ends = {tree.nodes[leaf].action_text for leaf in tree.leaves()}
    scored.leaf_signals = parse_scored(shape, outcomes={name: data.draw(SCORES) for name in ends}).leaf_signals
    with_lengths(scored, {name: data.draw(st.integers(1, 3)) for name in steps})
    values = {
        node.action_text: [data.draw(st.sampled_from([-1.0, 0.25, 0.5])) for _ in node.action_ids]
        for node in tree.nodes
    }
    gamma, lam = data.draw(st.sampled_from([0.9, 1.0])), data.draw(st.sampled_from([0.0, 0.95, 1.0]))
    forest, credit = measured_credit(gae(signals=BOTH, gamma=gamma, lam=lam), scored, values=values)
    seen: dict[tuple[str, int], list[float]] = {}
    valid = set()
    for leaf in tree.leaves():
        path = tree.path(leaf)
        outcome = scored.leaf_signals["outcome"][leaf]
        judged = {row: scored.step_signals["step"][row] for row in path}
        if not outcome.is_scored or any(score.status is ScoreStatus.failed for score in judged.values()):
            continue
        valid.add(tree.nodes[leaf].action_text)
        tokens = [
            (tree.nodes[row].action_text, place) for row in path for place in range(len(tree.nodes[row].action_ids))
        ]
        reward = dict.fromkeys(tokens, 0.0)
        for row, score in judged.items():
            last = (tree.nodes[row].action_text, len(tree.nodes[row].action_ids) - 1)
            reward[last] = (score.value if score.is_scored else 0.0) + (outcome.value if row == leaf else 0.0)
        own = slow_gae([reward[each] for each in tokens], [values[name][place] for name, place in tokens], gamma, lam)
        for each, advantage in zip(tokens, own, strict=True):
            seen.setdefault(each, []).append(advantage)
    found = per_token(forest, credit, scored)
    for (name, place), each in seen.items():
        assert found[name][place] == pytest.approx(math.fsum(each) / len(each), abs=1e-6)
    weight = per_pair(forest, credit.weight_P, scored)
    assert {leaf for (leaf, _), each in weight.items() if each} == valid


@laws
@given(st.floats(-1, 1), st.sampled_from(["step", "token"]))
def test_a_critic_that_knows_the_return_leaves_no_advantage(outcome, level):
    tree = with_lengths(parse_scored("q -> a -> (b, c)", outcomes={"b": outcome, "c": outcome}), {"a": 2})
    values = {"a": [outcome] * 2, "b": [outcome], "c": [outcome]}
    _, credit = measured_credit(gae(level=level, lam=0.9), tree, values=values)
    assert credit.advantage_P.abs().max() < 1e-6


# ---- what the learner gets of it ----


def test_the_learner_gets_each_tokens_own_advantage():
    tree = chain()
    forest, credit = measured_credit(gae(signals=BOTH), tree, values=CHAIN_VALUES)
    assert credit.critic is not None and names([tree], forest) == ["a", "b"]
    critic = credit.critic
    batch = pack(
        [
            TreeCredit(
                tree=tree.tree,
                w_pos=credit.w_pos_N.tolist(),
                w_neg=credit.w_neg_N.tolist(),
                w0=credit.w0_N.tolist(),
                paths=[PathCredit(leaf=1, advantage=credit.advantage_P.tolist(), weight=credit.weight_P.tolist())],
                tokens=TokenCredit(
                    advantage=critic.by_node(critic.extra_T),
                    value=critic.by_node(critic.value_T),
                    target=critic.by_node(critic.target_T),
                ),
            )
        ]
    )
    assert batch.w_pos_E.tolist() == pytest.approx([1.3, 1.1, 0.7, 0.4], abs=1e-6)
    assert batch.target_E is not None and batch.target_E.tolist() == pytest.approx([1.5, 1.5, 1, 1])


def test_a_signal_that_no_tree_has_is_refused_by_its_key():
    with pytest.raises(ConfigError, match=r'^credit.gae.signals names "reward", which no tree of the batch has'):
        measured_credit(gae(signals={"reward": {}}), balanced(), values={})
    with pytest.raises(ConfigError, match=r"^credit.gae.signals is empty"):
        measured_credit(gae(signals={}), balanced(), values={})
