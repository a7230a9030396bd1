from __future__ import annotations

import asyncio
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.drawn import parse_tree
from rollout.expanders.base import Ask, Expansion, View
from rollout.expanders.search import BestFirst, Budget, Mcts
from rollout.search import WrongRollout, first_error, omega_choice, omega_scores, puct, step_prior
from rollout.tree import ROOT
from rollout.types import StopReason


def found(values: list[float]) -> tuple[int, list[int]]:
    probed: list[int] = []

    async def probe(step: int) -> float:
        probed.append(step)
        return values[step]

    return asyncio.run(first_error(probe, len(values))), probed


def test_puct_of_the_worked_example():
    assert puct(0.4, 0.3, num_parent=9, num_visits=2, c=1.25) == pytest.approx(0.775)


def test_prior_is_the_geometric_mean_of_the_tokens():
    assert step_prior([math.log(0.5), math.log(0.125)]) == pytest.approx(0.25)
    assert step_prior([]) == 1


def test_omega_chooses_the_third_of_the_worked_example():
    pool = [WrongRollout(0.25, 100, 0), WrongRollout(0.5, 250, 1), WrongRollout(0.75, 400, 3)]
    assert omega_scores(pool, 0.5, 0.9, 500, 0.125) == pytest.approx([0.832205, 0.795820, 0.835423], abs=1e-6)
    assert omega_choice(pool, 0.5, 0.9, 500, 0.125) == 2


def test_a_state_that_is_always_or_never_solved_is_not_searched():
    pool = [WrongRollout(1.0, 1, 0), WrongRollout(0.0, 1, 0)]
    assert omega_choice(pool, 0.5, 0.9, 500, 0.125) is None
    assert omega_choice([*pool, WrongRollout(0.1, 900, 9)], 0.5, 0.9, 500, 0.125) == 2


def test_binary_search_probes_three_steps_of_eight():
    assert found([0.9, 0.8, 0.6, 0.6, 0.3, 0, 0, 0]) == (5, [3, 5, 4])


@given(right=st.integers(0, 40), wrong=st.integers(1, 40))
def test_of_values_that_stay_zero_binary_search_finds_what_a_linear_scan_finds(right: int, wrong: int):
    values = [0.5] * right + [0.0] * wrong
    step, probed = found(values)
    assert step == values.index(0.0)
    assert len(probed) <= math.ceil(math.log2(len(values)))


@given(values=st.lists(st.sampled_from([0.0, 0.5]), max_size=40))
def test_of_any_values_it_finds_a_step_that_fails_behind_one_that_does_not(values: list[float]):
    values = [*values, 0.0]
    step, _ = found(values)
    assert values[step] == 0 and (step == 0 or values[step - 1] > 0)


def test_mcts_walks_to_the_child_of_the_greatest_puct():
    # a and b have priors 1 and e^-1 and scores 0.1 and 0.9; the prompt was passed once when they grew
    tree = parse_tree("q -> (a -> x, b -> y)")
    del tree.nodes[3], tree.nodes[1]
    tree.nodes[0].action_logprobs = [0.0]
    mcts = Mcts(simulations=4, width=2, c=1.25, budget=Budget(0, 0, 8))
    assert mcts.expand(View(replace(tree, nodes=[]), [], 0)) == [Expansion(ROOT)] * 2
    assert mcts.expand(View(tree, [0, 1], 0)) == [Ask((0, 1))]
    # 1.25 x 1 x sqrt(1) / 1 is above 1.25 x 0.37 x sqrt(1) / 1, whatever the scores
    scores: dict[int, float | None] = {0: 0.1, 1: 0.9}
    assert mcts.expand(View(tree, [0, 1], 0, scores=scores)) == [Expansion(0)] * 2
    # now a has been tried: 0.1 + 1.25 x sqrt(2) / 2 = 0.98; b: 1.25 x 0.37 x sqrt(2) = 0.65
    # a again, as it ended at once there; then 0.1 + 1.25 x sqrt(3) / 3 = 0.82 against b's 0.80; then 0.725 and 0.92: b
    ended = replace(tree, nodes=[replace(tree.nodes[0], stop=StopReason.answered), tree.nodes[1]])
    assert mcts.expand(View(ended, [1], 0, scores=scores)) == []
    mcts.simulations = 5
    assert mcts.expand(View(ended, [1], 0, scores=scores)) == [Expansion(1)] * 2


def test_best_first_goes_on_from_the_best_score_and_from_none_last():
    tree = parse_tree("q -> (a -> x, b -> y, c -> z)")
    del tree.nodes[5], tree.nodes[3], tree.nodes[1]
    search = BestFirst(num=2, width=2, budget=Budget(4, 0, 8))
    assert search.expand(View(tree, [0, 1, 2], 0)) == [Ask((0, 1, 2))]
    assert search.expand(View(tree, [0, 1, 2], 0, scores={0: None, 1: -2.0, 2: -1.0})) == [Expansion(2)]  # 4 - 3 fit


def test_a_budget_counts_whole_turns():
    tree = parse_tree("q -> (a, b, c)")
    assert Budget(max_nodes=5, max_tokens=0, turn_tokens=8).room(tree, 4) == 2
    assert Budget(max_nodes=0, max_tokens=20, turn_tokens=8).room(tree, 4) == (20 - 3) // 8
    assert Budget(max_nodes=2, max_tokens=0, turn_tokens=8).room(tree, 4) == 0
    assert Budget(max_nodes=0, max_tokens=0, turn_tokens=8).room(tree, 4) == 4
