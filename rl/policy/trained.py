"""A module in training, on one rank or many: its optimiser, its learning rate, how it steps, is saved and is loaded."""

from __future__ import annotations

import math
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from conf.errors import GroveError
from conf.schema import LearnerConfig
from rl.policy.moments import load_moments, load_weights, moment_tensors, weight_tensors
from rl.policy.optimizer import build_optimizer
from rl.policy.rank_files import Shards
from rl.policy.ranks import Ranks
from rl.policy.sharding import clip_gradients, full_weights, shard


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
        self.module, self._cfg, self._ranks, self._max_grad_norm = module, cfg, ranks, max_grad_norm
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

    def state(self, name: str) -> dict[str, Tensor]:
        """Trained weights and moments as they are on this rank, under the module's name, for `rl.policy.rank_files`."""
        weights, moments = weight_tensors(self.module), moment_tensors(self.module, self.optimizer)
        return {
            **{weights_prefix(name) + path: weight for path, weight in weights.items()},
            **{_moments_prefix(name) + path: moment for path, moment in moments.items()},
        }

    def load(self, stored: Shards, name: str) -> None:
        """Take back what `state` gave, on as many ranks as there are now. Collective.

        Raises: CheckpointError when it is of another module or another optimiser.
        """
        load_weights(self.module, stored, weights_prefix(name), self._ranks)
        load_moments(self.module, self.optimizer, stored, _moments_prefix(name), self._ranks)


def weights_prefix(name: str) -> str:
    """Before the names of a module's weights among stored tensors."""
    return f"weights/{name}/"


def _moments_prefix(name: str) -> str:
    return f"moments/{name}/"
