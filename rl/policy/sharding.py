"""A module shared out over ranks by FSDP2, and the whole of it again for engines.

A sharded parameter is a `DTensor`: each rank keeps its rows, its gradients and its moments, and has all rows only while
a layer computes. What is said here of whole weights holds for a module that was never sharded too.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from rl.policy.ranks import Ranks, one_process_mesh


def shard(module: nn.Module, ranks: Ranks, compute_dtype: torch.dtype, *, offload: bool) -> None:
    """Share a module out over the ranks, in place; weights stay in their type and are computed with in another.

    Gradients are summed over the ranks in float32, not averaged: losses are divided by global counts already. A value
    head computes in the type of its own weights.

    Args:
        module: the root whose forward is called, a `TreePolicy` or `TreeCritic`, the same on all ranks.
        offload: weights, gradients and moments wait in the host's memory; on a GPU alone.
    """
    mesh = ranks.mesh or one_process_mesh(ranks.device)
    heads = _value_heads(module)
    parts = [*_blocks(module), *heads, module]
    for part in parts:
        own_dtype = next(part.parameters()).dtype
        fully_shard(
            part,
            mesh=mesh,
            # The root too: a forward pass without backward would leave it whole, and blind to the next update.
            reshard_after_forward=True,
            mp_policy=MixedPrecisionPolicy(
                param_dtype=own_dtype if part in heads else compute_dtype,
                reduce_dtype=torch.promote_types(own_dtype, torch.float32),
                cast_forward_inputs=False,  # a pack's float64 numbers keep their type on the way in
            ),
            offload_policy=CPUOffloadPolicy() if offload else OffloadPolicy(),
        )
    for part in parts:
        assert isinstance(part, FSDPModule), "fully_shard makes it one"
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # gloo has no other sum that is divided by 1


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The transformer blocks, by what their model says must not be split, inside adapters too."""
    names = {
        name
        for model in module.modules()
        if isinstance(model, PreTrainedModel)
        for name in model._no_split_modules or ()
    }
    return [part for part in module.modules() if type(part).__name__ in names]


def _value_heads(module: nn.Module) -> list[nn.Module]:
    head = getattr(module, "value_head", None)
    return [] if head is None else [head]


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scale the gradients so that their norm over all parameters and ranks is at most `max_norm`.

    Returns: the norm before; the same on all ranks, infinite or NaN where a gradient is. Collective.
    """
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def full_weights(module: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter as `named_parameters` names it, whole, on the CPU of rank 0; {} elsewhere. Collective.

    A shared parameter, as a tied output layer, is named once.
    """
    keeps = _is_first_rank(module)
    weights: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        whole = whole_tensor(parameter.detach())
        if keeps:
            weights[name] = whole.to("cpu", copy=True)
    return weights


def whole_tensor(value: Tensor) -> Tensor:
    """All rows of a tensor, on every rank. Collective."""
    if not isinstance(value, DTensor):
        return value
    local = value.to_local().to(value.device_mesh.device_type)  # offloaded rows go by way of the GPU
    mesh, placements = value.device_mesh, value.placements
    return DTensor.from_local(local, mesh, placements, shape=value.shape, stride=value.stride()).full_tensor()


def local_rows(value: Tensor) -> tuple[Tensor, int]:
    """The rows of a tensor that this rank holds, and the number of the first; all of one that is not sharded."""
    if not isinstance(value, DTensor):
        return value, 0
    local, rank = value.to_local(), value.device_mesh.get_local_rank()
    start = min(rank * -(-value.shape[0] // value.device_mesh.size()), value.shape[0])  # as torch.chunk cuts
    return local, start


def copy_whole(target: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor, the same on all ranks, into one that may be sharded. Collective."""
    if not isinstance(target, DTensor):
        target.copy_(whole.to(target.device))
        return
    mesh = target.device_mesh
    source = whole.to(device=mesh.device_type, dtype=target.dtype)
    target.to_local().copy_(distribute_tensor(source, mesh, target.placements).to_local())


def _first_sharded(module: nn.Module) -> DTensor | None:
    return next((parameter for parameter in module.parameters() if isinstance(parameter, DTensor)), None)


def _is_first_rank(module: nn.Module) -> bool:
    sharded = _first_sharded(module)
    return sharded is None or sharded.device_mesh.get_rank() == 0
