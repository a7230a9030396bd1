"""A module in training, on one rank or many: its optimiser, its learning rate, how it steps, is saved and is loaded."""

from __future__ import annotations

import math
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from conf.errors import GroveError
from conf.schema import LearnerConfig
from rl.policy.optimizer import build_optimizer
from rl.policy.ranks import Ranks
from rl.policy.sharding import (
    clip_gradients,
    full_optimizer_state,
    full_weights,
    load_full_optimizer_state,
    load_full_weights,
    shard,
)


class NonFiniteGradient(GroveError, RuntimeError):
    """A gradient that is NaN or infinite, caught before the optimiser could spread it over all weights."""


Trainable = TypeVar("Trainable", bound=nn.Module)


class Trained(Generic[Trainable]):
    """Carries a module and its optimiser; every method that says "collective" is called on all ranks.

    Args:
        module: on its device, in learner.weights_dtype.
        cfg: optimiser, its numbers, and offload.
        compute_dtype: what the module computes in.
        learning_rates: of the module, and of its value head.
    """

    def __init__(
        self,
        module: Trainable,
        cfg: LearnerConfig,
        ranks: Ranks,
        *,
        compute_dtype: str,
        learning_rate: float,
        head_learning_rate: float,
        max_grad_norm: float,
    ) -> None:
        self.module, self._cfg, self._max_grad_norm = module, cfg, max_grad_norm
        if ranks.size > 1 or compute_dtype != cfg.weights_dtype or cfg.offload:
            shard(module, ranks, getattr(torch, compute_dtype), offload=cfg.offload)
        self.optimizer = build_optimizer(module, cfg, learning_rate, head_learning_rate)
        self._first_rates = [group["lr"] for group in self.optimizer.param_groups]

    def set_learning_rate(self, step: int) -> float:
        """Warm-up: a share of the configured rates that grows to 1; returns the first group's."""
        share = min(1.0, (step + 1) / max(1, self._cfg.warmup_steps))
        for group, rate in zip(self.optimizer.param_groups, self._first_rates, strict=True):
            group["lr"] = rate * share
        return self.optimizer.param_groups[0]["lr"]

    def step(self) -> float:
        """Clip and apply the gradients, then drop them; returns their norm before clipping. Collective.

        Raises: NonFiniteGradient, with the weights as they were.
        """
        norm = clip_gradients(self.module.parameters(), self._max_grad_norm)
        if not math.isfinite(norm):
            self.optimizer.zero_grad()
            raise NonFiniteGradient(
                f"the gradient norm is {norm}: the optimiser would turn every weight into NaN, so it was not run and "
                "the weights are as before it. Look for log-probabilities or advantages that are not finite in "
                "the recorded trees of this step; else lower learner.learning_rate, or use a wider model.dtype."
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def weights(self) -> dict[str, Tensor]:
        """All weights by name, whole, on the CPU of rank 0; {} elsewhere. Collective."""
        return full_weights(self.module)

    def optimizer_state(self) -> dict[str, dict[str, Any]]:
        """Moments by parameter, whole, on the CPU of rank 0, for torch.load(weights_only=True). Collective."""
        return full_optimizer_state(self.module, self.optimizer)

    def load(self, weights: dict[str, Tensor], optimizer_state: dict[str, dict[str, Any]]) -> None:
        """Take back what `weights` and `optimizer_state` gave; only rank 0 needs them. Collective.

        Raises: CheckpointError when they are of another module or another optimiser.
        """
        load_full_weights(self.module, weights)
        load_full_optimizer_state(self.module, self.optimizer, optimizer_state)
