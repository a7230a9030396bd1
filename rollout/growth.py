"""A tree under growth: what a move starts, and how what came of it is written down."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from conf.errors import ConfigError, DataError
from conf.schema import RolloutConfig
from rollout.engine import Engine
from rollout.environment import Environment, Turn
from rollout.expanders.base import Act, Ask, Expansion, Judge, Move, Prune, View
from rollout.seeds import derive_seed
from rollout.tree import ROOT, Node, Tree, split
from rollout.types import WORLD_FAILED, Prompt, Sampled, Sampling, StepFacts, StepKind, StopReason


@dataclass(slots=True, eq=False)
class _Spot:
    """The end of a step, or of the prompt: where others grow from. Beside each row of the tree there is one."""

    key: tuple[int, ...]
    """Child numbers from the prompt: its place in canonical order."""
    name: tuple[object, ...]
    """What the seeds of its children are made of. Cutting a step in two changes keys, and no name."""
    state: Any
    """The environment's, behind the last whole turn."""
    row: int = ROOT
    turn_ids: list[int] = field(default_factory=list)
    """Tokens of the turn that is not whole yet."""
    num_turns: int = 0
    num_children: int = 0
    is_draft: bool = False
    is_acting: bool = False
    stopped: bool = True
    is_asked: bool = False
    score: float | None = None


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a step grows: behind a spot, as its child of this number."""

    behind: _Spot
    number: int
    expansion: Expansion
    context_ids: list[int]


@dataclass(frozen=True, slots=True)
class _Grown:
    place: _Place
    sampled: Sampled
    turn: Turn | None
    """None when the turn goes on, or nobody read it."""


@dataclass(frozen=True, slots=True)
class _Judged:
    spots: list[_Spot]
    scores: list[float | None]


@dataclass(frozen=True, slots=True)
class _Acted:
    spot: _Spot
    turn: Turn


Result = _Grown | _Judged | _Acted


class Growth:
    """A tree under growth: its rows, and beside each row its spot.

    It starts what is to be awaited and writes down what came of it; when, and in which order, is the caller's affair.
    """

    def __init__(
        self,
        prompt: Prompt,
        engine: Engine,
        environment: Environment,
        cfg: RolloutConfig,
        seed: int,
        judge: Judge | None = None,
    ) -> None:
        self.tree = Tree(prompt=prompt)
        self._engine, self._environment, self._cfg, self._seed, self._judge = engine, environment, cfg, seed, judge
        self._root = _Spot((), (), environment.reset(prompt))
        self._spots: list[_Spot] = []

    def view(self, num_growing: int) -> View:
        """What the expander sees."""
        rows = list(zip(self._spots, self.tree.nodes, strict=True))
        return View(
            tree=self.tree,
            open_rows=[
                spot.row
                for spot, node in rows
                if node.stop is StopReason.continues and node.kept and not spot.num_children
            ],
            num_growing=num_growing,
            drafts=[spot.row for spot in self._spots if spot.is_draft],
            scores={spot.row: spot.score for spot in self._spots if spot.is_asked},
        )

    def start(self, moves: Sequence[Move], *, is_still: bool) -> list[Coroutine[Any, Any, Result]]:
        """Do what can be done at once; what is left to be awaited.

        Args:
            is_still: nothing is growing, so that rows may change their numbers.
        """
        expansions = [move for move in moves if isinstance(move, Expansion)]
        spots = {row: self._spot(row) for row in {move.parent for move in expansions}}
        places = {(row, 0): spot for row, spot in spots.items()}
        for row, token in sorted({(each.parent, each.token) for each in expansions if each.token}, reverse=True):
            assert is_still, "a step is cut in two only while nothing is growing"
            # Its earlier tokens are those of the beginning from now on.
            spots[row] = places[row, token] = self._split(spots[row], token)
        started: list[Coroutine[Any, Any, Result]] = []
        for move in moves:
            match move:
                case Expansion():
                    started.append(self._step(self._place(places[move.parent, move.token], move)))
                case Ask():
                    started.append(self._ask([self._spots[row] for row in move.rows]))
                case Act():
                    started.append(self._act(self._spots[move.row]))
                case Prune():
                    self.tree.nodes[move.row].kept = False
        return started

    def take(self, result: Result) -> None:
        """Write down what was awaited."""
        match result:
            case _Grown():
                self._add(result)
            case _Judged():
                for spot, score in zip(result.spots, result.scores, strict=True):
                    spot.is_asked, spot.score = True, score
                    self.tree.nodes[spot.row].judged = score
            case _Acted():
                self._finish(result)

    async def replay(self, step: Node) -> None:
        """Take a grown step behind the last one, and have the environment answer it again once its turn is whole."""
        behind = self._spots[-1] if self._spots else self._root
        turn_ids = [*behind.turn_ids, *step.action_ids]
        if step.is_part:
            spot = replace(behind, turn_ids=turn_ids)
        else:
            is_whole = turn_ids[-1:] != [] and turn_ids[-1] in self._environment.stop_token_ids
            async with asyncio.timeout(self._cfg.turn_timeout_s):
                turn = await self._environment.act(behind.state, turn_ids, stopped=is_whole)
            if turn.observation_ids != step.observation_ids or turn.stop is not StopReason.continues:
                raise DataError(
                    f'acting step {behind.num_turns} of prompt "{self.tree.prompt.id}" again gave '
                    f'"{turn.observation_text}" ({turn.stop}) where it gave "{step.observation_text}" before: no value '
                    f"can be measured behind it. Tools must answer the same call alike; take others out of the task, "
                    f"or leave the source out."
                )
            spot = replace(behind, state=turn.state, turn_ids=[], num_turns=behind.num_turns + 1)
        behind.num_children = 1
        row = self.tree.add(replace(step, parent=len(self.tree.nodes) - 1))
        self._spots.append(replace(spot, key=(*behind.key, 0), name=(*behind.name, 0), row=row, num_children=0))

    def cut(self) -> None:
        """Time is up: steps that were to be continued end here, by the world's fault. Candidates that nobody had
        chosen yet stay as they are."""
        parents = {node.parent for node in self.tree.nodes}
        for row, (node, spot) in enumerate(zip(self.tree.nodes, self._spots, strict=True)):
            if spot.is_acting or (node.stop is StopReason.continues and row not in parents):
                node.stop, node.observation_ids, node.is_part = StopReason.deadline, [], False

    def sort(self) -> None:
        """Put rows in canonical order: depth first, children by their number."""
        self._spots.sort(key=lambda spot: spot.key)
        row_of = {spot.row: row for row, spot in enumerate(self._spots)} | {ROOT: ROOT}
        nodes = [self.tree.nodes[spot.row] for spot in self._spots]
        self.tree.nodes = [replace(node, parent=row_of[node.parent]) for node in nodes]
        for row, spot in enumerate(self._spots):
            spot.row = row

    def _spot(self, row: int) -> _Spot:
        return self._root if row == ROOT else self._spots[row]

    def _split(self, spot: _Spot, token: int) -> _Spot:
        """Cut the step before a spot in two. The spot stays where it is, behind the rest."""
        row, node, key = spot.row, self.tree.nodes[spot.row], spot.key
        behind = self._spot(node.parent)
        size = len(self.tree.path_ids(node.parent)) + token
        beginning = _Spot(
            key=key,
            name=(*spot.name, "token", size),
            state=behind.state,
            row=row,
            turn_ids=behind.turn_ids + node.action_ids[:token],
            num_turns=behind.num_turns,
            num_children=1,
        )
        self.tree = split(self.tree, row, token)
        for each in self._spots[row:]:
            each.row += 1
            if each.key[: len(key)] == key:
                each.key = (*key, 0, *each.key[len(key) :])
        self._spots.insert(row, beginning)
        return beginning

    def _place(self, behind: _Spot, expansion: Expansion) -> _Place:
        """Reserve the next child number behind the expansion's parent."""
        number = behind.num_children
        behind.num_children += 1
        return _Place(behind, number, expansion, self.tree.path_ids(behind.row))

    async def _step(self, place: _Place) -> _Grown:
        """Sample one step; the environment answers it when its turn is whole and it is no candidate."""
        behind, expansion = place.behind, place.expansion
        room = min(
            self._cfg.max_turn_tokens - len(behind.turn_ids), self._cfg.max_context_tokens - len(place.context_ids)
        )
        limit = min(room, expansion.max_tokens or room)
        sampling = Sampling(
            max_tokens=limit,
            temperature=self._cfg.temperature,
            top_p=self._cfg.top_p,
            stop_token_ids=self._environment.stop_token_ids,
            seed=derive_seed(self._seed, *behind.name, place.number),
        )
        sampled: Sampled | None = None
        turn_limit = asyncio.timeout(self._cfg.turn_timeout_s)
        try:
            async with turn_limit:
                sampled = await self._engine.sample(place.context_ids, sampling)
                assert sampled.context_ids == place.context_ids, "the engine continued other tokens than the tree holds"
                is_whole = sampled.stopped or limit == room
                turn = await self._answer(behind, sampled, drafted=expansion.drafted) if is_whole else None
        except TimeoutError:
            if not turn_limit.expired():
                raise  # somebody else's time was up
            turn = Turn(state=behind.state, facts=StepFacts(kind=StepKind.unread), stop=StopReason.deadline)
            if sampled is None:  # nothing is known of the turn but where it was to begin
                version = self._engine.version
                sampled = Sampled(
                    token_ids=[], logprobs=[], stopped=False, version=version, context_ids=place.context_ids
                )
        return _Grown(place, sampled, turn)

    async def _answer(self, behind: _Spot, sampled: Sampled, *, drafted: bool) -> Turn | None:
        """What the environment says of a whole turn; a candidate is read, where that is possible without acting."""
        turn_ids = [*behind.turn_ids, *sampled.token_ids]
        if not drafted:
            return await self._environment.act(behind.state, turn_ids, stopped=sampled.stopped)
        read = getattr(self._environment, "read", None)
        return await read(behind.state, turn_ids, stopped=sampled.stopped) if read else None

    async def _ask(self, spots: list[_Spot]) -> _Judged:
        if self._judge is None:
            if self._cfg.judge:
                raise ConfigError(
                    f'rollout.judge="{self._cfg.judge}", but whoever grows this tree was given no judge: steps would '
                    f"be chosen blindly. Use rollout.judge= (empty) to choose uniformly."
                )
            return _Judged(spots, [None] * len(spots))
        # Where the world failed there is nothing to judge, and maybe not a single token.
        asked = [spot.row for spot in spots if self.tree.nodes[spot.row].stop not in WORLD_FAILED]
        said = dict(zip(asked, await self._judge.score(self.tree, asked), strict=True)) if asked else {}
        return _Judged(spots, [said.get(spot.row) for spot in spots])

    async def _act(self, spot: _Spot) -> _Acted:
        for each in self._spots:
            each.is_draft = each.is_draft and each.key[:-1] != spot.key[:-1]
        spot.is_acting = True
        node = self.tree.nodes[spot.row]
        turn_limit = asyncio.timeout(self._cfg.turn_timeout_s)
        try:
            async with turn_limit:
                turn_ids = spot.turn_ids + node.action_ids
                turn = await self._environment.act(spot.state, turn_ids, stopped=spot.stopped)
        except TimeoutError:
            if not turn_limit.expired():
                raise
            turn = Turn(state=spot.state, facts=node.facts, stop=StopReason.deadline, action_text=node.action_text)
        return _Acted(spot, turn)

    def _add(self, grown: _Grown) -> None:
        """Append a grown step; one that cannot be continued becomes a leaf."""
        place, sampled, turn = grown.place, grown.sampled, grown.turn
        behind, is_late = place.behind, turn is not None and turn.stop is StopReason.deadline
        drafted = place.expansion.drafted and not is_late
        is_part = turn is None and not drafted
        row = self.tree.add(
            Node(
                parent=behind.row,
                action_ids=sampled.token_ids,
                action_logprobs=sampled.logprobs,
                facts=turn.facts if turn else StepFacts(kind=StepKind.unread),
                # A candidate is not chosen until it is.
                stop=StopReason.continues if is_part else StopReason.not_chosen,
                version=sampled.version,
                num_cached_tokens=sampled.num_cached_tokens,
                branch=place.expansion.branch,
                action_text=turn.action_text if turn else "",
                is_part=is_part,
            )
        )
        spot = _Spot(
            key=(*behind.key, place.number),
            name=(*behind.name, place.number),
            state=behind.state,
            row=row,
            turn_ids=[*behind.turn_ids, *sampled.token_ids] if is_part else behind.turn_ids,
            num_turns=behind.num_turns,
            is_draft=drafted,
            stopped=sampled.stopped,
        )
        self._spots.append(spot)
        if turn and not drafted:
            self._finish(_Acted(spot, turn))

    def _finish(self, acted: _Acted) -> None:
        """Write down what the environment answered the turn that ends at a spot."""
        spot, turn, node = acted.spot, acted.turn, self.tree.nodes[acted.spot.row]
        spot.state, spot.turn_ids, spot.num_turns, spot.is_acting = turn.state, [], spot.num_turns + 1, False
        node.stop = turn.stop
        if turn.stop is StopReason.continues:
            length = len(self.tree.path_ids(spot.row)) + len(turn.observation_ids)
            if length >= self._cfg.max_context_tokens:
                node.stop = StopReason.context
            elif spot.num_turns >= self._cfg.max_steps:
                node.stop = StopReason.max_steps
        # A leaf's reply is never seen by the model, so it is kept for people only.
        node.observation_ids = turn.observation_ids if node.stop is StopReason.continues else []
        node.facts, node.action_text, node.observation_text = turn.facts, turn.action_text, turn.observation_text
