"""The optimiser of a module: AdamW, or AdamW with moments in 8 bits; for plain and for sharded parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from conf.errors import ConfigError
from conf.schema import LearnerConfig, OptimizerKind

VALUE_HEAD = "value_head."
"""Parameters with this prefix learn at a rate of their own."""


def build_optimizer(
    module: nn.Module, cfg: LearnerConfig, learning_rate: float, head_learning_rate: float
) -> Optimizer:
    """The optimiser of all parameters that require a gradient; the first group's rate is the module's own.

    Norms and biases are not decayed, since pulling them to 0 pulls the activations to 0.

    Args:
        module: sharded already, if it is to be.
        cfg: which optimiser, its betas and its decay.
        learning_rate: of every parameter but the value head's.
        head_learning_rate: of the value head, where there is one.
    Raises: ConfigError when the optimiser's library is not installed.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {(False, True): []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((name.startswith(VALUE_HEAD), parameter.ndim >= 2), []).append(parameter)
    settings = [
        {
            "params": parameters,
            "lr": head_learning_rate if in_head else learning_rate,
            "weight_decay": cfg.weight_decay if decays else 0.0,
        }
        for (in_head, decays), parameters in groups.items()
        if parameters
    ]
    first, second = cfg.betas
    if cfg.optimizer is OptimizerKind.adamw_8bit:
        return _adamw_8bit(settings, (first, second))
    return torch.optim.AdamW(settings, betas=(first, second))


def _adamw_8bit(groups: list[dict[str, Any]], betas: tuple[float, float]) -> Optimizer:
    """AdamW whose moments are quantised in blocks of 256 values (arXiv 2110.02861)."""
    try:
        from torchao.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            f"learner.optimizer=adamw_8bit needs the package torchao, which cannot be imported ({error}). Install it "
            "(pip install torchao), or use learner.optimizer=adamw, whose moments take four times the memory."
        ) from error

    class PlainRates(AdamW8bit):
        """The library's own wants each rate as a tensor, and is compiled at the first step."""

        def step(self, closure: Callable[[], float] | None = None) -> Any:
            rates = [float(group["lr"]) for group in self.param_groups]
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = torch.tensor(rate)
            # On a CPU compiling takes longer than all it could save, and needs a C++ compiler.
            on_gpu = any(each.grad is not None and each.grad.is_cuda for g in self.param_groups for each in g["params"])
            with torch.compiler.set_stance("default" if on_gpu else "force_eager"):
                loss = super().step(closure)
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate
            return loss

    optimizer = PlainRates(groups, betas=betas)
    for group in optimizer.param_groups:
        group["lr"] = float(group["lr"])
    return optimizer
