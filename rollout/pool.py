"""The pool: hands prompts to rollout workers, and re-grows what a dead one lost."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from conf.errors import EngineLost, WaitTimeout, WorkerLost
from conf.schema import Config, RolloutConfig
from rollout.balance import least_busy
from rollout.seeds import derive_seed
from rollout.tree import Tree
from rollout.types import Prompt, Sampled, Sampling
from rollout.waiting import value_of, wait_all, wait_some
from rollout.worker import start_worker

logger = logging.getLogger(__name__)

LOST = (RayActorError, EngineLost)
"""What a call of a worker raises that can do no more."""

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

    def __init__(
        self, cfg: Config, model_path: str, log_dir: Path, *, gpus_per_worker: float = 0, judge_actor: Any = None
    ) -> None:
        """Start every worker and wait until all engines are loaded.

        Args:
            judge_actor: who is asked about growing trees where rollout.judge names a source.

        Raises: WaitTimeout, WorkerLost when an engine does not come up.
        """
        self._cfg, self._model_path, self._log_dir, self._gpus = cfg, model_path, log_dir, gpus_per_worker
        self._judge_actor = judge_actor
        self._weights: tuple[str, int] | None = None
        self._restarts = 0
        self._lost: deque[int] = deque()
        """Prompts whose trees went with their worker."""
        self._tree_tokens = 0.0
        """Sampled tokens of a tree, the running mean: what a worker is expected to still do for each."""
        # Trees may grow on one thread while weights are published on another.
        self._changing = threading.RLock()
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
        It stays on the engine that holds its prefixes.

        Args:
            seed: of the batch.
            rollout: how to grow; `cfg.rollout` by default.
        Raises: WorkerLost when no worker is left.
        """
        rollout = rollout or self._cfg.rollout
        waiting, num_done, started = deque(range(len(prompts))), 0, time.monotonic()
        share = max(1, self._cfg.rollout.max_running_requests // rollout.num_leaves)
        limit_s = rollout.tree_timeout_s + GRACE_S
        while True:
            waiting.extendleft(self._taken_lost())
            if not waiting and not any(worker.trees for worker in self._workers):
                return
            self._hand_out(waiting, prompts, rollout, seed, share)
            calls = {ref: worker for worker in self._workers for ref in worker.trees}
            what = f"a tree ({len(waiting) + len(calls)} of {len(prompts)} left)"
            left_s = self._batch_left_s(rollout, started, num_done, len(prompts))
            try:
                ready = wait_some(list(calls), limit_s=min(limit_s, left_s), what=what)
            except WaitTimeout:
                if left_s < limit_s:
                    self._cut(calls, len(prompts) - num_done, len(prompts))
                    return
                for worker in set(calls.values()):
                    self._replace(worker, worker.actor, f"grew no tree within {limit_s:.0f} s")
                continue
            for ref in ready:
                worker = calls[ref]
                if ref not in worker.trees:
                    continue  # lost with its worker a moment ago, and handed out again
                actor = worker.actor
                try:
                    tree = value_of(ref)
                except LOST as error:
                    self._replace(worker, actor, str(error).splitlines()[0])
                    continue
                self._tree_tokens += (tree.num_generated_tokens() - self._tree_tokens) / 16
                num_done += 1
                yield worker.trees.pop(ref), tree

    def load_weights(self, path: str, version: int) -> None:
        """Have every engine take the weights at `path`; a worker that dies in it is replaced and given them too.

        What an engine samples meanwhile goes on under the new weights; every step records the version it began with.
        """
        with self._changing:
            self._weights = (path, version)
            calls = [
                (worker, worker.actor, worker.actor.load_weights.remote(path, version)) for worker in self._workers
            ]
            for worker, actor, ref in calls:
                try:
                    wait_all([ref], limit_s=WEIGHTS_LIMIT_S, what=f"worker {worker.number} to load weights {version}")
                except LOST as error:
                    self._replace(worker, actor, str(error).splitlines()[0])

    def sample_everywhere(self, requests: Sequence[tuple[list[int], Sampling]]) -> list[list[Sampled]]:
        """The same steps, given as (context ids, sampling), by each engine: one list for each engine.

        A worker that dies in it is replaced, and its successor asked.
        """
        with self._changing:
            return [self._sampled(worker, list(requests)) for worker in list(self._workers) if worker in self._workers]

    def _sampled(self, worker: _Worker, requests: list[tuple[list[int], Sampling]]) -> list[Sampled]:
        while True:
            actor = worker.actor
            try:
                call = actor.sample.remote(requests)
                return wait_all([call], limit_s=WEIGHTS_LIMIT_S, what=f"worker {worker.number} to sample")[0]
            except LOST as error:
                self._replace(worker, actor, str(error).splitlines()[0])
                if worker not in self._workers:
                    worker = self._workers[0]

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
        """Give each next prompt to the worker with the least to do, up to `share` trees at a time."""

        def expected(worker: _Worker) -> list[float]:
            return [len(prompts[index].token_ids) + self._tree_tokens for index in worker.trees.values()]

        with self._changing:
            while waiting:
                place = least_busy([expected(worker) for worker in self._workers], share)
                if place is None:
                    return
                worker, index = self._workers[place], waiting.popleft()
                tree_seed = derive_seed(seed, prompts[index].id, index)
                worker.trees[worker.actor.grow.remote(prompts[index], rollout, tree_seed)] = index

    def _batch_left_s(self, rollout: RolloutConfig, started: float, num_done: int, num_prompts: int) -> float:
        """Seconds until the batch may close without the rest; infinite where it may not."""
        if not rollout.batch_timeout_s or num_done < rollout.min_batch_share * num_prompts:
            return math.inf
        return max(0.1, rollout.batch_timeout_s - (time.monotonic() - started))

    def _cut(self, calls: dict[ray.ObjectRef[Any], _Worker], num_left: int, num_prompts: int) -> None:
        """Give up the trees that are still growing."""
        logger.warning(
            "rollout.batch_timeout_s=%g: the batch closes without %d of its %d trees",
            self._cfg.rollout.batch_timeout_s, num_left, num_prompts,
        )  # fmt: skip
        for ref, worker in calls.items():
            ray.cancel(ref)
            worker.trees.pop(ref, None)

    def _taken_lost(self) -> list[int]:
        with self._changing:
            lost = list(self._lost)
            self._lost.clear()
            return lost

    def _replace(self, worker: _Worker, lost_actor: Any, why: str) -> None:
        """Put a new actor in a lost one's place, or do without where too many were lost; its trees are grown again.

        Raises: WorkerLost when none is left.
        """
        with self._changing:
            if worker.actor is not lost_actor or worker not in self._workers:
                return  # whoever noticed first has done it
            self._restarts += 1
            self._lost.extend(worker.trees.values())
            worker.trees = {}
            ray.kill(lost_actor)
            log_path = self._log_path(worker.number)
            if self._restarts <= self._cfg.rollout.max_worker_restarts:
                logger.warning(
                    "rollout worker %d was lost (%s); starting another, log %s", worker.number, why, log_path
                )
                worker.actor = self._new_actor(worker.number)
                self._start([worker])
                return
            self._workers.remove(worker)
            lost = (
                f"rollout worker {worker.number} was lost ({why}), number {self._restarts} of this run: "
                f"rollout.max_worker_restarts={self._cfg.rollout.max_worker_restarts} is used up"
            )
            if self._workers:
                logger.warning("%s; going on with the other %d, log %s", lost, len(self._workers), log_path)
                return
            raise WorkerLost(
                f"{lost}, and none is left. Its log is {log_path}; out of memory is the usual cause: lower "
                f"rollout.num_workers or rollout.kv_cache_mib."
            )

    def _new_actor(self, number: int) -> Any:
        log, judge = str(self._log_path(number)), self._judge_actor
        return start_worker(self._cfg, self._model_path, log, num_gpus=self._gpus, judge_actor=judge)

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
        except LOST as error:
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
