"""Starts the parts of a run on Ray, and stops them whatever happens."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from safetensors import safe_open

from conf.check_machine import DTYPE_BYTES
from conf.errors import ConfigError, GroveError, WaitTimeout, WorkerLost, first_line
from conf.schema import Config, WeightPath
from rewards.actor import RewardActor
from rewards.arguments import ENGINE
from rewards.base import build_sources
from rewards.models.actor import ActorModel, start_model
from rewards.sandbox import MAX_PLAIN_TRIES
from rewards.service import check_failure_budget
from rewards.types import ScoredTree
from rl.interrupts import handlers_kept
from rl.jobs import passed
from rl.jobs.nodes import require_equal_nodes
from rl.line_plan import Ends, check_lines
from rl.placement import Plan, Role, node_here, plan
from rl.places import Places, check_files, ray_nodes
from rl.policy.actor import LearnerGroup
from rl.policy.prm_actor import PrmHandle
from rl.policy.weights import WeightPublisher
from rollout.meeting import LOOPBACK
from rollout.patience import wait_for, waiting
from rollout.pool import RolloutPool
from rollout.tree import Tree
from rollout.waiting import value_of, wait_all

logger = logging.getLogger(__name__)

CLOSE_LIMIT_S = 10.0
LOOK_EVERY_S = 1.0
SERVICE_RESTARTS = 3
"""How often Ray makes a lost reward service anew; it scores the trees again that it had."""
BUSY_LIMIT_S = 2.0
"""Longest wait for the processes to say how much they have worked."""


class Scoring:
    """The driver's side of the reward service."""

    def __init__(self, cfg: Config, actor: Any, pool: RolloutPool) -> None:
        self._cfg, self._actor, self._pool = cfg, actor, pool
        sources = build_sources(cfg.rewards)
        # A plain function that hangs is asked again, without the step that it hung at.
        self._longest_s = sum(source.timeout_s * MAX_PLAIN_TRIES for source in sources)
        self._asks_workers = any(ENGINE in source.services for source in sources)
        self._pid = 0

    def actors(self) -> list[Any]:
        """The handle of the service, for who asks it beside this."""
        return [self._actor]

    def submit(self, trees: Iterable[tuple[int, Tree]], sources: Collection[str] | None = None) -> dict[int, Any]:
        """Hand trees over as they arrive, so that scoring overlaps growing.

        Args:
            sources: names of the sources to ask; None for all.
        Returns: calls by index of the prompt.
        """
        calls = {}
        for index, tree in trees:
            asked = (self._pool.actors(), self._cfg.rollout) if self._asks_workers else ()
            calls[index] = self._actor.score.remote(tree, sources, *asked)
        return calls

    @staticmethod
    def answered(scored: ScoredTree) -> Any:
        """A call that has its answer already, for a tree that was scored in an earlier life of the run."""
        return ray.put(scored)

    @staticmethod
    def answers_so_far(calls: dict[int, Any]) -> dict[int, ScoredTree]:
        """Those of the scored trees that are there, by index of the prompt; waits for nothing."""
        refs = list(calls.values())
        ready = set(ray.wait(refs, num_returns=len(refs), timeout=0)[0] if refs else [])
        found = {}
        for index, ref in calls.items():
            if ref in ready:
                with contextlib.suppress(GroveError, RayError):  # told where the batch is trained
                    found[index] = value_of(ref)
        return found

    def collect(self, calls: dict[int, Any]) -> list[ScoredTree]:
        """The scored trees, in the order of their prompts.

        Raises: RewardFailed when a source fails more often than rewards.max_failed_share; WaitTimeout.
        """
        rewards = self._cfg.rewards
        limit_s = 60.0 + rewards.setup_timeout_s + len(calls) * self._longest_s
        scored = wait_all([calls[index] for index in sorted(calls)], limit_s=limit_s, what="the reward service")
        self._tell_restart()
        check_failure_budget(scored, self._cfg.rewards)
        return scored

    def _tell_restart(self) -> None:
        (pid,) = wait_all([self._actor.pid.remote()], limit_s=CLOSE_LIMIT_S, what="the reward service")
        if self._pid not in (0, pid):
            logger.warning(
                "the reward service was lost (process %d) and made anew; the trees it had were scored again", self._pid
            )
        self._pid = pid


@dataclass(frozen=True, slots=True)
class Parts:
    """The running parts, as handles."""

    pool: RolloutPool
    scoring: Scoring
    learner: LearnerGroup | None
    """None in an evaluation."""
    publisher: WeightPublisher | None
    prm: PrmHandle | None = None
    """None unless the run trains a process reward model."""

    def busy_seconds(self) -> dict[str, dict[str, float]]:
        """Process -> part -> seconds with something to do so far (`rl.idle`); who does not answer soon is left out."""
        actors = [*self.pool.actors(), *self.scoring.actors()]
        actors += self.learner.actors() if self.learner else []
        actors += self.prm.actors() if self.prm else []
        calls = {actor.busy_seconds.remote(): actor for actor in actors}
        found: dict[str, dict[str, float]] = {}
        if not calls:
            return found
        with waiting():
            ready, _ = ray.wait(list(calls), num_returns=len(calls), timeout=BUSY_LIMIT_S)
        for call in ready:
            with contextlib.suppress(RayError):  # lost, as who needs it will find
                found[calls[call]._actor_id.hex()] = value_of(call)
        return found


def write_ray_timeline(path: Path) -> None:
    """Write what every Ray process did when, as a Chrome trace; what Ray cannot give is logged."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        ray.timeline(filename=str(path))
    except Exception as error:
        # Ray raises whatever its store of events raises, and a picture is not worth a run.
        logger.warning("Ray gave no timeline for %s: %s", path, error)


@contextlib.contextmanager
def launched(
    cfg: Config, model_path: str, log_dir: Path, *, without: Collection[Role] = (), prm_path: str = ""
) -> Iterator[Parts]:
    """Ray, the reward service, the learner and the rollout workers; all stopped on the way out.

    Args:
        without: roles that nobody has, such as the learner's in an evaluation.
        prm_path: weights that the run's own process reward model began with, where they are not the policy's.
    Raises: ConfigError, WaitTimeout, WorkerLost when a part does not come up or is lost for good.
    """
    if not cfg.cluster.address:
        # What has no room is told before Ray is started.
        check_lines(cfg, plan(cfg, [node_here(cfg)], without=without))
    with contextlib.ExitStack() as stack:
        stack.enter_context(_ray(cfg, model_path))
        stack.enter_context(_losses_told())
        found = _planned(cfg, without)
        check_lines(cfg, found)
        logger.info("where the processes go:\n%s", found.table())
        check_files(found, log_dir, model_path)
        places = Places(found)
        stack.callback(places.close)
        engine_cfg = replace(cfg, rollout=replace(cfg.rollout, gpu_memory_share=found.engine_memory_share))
        reward_log = str(log_dir / "reward_service.log")
        models = stack.enter_context(_reward_models(cfg, log_dir, places))
        cache = str(log_dir.parent / "reward_cache.sqlite")
        options = places.of_role(Role.rewards)[0]
        options |= {"max_concurrency": 1000, "max_restarts": SERVICE_RESTARTS, "max_task_retries": -1}
        reward_actor = RewardActor.options(**options).remote(cfg.rewards, None, reward_log, models, cache)
        stack.callback(_close_actor, reward_actor, "the reward service")
        learner = prm = None
        if Role.learner not in without:
            host = found.learner_address() or LOOPBACK
            learner = LearnerGroup(cfg, model_path, log_dir, places=places.of_role(Role.learner), host=host)
            stack.callback(learner.close)
        for place in places.of_role(Role.prm):
            prm = PrmHandle(cfg, prm_path or model_path, log_dir, place=place)
            stack.callback(prm.close)
        wait_all([reward_actor.ping.remote()], limit_s=cfg.rollout.start_timeout_s, what="the reward service to start")
        judge = reward_actor if cfg.rollout.judge else None
        pool = RolloutPool(engine_cfg, model_path, log_dir, places=places, judge_actor=judge)
        stack.callback(pool.close)
        publisher = None
        if learner is not None:
            learner.answer(learner.ready(), limit_s=cfg.rollout.start_timeout_s, what="the learner to load")
            direct = cfg.cluster.weights is not WeightPath.object_store
            ends = Ends(cfg.cluster.weights, lambda: places.plan) if direct else None
            publisher = WeightPublisher(cfg, learner, pool, ends)
        if prm is not None:
            prm.answer(prm.ready(), "the process reward model to load", cfg.rollout.start_timeout_s)
        yield Parts(pool, Scoring(cfg, reward_actor, pool), learner, publisher, prm)


def _planned(cfg: Config, without: Collection[Role] = ()) -> Plan:
    """The plan of what is free now; a run that goes on gives a cluster's nodes time to come back.

    Raises: ConfigError where something has no room.
    """

    def planned() -> Plan:
        return plan(cfg, ray_nodes(), without=without)

    if not (cfg.cluster.address and cfg.run.resume and cfg.cluster.nodes_timeout_s):
        return planned()

    def come(wait_s: float) -> Plan | None:
        until = time.monotonic() + wait_s
        while time.monotonic() < until:
            with contextlib.suppress(ConfigError):
                return planned()
            time.sleep(LOOK_EVERY_S)
        return None

    try:
        return planned()
    except ConfigError as error:
        logger.warning("waiting up to %g s (cluster.nodes_timeout_s) for room: %s", cfg.cluster.nodes_timeout_s, error)
    try:
        return wait_for(come, limit_s=cfg.cluster.nodes_timeout_s, what="room for all processes on the cluster's nodes")
    except WaitTimeout:
        return planned()  # or tells what has no room


@contextlib.contextmanager
def _reward_models(cfg: Config, log_dir: Path, places: Places) -> Iterator[dict[str, ActorModel]]:
    """The models of rewards.models that the run serves itself, loaded; name -> client."""
    started: dict[str, ActorModel] = {}
    try:
        for process in places.plan.of(Role.model):
            model, place = cfg.rewards.models[process.name], places.options(process)
            started[process.name] = start_model(process.name, model, log_dir, place=place)
        loading = [model.ready() for model in started.values()]
        what = f"the reward models to load ({', '.join(started)})"
        wait_all(loading, limit_s=cfg.rollout.start_timeout_s, what=what)
        yield started
    finally:
        for name, model in started.items():
            _close_actor(model.handle, f"rewards.models.{name}")


@contextlib.contextmanager
def _losses_told() -> Iterator[None]:
    """What Ray raises when a process or a machine is gone, as Grove's own error; a bug in an actor stays as it is."""
    try:
        yield
    except RayError as error:
        if isinstance(error, RayTaskError):
            raise
        raise WorkerLost(
            f"a process of the run is gone ({first_line(error)}): the run cannot go on without it."
        ) from error


@contextlib.contextmanager
def _ray(cfg: Config, model_path: str) -> Iterator[None]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves the machine unless the user asks for it
    os.environ.setdefault("RAY_worker_niceness", "0")  # at Ray's 15 any other work of the machine starves the engines
    # Ray would start a process for each core ahead; ours have environments of their own, so nobody would take them.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING, "ignore_reinit_error": False}
    with handlers_kept():
        if cfg.cluster.address:
            is_passed = passed.NAME_VARIABLE in os.environ
            runtime_env = {"worker_process_setup_hook": passed.HOOK} if is_passed else None
            ray.init(address=cfg.cluster.address, runtime_env=runtime_env, **options)
        else:
            ray.init(
                address="local",  # without it Ray would join whatever it finds running here
                num_cpus=cfg.cluster.num_cpus or None,
                include_dashboard=False,
                object_store_memory=cfg.cluster.object_store_mib * 2**20
                + 2 * weights_bytes(model_path, cfg.model.dtype),
                _node_ip_address="127.0.0.1",
                **options,
            )
    try:
        if cfg.cluster.address:
            require_equal_nodes()
        yield
    finally:
        ray.shutdown()


def weights_bytes(model_path: str, dtype: str) -> int:
    """What the weights of a model folder take in another type; 0 for a folder without safetensors files."""
    numbers = 0
    for file in Path(model_path).glob("*.safetensors"):
        with safe_open(file, framework="numpy") as tensors:
            numbers += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return numbers * DTYPE_BYTES[dtype]


def _close_actor(actor: Any, what: str) -> None:
    """Let an actor close what it started, then make sure."""
    try:
        wait_all([actor.close.remote()], limit_s=CLOSE_LIMIT_S, what=f"{what} to close")
    except (WaitTimeout, RayError) as error:
        logger.warning("%s did not close (%s) and is killed", what, error)
    ray.kill(actor)
