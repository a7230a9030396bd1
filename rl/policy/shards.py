"""The policy as pieces for the engines: each rank gives the rows it holds, in the engines' type and by their names.

No rank ever has all of the model: a group of tensors goes at a time, and only tensors whose names on the hub stand for
other tensors than those in memory (fused experts) are made whole, one layer at a time, each on another rank in turn.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from conf.schema import Config, LoraConfig
from rl.policy.lora import ADAPTER_WEIGHT, base_causal_lm
from rl.policy.model import TreePolicy
from rl.policy.ranks import Ranks
from rl.policy.sharding import local_rows, whole_tensor
from rl.policy.stored import plain_weights
from rollout.shards import Rows

GROUP_BYTES = 64 * 2**20
"""What a group holds of all ranks together, at most, unless one tensor or one layer of experts is larger."""
LAYER = re.compile(r"^(.*?\.\d+)\.")


@torch.no_grad()
def policy_pieces(
    policy: TreePolicy, cfg: Config, ranks: Ranks, group_bytes: int = GROUP_BYTES, *, whole: bool = False
) -> Iterator[tuple[list[Rows], list[Tensor]]]:
    """This rank's rows of the policy, group by group: adapters merged, a value head and a tied output layer left out.

    Collective: every rank gets as many groups. The tensors may be the weights themselves; copy them before the next
    update.

    Args:
        cfg: model.dtype is the type that engines take; reads model.lora.
        group_bytes: of a whole group.
        whole: every rank gets all rows of every group, for engines that hear this rank alone.
    """
    dtype = getattr(torch, cfg.model.dtype)
    model = base_causal_lm(policy.model)
    converts = has_conversion(model)
    parameters = dict(policy.named_parameters())
    sizes = {name: each.numel() * dtype.itemsize for name, each in parameters.items()}
    for number, units in enumerate(groups_of(sizes, group_bytes, by_layer=converts)):
        rows, tensors = [], []
        for names in units:
            unit = {name: parameters[name].detach() for name in names}
            held = _whole(unit, model, cfg.model.lora) if converts or whole else _own_rows(unit, cfg.model.lora)
            if converts and not whole and ranks.rank != number % ranks.size:
                continue
            for name, (tensor, shape, start) in held.items():
                rows.append(Rows(name, cfg.model.dtype, shape, start))
                tensors.append(tensor.to(dtype))
        yield rows, tensors


def has_conversion(model: PreTrainedModel) -> bool:
    """True for a model whose tensors have other shapes or names in memory than on the hub."""
    nothing: dict[str, Tensor] = {}
    return revert_weight_conversion(model, nothing) is not nothing


def groups_of(sizes: dict[str, int], group_bytes: int, *, by_layer: bool = False) -> list[list[list[str]]]:
    """Parameters in their order, in units of what must be seen together, in groups of at most `group_bytes`.

    Args:
        sizes: bytes by the parameter's name in a TreePolicy.
        by_layer: a unit is a layer of the model; else a parameter, with the adapter on it.
    Returns: groups of units of names; a unit above `group_bytes` is a group of its own.
    """
    units: dict[str, list[str]] = {}
    for name in sizes:
        layer = LAYER.match(name) if by_layer else None
        units.setdefault(layer[1] if layer else _adapted_layer(name), []).append(name)
    groups: list[list[list[str]]] = []
    room = 0
    for names in units.values():
        size = sum(sizes[name] for name in names)
        if not groups or size > room:
            groups.append([])
            room = group_bytes
        groups[-1].append(names)
        room -= size
    return groups


def _adapted_layer(name: str) -> str:
    return ADAPTER_WEIGHT.sub("", name).removesuffix(".base_layer.weight")


Held = tuple[Tensor, tuple[int, ...], int]
"""Rows, the shape of the whole tensor, and the first row."""


def _whole(unit: dict[str, Tensor], model: PreTrainedModel, lora: LoraConfig) -> dict[str, Held]:
    plain = plain_weights({name: whole_tensor(each) for name, each in unit.items()}, lora)
    return {name: (each, tuple(each.shape), 0) for name, each in revert_weight_conversion(model, plain).items()}


def _own_rows(unit: dict[str, Tensor], lora: LoraConfig) -> dict[str, Held]:
    """The rows this rank holds of one plain tensor, its adapter merged."""
    local: dict[str, Tensor] = {}
    shape, start = (), 0
    for name, each in unit.items():
        adapter = ADAPTER_WEIGHT.search(name)
        if adapter is not None and adapter[1] == "A":
            local[name] = whole_tensor(each)  # rows of B A are rows of B times all of A
        elif adapter is not None:
            local[name] = local_rows(each)[0]
        else:
            (local[name], start), shape = local_rows(each), tuple(each.shape)
    return {name: (rows, shape, start) for name, rows in plain_weights(local, lora).items()}
