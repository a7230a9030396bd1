"""The learner's Ray actor: carries a `Learner`, decides nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray
import torch

from conf.schema import Config
from rl.policy.pack import TreeCredit
from rollout.worker import send_output_to

MODEL = "model"
"""Folder of the policy inside a checkpoint; loads in transformers and vLLM as it is."""
OPTIMIZER = "optimizer.pt"


class LearnerActor:
    """Forwards to `rl.policy.learner.Learner` in a process of its own."""

    def __init__(self, cfg: Config, model_path: str, log_path: str) -> None:
        send_output_to(Path(log_path))
        from rl.policy.learner import Learner

        self._learner = Learner(cfg, model_path)

    def ready(self) -> None:
        """Answers once the model is loaded."""

    def update(self, trees: list[TreeCredit], step: int) -> dict[str, float]:
        """One step of training; returns its metrics."""
        return self._learner.update(trees, step)

    def score(self, samples: list[tuple[list[int], list[int]]]) -> list[list[float]]:
        """Log-probabilities of each (context ids, action ids) sample, at temperature 1."""
        return [self._learner.score(context_ids, action_ids) for context_ids, action_ids in samples]

    def save_weights(self, path: str) -> None:
        """Write what the engines load."""
        self._learner.save_weights(path)

    def save(self, folder: str) -> None:
        """Write a Hugging Face folder model/ and the optimiser into a checkpoint folder."""
        self._learner.save_model(Path(folder) / MODEL)
        torch.save(self._learner.optimizer_state(), Path(folder) / OPTIMIZER)

    def load(self, folder: str) -> None:
        """Continue from a checkpoint folder, without executing anything stored in it."""
        self._learner.load_model(Path(folder) / MODEL)
        state = torch.load(Path(folder) / OPTIMIZER, weights_only=True, map_location=self._learner.device)
        self._learner.load_optimizer_state(state)


def start_learner(cfg: Config, model_path: str, log_path: str, *, num_gpus: float) -> Any:
    """A new learner actor, still loading.

    It takes no core of its own: in a synchronous step it works while the engines rest.
    """
    environment = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    options: dict[str, Any] = {
        "num_cpus": 0,
        "num_gpus": num_gpus,
        "max_restarts": 0,
        "runtime_env": {"env_vars": environment},
    }
    return ray.remote(LearnerActor).options(**options).remote(cfg, model_path, log_path)
