"""Every trajectory a sequence of its own, as trainers without trees have it: the reference that packed layouts must
agree with, and the way for models that no packed tree can train exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from conf.errors import ConfigError
from rl.policy.layouts.backend import text_config, use_plain_attention
from rl.policy.pack import PAD_ID, PackedBatch

MAX_TOKENS = 8192
"""Tokens of one padded group; more would only make single calls larger."""


@dataclass(frozen=True, slots=True)
class Hidden:
    """What a layout makes of a pack."""

    hidden_TD: Tensor
    """Last hidden state of every token, in the model's dtype, zeros where nothing reads it."""
    router_loss: Tensor | None = None
    """Load-balancing loss (float32 scalar, about 1 when balanced) of a model whose config asks for one; a loss adds it
    times config.router_aux_loss_coef."""


def trajectory_hidden(backbone: nn.Module, batch: PackedBatch, max_tokens: int = MAX_TOKENS) -> Hidden:
    """Last hidden states of a pack whose trajectories go through the model one by one.

    Rows are sorted by length and padded on the right, and no mask and no positions are passed: the padding comes after
    everything real, so neither causal attention nor a recurrence can see it. A token that several trajectories share is
    computed in each and trained once, as part of the first that holds it. Where the model draws random numbers
    (dropout), that copy has its own draw and the other trajectories' context has others.

    Several processes make the same number of calls, so that a sharded model's collectives match: all must come here
    together.

    Args:
        backbone: a model of transformers without its output layer; afterwards it has transformers' own attention.
        max_tokens: a group holds at most this many tokens, padding included; a longer trajectory is alone.
    Raises: ConfigError for a model that asks for a load-balancing loss and does not return its routers' logits.
    """
    use_plain_attention(backbone)
    wants_routers = bool(getattr(text_config(backbone), "output_router_logits", False))
    extra = {"output_router_logits": True} if wants_routers else {}
    starts = batch.traj_ptr
    lengths = [stop - start for start, stop in pairwise(starts)]
    is_first_P = _is_first(batch)
    groups = list(_groups(lengths, max_tokens))
    num_idle = _most_calls(len(groups), batch) - len(groups)  # agreed on before the first call
    rows, tokens, routers = [], [], []
    for group in groups:
        place_GL, is_real_GL = _places([starts[row] for row in group], [lengths[row] for row in group], batch)
        index_GL = batch.traj_index_P[place_GL]
        ids_GL = batch.input_ids_T[index_GL].where(is_real_GL, PAD_ID)
        output = backbone(input_ids=ids_GL, use_cache=False, **extra)
        is_taken_GL = is_real_GL & is_first_P[place_GL]
        rows.append(output.last_hidden_state[is_taken_GL])
        tokens.append(index_GL[is_taken_GL])
        if wants_routers:
            routers.append(_router_logits(output, is_real_GL))
    idle = [_idle_row(backbone, batch) for _ in range(num_idle)]
    hidden_TD = _scattered(rows, tokens, idle, len(batch.input_ids_T))
    return Hidden(hidden_TD, router_aux_loss(routers, backbone) if routers else None)


def router_aux_loss(routers: list[list[Tensor]], backbone: nn.Module) -> Tensor:
    """Load-balancing loss of the Switch Transformer (arXiv 2101.03961, equations 4 to 6), as transformers has it.

    It is no sum over tokens: the share of tokens that an expert got times its mean probability. So the tokens of all
    groups are put together first, and a token counts as often as trajectories hold it.

    Args:
        routers: for each group, for each layer, logits [its real tokens, experts].
    """
    layers = tuple(torch.cat(groups) for groups in zip(*routers, strict=True))
    # Its annotation says a tuple of one.
    loss = load_balancing_loss_func(
        cast(Any, layers), num_experts=layers[0].shape[-1], top_k=text_config(backbone).num_experts_per_tok
    )
    assert isinstance(loss, Tensor), "it is a number only without logits"
    return loss


def _groups(lengths: list[int], max_tokens: int) -> Iterator[list[int]]:
    """Trajectories by length, longest first, as many as fit padded to the group's first."""
    group: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        if group and (len(group) + 1) * lengths[group[0]] > max_tokens:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _places(starts: list[int], lengths: list[int], batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Place in traj_index_P of each token of a group [G, L] (padding: of the row's last), and which are real."""
    device = batch.traj_index_P.device
    length_G1 = torch.tensor(lengths, device=device)[:, None]
    offset_L = torch.arange(max(lengths), device=device)
    place_GL = torch.tensor(starts, device=device)[:, None] + offset_L.minimum(length_G1 - 1)
    return place_GL, offset_L < length_G1


def _is_first(batch: PackedBatch) -> Tensor:
    """bool [P], True where no earlier trajectory holds the token."""
    index_P = batch.traj_index_P
    place_P = torch.arange(len(index_P), device=index_P.device)
    first_T = torch.full_like(batch.input_ids_T, len(index_P)).scatter_reduce(0, index_P, place_P, "amin")
    return first_T[index_P] == place_P


def _router_logits(output: dict[str, object], is_real_GL: Tensor) -> list[Tensor]:
    layers = output.get("router_logits")
    if not isinstance(layers, tuple) or not layers:
        raise ConfigError(
            "the model's config says output_router_logits=true but the model returns no router logits, so its "
            "load-balancing loss cannot be computed. Set output_router_logits to false in its config.json."
        )
    return [logits[is_real_GL.flatten()] for logits in layers]


def _most_calls(num_calls: int, batch: PackedBatch) -> int:
    """Calls that the process with most groups makes, at least one."""
    num_calls = max(1, num_calls)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return num_calls
    most = torch.tensor(num_calls, device=batch.input_ids_T.device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


def _idle_row(backbone: nn.Module, batch: PackedBatch) -> Tensor:
    """One token's hidden state [1, D], computed only to keep step with other processes."""
    ids = torch.full((1, 1), PAD_ID, device=batch.input_ids_T.device)
    return backbone(input_ids=ids, use_cache=False).last_hidden_state[0]


def _scattered(rows: list[Tensor], tokens: list[Tensor], idle: list[Tensor], num_tokens: int) -> Tensor:
    """Rows at their tokens' places; idle ones times 0, so that backward goes through them as well."""
    first = (rows or idle)[0]
    hidden_TD = first.new_zeros(num_tokens, first.shape[-1])
    if rows:
        hidden_TD = hidden_TD.index_copy(0, torch.cat(tokens), torch.cat(rows))
    return hidden_TD + sum(0.0 * row for row in idle) if idle else hidden_TD
