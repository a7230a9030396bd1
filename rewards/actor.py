"""The reward service as a Ray actor."""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from conf.errors import EngineLost
from conf.schema import RewardsConfig, RolloutConfig
from rewards.models.actor import ActorModel
from rewards.models.base import ModelError
from rewards.service import RewardService
from rewards.types import ScoredTree
from rollout.balance import at_home
from rollout.busy import BusyClock
from rollout.process import begin_actor
from rollout.seeds import derive_seed
from rollout.tree import Tree

COMPLETION_TRIES = 3
HOME_SLACK = 8
"""Completions that a worker may have under way beyond the least busy one's before others are asked."""
RESTART_PAUSE_S = 5.0
"""What a worker that is being replaced is given before its completions are asked of the others again."""


class WorkerCompleter:
    """Goes on from steps with the rollout workers: all that goes on from one prompt on the same worker, which then has
    the steps before in its prefix cache, unless others have much less to do."""

    def __init__(self, workers: Sequence[Any], rollout: RolloutConfig) -> None:
        self._rollout = rollout
        self._workers = list(workers)
        self._running = [0.0] * len(self._workers)

    async def complete(self, tree: Tree, row: int, num: int) -> Tree:
        """As `rewards.engine.Completer.complete`."""
        steps = [tree.nodes[each] for each in tree.path(row)]
        content = repr([(step.action_ids, step.observation_ids) for step in steps]).encode()
        version = steps[-1].version if steps else max((node.version for node in tree.nodes), default=0)
        path = hashlib.blake2b(content, digest_size=8).hexdigest()
        seed = derive_seed("complete", tree.prompt.id, version, path)
        for number in range(1, COMPLETION_TRIES + 1):
            place = at_home(tree.prompt.id, self._running, HOME_SLACK)
            self._running[place] += 1
            try:
                call = self._workers[place].complete.remote(tree.prompt, steps, num, self._rollout, seed)
                return await asyncio.wait_for(call, self._rollout.tree_timeout_s)
            except TimeoutError:
                raise TimeoutError(
                    f"no {num} completions within rollout.tree_timeout_s={self._rollout.tree_timeout_s:g}"
                ) from None
            except RayActorError as error:
                self._running[place] = math.inf  # whoever takes its place comes with the next tree
                if number == COMPLETION_TRIES:
                    raise ModelError(f"no rollout worker was left to go on with: {error}") from error
                await asyncio.sleep(RESTART_PAUSE_S)
            except RayTaskError as error:
                if isinstance(error.cause, EngineLost) and number < COMPLETION_TRIES:
                    self._running[place] = math.inf
                    continue
                raise ModelError(f"going on from a step failed: {error.cause}") from error
            finally:
                self._running[place] -= 1
        raise AssertionError("the last try returns or raises")


@ray.remote
class RewardActor:
    """Carries a `RewardService`; trees sent at the same time are scored at the same time."""

    def __init__(
        self,
        cfg: RewardsConfig,
        columns: Collection[str] | None = None,
        log_path: str = "",
        models: Mapping[str, ActorModel] | None = None,
        cache_path: str = "",
    ):
        """As `RewardService`; what the process prints goes to the file `log_path`, where one is given."""
        if log_path:
            begin_actor(Path(log_path))
        cache = Path(cache_path) if cache_path else None
        self._service = RewardService(cfg, columns, models=models, cache_path=cache)
        self._workers: list[Any] = []
        self._clock = BusyClock()

    async def judge(self, source: str, tree: Tree, rows: list[int]) -> list[float | None]:
        """What a source says of steps of a tree that still grows."""
        with self._clock.running():
            return await self._service.judge(source, tree, rows)

    async def score(
        self,
        tree: Tree,
        sources: Collection[str] | None = None,
        workers: Sequence[Any] = (),
        rollout: RolloutConfig | None = None,
    ) -> ScoredTree:
        """Score one tree, by these sources or by all.

        Args:
            workers, rollout: who goes on from steps from now on. They come with every tree, since one that is scored
                after this actor was lost and made anew finds nothing that was said before.
        """
        if rollout is not None and list(workers) != self._workers:
            self._workers = list(workers)
            self._service.use_completer(WorkerCompleter(self._workers, rollout))
        with self._clock.running():
            return await self._service.score(tree, sources)

    async def busy_seconds(self) -> dict[str, float]:
        """Time with a tree to score so far, waiting for models included."""
        return {"reward": self._clock.seconds()}

    async def pid(self) -> int:
        """Process id: another once Ray had to make the actor anew."""
        return os.getpid()

    async def ping(self) -> bool:
        """True: the actor is up and its sources are loaded."""
        return True

    async def close(self) -> None:
        """Stop the reward processes."""
        self._service.close()
