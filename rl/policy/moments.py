"""Weights and moments as named tensors for `rl.policy.rank_files`, and back into a module and its optimiser.

A moment in 8 bits is not a tensor that rows can be cut from: its codes are quantised in blocks of each rank's part. So
every rank names its own part, which goes back bit for bit on as many ranks and is dequantised on any other number.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from conf.errors import CheckpointError
from rl.policy.rank_files import Shards
from rl.policy.ranks import Ranks
from rl.policy.sharding import copy_whole

QUANTISED = ("codes", "scale", "qmap")
"""Tensors that a moment in 8 bits is made of: a byte for each value, a scale for each block, the value of each byte."""
PLAIN = "plain"
"""What a part is called that is too small or too odd to be quantised."""


def weight_tensors(module: nn.Module, *, trained: bool = True) -> dict[str, Tensor]:
    """The parameters that are trained, or those that are frozen, as `named_parameters` names them; sharded or not."""
    return {name: each.detach() for name, each in module.named_parameters() if each.requires_grad == trained}


def moment_tensors(module: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """What the optimiser keeps, as "parameter/moment", or "parameter/moment/part0of2/codes" where it is in 8 bits.

    Hyperparameters are the config's and stay out. Empty before the first step.
    """
    in_parts = not isinstance(optimizer, torch.optim.AdamW)
    found: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            whole = value.ndim == 0 or not in_parts  # the count of steps, or a moment of the parameter's shape
            found |= {f"{name}/{key}": value} if whole else _parts(f"{name}/{key}", value)
    return found


@torch.no_grad()
def load_weights(module: nn.Module, stored: Shards, prefix: str, ranks: Ranks) -> None:
    """Take the weights stored under `prefix`. Collective.

    Raises: CheckpointError for a name or shape the module does not have, or a trained parameter without weights.
    """
    parameters = dict(module.named_parameters())
    shapes = _under(prefix, stored)
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
    stored.fill({prefix + name: parameters[name].detach() for name in shapes}, ranks)


@torch.no_grad()
def load_moments(module: nn.Module, optimizer: Optimizer, stored: Shards, prefix: str, ranks: Ranks) -> None:
    """Take the moments stored under `prefix`, on as many ranks as there are now. Collective.

    Raises: CheckpointError for a moment of a parameter the module does not have, or of another optimiser.
    """
    parameters = dict(module.named_parameters())
    kept: defaultdict[str, dict[str, list[str]]] = defaultdict(dict)
    for path in _under(prefix, stored):
        name, key, *part = path.split("/")
        kept[name].setdefault(key, []).extend(["/".join(part)] if part else [])
    unknown = sorted(kept.keys() - parameters.keys())
    if unknown:
        raise CheckpointError(
            f"the checkpoint has optimiser moments of {len(unknown)} parameters that this model does not have (first: "
            f"{unknown[0]}): they are of another model or other adapters. Resume with the model settings it was "
            "written with."
        )
    _start_states(optimizer, {parameters[name] for name in kept})
    same: dict[str, Tensor] = {}
    for name, keys in kept.items():
        own = optimizer.state[parameters[name]]
        if own.keys() != keys.keys():
            raise CheckpointError(
                f"the checkpoint's optimiser keeps {sorted(keys)} of each parameter and this one {sorted(own)}. "
                "Resume with the learner.optimizer it was written with."
            )
        for key, parts in keys.items():
            path, moment = f"{prefix}{name}/{key}", own[key]
            if not parts and (type(_local(moment)) is Tensor):
                same[path] = moment
            elif not parts:
                copy_whole(moment, stored.whole([path])[path])
            elif not _take_own_part(path, moment, parts, stored):
                copy_whole(moment, _dequantised(path, parts, stored))
    stored.fill(same, ranks)


def _under(prefix: str, stored: Shards) -> dict[str, tuple[int, ...]]:
    return {name.removeprefix(prefix): shape for name, shape in stored.shapes.items() if name.startswith(prefix)}


def _parts(path: str, value: Tensor) -> dict[str, Tensor]:
    """This rank's part of a moment, as plain tensors."""
    rank, size = (value.device_mesh.get_rank(), value.device_mesh.size()) if isinstance(value, DTensor) else (0, 1)
    return {f"{path}/part{rank}of{size}/{name}": each for name, each in _pieces(_local(value)).items()}


def _pieces(local: Any) -> dict[str, Tensor]:
    return {PLAIN: local} if type(local) is Tensor else {name: getattr(local, name) for name in QUANTISED}


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def _take_own_part(path: str, moment: Tensor, parts: list[str], stored: Shards) -> bool:
    """Copy this rank's part bit for bit; False where the parts are of another number of ranks."""
    own = _parts(path, moment)
    if not {name.removeprefix(f"{path}/") for name in own} <= set(parts):
        return False
    found = stored.whole(own)
    for name, piece in own.items():
        piece.copy_(found[name])
    return True


def _dequantised(path: str, parts: list[str], stored: Shards) -> Tensor:
    """The values of a moment, its parts one below the other: table[code] * scale of the code's block."""
    found = stored.whole(f"{path}/{part}" for part in parts)
    size = len({part.partition("/")[0] for part in parts})
    values = []
    for rank in range(size):
        part = f"{path}/part{rank}of{size}"
        if f"{part}/{PLAIN}" in found:
            values.append(found[f"{part}/{PLAIN}"])
            continue
        codes, scale, table = (found[f"{part}/{name}"] for name in QUANTISED)
        values.append((table[codes.flatten().long()].view(len(scale), -1) * scale[:, None]).view(codes.shape))
    return torch.cat(values)


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
