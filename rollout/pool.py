"""The pool: hands prompts to rollout workers, and re-grows what a dead one lost."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from conf.errors import WaitTimeout, WorkerLost
from conf.schema import Config, RolloutConfig
from rollout.seeds import derive_seed
from rollout.tree import Tree
from rollout.types import Prompt, Sampled, Sampling
from rollout.waiting import value_of, wait_all, wait_some
from rollout.worker import start_worker

logger = logging.getLogger(__name__)

CLOSE_LIMIT_S = 20.0
WEIGHTS_LIMIT_S = 600.0
GRACE_S = 60.0
"""What a tree may take beyond rollout.tree_timeout_s before its worker counts as hung."""


@dataclass(slots=True, eq=False)
class _Worker:
    actor: Any
    number: int
    trees: dict[ray.ObjectRef[Any], int] = field(default_factory=dict)
    """What it is growing: the call, and the index of its prompt."""


class RolloutPool:
    """`cfg.rollout.num_workers` workers that share the prompts of a batch."""

    def __init__(self, cfg: Config, model_path: str, log_dir: Path, *, gpus_per_worker: float = 0) -> None:
        """Start every worker and wait until all engines are loaded.

        Raises: WaitTimeout, WorkerLost when an engine does not come up.
        """
        self._cfg, self._model_path, self._log_dir, self._gpus = cfg, model_path, log_dir, gpus_per_worker
        self._weights: tuple[str, int] | None = None
        self._restarts = 0
        # Side by side: most of a start is imports.
        self._workers = [_Worker(self._new_actor(number), number) for number in range(cfg.rollout.num_workers)]
        try:
            self._start(self._workers)
        except BaseException:
            self.close()
            raise

    def grow(
        self, prompts: Sequence[Prompt], seed: int, rollout: RolloutConfig | None = None
    ) -> Iterator[tuple[int, Tree]]:
        """Trees of the prompts as they finish, each with the index of its prompt.

        A tree depends on its prompt, the seed and the weights alone, so one that is grown again elsewhere is the same.

        Args:
            seed: of the batch.
            rollout: how to grow; `cfg.rollout` by default.
        Raises: WorkerLost after more dead workers than rollout.max_worker_restarts.
        """
        rollout = rollout or self._cfg.rollout
        waiting = deque(range(len(prompts)))
        share = max(1, self._cfg.rollout.max_running_requests // rollout.num_leaves)
        limit_s = rollout.tree_timeout_s + GRACE_S
        while waiting or any(worker.trees for worker in self._workers):
            self._hand_out(waiting, prompts, rollout, seed, share)
            calls = {ref: worker for worker in self._workers for ref in worker.trees}
            try:
                ready = wait_some(
                    list(calls), limit_s=limit_s, what=f"a tree ({len(waiting) + len(calls)} of {len(prompts)} left)"
                )
            except WaitTimeout:
                for worker in set(calls.values()):
                    waiting.extendleft(self._replace(worker, f"grew no tree within {limit_s:.0f} s"))
                continue
            for ref in ready:
                worker = calls[ref]
                if ref not in worker.trees:
                    continue  # lost with its worker a moment ago, and handed out again
                try:
                    tree = value_of(ref)
                except RayActorError as error:
                    waiting.extendleft(self._replace(worker, str(error).splitlines()[0]))
                    continue
                yield worker.trees.pop(ref), tree

    def load_weights(self, path: str, version: int) -> None:
        """Have every engine take the weights at `path`; a worker that dies in it is replaced and given them too."""
        self._weights = (path, version)
        calls = [(worker, worker.actor.load_weights.remote(path, version)) for worker in self._workers]
        for worker, ref in calls:
            try:
                wait_all([ref], limit_s=WEIGHTS_LIMIT_S, what=f"worker {worker.number} to load weights {version}")
            except RayActorError as error:
                self._replace(worker, str(error).splitlines()[0])

    def sample_everywhere(self, requests: Sequence[tuple[list[int], Sampling]]) -> list[list[Sampled]]:
        """The same steps, given as (context ids, sampling), by each engine: one list for each engine."""
        calls = [worker.actor.sample.remote(list(requests)) for worker in self._workers]
        return wait_all(calls, limit_s=WEIGHTS_LIMIT_S, what="the canary's samples")

    def close(self) -> None:
        """Close every engine, then its actor; one that does not answer is killed."""
        calls = [worker.actor.close.remote() for worker in self._workers]
        ray.wait(calls, num_returns=len(calls), timeout=CLOSE_LIMIT_S)
        for worker in self._workers:
            ray.kill(worker.actor)
        self._workers = []

    def _hand_out(
        self, waiting: deque[int], prompts: Sequence[Prompt], rollout: RolloutConfig, seed: int, share: int
    ) -> None:
        while waiting:
            worker = min(self._workers, key=lambda each: len(each.trees))
            if len(worker.trees) >= share:
                return
            index = waiting.popleft()
            tree_seed = derive_seed(seed, prompts[index].id, index)
            worker.trees[worker.actor.grow.remote(prompts[index], rollout, tree_seed)] = index

    def _replace(self, worker: _Worker, why: str) -> list[int]:
        """Put a new actor in a lost worker's place and return the prompts it was growing."""
        self._restarts += 1
        log_path = self._log_path(worker.number)
        if self._restarts > self._cfg.rollout.max_worker_restarts:
            raise WorkerLost(
                f"rollout worker {worker.number} was lost ({why}), number {self._restarts} of this run: "
                f"rollout.max_worker_restarts={self._cfg.rollout.max_worker_restarts} is used up. "
                f"Its log is {log_path}; out of memory is the usual cause: lower rollout.num_workers or "
                "rollout.kv_cache_mib."
            )
        logger.warning("rollout worker %d was lost (%s); starting another, log %s", worker.number, why, log_path)
        ray.kill(worker.actor)
        lost, worker.trees = list(worker.trees.values()), {}
        worker.actor = self._new_actor(worker.number)
        self._start([worker])
        return lost

    def _new_actor(self, number: int) -> Any:
        return start_worker(self._cfg, self._model_path, str(self._log_path(number)), num_gpus=self._gpus)

    def _log_path(self, number: int) -> Path:
        return self._log_dir / f"rollout_worker_{number}.log"

    def _start(self, workers: Sequence[_Worker]) -> None:
        limit_s = self._cfg.rollout.start_timeout_s
        calls = [worker.actor.start.remote() for worker in workers]
        try:
            wait_all(calls, limit_s=limit_s, what="the engines to load")
            if self._weights is not None:
                path, version = self._weights
                wait_all(
                    [worker.actor.load_weights.remote(path, version) for worker in workers],
                    limit_s=WEIGHTS_LIMIT_S,
                    what=f"a new worker to load weights {version}",
                )
        except RayActorError as error:
            raise WorkerLost(
                f"a rollout worker died while loading the model ({str(error).splitlines()[0]}). "
                f"Its log is in {self._log_dir}."
            ) from error
        except RayTaskError as error:
            raise WorkerLost(
                f'the {self._cfg.rollout.engine.value} engine cannot load "{self._model_path}" ({error.cause!r}), so '
                f"no worker can sample. Its log is in {self._log_dir}; if this engine does not serve the model, try "
                "rollout.engine=transformers."
            ) from error

    def actors(self) -> list[Any]:
        """Handles of the workers, for who asks them beside the pool; another after each restart."""
        return [worker.actor for worker in self._workers]

    def worker_pids(self) -> list[int]:
        """Process ids of the workers, in their order."""
        return wait_all([each.actor.pid.remote() for each in self._workers], limit_s=CLOSE_LIMIT_S, what="pids")

    @property
    def num_restarts(self) -> int:
        """Workers replaced so far."""
        return self._restarts
