"""The process reward model's Ray actor: carries it, decides nothing; and the driver's side of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError

from conf.errors import WorkerLost
from conf.schema import Config
from rl.generators import seed_generators
from rl.policy.memory import keep_freed_memory
from rollout.busy import BusyClock
from rollout.process import begin_actor
from rollout.seeds import derive_seed
from rollout.tree import Tree
from rollout.waiting import wait_all

LOG = "prm.log"


class PrmActor:
    """Forwards to a `rl.policy.prm.ProcessRewardModel`, in a process of its own."""

    def __init__(self, cfg: Config, policy_path: str, log_path: str) -> None:
        begin_actor(Path(log_path))
        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", force=True)
        self._cfg, self._policy_path = cfg, policy_path
        self._model: Any = None
        self._clock = BusyClock()

    def start(self) -> None:
        """Load the weights."""
        from rl.policy.prm import ProcessRewardModel  # loads transformers

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cpu":
            keep_freed_memory()
        seed_generators(derive_seed(self._cfg.seed, "prm"))
        self._model = ProcessRewardModel(self._cfg, self._policy_path, device)

    def score(self, trees: list[Tree]) -> list[dict[int, float]]:
        """Score of every step of a trained path, one mapping per tree."""
        with self._clock.running():
            return self._model.score(trees)

    def update(self, trees: list[Tree], outcomes: list[dict[int, float]], step: int) -> dict[str, float]:
        """Learn from how trajectories ended; returns metrics."""
        with self._clock.running():
            return self._model.update(trees, outcomes, step)

    def busy_seconds(self) -> dict[str, float]:
        """Time with something to do so far."""
        return {"prm": self._clock.seconds()}

    def begin_save(self, folder: str) -> None:
        """Copy weights and moments, and write them while learning goes on."""
        with self._clock.running():
            self._model.begin_save(Path(folder))

    def saved(self) -> Any:
        """How far it is with that."""
        return self._model.saved()

    def load(self, folder: str) -> None:
        """Take them back."""
        self._model.load(Path(folder))


class PrmHandle:
    """The driver's side: every call returns at once, `answer` waits for it."""

    def __init__(self, cfg: Config, policy_path: str, log_dir: Path, *, place: Mapping[str, Any]) -> None:
        environment = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        options: dict[str, Any] = {
            "num_cpus": 0,
            "max_restarts": 0,
            "runtime_env": {"env_vars": environment},
            **place,
        }
        self._limit_s = cfg.learner.update_timeout_s
        self._log = str(log_dir / LOG)
        self._actor: Any = ray.remote(PrmActor).options(**options).remote(cfg, policy_path, self._log)
        self._loading = self._actor.start.remote()

    def actors(self) -> list[Any]:
        """The handle, for who asks it beside this."""
        return [self._actor]

    def ready(self) -> Any:
        """Answered once the model is loaded."""
        return self._loading

    def score(self, trees: Sequence[Tree]) -> Any:
        """The answer is the score of every step, one mapping per tree."""
        return self._actor.score.remote(list(trees))

    def update(self, trees: Sequence[Tree], outcomes: Sequence[dict[int, float]], step: int) -> Any:
        """The answer is metrics."""
        return self._actor.update.remote(list(trees), list(outcomes), step)

    def begin_save(self, folder: Path) -> Any:
        """Begin to write weights and moments into a folder; answered once they are copied."""
        return self._actor.begin_save.remote(str(folder))

    def saved(self) -> Any:
        """The answer is how far it is with that, a `Written`."""
        return self._actor.saved.remote()

    def load(self, folder: Path) -> Any:
        """Take them back."""
        return self._actor.load.remote(str(folder))

    def answer(self, call: Any, what: str, limit_s: float | None = None) -> Any:
        """What a call returned.

        Raises: WorkerLost when the process died; WaitTimeout; whatever the model raised.
        """
        try:
            return wait_all([call], limit_s=limit_s or self._limit_s, what=what)[0]
        except RayActorError as error:
            raise WorkerLost(
                f"waiting for {what}, its process died. The end of {self._log} says why; a process killed without a "
                "word was often out of memory: lower learner.pack_tokens, or set learner.gradient_checkpointing=true."
            ) from error

    def close(self) -> None:
        """Stop the process."""
        ray.kill(self._actor)
