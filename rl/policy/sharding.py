"""A module shared out over ranks by FSDP2, and the whole of it again for checkpoints and engines.

A sharded parameter is a `DTensor`: each rank keeps its rows, its gradients and its moments, and has all rows only while
a layer computes. What is said here of whole weights and states holds for a module that was never sharded too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from conf.errors import CheckpointError
from rl.policy.ranks import Ranks, one_process_mesh

QUANTISED = ("codes", "scale", "qmap")
"""Tensors that a moment in 8 bits is made of: a byte for each value, a scale for each block, the value of each byte."""


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


@torch.no_grad()
def load_full_weights(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Take weights that `full_weights` gave; only rank 0 needs them. Collective.

    Frozen parameters that are not named stay as they are.

    Raises: CheckpointError for a name or shape the module does not have, or a trained parameter without weights.
    """
    parameters = dict(module.named_parameters())
    shapes = _from_first_rank(module, {name: tuple(weight.shape) for name, weight in weights.items()})
    _check_names(parameters, shapes)
    for name in shapes:
        _copy_whole(parameters[name], weights.get(name))


@torch.no_grad()
def full_optimizer_state(module: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    """What the optimiser keeps of each parameter, by the parameter's name, on the CPU of rank 0. Collective.

    Moments in 8 bits stay so, as a list of each rank's part, and go back to the same bits on as many ranks; other
    moments are whole. Hyperparameters are the config's and stay out. Loads by torch.load(weights_only=True).

    Returns: {} elsewhere, and before the first step.
    """
    keeps = _is_first_rank(module)
    in_parts = not isinstance(optimizer, torch.optim.AdamW)
    states: dict[str, dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        entries = optimizer.state.get(parameter, {})
        stored = {key: _stored(value, in_parts) for key, value in entries.items()}
        if keeps and stored:
            states[name] = stored
    return states


@torch.no_grad()
def load_full_optimizer_state(module: nn.Module, optimizer: Optimizer, states: dict[str, dict[str, Any]]) -> None:
    """Take back what `full_optimizer_state` gave, on as many ranks as there are now; only rank 0 needs it. Collective.

    Raises: CheckpointError for a state of a parameter the module does not have, or of another optimiser.
    """
    parameters = dict(module.named_parameters())
    outlines = _from_first_rank(
        module, {name: {key: _outline(value) for key, value in entries.items()} for name, entries in states.items()}
    )
    unknown = sorted(outlines.keys() - parameters.keys())
    if unknown:
        raise CheckpointError(
            f"the checkpoint has optimiser moments of {len(unknown)} parameters that this model does not have (first: "
            f"{unknown[0]}): they are of another model or other adapters. Resume with the model settings it was "
            "written with."
        )
    _start_states(optimizer, {parameters[name] for name in outlines})
    for name, outline in outlines.items():
        own = optimizer.state[parameters[name]]
        if own.keys() != outline.keys():
            raise CheckpointError(
                f"the checkpoint's optimiser keeps {sorted(outline)} of each parameter and this one {sorted(own)}. "
                "Resume with the learner.optimizer it was written with."
            )
        for key, (kind, value) in outline.items():
            stored = states[name][key] if name in states else None
            if kind == "value":
                own[key].copy_(value)
            elif kind == "whole":
                _copy_whole(own[key], stored)
            elif value == _num_parts(own[key]):
                _copy_part(own[key], stored)
            else:
                _copy_whole(own[key], stored and torch.cat([_dequantised(part) for part in stored]))


def _start_states(optimizer: Optimizer, parameters: set[nn.Parameter]) -> None:
    """Make the optimiser set up its state of `parameters` and no others, by a step of length 0 along gradients of 0."""
    optimizer.state.clear()
    gradients = [(parameter, parameter.grad) for group in optimizer.param_groups for parameter in group["params"]]
    rates = [group["lr"] for group in optimizer.param_groups]
    for parameter, _ in gradients:
        parameter.grad = torch.zeros_like(parameter) if parameter in parameters else None
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for parameter, gradient in gradients:
        parameter.grad = gradient
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _check_names(parameters: dict[str, nn.Parameter], shapes: dict[str, tuple[int, ...]]) -> None:
    unknown = sorted(shapes.keys() - parameters.keys())
    missing = sorted(name for name in parameters.keys() - shapes.keys() if parameters[name].requires_grad)
    other = sorted(name for name in shapes.keys() & parameters.keys() if shapes[name] != parameters[name].shape)
    if unknown or missing or other:
        named = ", ".join((unknown + missing + other)[:3])
        raise CheckpointError(
            f"the checkpoint does not fit this model: {len(unknown)} weights it does not have, {len(missing)} it "
            f"trains and the checkpoint lacks, {len(other)} of another shape (first: {named}). Resume with the model "
            "settings it was written with."
        )


def _stored(value: Tensor, in_parts: bool) -> Any:
    """One entry of an optimiser's state, on the CPU of rank 0."""
    if value.ndim == 0 or not in_parts:  # the count of steps, or a moment of the parameter's shape
        return whole_tensor(value).to("cpu", copy=True)
    part = _part(value.to_local() if isinstance(value, DTensor) else value)
    if not isinstance(value, DTensor):
        return [part]
    mesh = value.device_mesh
    gathered: list[Any] | None = [None] * mesh.size() if mesh.get_rank() == 0 else None
    dist.gather_object(part, gathered, dst=0, group=mesh.get_group())
    return gathered


def _part(local: Tensor) -> Any:
    """A rank's part of a moment as plain tensors; small or odd parts are not quantised."""
    if type(local) is Tensor:
        return local.to("cpu", copy=True)
    return {name: getattr(local, name).to("cpu", copy=True) for name in QUANTISED}


def _dequantised(part: Any) -> Tensor:
    """The values of a part: table[code] * scale of the code's block."""
    if isinstance(part, Tensor):
        return part
    codes, scale, table = (part[name] for name in QUANTISED)
    return (table[codes.flatten().long()].view(len(scale), -1) * scale[:, None]).view(codes.shape)


def _outline(value: Any) -> tuple[str, Any]:
    """What every rank must know of an entry: the count of steps itself, or how a moment is stored."""
    if isinstance(value, list):
        return "parts", len(value)
    return ("value", value) if value.ndim == 0 else ("whole", None)


def _num_parts(moment: Tensor) -> int:
    return moment.device_mesh.size() if isinstance(moment, DTensor) else 1


def _copy_part(moment: Tensor, parts: list[Any] | None) -> None:
    """Give each rank its own part, bit for bit."""
    if isinstance(moment, DTensor):
        own: list[Any] = [None]
        dist.scatter_object_list(own, parts, src=0, group=moment.device_mesh.get_group())
        _copy_part(moment.to_local(), own)
        return
    assert parts is not None and len(parts) == 1, "a rank has one part"
    if isinstance(parts[0], Tensor):
        moment.copy_(parts[0])
        return
    for name in QUANTISED:
        getattr(moment, name).copy_(parts[0][name])


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


def _copy_whole(target: Tensor, whole: Tensor | None) -> None:
    """Copy a whole tensor, which only rank 0 needs, into one that may be sharded."""
    if not isinstance(target, DTensor):
        assert whole is not None, "a module that is not sharded has no other ranks"
        target.copy_(whole.to(target.device))
        return
    mesh = target.device_mesh
    if whole is None:
        whole = torch.empty(target.shape, dtype=target.dtype)
    source = whole.to(device=mesh.device_type, dtype=target.dtype)
    target.to_local().copy_(distribute_tensor(source, mesh, target.placements).to_local())


def _first_sharded(module: nn.Module) -> DTensor | None:
    return next((parameter for parameter in module.parameters() if isinstance(parameter, DTensor)), None)


def _is_first_rank(module: nn.Module) -> bool:
    sharded = _first_sharded(module)
    return sharded is None or sharded.device_mesh.get_rank() == 0


def _from_first_rank(module: nn.Module, value: Any) -> Any:
    """What rank 0 passed, on every rank."""
    sharded = _first_sharded(module)
    if sharded is None:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=sharded.device_mesh.get_group())
    return box[0]
