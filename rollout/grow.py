"""Grows one tree: an async function of an engine, an environment and an expander."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from conf.errors import DataError
from conf.schema import RolloutConfig
from rollout.engine import Engine
from rollout.environment import Environment, Turn
from rollout.expand import Chains, Expander, Expansion
from rollout.seeds import derive_seed
from rollout.tree import ROOT, Node, Tree
from rollout.types import Prompt, Sampled, Sampling, StopReason


async def grow_tree(
    prompt: Prompt, engine: Engine, environment: Environment, expander: Expander, cfg: RolloutConfig, seed: int
) -> Tree:
    """The tree that the expander asks for, the same whenever the seed and the weights are the same.

    Every step draws from a seed of its own place in the tree, and rows are put in canonical (depth-first) order, so
    neither the order in which steps finish nor the worker that grows them leaves a trace.

    Args:
        seed: of this tree.
    Raises: AssertionError when the engine continued other tokens than the tree holds (the path law);
        whatever the engine raises. A crashed tool or a passed deadline ends trajectories, it does not raise.
    """
    return await _grown(_Growth(prompt, engine, environment, cfg, seed), expander, cfg)


async def complete_path(
    prompt: Prompt,
    steps: Sequence[Node],
    num: int,
    engine: Engine,
    environment: Environment,
    cfg: RolloutConfig,
    seed: int,
) -> Tree:
    """A path and `num` trajectories that go on from its end, each to its own: what a Monte-Carlo value is the mean of.

    The environment's state behind the path is made by acting the steps again.

    Args:
        steps: from the first to the one to go on from; none for the prompt. The last one must be open.
        seed: of these completions.
    Raises: as `grow_tree`; DataError when the environment answers a step otherwise than before.
    """
    growth = _Growth(prompt, engine, environment, cfg, seed)
    for step in steps:
        await growth.replay(step)
    return await _grown(growth, Chains(num, start=len(steps) - 1), cfg)


async def _grown(growth: _Growth, expander: Expander, cfg: RolloutConfig) -> Tree:
    deadline = time.monotonic() + cfg.tree_timeout_s
    growing: set[asyncio.Task[_Grown]] = set()
    try:
        while True:
            for expansion in expander.expand(growth.tree, growth.open_rows(), len(growing)):
                growing.add(asyncio.create_task(growth.step(growth.place(expansion))))
            if not growing:
                break
            done, growing = await asyncio.wait(
                growing, timeout=max(0.0, deadline - time.monotonic()), return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                growth.cut()
                break
            for task in done:
                growth.add(task.result())
            if not growing:
                growth.sort()
    finally:
        for task in growing:
            task.cancel()
        # A cancelled request is aborted in the engine before its slot is given to another tree.
        await asyncio.gather(*growing, return_exceptions=True)
    growth.sort()
    _mark_pruned(growth.tree, expander.pruned_leaves(growth.tree))
    return growth.tree


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a step grows. `key` is the path of child numbers from the prompt: its name in every process."""

    parent_key: tuple[int, ...]
    key: tuple[int, ...]
    branch: int
    context_ids: list[int]
    state: Any


@dataclass(frozen=True, slots=True)
class _Grown:
    place: _Place
    sampled: Sampled
    turn: Turn


class _Growth:
    """A tree under growth: its rows, and for each row its key and the environment's state behind it."""

    def __init__(self, prompt: Prompt, engine: Engine, environment: Environment, cfg: RolloutConfig, seed: int) -> None:
        self.tree = Tree(prompt=prompt)
        self._engine, self._environment, self._cfg, self._seed = engine, environment, cfg, seed
        self._keys: list[tuple[int, ...]] = []
        self._states: dict[tuple[int, ...], Any] = {(): environment.reset(prompt)}
        self._num_children: dict[tuple[int, ...], int] = {}

    def open_rows(self) -> list[int]:
        """Rows that may be continued and that nobody has continued yet."""
        return [
            row
            for row, node in enumerate(self.tree.nodes)
            if node.stop is StopReason.continues and not self._num_children.get(self._keys[row])
        ]

    def place(self, expansion: Expansion) -> _Place:
        """Reserve the next child number behind the expansion's parent."""
        parent_key = () if expansion.parent == ROOT else self._keys[expansion.parent]
        number = self._num_children.get(parent_key, 0)
        self._num_children[parent_key] = number + 1
        context_ids = self.tree.path_ids(expansion.parent)
        return _Place(parent_key, (*parent_key, number), expansion.branch, context_ids, self._states[parent_key])

    async def replay(self, step: Node) -> None:
        """Take a grown step behind the last one, and have the environment answer it again."""
        key = self._keys[-1] if self._keys else ()
        is_whole = step.action_ids[-1:] != [] and step.action_ids[-1] in self._environment.stop_token_ids
        turn = await self._environment.act(self._states[key], step.action_ids, stopped=is_whole)
        if turn.observation_ids != step.observation_ids or turn.stop is not StopReason.continues:
            raise DataError(
                f'acting step {len(self._keys)} of prompt "{self.tree.prompt.id}" again gave "{turn.observation_text}" '
                f'({turn.stop}) where it gave "{step.observation_text}" before: no value can be measured behind it. '
                f"Tools must answer the same call alike; take others out of the task, or leave the source out."
            )
        self.tree.add(replace(step, parent=len(self.tree.nodes) - 1))
        self._num_children[key] = 1
        self._keys.append((*key, 0))
        self._states[self._keys[-1]] = turn.state

    async def step(self, place: _Place) -> _Grown:
        """Sample one step and let the environment answer it."""
        room = self._cfg.max_context_tokens - len(place.context_ids)
        sampling = Sampling(
            max_tokens=min(self._cfg.max_turn_tokens, room),
            temperature=self._cfg.temperature,
            top_p=self._cfg.top_p,
            stop_token_ids=self._environment.stop_token_ids,
            seed=derive_seed(self._seed, *place.key),
        )
        sampled = await self._engine.sample(place.context_ids, sampling)
        assert sampled.context_ids == place.context_ids, "the engine continued other tokens than the tree holds"
        turn = await self._environment.act(place.state, sampled.token_ids, stopped=sampled.stopped)
        return _Grown(place, sampled, turn)

    def add(self, grown: _Grown) -> None:
        """Append a grown step; one that cannot be continued becomes a leaf."""
        place, sampled, turn = grown.place, grown.sampled, grown.turn
        stop = turn.stop
        if stop is StopReason.continues:
            length = len(place.context_ids) + len(sampled.token_ids) + len(turn.observation_ids)
            if length >= self._cfg.max_context_tokens:
                stop = StopReason.context
            elif len(place.key) >= self._cfg.max_steps:
                stop = StopReason.max_steps
        goes_on = stop is StopReason.continues
        self.tree.add(
            Node(
                parent=ROOT if not place.parent_key else self._keys.index(place.parent_key),
                action_ids=sampled.token_ids,
                action_logprobs=sampled.logprobs,
                # A leaf's reply is never seen by the model, so it is kept for people only.
                observation_ids=turn.observation_ids if goes_on else [],
                facts=turn.facts,
                stop=stop,
                version=sampled.version,
                num_cached_tokens=sampled.num_cached_tokens,
                branch=place.branch,
                action_text=turn.action_text,
                observation_text=turn.observation_text,
            )
        )
        self._keys.append(place.key)
        self._states[place.key] = turn.state

    def cut(self) -> None:
        """Time is up: steps that were to be continued end here, by the world's fault."""
        parents = {node.parent for node in self.tree.nodes}
        for row, node in enumerate(self.tree.nodes):
            if node.stop is StopReason.continues and row not in parents:
                node.stop, node.observation_ids = StopReason.deadline, []

    def sort(self) -> None:
        """Put rows in canonical order: depth first, children by their number."""
        order = sorted(range(len(self._keys)), key=self._keys.__getitem__)
        row_of = {old: new for new, old in enumerate(order)} | {ROOT: ROOT}
        nodes = [self.tree.nodes[old] for old in order]
        self.tree.nodes = [replace(node, parent=row_of[node.parent]) for node in nodes]
        self._keys = [self._keys[old] for old in order]


def _mark_pruned(tree: Tree, pruned_leaves: set[int]) -> None:
    """Steps on no kept trajectory are kept=False: recorded, never trained."""
    kept = {row for leaf in tree.leaves() if leaf not in pruned_leaves for row in tree.path(leaf)}
    for row, node in enumerate(tree.nodes):
        node.kept = row in kept
