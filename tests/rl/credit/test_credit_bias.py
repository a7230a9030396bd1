"""What each scope teaches on average, where the policy decides when to stop: exact expectations of a tiny policy.

First step: stop, which earns 0.5, or go on, which earns nothing. Second step, after going on: a good one earns 1, a bad
one nothing. The policy goes on half of the time and is good in the share `good` of cases; the return of going on is
thus `good` on average. All samples of a prompt are enumerated, so that nothing here is an estimate.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from credit_forests import credit_config, measured_credit, per_node

from conf.schema import CreditConfig
from rewards.drawn import parse_scored
from rewards.types import ScoredTree

GO = 0.5
STOP_REWARD = 0.5
NUM_CHAINS = 3

Gradient = tuple[float, float]
"""By the logit of going on, and by that of a good second step."""


def true_gradient(good: float) -> Gradient:
    """Of the expected return (1 - p) * .5 + p * s; by a logit, p moves by p (1 - p) and s by s (1 - s)."""
    return GO * (1 - GO) * (good - STOP_REWARD), GO * good * (1 - good)


def score(name: str, good: float) -> Gradient:
    """Derivative of the log-probability of a step by the two logits; the last letter of its name says what it is."""
    return {"s": (-GO, 0.0), "g": (1 - GO, 0.0), "h": (0.0, 1 - good), "l": (0.0, -good)}[name[-1]]


def chances(good: float) -> dict[str, float]:
    """stop, go on and be good (h), go on and be bad (l)."""
    return {"s": 1 - GO, "h": GO * good, "l": GO * (1 - good)}


def groups_of_chains(good: float) -> Iterator[tuple[float, ScoredTree]]:
    """Every group of three chains, with its chance."""
    for kinds in itertools.product(chances(good), repeat=NUM_CHAINS):
        chance, paths = 1.0, []
        for place, kind in enumerate(kinds):
            chance *= chances(good)[kind]
            paths.append(f"t{place}s" if kind == "s" else f"t{place}g -> u{place}{kind}")
        yield chance, scored(f"q -> ({', '.join(paths)})")


def forks_of_two(good: float) -> Iterator[tuple[float, ScoredTree]]:
    """Every tree that tries two first steps, and two second steps after each that goes on."""
    branches = {"s": 1 - GO} | {a + b: GO * chances(good)[a] / GO * chances(good)[b] / GO for a in "hl" for b in "hl"}
    for one, two in itertools.product(branches, repeat=2):
        drawn = [
            f"t{place}s" if kind == "s" else f"t{place}g -> (u{place}{kind[0]}, v{place}{kind[1]})"
            for place, kind in enumerate((one, two))
        ]
        yield branches[one] * branches[two], scored(f"q -> ({', '.join(drawn)})")


def scored(text: str) -> ScoredTree:
    """Rewards stand at the steps that earn them; the outcome of a trajectory is their sum."""
    bare = parse_scored(text, observation_tokens=1)
    names = [node.action_text for node in bare.tree.nodes]
    earned = {"s": STOP_REWARD, "g": 0.0, "h": 1.0, "l": 0.0}
    leaves = [names[row] for row in bare.tree.leaves()]
    return parse_scored(
        text,
        steps={name: earned[name[-1]] for name in names},
        outcomes={name: earned[name[-1]] for name in leaves},
        observation_tokens=1,
    )


def taught(cfg: CreditConfig, groups: Iterator[tuple[float, ScoredTree]], good: float, per: float) -> Gradient:
    """Expected policy gradient, divided by `per`."""
    total = [0.0, 0.0]
    for chance, tree in groups:
        values = {node.action_text: [0.4 if node.parent < 0 else 0.7] for node in tree.tree.nodes}
        forest, credit = measured_credit(cfg, tree, values=values)
        for name, weight in per_node(forest, credit.w_pos_N + credit.w_neg_N, tree).items():
            for place, slope in enumerate(score(name, good)):
                total[place] += chance * weight * slope / per
    return total[0], total[1]


def of_chains(term: dict, good: float) -> Gradient:
    cfg = credit_config({"terms": {"x": term}})
    return taught(cfg, groups_of_chains(good), good, per=NUM_CHAINS)


def times(factors: Gradient, gradient: Gradient):
    return pytest.approx([factor * each for factor, each in zip(factors, gradient, strict=True)], abs=1e-6)


WHOLE = {"signals": {"step": {}}, "returns": "broadcast"}
TO_GO = {"level": "step", "signals": {"step": {}}, "returns": "to_go", "backup": "none"}
TURNS = {**TO_GO, "scope": "turn_index"}
PADDED = {**TO_GO, "scope": "turn_index_padded"}


def centred(term: dict) -> dict:
    return {**term, "normalizer": "center"}


def left_one_out(term: dict) -> dict:
    return {**term, "normalizer": "leave_one_out"}


@pytest.mark.parametrize("good", [0.5, 0.9])
@pytest.mark.parametrize(
    ("term", "factor"),
    [
        (left_one_out(WHOLE), 1),
        (left_one_out(PADDED), 1),
        (centred(WHOLE), 2 / 3),  # a value is a third of the mean it is compared with
        (centred({**WHOLE, "scope": "batch"}), 2 / 3),
        (centred(PADDED), 2 / 3),
        (centred({**TO_GO, "scope": "critic"}), 1),  # whatever the critic says
    ],
)
def test_scopes_that_are_free_of_the_stopping_bias_teach_the_true_gradient(term, factor, good):
    assert of_chains(term, good) == times((factor, factor), true_gradient(good))


@pytest.mark.parametrize("good", [0.5, 0.9])
@pytest.mark.parametrize("scope", ["turn_index", "state_key"])
def test_groups_of_those_who_got_so_far_teach_late_steps_less(scope, good):
    # of the other two, 0, 1 or 2 go on with chances 1/4, 1/2, 1/4: 1/4 * 0 + 1/2 * 1/2 + 1/4 * 2/3 = 5/12
    term = {**TO_GO, "scope": scope}
    assert of_chains(centred(term), good) == times((2 / 3, 5 / 12), true_gradient(good))
    # less the mean of the others: nothing is taught where there are none
    assert of_chains(left_one_out(term), good) == times((1, 3 / 4), true_gradient(good))


@pytest.mark.parametrize("good", [0.5, 0.9])
def test_comparing_rewards_by_turn_takes_what_the_next_turn_earns_on_average_off_going_on(good):
    # verl #7244. Going on is worth `good` later on, of which the mean of turn 2 takes all: 0 - .5 is left of good - .5.
    by_going_on, by_second_step = of_chains(centred({**TURNS, "compare": "rewards"}), good)
    assert by_going_on == pytest.approx(2 / 3 * GO * (1 - GO) * (0 - STOP_REWARD), abs=1e-6)
    assert by_second_step == pytest.approx(5 / 12 * true_gradient(good)[1], abs=1e-6)


@pytest.mark.parametrize(
    "term",
    [
        centred({**TURNS, "compare": "rewards"}),
        centred({**TO_GO, "compare": "rewards"}),  # process supervision of GRPO
        {**TO_GO, "compare": "rewards", "normalizer": "token_leave_one_out"},  # PRIME, PURE
        centred({"level": "step", "signals": {"step": {}}}),  # Step-GRPO: no return at all
    ],
)
def test_methods_that_pay_a_baseline_for_each_step_can_teach_to_stop_where_going_on_is_better(term):
    good = 0.9
    assert true_gradient(good)[0] == pytest.approx(0.1)
    assert of_chains(term, good)[0] < -0.01


def test_zscores_weigh_prompts_by_their_spread_and_turn_no_decision_around():
    assert of_chains(WHOLE, good=0.9) == pytest.approx((0.23094, 0.07446), abs=1e-4)  # 2.3 and 1.7 times the true one
    assert of_chains(WHOLE, good=0.5)[0] == pytest.approx(0, abs=1e-6)


OUTCOME = {"level": "step", "signals": {"outcome": {}}, "normalizer": "center"}


@pytest.mark.parametrize("good", [0.5, 0.9])
@pytest.mark.parametrize("scope", ["siblings", "parent_value"])
@pytest.mark.parametrize("backup", ["child_mean", "leaf_mean"])
def test_forks_teach_each_decision_truly_and_as_often_as_the_tree_tries_it(scope, backup, good):
    # both first steps, half of each in its own mean; then on average one step that goes on, with two more below it
    cfg = credit_config(
        {"terms": {"x": {**OUTCOME, "scope": scope, "backup": backup}}, "shared_token_weight": "unique"}
    )
    assert taught(cfg, forks_of_two(good), good, per=1.0) == times((1, 2), true_gradient(good))


def test_counting_a_shared_step_for_each_of_its_trajectories_teaches_wide_steps_more():
    good = 0.9
    cfg = credit_config({"terms": {"x": {**OUTCOME, "scope": "siblings"}}})  # per_leaf: going on has two leaves
    assert taught(cfg, forks_of_two(good), good, per=1.0) == times((1.5, 2), true_gradient(good))
