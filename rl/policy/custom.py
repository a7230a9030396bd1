"""What a loss function of the user's own sees, and what it must give back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from conf.errors import ConfigError
from rl.policy.loss import path_sums


@dataclass(frozen=True, kw_only=True, slots=True)
class TrajectoryView:
    """Trained tokens of a pack, trajectory by trajectory: M entries, a token in k trajectories k times; float64.

    A loss of plain sequences needs no change: the gradients of a shared token's copies add up by themselves. A pack
    holds whole trajectories, not whole groups: a function sees each trajectory entirely and must not compare two.
    """

    logprob_M: Tensor
    """Nats, now; carries the gradient."""
    entropy_M: Tensor
    """Nats; carries the gradient."""
    old_logprob_M: Tensor
    """Nats, what ratios are taken against."""
    engine_logprob_M: Tensor
    """Nats, of the engine that sampled the token."""
    reference_logprob_M: Tensor | None
    """Nats, of the frozen reference; None with loss.kl_coef=0."""
    advantage_M: Tensor
    """Of the trajectory at the token."""
    weight_M: Tensor
    """What the token's loss must be multiplied with: loss.aggregation, credit.shared_token_weight, loss.correction."""
    path_M: Tensor
    """int64, the trajectory, from 0 to num_paths - 1; entries of one trajectory are neighbours, in order."""
    num_paths: int
    """K."""

    def path_sums(self, value_M: Tensor) -> Tensor:
        """Sum over the tokens of each trajectory: float [M] -> float [K]."""
        return path_sums(value_M, self.path_M, self.num_paths)


CustomLoss = Callable[[TrajectoryView], Tensor]
"""Returns the sum, not the mean, of the weighted losses of a pack; Grove divides by the mini-batch's denominator."""


def custom_sum(custom: CustomLoss, view: TrajectoryView) -> Tensor:
    """What the function makes of a pack.

    Returns: float [].
    Raises: ConfigError for anything but a finite scalar that depends on the policy.
    """
    found = custom(view)
    if not isinstance(found, Tensor) or found.numel() != 1:
        what = f"a tensor of shape {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ConfigError(
            f"the function of loss.fn returned {what}, and a gradient can only be taken of one number. Return "
            "(view.weight_M * your_loss_M).sum()."
        )
    if not torch.isfinite(found):
        raise ConfigError(
            f"the function of loss.fn returned {found.item()}: every weight would become NaN. Look for exp of a large "
            "log-ratio or log of 0, and clamp there."
        )
    if not found.requires_grad:
        raise ConfigError(
            f"the function of loss.fn returned {found.item()}, which does not depend on the policy, so nothing would "
            "be learned. Compute it from view.logprob_M, without .detach() or .item()."
        )
    return found.reshape(())
