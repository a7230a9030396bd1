"""Every shipped method that pays steps, against numbers worked out apart from this code.

Where a vector has no tree of its own, trajectories are chains: a1 -> a2 is the trajectory a with two steps.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from credit_forests import (
    balanced,
    credit_config,
    credit_of,
    measured_credit,
    per_node,
    per_pair,
    ragged,
    recipe,
    with_lengths,
)

from rewards.drawn import parse_scored
from rewards.types import Score, ScoredTree
from rl.credit.forest import forest_of
from rl.credit.reads import largest_return
from rollout.tree import ROOT

TOLERANCE = 1e-4


def close(expected: Any) -> Any:
    return pytest.approx(expected, abs=TOLERANCE)


def chains(
    steps: Sequence[Sequence[float | None]], outcomes: Sequence[float] | None = None, signal: str = "step"
) -> ScoredTree:
    """One trajectory for each row: a1 -> a2 -> ..., b1 -> ...; outcomes are those of the rows."""
    letters = "abcdefgh"[: len(steps)]
    rows = [
        [f"{letter}{place}" for place in range(1, len(row) + 1)] for letter, row in zip(letters, steps, strict=True)
    ]
    return parse_scored(
        f"prompt -> ({', '.join(' -> '.join(row) for row in rows)})",
        steps={
            name: score for names, row in zip(rows, steps, strict=True) for name, score in zip(names, row, strict=True)
        },
        step_signal=signal,
        outcomes=None if outcomes is None else {row[-1]: each for row, each in zip(rows, outcomes, strict=True)},
    )


def by_chain(forest, value_P: torch.Tensor) -> list[list[float]]:
    """Values of each trajectory's steps."""
    return [part.tolist() for part in value_P.split(forest.length_L.tolist())]


def with_prompt_score(tree: ScoredTree, signal: str, value: float) -> ScoredTree:
    tree.step_signals[signal][ROOT] = Score(value)
    return tree


def of_steps(cfg, tree: ScoredTree) -> dict[str, float]:
    forest, credit = credit_of(cfg, tree)
    return per_node(forest, credit.advantage_N, tree)


def of_pairs(cfg, tree: ScoredTree) -> dict[tuple[str, str], float]:
    forest, credit = credit_of(cfg, tree)
    return per_pair(forest, credit.advantage_P, tree)


def last_steps(cfg, tree: ScoredTree) -> dict[str, float]:
    """Advantage of each trajectory's last step."""
    return {leaf: value for (leaf, step), value in of_pairs(cfg, tree).items() if leaf == step}


def untrained(cfg, tree: ScoredTree) -> set[str]:
    forest, credit = credit_of(cfg, tree)
    return {name for name, weight in per_node(forest, credit.w0_N, tree).items() if weight == 0}


# ---- PPR ----

PPR_SCORES = [[4 / 6, 6 / 6, None], [3 / 6, None], [4 / 6, 1 / 6, None], [0.0, 2 / 4, None]]
PPR_OUTCOMES = [1.0, 1.0, 0.0, 0.0]
PPR_RETURNS = [[2.6667, 2.0, 1.0], [1.5, 1.0], [-1.1667, -0.8333, 0.0], [-1.5, -0.5, 0.0]]
PPR_WHITENED = [[1.6895, 1.1972, 0.4587], [0.8280, 0.4587], [-1.1412, -0.8951, -0.2797], [-1.3874, -0.6489, -0.2797]]


@pytest.mark.parametrize(("whiten", "expected"), [(False, PPR_RETURNS), (True, PPR_WHITENED)])
@pytest.mark.parametrize("level", ["step", "token"])
def test_ppr_against_a_critic_that_says_0(level, whiten, expected):
    tree = chains(PPR_SCORES, PPR_OUTCOMES, "judge")
    forest, credit = measured_credit(recipe("ppr", gae={"whiten": whiten, "level": level}), tree, values={})
    assert by_chain(forest, credit.advantage_P) == [close(row) for row in expected]


def test_ppr_without_a_critic_is_a_term():
    term = {
        "level": "step",
        "signals": {"judge": {"shift": -1.0}, "outcome": {}},
        "combine": "renorm",
        "returns": "to_go",
        "normalizer": "none",
    }
    tree = chains(PPR_SCORES, PPR_OUTCOMES, "judge")
    forest, credit = credit_of(credit_config({"terms": {"steps": term}}), tree)
    assert by_chain(forest, credit.advantage_P) == [close(row) for row in PPR_RETURNS]
    forest, credit = credit_of(credit_config({"terms": {"steps": term}, "whiten": True}), tree)
    assert by_chain(forest, credit.advantage_P) == [close(row) for row in PPR_WHITENED]


@pytest.mark.parametrize("outcome", [0.0, 1.0])
@pytest.mark.parametrize("score", [0.0, 0.25, 1.0])
def test_renorm_never_opposes_the_outcome(outcome, score):
    term = {"level": "step", "signals": {"judge": {"shift": -1.0}, "outcome": {}}, "combine": "renorm"}
    cfg = credit_config({"terms": {"steps": {**term, "normalizer": "none"}}})
    reward = of_steps(cfg, chains([[score, None]], [outcome], "judge"))["a1"]
    assert reward == score + outcome - 1
    assert reward * (2 * outcome - 1) >= 0


def test_renorm_on_a_tree_pays_the_mean_of_what_a_step_earns_in_its_trajectories():
    # a: scored .5; in a1's trajectory it earns .5 + 1 - 1, in a2's .5 + 0 - 1; returns 1.5 and -.5, mean .5
    tree = parse_scored("q -> a -> (a1, a2)", steps={"a": 0.5}, outcomes={"a1": 1.0, "a2": 0.0}, step_signal="judge")
    forest, credit = measured_credit(recipe("ppr", gae={"whiten": False, "level": "step"}), tree, values={})
    assert per_node(forest, credit.advantage_N, tree) == close({"a": 0.5, "a1": 1, "a2": 0})


# ---- SLATE ----


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([2, 1, 0.075, -1], [1.1556, 0.3754, -0.3462, -1.1848]),
        ([2, 1, 0.1, -1], [1.1532, 0.3714, -0.3323, -1.1923]),
        ([2, 1, 2.05, -1], [0.6924, -0.0088, 0.7275, -1.4111]),
        ([1, 1, 1, 1], [0, 0, 0, 0]),
    ],
)
def test_slate_compares_the_candidates_of_one_step(scores, expected):
    steps = dict(zip(["a", "b", "c", "d"], scores, strict=True))
    tree = parse_scored("prompt -> (a, b, c, d)", steps=steps, step_signal="judge")
    assert list(of_steps(recipe("slate"), tree).values()) == close(expected)
    behind = parse_scored("prompt -> z -> (a, b, c, d)", steps={"z": 0.0, **steps}, step_signal="judge")
    assert list(of_steps(recipe("slate"), behind).values()) == close([0, *expected])


def test_slate_trains_each_candidate_once_whatever_follows_it():
    tree = parse_scored(
        "q -> (a -> (a1, a2), b)", steps={"a": 1.0, "b": 0.0, "a1": 0.0, "a2": 1.0}, step_signal="judge"
    )
    forest, credit = credit_of(recipe("slate"), tree)
    assert per_node(forest, credit.w0_N, tree) == {"a": 1, "a1": 1, "a2": 1, "b": 1}


# ---- trees of outcomes ----


def sqrt_weighted(tree: ScoredTree) -> dict[str, float]:
    """Advantage times weight in one trajectory: what TreeRL calls a step's reward."""
    forest, credit = credit_of(recipe("tree_rl"), tree)
    value = per_pair(forest, credit.advantage_P * credit.weight_P, tree)
    return {step: each for (_, step), each in value.items()}


def test_tree_rl_on_both_trees():
    assert sqrt_weighted(balanced()) == close(
        {"a": 0.3536, "b": -0.3536, "a1": 1.25, "a2": -0.75, "b1": -0.25, "b2": -0.25}
    )
    assert sqrt_weighted(ragged()) == close(
        {"p": 0.5, "q": -0.3536, "r": 0.5, "q1": 0.75, "q2": -1.25, "r1": 0.25, "r2": 0.25}
    )


@pytest.mark.parametrize(
    ("scope", "whiten", "first", "second"),
    [
        ("ancestors", False, [0.6250, -0.3750, -0.1250, -0.1250], [0.25, 0.375, -0.625, 0.25]),
        ("ancestors_by_size", False, [0.6667, -0.3333, -0.1667, -0.1667], [0.25, 0.3333, -0.6667, 0.25]),
    ],
)
def test_tree_po_on_both_trees(scope, whiten, first, second):
    cfg = recipe("tree_po", terms={"ancestors": {"scope": scope}}, whiten=whiten)
    assert list(last_steps(cfg, balanced()).values()) == close(first)
    assert list(last_steps(cfg, ragged()).values()) == close(second)


def test_tree_po_whitens_over_tokens():
    # each trajectory with two tokens: .625, -.375, -.125, -.125 twice; variance 2 * .5625 / 3.5 / 2
    expected = [value / (2 * 0.5625 / 7) ** 0.5 for value in (0.625, -0.375, -0.125, -0.125)]
    assert list(last_steps(recipe("tree_po"), balanced()).values()) == close(expected)
    # with one token each, as the vector has it
    tree = parse_scored("q -> (a, b, c, d)", outcomes={"a": 0.625, "b": -0.375, "c": -0.125, "d": -0.125})
    cfg = recipe("tree_po", terms={"ancestors": {"scope": "prompt"}})
    assert list(last_steps(cfg, tree).values()) == close([1.4434, -0.8660, -0.2887, -0.2887])
    tree = parse_scored("q -> (p, q1, q2, r2)", outcomes={"p": 0.25, "q1": 0.375, "q2": -0.625, "r2": 0.25})
    assert list(last_steps(cfg, tree).values()) == close([0.4058, 0.6763, -1.4878, 0.4058])


def test_spo_tree_on_both_trees_drops_what_changes_nothing():
    cfg = recipe("spo_tree")
    assert of_steps(cfg, balanced()) == close({"a": 0.25, "b": -0.25, "a1": 0.5, "a2": -0.5, "b1": 0, "b2": 0})
    assert untrained(cfg, balanced()) == {"b1", "b2"}
    expected = {"p": 1 / 6, "q": -1 / 3, "r": 1 / 6, "q1": 0.5, "q2": -0.5, "r1": 0, "r2": 0}
    assert of_steps(cfg, ragged()) == close(expected)
    assert untrained(cfg, ragged()) == {"r1", "r2"}


def test_spo_tree_with_the_mean_over_leaves():
    got = of_steps(recipe("spo_tree", terms={"gain": {"backup": "leaf_mean"}}), ragged())
    assert (got["p"], got["q"], got["r"]) == close((0.25, -0.25, 0.25))


def test_vine_ppo_pays_the_gain_in_measured_value():
    tree = parse_scored("q -> a -> a1", steps={"a": 0.5, "a1": 1.0}, step_signal="value")
    assert of_steps(recipe("vine_ppo"), with_prompt_score(tree, "value", 0.25)) == {"a": 0.25, "a1": 0.5}


def test_vine_ppo_takes_a_prompt_without_a_value_for_the_mean_of_its_first_steps():
    tree = parse_scored("q -> (a -> a1, b)", steps={"a": 0.5, "a1": 1.0, "b": 0.0}, step_signal="value")
    assert of_steps(recipe("vine_ppo"), tree) == {"a": 0.25, "a1": 0.5, "b": -0.25}


def test_vine_ppo_does_not_pay_a_step_behind_a_value_that_failed():
    tree = parse_scored(
        "q -> a -> a1 -> a2", steps={"a": Score.failed("down"), "a1": 1.0, "a2": 0.5}, step_signal="value"
    )
    assert untrained(recipe("vine_ppo"), tree) == {"a", "a1"}
    assert of_steps(recipe("vine_ppo"), tree)["a2"] == -0.5


def test_tree_rpo_on_both_trees_prunes_forks_without_spread():
    cfg = recipe("tree_rpo")
    assert of_steps(cfg, balanced()) == close(
        {"a": 0.7071, "b": -0.7071, "a1": 0.7071, "a2": -0.7071, "b1": 0, "b2": 0}
    )
    assert untrained(cfg, balanced()) == {"b1", "b2"}
    got = of_steps(cfg, ragged())
    assert [got[name] for name in ("p", "q", "r", "q1", "q2")] == close([0.5773, -1.1547, 0.5773, 0.7071, -0.7071])
    assert untrained(cfg, ragged()) == {"r1", "r2"}


def gigpo(normalizer: str) -> tuple[list[float], list[float]]:
    """Advantages at the first and at the last step of the four trajectories of T1."""
    cfg = recipe("gigpo", terms={"episode": {"normalizer": normalizer}, "state": {"normalizer": normalizer}})
    got = of_pairs(cfg, balanced())
    return [v for (leaf, step), v in got.items() if leaf != step], [
        v for (leaf, step), v in got.items() if leaf == step
    ]


def test_gigpo_credits_the_return_that_each_trajectory_realised():
    first, last = gigpo("center")
    assert first == close([1.4625, -0.4875, -0.4875, -0.4875])
    assert last == close([1.25, -0.75, -0.25, -0.25])
    first, last = gigpo("zscore")
    assert first == close([3, -1, -1, -1])
    assert last == close([2.2071, -1.2071, -0.5, -0.5])


def test_gigpo_compares_steps_behind_the_same_observation_whatever_came_before():
    tree = parse_scored("q -> (a -> a1, b -> b1)", outcomes={"a1": 1.0, "b1": 0.0}, observation_tokens=1)
    forest = forest_of([tree])
    assert per_node(forest, forest.state_N, tree)["a1"] == per_node(forest, forest.state_N, tree)["b1"]
    assert of_steps(recipe("gigpo"), tree) == close({"a": 0.975, "a1": 1, "b": -0.975, "b1": -1})
    tree.tree.nodes[0].observation_ids = [99]  # now the two are behind different states, and alone there
    assert of_steps(recipe("gigpo"), tree) == close({"a": 0.975, "a1": 0.5, "b": -0.975, "b1": -0.5})


# ---- whole trajectories and pooled steps ----


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([3, 1, 2, 0], [1.1619, -0.3873, 0.3873, -1.1619]),  # places of qualities 7, 5, 6, 3
        ([14, 10, 12, 10], [1.3056, -0.7833, 0.2611, -0.7833]),  # an anchor's scores, with a tie
    ],
)
def test_arena_rl_teaches_the_place_and_not_the_score(ranks, expected):
    outcomes = dict(zip("abcd", ranks, strict=True))
    tree = parse_scored("prompt -> (a, b, c, d)", outcomes=outcomes, outcome_signal="arena")
    assert list(of_steps(recipe("arena_rl"), tree).values()) == close(expected)


def test_arena_rl_of_sixteen():
    names = [f"s{place}" for place in range(16)]
    tree = parse_scored(
        f"prompt -> ({', '.join(names)})",
        outcomes={name: float(place) for place, name in enumerate(names)},
        outcome_signal="arena",
    )
    assert of_steps(recipe("arena_rl"), tree)["s15"] == close(1.5753)


PRORAG_STEPS = [[1.9, 1.8], [1.7, 1.2], [1.4, -1.5], [1.1, 0.6]]
PRORAG = [[1.4785, 1.4495], [0.1958, 0.0508], [-1.1159, -1.9572], [0.0218, -0.1233]]


def test_prorag_weighs_every_token_of_the_prompt():
    tree = chains(PRORAG_STEPS, [3, 1, -1, 1], "prm")
    with_lengths(tree, {node.action_text: 2 for node in tree.tree.nodes})
    forest, credit = credit_of(recipe("prorag"), tree)
    assert by_chain(forest, credit.advantage_P) == [close(row) for row in PRORAG]


def test_prorag_lets_long_steps_rule_the_mean():
    # scores 1 over three tokens and -1 over one: mean .5, variance (3 * .25 + 2.25) / 4 = .75
    tree = with_lengths(parse_scored("q -> (a, b)", steps={"a": 1.0, "b": -1.0}, step_signal="prm"), {"a": 3})
    cfg = credit_config({"terms": {"process": recipe("prorag").terms["process"]}})
    assert of_steps(cfg, tree) == close({"a": 0.3 * 0.5 / 0.75**0.5, "b": -0.3 * 1.5 / 0.75**0.5})


MATCH_STEPS = [[0.8, 0.5, 1.0], [0.8, 0.0, 0.0], [0.2, 1.0], [0.0, 0.5, 0.5]]
MATCH_TIR = [[1.4586, 1.2012, 1.2274], [-0.7364, -1.0972, -0.8917], [-0.1818, 0.0436], [-0.5403, -0.1477, -0.2425]]


def test_match_tir_fuses_trajectories_and_turns():
    forest, credit = credit_of(recipe("match_tir"), chains(MATCH_STEPS, signal="match"))
    assert by_chain(forest, credit.advantage_P) == [close(row) for row in MATCH_TIR]
    whole = by_chain(forest, 2 * credit.parts["trajectory"])
    assert [row[0] for row in whole] == close([1.4548, -0.7833, -0.1865, -0.4849])


def test_match_tir_makes_a_turn_that_is_alone_0_unless_parity_is_asked_for():
    tree = chains([[0.5, 1.0], [0.5]], signal="match")
    assert of_pairs(credit_config({"terms": {"turn": recipe("match_tir").terms["turn"]}}), tree)["a2", "a2"] == 0
    raw = recipe("match_tir", terms={"turn": {"singleton": "raw"}}).terms["turn"]
    assert of_pairs(credit_config({"terms": {"turn": raw}}), tree)["a2", "a2"] == 0.5  # .5 * 1.0


STEP_GRPO_SCORES = [[6, 8], [3, -1], [5, 7, 8], [4]]
STEP_GRPO = [[0.3307, 0.9922], [-0.6614, -1.9843], [0, 0.6614, 0.9922], [-0.3307]]
STEP_GRPO_CUMULATIVE = [[1.3229, 0.9922], [-2.6458, -1.9843], [1.6536, 1.6536, 0.9922], [-0.3307]]


def test_step_grpo_compares_a_step_with_all_steps_of_the_prompt():
    forest, credit = credit_of(recipe("step_grpo"), chains(STEP_GRPO_SCORES, signal="judge"))
    assert by_chain(forest, credit.advantage_P) == [close(row) for row in STEP_GRPO]


def test_process_supervision_of_grpo_sums_what_was_compared():
    forest, credit = credit_of(recipe("grpo_process"), chains(STEP_GRPO_SCORES, signal="prm"))
    assert by_chain(forest, credit.advantage_P) == [close(row) for row in STEP_GRPO_CUMULATIVE]


# ---- PRIME and PURE ----

IMPLICIT = [[0.2, -0.1, 0.5], [-0.3, 0.1], [0.0, 0.4, 0.2], [-0.6]]
PRIME_OUTCOMES = [1.0, 0.0, 1.0, 0.0]
PRIME_PAPER = [[1.766667, 1.4, 1.333333], [-0.733333, -0.5], [1.766667, 1.6, 1.033333], [-1.366667]]
PRIME_CODE = [[1.766667, 1.4, 1.433333], [-0.733333, -0.433333], [1.766667, 1.666667, 1.033333], [-1.366667]]
PRIME_PAPER_WHITENED = [
    [0.876301, 0.575073, 0.520304],
    [-1.17753, -0.985839],
    [0.876301, 0.739379, 0.273844],
    [-1.697834],
]
PRIME_CODE_WHITENED = [
    [0.851436, 0.551464, 0.578734],
    [-1.193828, -0.948397],
    [0.851436, 0.769625, 0.251492],
    [-1.711962],
]


def prime(normalizer: str, whiten: bool, read: str = "score"):
    process = {"normalizer": normalizer, "signals": {"implicit": {"read": read}}}
    cfg = recipe("prime", whiten=whiten, terms={"process": process})
    return credit_of(cfg, chains(IMPLICIT, PRIME_OUTCOMES, "implicit"))


@pytest.mark.parametrize(
    ("normalizer", "whiten", "expected"),
    [
        ("token_leave_one_out", False, PRIME_PAPER),
        ("token_leave_one_out", True, PRIME_PAPER_WHITENED),
        ("token_leave_one_out_released", False, PRIME_CODE),
        ("token_leave_one_out_released", True, PRIME_CODE_WHITENED),
    ],
)
def test_prime_by_the_papers_formula_and_by_the_released_code(normalizer, whiten, expected):
    forest, credit = prime(normalizer, whiten)
    assert by_chain(forest, credit.advantage_P) == [pytest.approx(row, abs=1e-5) for row in expected]


def test_prime_divides_implicit_rewards_by_the_largest_return_of_the_batch():
    forest, plain = prime("token_leave_one_out", whiten=False)
    _, divided = prime("token_leave_one_out", whiten=False, read="max_return")
    assert divided.parts["process"].tolist() == pytest.approx((plain.parts["process"] / 0.600001).tolist(), abs=1e-5)
    score_P = forest.step_signals["implicit"][forest.pair_node_P]
    assert largest_return(score_P, forest.pair_leaf_P, gamma=1.0).item() == pytest.approx(0.600001)


def test_prime_baseline_counts_the_tokens_of_a_step():
    # a earns .6 over 2 tokens, b .2 over 1: a's step pays 2 * .2, b's 1 * .3
    tree = with_lengths(parse_scored("q -> (a, b)", steps={"a": 0.6, "b": 0.2}, step_signal="implicit"), {"a": 2})
    process = recipe("prime", terms={"process": {"signals": {"implicit": {"read": "score"}}}}).terms["process"]
    assert of_steps(credit_config({"terms": {"process": process}}), tree) == close({"a": 0.2, "b": -0.1})


def test_grpo_reading_of_prime_is_two_terms():
    cfg = credit_config(
        {"terms": {"outcome": {"signals": {"outcome": {}}}}},
        {"terms": {"process": recipe("grpo_process").terms["process"]}},
    )
    forest, credit = credit_of(cfg, chains(IMPLICIT, PRIME_OUTCOMES, "prm"))
    expected = [[2.22582, 1.772555, 2.193444], [-1.707803, -0.704143], [2.22582, 2.355325, 1.319289], [-2.743838]]
    assert by_chain(forest, credit.advantage_P) == [pytest.approx(row, abs=1e-5) for row in expected]


def test_pure_pays_the_steps_up_to_the_worst_one():
    # softmax(-score / .1) of .5, -.5, .8 is (4.5e-5, 1, 2.3e-6): the sum from a step on is -.5, -.5, 0
    term = {**vars_of(recipe("pure").terms["process"]), "normalizer": "none"}
    forest, credit = credit_of(credit_config({"terms": {"process": term}}), chains([[0.5, -0.5, 0.8]], signal="prm"))
    assert by_chain(forest, credit.advantage_P) == [pytest.approx([-0.5, -0.5, 0], abs=1e-3)]


def vars_of(term) -> Mapping[str, Any]:
    return {name: getattr(term, name) for name in term.__dataclass_fields__}


def test_pure_compares_the_worst_steps_of_trajectories_per_token():
    # a's worst is -.5 and b's .5, in all; per token -.25 and .25: a1 and a2 pay .25 each, b1 and b2 -.25
    forest, credit = credit_of(recipe("pure"), chains([[0.5, -0.5], [0.5, 0.9]], [0.0, 1.0], "prm"))
    expected = [[-1 - 0.5 - 0.5, -1 - 0.5 - 0.25], [1 + 0.5 + 0.5, 1 + 0.25]]
    # softmax leaves 2% of a step .4 above the worst: b1 weighs .982
    assert by_chain(forest, credit.advantage_P) == [pytest.approx(row, abs=0.03) for row in expected]


# ---- progress ----


def test_pav_pays_progress_of_the_prover_after_returns():
    tree = chains([[0.5, 0.4, 0.9]], [1.0], "value")
    forest, credit = credit_of(recipe("pav"), with_prompt_score(tree, "value", 0.3))
    assert by_chain(forest, credit.parts["progress"] / 5) == [close([0.1776, -0.0671, 0.1295])]


@pytest.mark.parametrize(
    ("alpha", "tries", "expected"),
    [
        (0.5, 4, [0.5888, 0.36645, 0.96475]),
        (5.0, 4, [1.388, 0.0645, 1.5475]),
        (0.5, 1, [0.6, 0.35, 1.15]),
        (5.0, 1, [1.5, -0.1, 3.4]),
    ],
)
def test_effective_reward_of_pav_is_the_value_and_alpha_times_the_progress(alpha, tries, expected):
    value = {"level": "step", "signals": {"value": {}}, "normalizer": "none"}
    progress = {
        **value, "signals": {"value": {"read": "difference", "best_of": tries}}, "weight": alpha
    }  # fmt: skip
    tree = with_prompt_score(chains([[0.5, 0.4, 0.9]], signal="value"), "value", 0.3)
    forest, credit = credit_of(credit_config({"terms": {"value": value, "progress": progress}}), tree)
    assert by_chain(forest, credit.advantage_P) == [close(expected)]


def test_progress_paid_as_a_reward_telescopes_and_forgets_the_steps_between():
    term = {"level": "step", "signals": {"value": {"read": "difference"}}, "returns": "to_go", "normalizer": "none"}
    tree = chains([[0.5, 0.4, 0.9], [0.1, 0.8, 0.9]], signal="value")
    forest, credit = credit_of(credit_config({"terms": {"x": term}}), with_prompt_score(tree, "value", 0.3))
    assert [row[0] for row in by_chain(forest, credit.advantage_P)] == close([0.9 - 0.3, 0.9 - 0.3])


def test_tp_grpo_has_four_cases():
    # outcomes +1, +1, -1, -1: z-scores +-.866025; half of the prompt is right, so a bad step of a right one loses .5
    tree = chains([[1.0, -1.0], [1.0], [1.0, -1.0], [-1.0]], [1.0, 1.0, 0.0, 0.0], "judge")
    forest, credit = credit_of(recipe("tp_grpo"), tree)
    expected = [[0.866025, 0.366025], [0.866025], [0, -0.866025], [-0.866025]]
    assert by_chain(forest, credit.advantage_P) == [close(row) for row in expected]


def test_tp_grpo_is_stricter_the_more_of_the_prompt_is_right():
    tree = chains([[-1.0], [1.0], [1.0], [1.0]], [1.0, 1.0, 1.0, 1.0], "judge")
    assert of_steps(recipe("tp_grpo"), tree) == close({"a1": -1, "b1": 0, "c1": 0, "d1": 0})


def test_tp_grpo_without_a_verdict_is_grpo_and_trains_no_step_whose_judge_failed():
    tree = chains([[None, -1.0], [1.0]], [1.0, 0.0], "judge")
    tree.step_signals["judge"][2] = Score.failed("down")
    assert of_steps(recipe("tp_grpo"), tree)["a1"] == close(0.7071)
    assert untrained(recipe("tp_grpo"), tree) == {"b1"}


def test_spa_rl_pays_contributions_and_half_a_point_for_what_could_be_executed():
    tree = chains([[0.1, 0.2, 0.4]], signal="contribution")
    tree.step_signals |= chains([[1.0, 0.0, 1.0]]).step_signals
    cfg = recipe("spa_rl", gae={"lam": 0.0, "gamma": 0.0, "whiten": False})
    forest, credit = measured_credit(cfg, tree, values={})
    assert by_chain(forest, credit.advantage_P) == [
        close([0.6, 0.2, 0.9])
    ]  # with no look ahead, the rewards themselves


VSRM = [
    ([0.2, 0.2, 0.2, 0.6, 0.6, 0.4], [0.196, 0.28, 0.4, -0.14, -0.2]),
    ([0.4] * 7 + [1.0], [0, 0, 0.14406, 0.2058, 0.294, 0.42, 0.6]),
    ([0.2, 0.8, 0.8, 0.8], [0.6, 0, 0]),
]


@pytest.mark.parametrize(("accuracy", "expected"), VSRM)
def test_vsrm_looks_ahead_for_the_next_change_of_accuracy(accuracy, expected):
    tree = with_prompt_score(chains([[*accuracy[1:], None]], [1.0], "value"), "value", accuracy[0])
    cfg = recipe("vsrm", gae={"lam": 0.0, "gamma": 0.0, "whiten": False})
    forest, credit = measured_credit(cfg, tree, values={})
    assert by_chain(forest, credit.advantage_P) == [pytest.approx([*expected, 1.0], abs=1e-5)]


def test_vsrm_pays_the_last_step_with_the_outcome_alone():
    tree = with_prompt_score(chains([[0.5, 1.0]], [0.0], "value"), "value", 0.0)
    forest, credit = measured_credit(recipe("vsrm", gae={"whiten": False}), tree, values={})
    assert by_chain(forest, credit.advantage_P) == [close([0.5, 0])]


# ---- laws that the methods share ----

AT_ONE_FORK = {"spo_tree": 1, "gigpo": 2, "tree_rl": 2}


@pytest.mark.parametrize("name", AT_ONE_FORK)
def test_a_tree_that_forks_at_the_prompt_alone_leaves_outcome_less_mean(name):
    tree = parse_scored("q -> (a, b, c, d)", outcomes={"a": 1.0, "b": 0.0, "c": 0.0, "d": 0.5})
    centred = {"a": 0.625, "b": -0.375, "c": -0.375, "d": 0.125}
    expected = {step: AT_ONE_FORK[name] * value for step, value in centred.items()}
    assert of_steps(recipe(name), tree) == close(expected)


def test_tree_po_and_tree_grpo_at_one_fork():
    tree = parse_scored("q -> (a, b, c, d)", outcomes={"a": 1.0, "b": 0.0, "c": 0.0, "d": 0.5})
    assert of_steps(recipe("tree_po", whiten=False), tree) == close({"a": 0.625, "b": -0.375, "c": -0.375, "d": 0.125})
    grpo = of_steps(recipe("grpo"), tree)
    assert of_steps(recipe("tree_grpo"), tree) == close({step: 2 * value for step, value in grpo.items()})


EVERY = [
    *("ppr", "slate", "tree_rl", "tree_po", "spo_tree", "vine_ppo", "tree_rpo", "gigpo", "arena_rl", "prorag"),
    *("match_tir", "step_grpo", "grpo_process", "prime", "pure", "pav", "tp_grpo", "spa_rl", "vsrm"),
]


def with_all_signals(value: float | Score) -> ScoredTree:
    """T1 with every signal that a shipped method reads, the same everywhere."""
    tree = balanced(outcomes=dict.fromkeys(["a1", "a2", "b1", "b2"], value))
    steps = dict.fromkeys(["a", "a1", "a2", "b", "b1", "b2"], value)
    for signal in ("judge", "value", "match", "prm", "implicit", "contribution", "step"):
        tree.step_signals |= balanced(steps=steps, step_signal=signal).step_signals
    tree.leaf_signals["arena"] = tree.leaf_signals["outcome"]
    return tree


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("value", [0.0, 1.0, Score.failed("down"), Score.not_applicable()])
def test_no_method_makes_nan_of_scores_that_are_all_alike(name, value):
    _, credit = measured_credit(recipe(name), with_all_signals(value), values={})
    for tensor in (credit.advantage_P, credit.weight_P, credit.w_pos_N, credit.w_neg_N, credit.w0_N):
        assert tensor.isfinite().all()
    if isinstance(value, Score):
        assert not credit.weight_P.any()


@pytest.mark.parametrize("name", EVERY)
def test_every_method_takes_a_batch_without_trajectories(name):
    _, credit = measured_credit(recipe(name), values={})
    assert credit.advantage_P.shape == (0,)
