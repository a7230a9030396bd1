"""Golden numbers of the cost model, and that trees cost what it foresees."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from fakes import GO, FakeEngine, LetterEnvironment, prompt
from hypothesis import given
from hypothesis import strategies as st

from conf.schema import ExpanderKind, RolloutConfig, Survivors
from rewards.drawn import parse_tree
from rollout.cost import (
    Lengths,
    beam_shape,
    chains_shape,
    comb_shape,
    completions_steps,
    cost_of,
    entropy_expand_leaves,
    entropy_expand_tokens,
    measured,
    most_steps,
    omega_rollouts,
    predicted,
    random_expand_shape,
    segment_edges,
    segment_tokens,
    shape_of,
    unique_tokens,
)
from rollout.expand import build_expander
from rollout.grow import grow_tree
from rollout.tree import Tree, split


def test_steps_of_the_published_settings():
    assert chains_shape(6, 4).steps == 24
    tree_grpo = random_expand_shape(trees=2, nodes=2, rounds=1, keep=0, length=4)
    assert tree_grpo.steps == 2 * 4 + 4 * 2.5 == 18
    assert tree_grpo.leaves == 6
    assert random_expand_shape(2, 2, 1, keep=3, length=4).leaves == 6
    slate = comb_shape(candidates=5, length=4)
    assert (slate.steps, slate.leaves, sum(slate.continued_D), sum(slate.trained_D)) == (20, 1, 3, 20)


def test_tree_rl_has_thirty_leaves_for_eighteen_chains():
    assert entropy_expand_leaves(6, 2, 1, 2) == 30
    assert entropy_expand_tokens(6, 2, 1, 2, length=1.0) == 6 + 24 * 0.5 == 18


def test_spo_tree_has_258_edges_and_a_tenth_of_the_prefix_tokens():
    edges = segment_edges([6, 6, 6])
    assert (edges, sum(edges)) == ([6, 36, 216], 258)
    assert segment_tokens([6, 6, 6], tokens=10, length=50) == 42 * 10 + 216 * 30
    assert segment_tokens([6, 6, 6], tokens=10, length=20) == 42 * 10  # against 216 x 20 = 432 x 10
    assert segment_tokens([6, 6, 6], tokens=0, length=50) == 216 * 50


def test_beams_pay_for_every_candidate():
    assert beam_shape(num=4, forks=2, first=4, length=3).steps == 4 + 8 + 8
    assert beam_shape(num=4, forks=4, first=16, length=3).steps == 3 * 16


def test_values_by_rollouts_cost_more_than_what_they_value():
    # 2 chains of 4 steps, 9 rollouts each: 3 + 2 + 1 steps behind the first three steps
    assert completions_steps(2, 9, 4) == 2 * 9 * (3 + 2 + 1)
    assert completions_steps(2, 9, 4, of_prompt=True) == 108 + 9 * 4
    assert completions_steps(2, 9, 1) == 0
    assert omega_rollouts(8, 8) == 24 and omega_rollouts(8, 1) == 0


@given(trees=st.integers(1, 4), nodes=st.integers(1, 4), rounds=st.integers(0, 3), length=st.integers(1, 8))
def test_random_expansion_never_costs_more_than_chains(trees: int, nodes: int, rounds: int, length: int):
    shape = random_expand_shape(trees, nodes, rounds, 0, length)
    assert shape.steps <= chains_shape(shape.leaves, length).steps
    by_hand = trees * length + trees * rounds * nodes * sum(length - place for place in range(length)) / length
    assert shape.steps == pytest.approx(by_hand)


def test_tokens_of_two_chains_of_two_steps():
    # prompt 10, step 3, reply 2: contexts 10, 10, 15, 15; the prompt and two replies are computed, the rest is cached
    cost = cost_of(chains_shape(2, 2), Lengths(prompt_tokens=10, turn_tokens=3, observation_tokens=2))
    assert (cost.generated, cost.trained, cost.chains_generated, cost.generated_share) == (12, 12, 12, 1)
    assert (cost.prefilled, cost.cached) == (10 + 2 * 2, 50 - 14)


CASES = [
    RolloutConfig(expander=ExpanderKind.chains, num_leaves=3),
    RolloutConfig(expander=ExpanderKind.beam_forks, num_leaves=4),
    RolloutConfig(expander=ExpanderKind.beam_forks, num_leaves=4, max_forks=2, survivors=Survivors.scored),
    RolloutConfig(expander=ExpanderKind.beam, num_leaves=3, max_forks=2),
    RolloutConfig(expander=ExpanderKind.comb, num_candidates=5),
]


def grown(cfg: RolloutConfig, length: int, seed: int = 0) -> Tree:
    """A tree whose trajectories all have `length` one-token steps."""
    engine = FakeEngine(choose=lambda rng: GO)
    cfg = replace(cfg, max_steps=length, max_context_tokens=64)
    return asyncio.run(grow_tree(prompt(), engine, LetterEnvironment(), build_expander(cfg, seed), cfg, seed))


@pytest.mark.parametrize("cfg", CASES, ids=lambda cfg: f"{cfg.expander.name}-{cfg.survivors.name}")
def test_trees_cost_what_was_foreseen(cfg: RolloutConfig):
    cost, found = (
        predicted(cfg, 4, Lengths(prompt_tokens=2, turn_tokens=1, observation_tokens=1)),
        measured([grown(cfg, 4)]),
    )
    assert cost is not None
    assert (found.steps, found.generated, found.trajectories) == (cost.steps, cost.generated, cost.trajectories)
    assert found.prefilled + found.cached == cost.prefilled + cost.cached  # contexts; the fake engine caches nothing
    assert found.chains_generated == cost.chains_generated
    assert found.trained <= cost.trained


def test_random_expansion_costs_what_was_foreseen_on_average():
    cfg = RolloutConfig(
        expander=ExpanderKind.random_expand, num_trees=2, expand_nodes=2, expand_rounds=1, keep_leaves=0
    )
    steps = [len(grown(cfg, 4, seed).nodes) for seed in range(300)]
    assert sum(steps) / len(steps) == pytest.approx(18, abs=0.3)
    assert shape_of(cfg, 4) == random_expand_shape(2, 2, 1, 0, 4)


def test_a_tree_is_measured_against_its_own_trajectories():
    tree = parse_tree("q -> (a -> (a1, a2), b)")
    cost = measured([tree, tree])
    assert (cost.generated, cost.trajectories) == (8, 6)
    assert cost.chains_generated == 2 * (2 + 2 + 1)
    assert cost.generated_share == 0.8


def test_an_engine_that_forgets_nothing_computes_every_token_once_but_the_last_of_each_path():
    # q is 1 token, a step 3, a reply 2: a and its reply are read by a1 and a2, whose last tokens are read by nobody
    tree = parse_tree("q -> (a -> (a1, a2), b)", observation_tokens=2)
    for node in tree.nodes:
        node.action_ids, node.action_logprobs = [1, 2, 3], [-1.0] * 3
    assert unique_tokens(tree) == 1 + (3 + 2) + 2 + 2 + 2
    # the best of caches: the last token of a context is computed anew each time, for what follows it; a1 needs a's last
    # token and the reply besides
    for node, cached in zip(tree.nodes, [0, 1 + 2, 1 + 5 - 1, 0], strict=True):
        node.num_cached_tokens = cached
    assert measured([tree]).computed == unique_tokens(tree) + 2  # once more for a2 and for b


def test_a_step_that_was_cut_in_two_is_one_request():
    tree = parse_tree("q -> a")
    node = tree.nodes[0]
    node.action_ids, node.action_logprobs = [1, 2, 3], [-1.0] * 3
    assert measured([split(tree, 0, 2)]) == measured([tree])


def test_segments_and_entropy_are_foreseen_for_one_turn():
    lengths = Lengths(prompt_tokens=100, turn_tokens=50, observation_tokens=0)
    segments = RolloutConfig(expander=ExpanderKind.segments, segment_branches=[6, 6, 6], segment_tokens=10)
    cost = predicted(segments, 1, lengths)
    assert cost is not None and (cost.generated, cost.steps, cost.trajectories) == (6900, 258, 216)
    assert cost.cached == 257 * 100 + 36 * 10 + 216 * 20
    entropy = RolloutConfig(expander=ExpanderKind.entropy_expand, num_trees=6, token_forks=2)
    cost = predicted(entropy, 1, lengths)
    assert cost is not None and cost.generated_share == pytest.approx(0.6)
    assert predicted(entropy, 2, lengths) is None


def test_searches_are_bounded_and_not_foreseen():
    mcts = RolloutConfig(expander=ExpanderKind.mcts, search_simulations=40, max_forks=5)
    assert (shape_of(mcts, 4), most_steps(mcts)) == (None, 200)
    assert most_steps(replace(mcts, max_nodes=64)) == 64
    assert most_steps(RolloutConfig(expander=ExpanderKind.best_first)) is None
