"""The pool: hands prompts to rollout workers, and re-grows what a dead one lost."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.exceptions import ActorUnschedulableError, RayActorError, RayError, RayTaskError

from conf.errors import DamagedWeights, EngineLost, GroveError, LineBroken, WaitTimeout, WorkerLost, first_line
from conf.schema import Config, RolloutConfig
from rollout.balance import least_busy
from rollout.lines import Offer
from rollout.seeds import derive_seed
from rollout.shards import Arrival, Published
from rollout.tree import Tree
from rollout.types import Prompt, Sampled, Sampling
from rollout.waiting import value_of, wait_all, wait_some
from rollout.worker import start_worker

logger = logging.getLogger(__name__)

LOST = (RayActorError, EngineLost)
"""What a call of a worker raises that can do no more."""

CLOSE_LIMIT_S = 20.0
WEIGHTS_LIMIT_S = 600.0
LOOK_EVERY_S = 5.0
"""How often a worker without a place is tried again."""
GRACE_S = 60.0
"""What a tree may take beyond rollout.tree_timeout_s before its worker counts as hung."""


class Places(Protocol):
    """Where workers run (`rl.places`)."""

    def of_worker(self, number: int) -> dict[str, Any] | None:
        """Options for Ray that start a worker in its place, or in another where its node is gone; None without room."""
        ...

    def lost_node(self, number: int) -> str:
        """The node of a worker if it is gone, else ""."""
        ...


class Anywhere:
    """Wherever Ray finds a core."""

    def of_worker(self, number: int) -> dict[str, Any]:
        """One core."""
        return {"num_cpus": 1}

    def lost_node(self, number: int) -> str:
        """Nodes are not told apart."""
        return ""


@dataclass(slots=True, eq=False)
class _Worker:
    actor: Any
    number: int
    trees: dict[ray.ObjectRef[Any], int] = field(default_factory=dict)
    """What it is growing: the call, and the index of its prompt."""


class RolloutPool:
    """`cfg.rollout.num_workers` workers that share the prompts of a batch."""

    def __init__(
        self, cfg: Config, model_path: str, log_dir: Path, *, places: Places | None = None, judge_actor: Any = None
    ) -> None:
        """Start every worker and wait until all engines are loaded.

        Args:
            places: where each worker goes; anywhere by default.
            judge_actor: who is asked about growing trees where rollout.judge names a source.

        Raises: WaitTimeout, WorkerLost when an engine does not come up.
        """
        self._cfg, self._model_path, self._log_dir, self._places = cfg, model_path, log_dir, places or Anywhere()
        self._judge_actor = judge_actor
        self._weights: Callable[[], Published] | None = None
        """Makes what a worker that comes later is given."""
        self._restarts = 0
        self._lost_nodes: set[str] = set()
        self._homeless: list[int] = []
        """Numbers of workers whose node is gone and that have no other place yet."""
        self._joining: dict[ray.ObjectRef[Any], _Worker] = {}
        """Workers that have a place again and load, by the call that starts them."""
        self._next_look = 0.0
        self._lost: deque[int] = deque()
        """Prompts whose trees went with their worker."""
        self._tree_tokens = 0.0
        """Sampled tokens of a tree, the running mean: what a worker is expected to still do for each."""
        # Trees may grow on one thread while weights are published on another.
        self._changing = threading.RLock()
        # Side by side: most of a start is imports.
        placed = [(number, self._places.of_worker(number)) for number in range(cfg.rollout.num_workers)]
        self._workers = [
            _Worker(self._new_actor(number, place), number) for number, place in placed if place is not None
        ]
        assert len(self._workers) == len(placed), "the plan has room for every worker"
        try:
            self._start(self._workers)
        except BaseException:
            self.close()
            raise

    def grow(
        self,
        prompts: Sequence[Prompt],
        seed: int,
        rollout: RolloutConfig | None = None,
        *,
        grown: Collection[int] = (),
    ) -> Iterator[tuple[int, Tree]]:
        """Trees of the prompts as they finish, each with the index of its prompt.

        A tree depends on its prompt, the seed and the weights alone, so one that is grown again elsewhere is the same.
        It stays on the engine that holds its prefixes.

        Args:
            seed: of the batch.
            rollout: how to grow; `cfg.rollout` by default.
            grown: indices of prompts whose trees are there already and are not grown again.
        Raises: WorkerLost when no worker is left.
        """
        rollout = rollout or self._cfg.rollout
        waiting = deque(index for index in range(len(prompts)) if index not in grown)
        num_done, started = len(prompts) - len(waiting), time.monotonic()
        share = max(1, self._cfg.rollout.max_running_requests // rollout.num_leaves)
        limit_s = rollout.tree_timeout_s + GRACE_S
        while True:
            self._call_back()
            waiting.extendleft(self._taken_lost())
            if not waiting and not any(worker.trees for worker in self._workers):
                return
            self._hand_out(waiting, prompts, rollout, seed, share)
            calls = {ref: worker for worker in self._workers for ref in worker.trees}
            what = f"a tree ({len(waiting) + len(calls)} of {len(prompts)} left)"
            left_s = self._batch_left_s(rollout, started, num_done, len(prompts))
            try:
                ready = wait_some([*calls, *self._joining], limit_s=min(limit_s, left_s), what=what)
            except WaitTimeout:
                if left_s < limit_s:
                    self._cut(calls, rollout, len(prompts) - num_done, len(prompts))
                    return
                for worker in set(calls.values()):
                    self._replace(worker, worker.actor, f"grew no tree within {limit_s:.0f} s")
                continue
            for ref in ready:
                if ref in self._joining:
                    self._join(ref)
                    continue
                worker = calls[ref]
                if ref not in worker.trees:
                    continue  # lost with its worker a moment ago, and handed out again
                actor = worker.actor
                try:
                    tree = value_of(ref)
                except LOST as error:
                    self._replace(worker, actor, first_line(error))
                    continue
                self._tree_tokens += (tree.num_generated_tokens() - self._tree_tokens) / 16
                num_done += 1
                yield worker.trees.pop(ref), tree

    def load_weights(self, published: Published) -> list[Arrival]:
        """Have every engine take a version; a worker that dies in it is replaced and given it too.

        What an engine samples meanwhile goes on under the new weights; every step records the version it began with.

        Returns: how long it took each engine that was there all the time.
        Raises: DamagedWeights when an engine did not get what was sent, once all others have answered.
        """
        with self._changing:
            self._weights = lambda: published
            calls = [(worker, worker.actor, worker.actor.load_weights.remote(published)) for worker in self._workers]
            return self._arrivals(calls, published.version)

    def receive_weights(
        self,
        offer: Callable[[dict[int, str]], Mapping[int, Offer]],
        later: Callable[[], Published],
        lost: Callable[[str], None],
    ) -> list[Arrival]:
        """As `load_weights`, straight from the learner's lines.

        Args:
            offer: told the workers that are there, number -> name of its process; has the learner send, and gives what
                each worker is to know.
            later: makes what a worker is given that comes later, or dies in it and is replaced.
            lost: told of a worker that died, for whom the learner would wait.
        Raises: DamagedWeights, LineBroken once all workers have answered: what each of them holds is unknown then.
        """
        with self._changing:
            self._weights = later
            offers = offer({worker.number: worker.actor._actor_id.hex() for worker in self._workers})
            told = [(worker, worker.actor, offers[worker.number]) for worker in self._workers]
            calls = [(worker, actor, actor.receive_weights.remote(each)) for worker, actor, each in told]
            return self._arrivals(calls, next(iter(offers.values())).version, lost)

    def _arrivals(
        self,
        calls: list[tuple[_Worker, Any, ray.ObjectRef[Any]]],
        version: int,
        lost: Callable[[str], None] = lambda why: None,
    ) -> list[Arrival]:
        arrivals: list[Arrival] = []
        failed: DamagedWeights | LineBroken | None = None
        waiting = {ref: (worker, actor) for worker, actor, ref in calls}
        while waiting:
            what = f"{len(waiting)} workers to load weights {version}"
            for ref in wait_some(list(waiting), limit_s=WEIGHTS_LIMIT_S, what=what):
                worker, actor = waiting.pop(ref)
                try:
                    arrivals.append(value_of(ref))
                except LOST as error:
                    lost(f"rollout worker {worker.number} was lost")
                    self._replace(worker, actor, first_line(error))
                except (DamagedWeights, LineBroken) as error:
                    failed = error
        if failed is not None:
            raise failed
        return arrivals

    def sleep(self) -> None:
        """Have every engine leave its GPU to others until new weights come. Nothing may be growing."""
        with self._changing:
            for worker in list(self._workers):
                while worker in self._workers:
                    actor = worker.actor
                    what = f"worker {worker.number} to go to sleep"
                    try:
                        wait_all([actor.sleep.remote()], limit_s=WEIGHTS_LIMIT_S, what=what)
                        break
                    except LOST as error:
                        self._replace(worker, actor, first_line(error))

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
                self._replace(worker, actor, first_line(error))
                if worker not in self._workers:
                    worker = self._workers[0]

    def close(self) -> None:
        """Close every engine, then its actor; one that does not answer is killed."""
        workers = [*self._workers, *self._joining.values()]
        calls = [worker.actor.close.remote() for worker in self._workers]
        ray.wait(calls, num_returns=len(calls), timeout=CLOSE_LIMIT_S)
        for worker in workers:
            ray.kill(worker.actor)
        self._workers, self._joining = [], {}

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

    def _cut(
        self, calls: dict[ray.ObjectRef[Any], _Worker], rollout: RolloutConfig, num_left: int, num_prompts: int
    ) -> None:
        """Give up the trees that are still growing."""
        logger.warning(
            "rollout.batch_timeout_s=%g: the batch closes without %d of its %d trees",
            rollout.batch_timeout_s, num_left, num_prompts,
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

        A node that goes counts once, however many workers go with it. Where no other has room, its workers come back
        when one has.

        Raises: WorkerLost when none is left.
        """
        with self._changing:
            if worker.actor is not lost_actor or worker not in self._workers:
                return  # whoever noticed first has done it
            self._lost.extend(worker.trees.values())
            worker.trees = {}
            ray.kill(lost_actor)
            log_path = self._log_path(worker.number)
            while self._counts(worker.number) <= self._cfg.rollout.max_worker_restarts:
                place = self._places.of_worker(worker.number)
                if place is None:
                    self._do_without(worker, why)
                    return
                logger.warning(
                    "rollout worker %d was lost (%s); starting another, log %s", worker.number, why, log_path
                )
                worker.actor = self._new_actor(worker.number, place)
                try:
                    self._start([worker])
                    return
                except WorkerLost:
                    node = self._places.lost_node(worker.number)
                    if not node:
                        raise
                    ray.kill(worker.actor)
                    self._lost_nodes.add(node)  # Ray tells of the worker before it gives up the node: it is one loss
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

    def _counts(self, number: int) -> int:
        """Losses so far, with this one of a worker that is counted now: one that went with its node counts once."""
        node = self._places.lost_node(number)
        if not node or node not in self._lost_nodes:
            self._restarts += 1
        if node:
            self._lost_nodes.add(node)
        return self._restarts

    def _do_without(self, worker: _Worker, why: str) -> None:
        self._workers.remove(worker)
        self._homeless.append(worker.number)
        lost = f"rollout worker {worker.number} was lost with its node ({why}), and no other node has room for it"
        if not self._workers:
            raise WorkerLost(
                f"{lost}; it was the last. Bring the node back, or another, and continue by run.resume=true."
            )
        logger.warning("%s: going on with the other %d until the node is back, or another", lost, len(self._workers))

    def _call_back(self) -> None:
        """Start workers that have a place again; they load while the others go on."""
        if not self._homeless or time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + LOOK_EVERY_S
        for number in list(self._homeless):
            place = self._places.of_worker(number)
            if place is not None:
                logger.warning("there is room for rollout worker %d again: it loads", number)
                self._homeless.remove(number)
                worker = _Worker(self._new_actor(number, place), number)
                self._joining[worker.actor.start.remote()] = worker

    def _join(self, ref: ray.ObjectRef[Any]) -> None:
        """Take a worker that has loaded among the others; one that could not is tried again, as often as any."""
        with self._changing:
            worker = self._joining.pop(ref)
            try:
                value_of(ref)
                self._give_newest([worker])
            except (RayError, GroveError) as error:
                ray.kill(worker.actor)
                self._restarts += 1
                again = self._restarts <= self._cfg.rollout.max_worker_restarts
                self._homeless += [worker.number] if again else []
                logger.warning("rollout worker %d could not come back: %s", worker.number, error)
                return
            self._workers = sorted([*self._workers, worker], key=lambda each: each.number)
            logger.warning("rollout worker %d is back", worker.number)

    def _new_actor(self, number: int, place: dict[str, Any]) -> Any:
        log, judge = str(self._log_path(number)), self._judge_actor
        return start_worker(self._cfg, self._model_path, log, place=place, judge_actor=judge)

    def _log_path(self, number: int) -> Path:
        return self._log_dir / f"rollout_worker_{number}.log"

    def _start(self, workers: Sequence[_Worker]) -> None:
        limit_s = self._cfg.rollout.start_timeout_s
        calls = [worker.actor.start.remote() for worker in workers]
        try:
            wait_all(calls, limit_s=limit_s, what="the engines to load")
            self._give_newest(workers)
        except (*LOST, ActorUnschedulableError) as error:
            raise WorkerLost(
                f"a rollout worker died while loading the model ({first_line(error)}). Its log is in {self._log_dir}."
            ) from error
        except RayTaskError as error:
            raise WorkerLost(
                f'the {self._cfg.rollout.engine.value} engine cannot load "{self._model_path}" ({error.cause!r}), so '
                f"no worker can sample. Its log is in {self._log_dir}; if this engine does not serve the model, try "
                "rollout.engine=transformers."
            ) from error

    def _give_newest(self, workers: Sequence[_Worker]) -> None:
        if self._weights is None:
            return
        published = self._weights()
        what = f"worker {', '.join(str(each.number) for each in workers)} to load weights {published.version}"
        calls = [worker.actor.load_weights.remote(published) for worker in workers]
        wait_all(calls, limit_s=WEIGHTS_LIMIT_S, what=what)

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
