"""Expanders that cut turns, that choose and that search: how much they grow, and that nothing depends on timing."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from fakes import END, GO, REPLY, prompt
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import ConfigError
from conf.schema import ExpanderKind, RolloutConfig, Survivors
from rollout.engine import Groups
from rollout.environment import Turn
from rollout.expand import build_expander
from rollout.expanders.comb import choice_chances
from rollout.expanders.entropy import marked_end
from rollout.grow import complete_path, grow_tree
from rollout.lines import Offer
from rollout.tree import ROOT, Tree, split
from rollout.types import Sampled, Sampling, StepFacts, StepKind, StopReason

WORDS = range(10, 20)
Draw = Callable[[random.Random, int], int]


def seldom_ends(rng: random.Random, number: int) -> int:
    return rng.choice([GO, END]) if rng.random() < 0.2 else rng.choice(WORDS)


def one_turn_of(size: int) -> Draw:
    """Every turn has `size` tokens behind the prompt, the last of which answers."""
    return lambda rng, number: END if number == size - 1 else rng.choice(WORDS)


@dataclass
class WordEngine:
    """Draws tokens one by one from the request's seed until one ends the turn; `draw` is told how many came before."""

    draw: Draw = seldom_ends
    delay_s: Callable[[random.Random], float] = lambda rng: 0.0
    requests: list[tuple[list[int], Sampling]] = field(default_factory=list)
    version: int = 0

    async def sample(self, context_ids: list[int], sampling: Sampling) -> Sampled:
        self.requests.append((list(context_ids), sampling))
        await asyncio.sleep(self.delay_s(random.Random(str(sampling.seed))))
        rng, drawn = random.Random(sampling.seed), []
        since_reply = len(context_ids) - max([at + 1 for at, token in enumerate(context_ids) if token == REPLY] or [2])
        while len(drawn) < sampling.max_tokens and (drawn[-1:] or [0])[0] not in sampling.stop_token_ids:
            drawn.append(self.draw(rng, since_reply + len(drawn)))
        return Sampled(
            token_ids=drawn,
            logprobs=[-3 * rng.random() for _ in drawn],
            stopped=drawn[-1] in sampling.stop_token_ids,
            version=self.version,
            context_ids=list(context_ids),
        )

    async def load_weights(self, groups: Groups, version: int) -> None: ...

    async def receive_weights(self, offer: Offer) -> None: ...

    async def sleep(self) -> None: ...

    async def close(self) -> None: ...


@dataclass
class TurnEnvironment:
    """State is the turns so far, as tokens. It reads a turn without acting, and remembers what it acted on."""

    stop_token_ids: tuple[int, ...] = (GO, END)
    acted: list[list[int]] = field(default_factory=list)

    def reset(self, prompt: Any) -> tuple[tuple[int, ...], ...]:
        return ()

    async def read(self, state: Any, action_ids: list[int], *, stopped: bool) -> Turn:
        text = " ".join(map(str, action_ids))
        after = (*state, tuple(action_ids))
        if not stopped:
            facts = StepFacts(kind=StepKind.malformed, error="too long")
            return Turn(state=after, facts=facts, stop=StopReason.turn_tokens, action_text=text)
        if action_ids[-1] == END:
            facts = StepFacts(kind=StepKind.answer, answer=text)
            return Turn(state=after, facts=facts, stop=StopReason.answered, action_text=text)
        facts = StepFacts(kind=StepKind.call, tool="tool", arguments={"text": text})
        return Turn(
            state=after, facts=facts, stop=StopReason.continues, observation_ids=[REPLY, REPLY], action_text=text
        )

    async def act(self, state: Any, action_ids: list[int], *, stopped: bool) -> Turn:
        self.acted.append(list(action_ids))
        return await self.read(state, action_ids, stopped=stopped)


@dataclass
class TokenJudge:
    """Likes great tokens: the mean of a step's. Takes its time, and remembers what it was asked."""

    delay_s: float = 0.0
    asked: list[list[list[int]]] = field(default_factory=list)

    async def score(self, tree: Tree, rows: list[int]) -> list[float | None]:
        self.asked.append([tree.nodes[row].action_ids for row in rows])
        await asyncio.sleep(self.delay_s)
        return [sum(tree.nodes[row].action_ids) / len(tree.nodes[row].action_ids) for row in rows]


BASE = RolloutConfig(
    num_leaves=4, max_forks=3, max_steps=3, max_turn_tokens=12, max_context_tokens=128, keep_leaves=0, max_nodes=40
)
KINDS = [
    replace(BASE, expander=ExpanderKind.beam),
    replace(BASE, expander=ExpanderKind.beam_forks, survivors=Survivors.scored),
    replace(BASE, expander=ExpanderKind.entropy_expand, expand_rounds=2),
    replace(BASE, expander=ExpanderKind.segments, segment_branches=[3, 2, 2], segment_tokens=3),
    replace(BASE, expander=ExpanderKind.segments, segment_tokens=3, segment_leaves=7, segment_first_max=4),
    replace(BASE, expander=ExpanderKind.comb),
    replace(BASE, expander=ExpanderKind.best_first),
    replace(BASE, expander=ExpanderKind.mcts, search_simulations=8),
]
kinds = pytest.mark.parametrize("cfg", KINDS, ids=lambda cfg: f"{cfg.expander.name}-{cfg.survivors.name}")
seeds = given(seed=st.integers(0, 10_000))


def grow(
    cfg: RolloutConfig,
    engine: WordEngine | None = None,
    seed: int = 0,
    judge: TokenJudge | None = None,
    environment: TurnEnvironment | None = None,
) -> Tree:
    expander = build_expander(cfg, seed, decode=lambda ids: " ".join(map(str, ids)))
    engine, environment = engine or WordEngine(), environment or TurnEnvironment()
    return asyncio.run(grow_tree(prompt(), engine, environment, expander, cfg, seed, judge or TokenJudge()))


def merged(tree: Tree, leaf: int) -> list[list[int]]:
    """The turns of a trajectory, each as one piece."""
    turns: list[list[int]] = [[]]
    for row in tree.path(leaf):
        turns[-1] = turns[-1] + tree.nodes[row].action_ids
        turns += [[]] * (not tree.nodes[row].is_part)
    return turns[:-1]


# Laws of all


@kinds
@seeds
@settings(max_examples=10, deadline=None)
def test_the_order_in_which_steps_and_scores_arrive_leaves_no_trace(cfg: RolloutConfig, seed: int):
    shuffled = WordEngine(delay_s=lambda rng: rng.random() * 0.003)
    assert grow(cfg, seed=seed) == grow(cfg, shuffled, seed, TokenJudge(delay_s=0.001))


@kinds
@seeds
@settings(max_examples=10, deadline=None)
def test_every_request_is_a_path_of_the_tree_and_draws_from_a_seed_of_its_own(cfg: RolloutConfig, seed: int):
    engine = WordEngine()
    tree = grow(cfg, engine, seed)
    contexts = [tree.path_ids(row) for row in [ROOT, *range(len(tree.nodes))]]
    assert all(context in contexts for context, _ in engine.requests)
    assert sum(len(node.action_ids) for node in tree.nodes) == sum(
        len(asyncio.run(WordEngine(engine.draw).sample(context, sampling)).token_ids)
        for context, sampling in engine.requests
    )
    assert len({sampling.seed for _, sampling in engine.requests}) == len(engine.requests)


@kinds
@seeds
@settings(max_examples=10, deadline=None)
def test_the_environment_acts_on_whole_turns_alone(cfg: RolloutConfig, seed: int):
    environment = TurnEnvironment()
    tree = grow(cfg, seed=seed, environment=environment)
    for node in tree.nodes:
        assert not node.is_part or (node.facts.kind is StepKind.unread and not node.observation_ids)
    turns = [merged(tree, row)[-1] for row, node in enumerate(tree.nodes) if not node.is_part]
    rejected = [merged(tree, row)[-1] for row in tree.leaves() if tree.nodes[row].stop is StopReason.not_chosen]
    assert sorted(environment.acted + rejected) == sorted(turns)
    assert all(len(turn) <= cfg.max_turn_tokens for turn in turns)
    assert max(tree.num_turns(leaf) for leaf in tree.leaves()) <= cfg.max_steps


# Cutting a step in two


@seeds
@settings(max_examples=30, deadline=None)
def test_cutting_a_step_in_two_changes_no_path(seed: int):
    tree = grow(replace(BASE, expander=ExpanderKind.chains), seed=seed)
    rng = random.Random(seed)
    row = rng.choice([row for row, node in enumerate(tree.nodes) if len(node.action_ids) > 1] or [-1])
    if row < 0:
        return
    token = rng.randrange(1, len(tree.nodes[row].action_ids))
    cut = split(tree, row, token)
    assert len(cut.nodes) == len(tree.nodes) + 1
    assert [cut.path_ids(leaf) for leaf in cut.leaves()] == [tree.path_ids(leaf) for leaf in tree.leaves()]
    assert [merged(cut, leaf) for leaf in cut.leaves()] == [merged(tree, leaf) for leaf in tree.leaves()]
    for one, other in zip(tree.leaves(), cut.leaves(), strict=True):
        logprobs = [
            [x for each in t.path(at) for x in t.nodes[each].action_logprobs] for t, at in ((tree, one), (cut, other))
        ]
        assert logprobs[0] == logprobs[1]
    assert (cut.nodes[row].is_part, cut.nodes[row + 1].facts) == (True, tree.nodes[row].facts)
    assert cut.turn(row + 1) == [row, row + 1]


def test_a_path_of_parts_can_be_gone_on_from():
    cfg = replace(BASE, expander=ExpanderKind.segments, segment_branches=[2, 2], segment_tokens=3)
    tree = grow(cfg, WordEngine(one_turn_of(8)))
    steps = [tree.nodes[row] for row in tree.path(0)]
    assert steps[-1].is_part
    environment = TurnEnvironment()
    found = asyncio.run(complete_path(prompt(), steps, 3, WordEngine(one_turn_of(8)), environment, cfg, 1))
    assert len(found.leaves()) == 3
    assert [len(turn) for turn in environment.acted] == [8, 8, 8]
    assert [turn[:3] for turn in environment.acted] == [tree.nodes[0].action_ids] * 3


# Survivors by score


def test_the_best_candidates_survive_and_the_others_are_pruned():
    cfg = replace(BASE, expander=ExpanderKind.beam_forks, survivors=Survivors.scored, num_leaves=2, max_forks=3)
    always_goes_on: Draw = lambda rng, number: GO if number == 1 else rng.choice(WORDS)  # noqa: E731
    tree = grow(cfg, WordEngine(always_goes_on))
    # 2 first steps; then 2 x 3 candidates at each of the two depths below, of which the best 2 stay
    assert len(tree.nodes) == 2 + 6 + 6
    for depth in (2, 3):
        rows = [row for row in range(len(tree.nodes)) if tree.depth(row) == depth]
        best = sorted(rows, key=lambda row: -sum(tree.nodes[row].action_ids))[:2]
        with_children = [row for row in rows if tree.children(row) or tree.nodes[row].stop is StopReason.max_steps]
        kept = [row for row in rows if tree.nodes[row].kept]
        assert sorted(best) == (kept if depth == 3 else with_children)


def test_a_beam_begins_with_all_its_candidates_and_shrinks_as_trajectories_end():
    cfg = replace(BASE, expander=ExpanderKind.beam, num_leaves=2, max_forks=3)
    tree = grow(cfg, WordEngine(lambda rng, number: GO if number == 1 else rng.choice(WORDS)))
    assert len(tree.nodes) == 6 + 6 + 6
    assert sum(tree.nodes[leaf].kept for leaf in tree.leaves()) == 2
    for seed in range(20):
        tree = grow(cfg, seed=seed)
        assert sum(tree.nodes[leaf].kept for leaf in tree.leaves()) == 2


# Candidates


def test_slates_worked_example_of_the_choice():
    assert choice_chances([2, 1, 0.075, -1], eta=0.7) == pytest.approx([0.6755, 0.2216, 0.0790, 0.0239], abs=1e-4)
    assert choice_chances([2, 1, 0.1, -1], eta=0.7) == pytest.approx([0.6747, 0.2208, 0.0808, 0.0237], abs=1e-4)


def test_choices_at_the_edges():
    assert choice_chances([1, 1, 1], eta=0.7) == pytest.approx([1 / 3] * 3)
    assert choice_chances([1, 3, 2], eta=0) == [0, 1, 0]
    assert choice_chances([None, None], eta=0.7) == [0.5, 0.5]
    assert choice_chances([None, -1, None], eta=0.7) == [0, 1, 0]
    assert choice_chances([5.0], eta=0.7) == [1]


def test_a_comb_of_five_candidates_and_four_steps_has_twenty_steps_and_calls_three_tools():
    cfg = replace(BASE, expander=ExpanderKind.comb, num_candidates=5, max_steps=8)
    environment, judge = TurnEnvironment(), TokenJudge()
    answers_last: Draw = lambda rng, number: rng.choice(WORDS)  # noqa: E731
    engine = WordEngine(answers_last)

    async def sample(context_ids: list[int], sampling: Sampling) -> Sampled:
        sampled = await WordEngine.sample(engine, context_ids, replace(sampling, max_tokens=3))
        last = END if context_ids.count(REPLY) == 2 * 3 else GO
        return replace(sampled, token_ids=[*sampled.token_ids[:-1], last], stopped=True)

    engine.sample = sample  # ty: the fake's own
    tree = grow(cfg, engine, judge=judge, environment=environment)
    assert len(tree.nodes) == 5 * 4
    assert len(environment.acted) == 4 and [turn[-1] for turn in environment.acted] == [GO, GO, GO, END]
    stops = [tree.nodes[leaf].stop for leaf in tree.leaves()]
    assert stops.count(StopReason.not_chosen) == 4 * 4 and stops.count(StopReason.answered) == 1
    assert len(tree.trained_leaves()) == 17 and len(tree.outcome_leaves()) == 1
    assert [len(rows) for rows in judge.asked] == [5, 5, 5, 5]
    assert all(node.action_text for node in tree.nodes)
    assert [node.judged for node in tree.nodes] == [sum(node.action_ids) / 3 for node in tree.nodes]


def test_without_a_judge_a_candidate_is_drawn_and_a_named_one_is_missed():
    cfg = replace(BASE, expander=ExpanderKind.comb)
    expander = build_expander(cfg, 0)
    tree = asyncio.run(grow_tree(prompt(), WordEngine(), TurnEnvironment(), expander, cfg, 0))
    assert len(tree.outcome_leaves()) == 1
    named = replace(cfg, judge="progress")
    with pytest.raises(ConfigError, match=r'rollout\.judge="progress", but whoever grows this tree was given no judge'):
        asyncio.run(grow_tree(prompt(), WordEngine(), TurnEnvironment(), build_expander(named, 0), named, 0))


# Segments


@pytest.mark.parametrize(("branches", "num_nodes"), [([6, 6, 6], 258), ([2, 3], 8), ([4], 4)])
def test_segments_have_the_edges_and_tokens_of_their_formula(branches: list[int], num_nodes: int):
    cfg = replace(BASE, expander=ExpanderKind.segments, segment_branches=branches, segment_tokens=3)
    tree = grow(cfg, WordEngine(one_turn_of(11)))
    levels = [math.prod(branches[: depth + 1]) for depth in range(len(branches))]
    assert len(tree.nodes) == sum(levels) == num_nodes
    assert len(tree.leaves()) == levels[-1]
    rest = 11 - 3 * (len(branches) - 1)
    assert tree.num_generated_tokens() == sum(levels[:-1]) * 3 + levels[-1] * rest


def test_segments_come_to_the_leaves_that_were_asked_for():
    cfg = replace(BASE, expander=ExpanderKind.segments, segment_branches=[2, 2, 2, 2, 2], segment_tokens=2)
    cfg = replace(cfg, segment_leaves=16, segment_first_max=8)
    first = set()
    for seed in range(20):
        tree = grow(cfg, seed=seed)
        assert len(tree.leaves()) == 16
        first.add(len(tree.children(ROOT)))
    assert first <= set(range(2, 17)) and len(first) > 3


# Surprising tokens


def test_entropy_expand_has_the_leaves_and_steps_of_its_formula():
    cfg = replace(BASE, expander=ExpanderKind.entropy_expand, num_trees=6, expand_nodes=2, expand_rounds=1)
    tree = grow(replace(cfg, token_forks=2), WordEngine(one_turn_of(10)))
    assert len(tree.leaves()) == 6 * (1 + 2 * 2 * 1) == 30
    assert len(tree.nodes) == 6 * (1 + 2 * (1 + 2))  # each chosen token cuts a step in two and has two new branches


def test_branches_start_before_the_most_surprising_tokens():
    cfg = replace(BASE, expander=ExpanderKind.entropy_expand, num_trees=1, expand_nodes=1, expand_rounds=1)
    chain = grow(replace(cfg, expand_rounds=0), WordEngine(one_turn_of(10)), seed=3).nodes[0]
    tree = grow(cfg, WordEngine(one_turn_of(10)), seed=3)
    token = min(range(1, 10), key=lambda number: chain.action_logprobs[number])
    assert tree.nodes[0].action_ids == chain.action_ids[:token] and tree.nodes[0].is_part
    assert [tree.nodes[row].parent for row in tree.leaves()] == [0, 0, 0]
    assert tree.nodes[1].action_ids == chain.action_ids[token:]


def test_nothing_behind_an_answer_marker_is_chosen():
    cfg = replace(BASE, expander=ExpanderKind.entropy_expand, num_trees=1, expand_nodes=9, expand_rounds=2)
    answers: Draw = lambda rng, number: {3: 77, 9: END}.get(number, rng.choice(WORDS))  # noqa: E731
    tree = grow(replace(cfg, answer_markers=["77"]), WordEngine(answers), seed=3)
    starts = {len(tree.path_ids(node.parent)) - 2 for node in tree.nodes if node.parent != ROOT}
    assert starts == {1, 2, 3}  # before the second, the third, and the marker itself
    with pytest.raises(ConfigError, match="there is no tokenizer here to decode with"):
        build_expander(replace(cfg, answer_markers=["77"]), 0)


def test_the_end_of_a_marker_is_its_last_token():
    def decode(token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))

    assert marked_end([*map(ord, "say answer: 7")], ["answer", "conclusion"], decode) == 10
    assert marked_end([*map(ord, "say")], ["answer"], decode) == 3


# Search


@pytest.mark.parametrize("kind", [ExpanderKind.best_first, ExpanderKind.mcts])
def test_search_keeps_to_its_budgets(kind: ExpanderKind):
    for seed in range(5):
        tree = grow(replace(BASE, expander=kind, max_nodes=10, num_leaves=100), seed=seed)
        assert len(tree.nodes) <= 10
        tree = grow(replace(BASE, expander=kind, max_tree_tokens=60, num_leaves=100), seed=seed)
        assert tree.num_generated_tokens() <= 60


def test_best_first_goes_on_from_the_best_open_step():
    always_goes_on: Draw = lambda rng, number: GO if number == 1 else rng.choice(WORDS)  # noqa: E731
    cfg = replace(BASE, expander=ExpanderKind.best_first, max_nodes=6, max_steps=8)
    tree = grow(cfg, WordEngine(always_goes_on))
    first = tree.children(ROOT)
    best = max(first, key=lambda row: sum(tree.nodes[row].action_ids))
    assert len(first) == 3 and len(tree.children(best)) == 3


def test_mcts_grows_its_width_in_each_walk_that_ends_at_an_open_step():
    always_goes_on: Draw = lambda rng, number: GO if number == 1 else rng.choice(WORDS)  # noqa: E731
    cfg = replace(BASE, expander=ExpanderKind.mcts, search_simulations=5, max_nodes=0, max_steps=20)
    tree = grow(cfg, WordEngine(always_goes_on))
    assert len(tree.nodes) == 5 * 3


# Time that is up


@kinds
def test_a_turn_that_hangs_ends_alone_whatever_grows_around_it(cfg: RolloutConfig):
    engine = WordEngine()
    engine.delay_s = lambda rng: 30.0 if len(engine.requests) == 2 else 0.0
    tree = grow(replace(cfg, turn_timeout_s=0.1), engine)
    (late,) = [row for row, node in enumerate(tree.nodes) if node.stop is StopReason.deadline]
    assert tree.nodes[late].action_ids == [] and late not in tree.trained_leaves()
    assert tree.trained_leaves()


def test_candidates_that_nobody_had_time_to_choose_from_train_all_the_same():
    cfg = replace(BASE, expander=ExpanderKind.comb, tree_timeout_s=0.2)
    tree = grow(cfg, judge=TokenJudge(delay_s=2.0))
    assert {node.stop for node in tree.nodes} == {StopReason.not_chosen}
    assert tree.trained_leaves() == [0, 1, 2, 3, 4] and tree.outcome_leaves() == []


def test_a_chosen_candidate_whose_tool_takes_too_long_trains_nothing():
    @dataclass
    class Slow(TurnEnvironment):
        async def act(self, state: Any, action_ids: list[int], *, stopped: bool) -> Turn:
            await asyncio.sleep(2.0)
            return await self.read(state, action_ids, stopped=stopped)

    tree = grow(replace(BASE, expander=ExpanderKind.comb, tree_timeout_s=0.2), environment=Slow())
    stops = [node.stop for node in tree.nodes]
    assert stops.count(StopReason.deadline) == 1 and stops.count(StopReason.not_chosen) == 4
    assert len(tree.trained_leaves()) == 4


def test_a_chosen_candidate_whose_turn_takes_too_long_ends_its_comb():
    @dataclass
    class Slow(TurnEnvironment):
        async def act(self, state: Any, action_ids: list[int], *, stopped: bool) -> Turn:
            await asyncio.sleep(30.0)
            return await self.read(state, action_ids, stopped=stopped)

    tree = grow(replace(BASE, expander=ExpanderKind.comb, turn_timeout_s=0.1), environment=Slow())
    (chosen,) = [node for node in tree.nodes if node.stop is StopReason.deadline]
    assert chosen.action_ids and chosen.facts.kind is not StepKind.unread  # it had been read
    assert len(tree.nodes) == 5 and len(tree.trained_leaves()) == 4


def test_a_part_that_nobody_finished_in_time_trains_nothing():
    cfg = replace(BASE, expander=ExpanderKind.segments, segment_tokens=3, tree_timeout_s=0.3)
    engine = WordEngine(one_turn_of(9))
    engine.delay_s = lambda rng: 0.2
    tree = grow(cfg, engine)
    assert [node.stop for node in tree.nodes] == [StopReason.deadline] * 2
    assert tree.trained_leaves() == [] and not any(node.is_part for node in tree.nodes)
