from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from fakes import CRASH, END, GO, REPLY, FakeEngine, LetterEnvironment, prompt
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import DataError, ToolCrashed
from conf.schema import ExpanderKind, RolloutConfig, TaskConfig
from rollout.environment import Turn
from rollout.expand import build_expander
from rollout.grow import complete_path, grow_tree
from rollout.health import check_tool_crashes
from rollout.tree import ROOT, Tree
from rollout.types import Sampled, Sampling, StopReason

CHAINS = RolloutConfig(expander=ExpanderKind.chains, num_leaves=3, max_steps=4, max_context_tokens=64)


def grow(cfg: RolloutConfig = CHAINS, engine: FakeEngine | None = None, seed: int = 0) -> Tree:
    expander = build_expander(cfg, seed)
    return asyncio.run(grow_tree(prompt(), engine or FakeEngine(), LetterEnvironment(), expander, cfg, seed))


def always(token: int) -> FakeEngine:
    return FakeEngine(choose=lambda rng: token)


def test_chains_that_answer_at_once_have_one_step_each():
    tree = grow(engine=always(END))
    assert [node.parent for node in tree.nodes] == [ROOT, ROOT, ROOT]
    assert tree.leaves() == [0, 1, 2]


@given(seed=st.integers(0, 10_000), kind=st.sampled_from(list(ExpanderKind)))
@settings(max_examples=30, deadline=None)
def test_concatenating_a_path_gives_what_the_engine_was_given(seed: int, kind: ExpanderKind):
    engine = FakeEngine()
    tree = grow(replace(CHAINS, expander=kind), engine, seed)
    given = sorted(context for context, _ in engine.requests)
    assert given == sorted(tree.path_ids(node.parent) for node in tree.nodes)


@given(seed=st.integers(0, 10_000), kind=st.sampled_from(list(ExpanderKind)))
@settings(max_examples=30, deadline=None)
def test_the_order_in_which_steps_finish_leaves_no_trace(seed: int, kind: ExpanderKind):
    cfg = replace(CHAINS, expander=kind)
    shuffled = FakeEngine(delay_s=lambda rng: rng.random() * 0.003)
    assert grow(cfg, FakeEngine(), seed) == grow(cfg, shuffled, seed)


def test_every_step_draws_from_a_seed_of_its_own():
    engine = always(GO)
    tree = grow(engine=engine)
    assert len({sampling.seed for _, sampling in engine.requests}) == len(tree.nodes) == 3 * 4


def test_an_engine_that_continued_other_tokens_is_caught():
    with pytest.raises(AssertionError, match="other tokens than the tree holds"):
        grow(engine=FakeEngine(corrupt_context=True))


def test_a_tree_ends_at_its_depth_limit_without_a_reply():
    tree = grow(engine=always(GO))
    leaf = tree.nodes[tree.leaves()[0]]
    assert (leaf.stop, leaf.observation_ids) == (StopReason.max_steps, [])
    assert tree.nodes[0].observation_ids == [REPLY]


def test_a_path_that_would_outgrow_the_context_ends():
    # prompt 2 tokens, each step 1 + 1: after step 2 the path has 6 tokens and no room for another
    tree = grow(replace(CHAINS, max_context_tokens=6), always(GO))
    assert {tree.nodes[leaf].stop for leaf in tree.leaves()} == {StopReason.context}
    assert {tree.depth(leaf) for leaf in tree.leaves()} == {2}


def test_the_deadline_cuts_what_is_open_and_keeps_what_ended():
    slow = FakeEngine(choose=lambda rng: GO, delay_s=lambda rng: 0.2)
    tree = grow(replace(CHAINS, tree_timeout_s=0.3), slow)
    assert {tree.nodes[leaf].stop for leaf in tree.leaves()} == {StopReason.deadline}
    assert tree.trained_leaves() == []


def one_slow_turn_in(num: int) -> FakeEngine:
    """Every `num`-th request hangs, the first of them first."""
    engine = always(GO)
    engine.delay_s = lambda rng: 30.0 if len(engine.requests) % num == 1 else 0.0
    return engine


def test_a_turn_that_takes_too_long_is_cut_alone_and_the_trajectories_beside_it_go_on():
    tree = grow(replace(CHAINS, turn_timeout_s=0.1), one_slow_turn_in(100))
    (late,) = [row for row, node in enumerate(tree.nodes) if node.stop is StopReason.deadline]
    assert (tree.nodes[late].parent, tree.nodes[late].action_ids) == (ROOT, [])  # nothing had come of it
    assert [tree.nodes[leaf].stop for leaf in tree.trained_leaves()] == [StopReason.max_steps] * 2
    assert len(tree.nodes) == 1 + 2 * 4


def test_a_request_whose_time_is_up_is_cancelled_in_the_engine():
    class Hanging(FakeEngine):
        cancelled = 0

        async def sample(self, context_ids: list[int], sampling: Sampling) -> Sampled:
            try:
                return await super().sample(context_ids, sampling)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise

    engine = Hanging(delay_s=lambda rng: 30.0)
    tree = grow(replace(CHAINS, turn_timeout_s=0.05), engine)
    assert engine.cancelled == 3 and tree.trained_leaves() == []


class SlowTool(LetterEnvironment):
    """Answers the second turn of a trajectory much later."""

    async def act(self, state: int, action_ids: list[int], *, stopped: bool) -> Turn:
        await asyncio.sleep(30.0 if state == 1 else 0.0)
        return await super().act(state, action_ids, stopped=stopped)


def test_a_turn_that_the_environment_does_not_answer_in_time_keeps_its_tokens_and_trains_nothing():
    cfg = replace(CHAINS, turn_timeout_s=0.1)
    tree = asyncio.run(grow_tree(prompt(), always(GO), SlowTool(), build_expander(cfg, 0), cfg, 0))
    assert [tree.nodes[leaf].stop for leaf in tree.leaves()] == [StopReason.deadline] * 3
    assert {tuple(tree.nodes[leaf].action_ids) for leaf in tree.leaves()} == {(GO,)}
    assert tree.trained_leaves() == []


def test_a_time_out_of_somebody_else_is_no_deadline_of_ours():
    class Broken(LetterEnvironment):
        async def act(self, state: int, action_ids: list[int], *, stopped: bool) -> Turn:
            raise TimeoutError("a socket")

    with pytest.raises(TimeoutError, match="a socket"):
        asyncio.run(grow_tree(prompt(), always(GO), Broken(), build_expander(CHAINS, 0), CHAINS, 0))


def test_a_path_that_the_world_does_not_answer_again_in_time_is_no_place_to_go_on_from():
    tree = grow(engine=always(GO))
    steps, cfg = [tree.nodes[row] for row in tree.path(1)], replace(CHAINS, turn_timeout_s=0.1)
    with pytest.raises(TimeoutError):
        asyncio.run(complete_path(tree.prompt, steps, 2, FakeEngine(), SlowTool(), cfg, 0))


def test_a_crashed_tool_ends_its_trajectory_untrained():
    tree = grow(engine=always(CRASH))
    assert tree.leaves() == [0, 1, 2] and tree.trained_leaves() == []


def test_tools_that_keep_crashing_stop_the_run():
    tree = grow(engine=always(CRASH))
    with pytest.raises(ToolCrashed, match=r'"tool" crashed or hung in 3 of 3 calls.*max_tool_crashes_share=0.05'):
        check_tool_crashes([tree], TaskConfig())
    check_tool_crashes([grow(engine=always(GO))], TaskConfig())


def test_beam_forks_always_ends_with_its_number_of_leaves():
    cfg = replace(CHAINS, expander=ExpanderKind.beam_forks, num_leaves=6, max_forks=2)
    for seed in range(20):
        tree = grow(cfg, FakeEngine(), seed)
        kept = [leaf for leaf in tree.leaves() if tree.nodes[leaf].kept]
        assert len(kept) == 6
        assert max(len(tree.children(row)) for row in range(len(tree.nodes))) <= 2


def test_beam_forks_prunes_steps_that_no_survivor_continues():
    cfg = replace(CHAINS, expander=ExpanderKind.beam_forks, num_leaves=6, max_forks=2)
    tree = grow(cfg, FakeEngine(), seed=1)
    childless = [r for r, n in enumerate(tree.nodes) if n.stop is StopReason.continues and not tree.children(r)]
    assert childless and not any(tree.nodes[row].kept for row in childless)


def test_random_expand_grows_m_times_one_plus_l_n_leaves_and_keeps_k_per_tree():
    cfg = replace(
        CHAINS, expander=ExpanderKind.random_expand, num_trees=2, expand_nodes=2, expand_rounds=1, keep_leaves=2
    )
    tree = grow(cfg, FakeEngine(choose=lambda rng: rng.choice([GO, GO, END])), seed=3)
    assert len(tree.leaves()) == 2 * (1 + 1 * 2)
    for branch in (0, 1):
        kept = [leaf for leaf in tree.leaves() if tree.nodes[leaf].branch == branch and tree.nodes[leaf].kept]
        assert len(kept) == 2


def test_a_branch_is_inherited_from_the_parent():
    cfg = replace(CHAINS, expander=ExpanderKind.random_expand, num_trees=2, keep_leaves=0)
    tree = grow(cfg, FakeEngine(), seed=5)
    assert all(n.branch == tree.nodes[n.parent].branch for n in tree.nodes if n.parent != ROOT)


def test_rows_are_depth_first():
    tree = grow(replace(CHAINS, expander=ExpanderKind.beam_forks, num_leaves=6), FakeEngine(), seed=4)
    order: list[int] = []

    def visit(row: int) -> None:
        order.append(row)
        for child in tree.children(row):
            visit(child)

    for first in tree.children(ROOT):
        visit(first)
    assert order == list(range(len(tree.nodes)))


def complete(tree: Tree, row: int, num: int, engine: FakeEngine, seed: int = 1) -> Tree:
    steps = [tree.nodes[each] for each in tree.path(row)]
    return asyncio.run(complete_path(tree.prompt, steps, num, engine, LetterEnvironment(), CHAINS, seed))


@given(seed=st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_what_goes_on_from_a_step_keeps_its_path_and_ends_in_its_own_ways(seed: int):
    tree = grow(seed=seed)
    inner = [row for row, node in enumerate(tree.nodes) if node.stop is StopReason.continues]
    for row in [ROOT, *inner[:2]]:
        engine = FakeEngine()
        found = complete(tree, row, 4, engine)
        start = len(tree.path(row)) - 1
        assert [node.action_ids for node in found.nodes[: start + 1]] == [
            tree.nodes[each].action_ids for each in tree.path(row)
        ]
        assert len(found.children(start)) == len(found.leaves()) == 4
        assert all(context[: len(tree.path_ids(row))] == tree.path_ids(row) for context, _ in engine.requests)
        assert complete(tree, row, 4, FakeEngine()) == found  # the same seed goes on in the same ways


def test_a_world_that_answers_otherwise_the_second_time_is_no_place_to_go_on_from():
    tree = grow(engine=always(GO))
    tree.nodes[0].observation_ids = [REPLY, REPLY]
    with pytest.raises(DataError, match=r"acting step 0 of .* again gave .* Tools must answer the same call alike"):
        complete(tree, 0, 2, FakeEngine())
