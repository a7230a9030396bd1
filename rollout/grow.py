"""Grows one tree: an async function of an engine, an environment and an expander."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from conf.schema import RolloutConfig
from rollout.engine import Engine
from rollout.environment import Environment
from rollout.expanders.base import Expander, Judge
from rollout.expanders.chains import Chains
from rollout.growth import Growth, Result
from rollout.patience import some_done
from rollout.tree import Node, Tree
from rollout.types import Prompt

CANCEL_LIMIT_S = 60.0
"""What a cancelled step may take to end; one that swallows it is left behind."""


async def grow_tree(
    prompt: Prompt,
    engine: Engine,
    environment: Environment,
    expander: Expander,
    cfg: RolloutConfig,
    seed: int,
    judge: Judge | None = None,
) -> Tree:
    """The tree that the expander asks for, the same whenever the seed, the weights and the judge are the same.

    Every step draws from a seed of its own place in the tree, and rows are put in canonical (depth-first) order, so
    neither the order in which steps finish nor the worker that grows them leaves a trace. A turn that takes longer than
    `cfg.turn_timeout_s` is given up by itself, and its request aborted; the tree's other steps go on.

    Args:
        seed: of this tree.
        judge: scores candidates for expanders that ask; without one nothing has a score.
    Raises: AssertionError when the engine continued other tokens than the tree holds (the path law);
        ConfigError when the config names a judge and none is given; whatever engine and judge raise. A crashed tool or
        a passed deadline ends trajectories, it does not raise.
    """
    return await _grown(Growth(prompt, engine, environment, cfg, seed, judge), expander, cfg)


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

    The environment's state behind the path is made by acting the turns again.

    Args:
        steps: from the first to the one to go on from; none for the prompt. The last one must be open.
        seed: of these completions.
    Raises: as `grow_tree`; DataError when the environment answers a step otherwise than before, TimeoutError when it
        takes longer than a turn may.
    """
    growth = Growth(prompt, engine, environment, cfg, seed)
    for step in steps:
        await growth.replay(step)
    return await _grown(growth, Chains(num, start=len(steps) - 1), cfg)


async def _grown(growth: Growth, expander: Expander, cfg: RolloutConfig) -> Tree:
    deadline, what = time.monotonic() + cfg.tree_timeout_s, f'steps of the tree of prompt "{growth.tree.prompt.id}"'
    growing: set[asyncio.Task[Result]] = set()
    try:
        while True:
            moves = expander.expand(growth.view(len(growing)))
            growing |= {asyncio.create_task(each) for each in growth.start(moves, is_still=not growing)}
            if not growing:
                break
            done, growing = await some_done(growing, limit_s=deadline - time.monotonic(), what=what)
            if not done:
                growth.cut()
                break
            for task in done:
                growth.take(task.result())
            if not growing:
                growth.sort()
    finally:
        for task in growing:
            task.cancel()
        # A cancelled request is aborted in the engine before its slot is given to another tree.
        await some_done(growing, limit_s=CANCEL_LIMIT_S, what=f"cancelled {what}", all_of_them=True)
    growth.sort()
    _mark_pruned(growth.tree, expander.pruned_leaves(growth.tree))
    return growth.tree


def _mark_pruned(tree: Tree, pruned_leaves: set[int]) -> None:
    """Steps on no kept trajectory are kept=False: recorded, never trained."""
    leaves = [leaf for leaf in tree.leaves() if tree.nodes[leaf].kept and leaf not in pruned_leaves]
    kept = {row for leaf in leaves for row in tree.path(leaf)}
    for row, node in enumerate(tree.nodes):
        node.kept = row in kept
