"""Three ways to the same gradient of one model: trees packed, trajectories padded, trajectories one behind the other.

All three have the loss of `rl.policy.loss.ppo_clip`, take the output layer on trained rows alone, and compute no more
tokens at once than they are told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from benchmarks.forests import Forest, Trajectory
from conf.schema import Layout, LossConfig
from rl.policy.layouts.backend import use_plain_attention, use_tree_attention
from rl.policy.logprobs import edge_logprobs, output_head
from rl.policy.lora import base_causal_lm
from rl.policy.loss import log_ratio, ppo_clip
from rl.policy.model import HEAD_CHUNK_LOGITS, TreePolicy
from rl.policy.pack import pack, plan_packs

Side = Callable[[TreePolicy, Forest, int], None]
"""(policy, forest, most tokens at once): adds the gradient of the forest to the policy's parameters."""


def packed(layout: Layout, pad_multiple: int = 1) -> Side:
    """Grove's own: every token once. Planning and packing are part of the work."""

    def side(policy: TreePolicy, forest: Forest, max_tokens: int) -> None:
        for trees in plan_packs(forest.credits, max_tokens):
            batch = pack(trees, pad_multiple).to(_device(policy))
            logprob_E = policy(batch, layout).logprob_E
            _backward(logprob_E, batch.old_logprob_E.float(), batch.w_pos_E.float(), batch.w_neg_E.float())

    return side


def padded(policy: TreePolicy, forest: Forest, max_tokens: int) -> None:
    """Every trajectory a row of its own, sorted by length, in groups; the model's stock attention."""
    device, backbone = _device(policy), _backbone(policy)
    use_plain_attention(backbone)
    for group in grouped(forest.trajectories, max_tokens):
        ids_BT = pad_sequence([each.token_ids_T for each in group], batch_first=True).to(device)
        # Padding comes last and attention is causal: no real token sees it, so no mask slows the kernel down.
        hidden_BTD = backbone(input_ids=ids_BT, use_cache=False).last_hidden_state
        starts = [row * ids_BT.shape[1] for row in range(len(group))]
        _train_rows(policy, hidden_BTD.flatten(0, 1), group, starts)


def varlen(policy: TreePolicy, forest: Forest, max_tokens: int) -> None:
    """Trajectories one behind the other without padding, attention within each."""
    device, backbone = _device(policy), _backbone(policy)
    use_tree_attention(backbone)
    for group in filled(forest.trajectories, max_tokens):
        lengths = [len(each.token_ids_T) for each in group]
        ids_T = torch.cat([each.token_ids_T for each in group]).to(device)
        position_T = torch.cat([torch.arange(length) for length in lengths]).to(device)
        plan = SequencePlan([(length, len(list(same))) for length, same in groupby(lengths)])
        output = backbone(input_ids=ids_T[None], position_ids=position_T[None], use_cache=False, tree_plan=plan)
        starts = [sum(lengths[:index]) for index in range(len(lengths))]
        _train_rows(policy, output.last_hidden_state[0], group, starts)


def gradient_gap(policy: TreePolicy, forest: Forest, sides: Sequence[Side], max_tokens: int) -> float:
    """How far the sides' gradients are apart: |g - g_last| / |g_last| of the worst side and weight.

    Leaves the policy without gradients.
    """
    gradients: list[dict[str, Tensor]] = []
    for side in sides:
        side(policy, forest, max_tokens)
        gradients.append({name: weight.grad for name, weight in policy.named_parameters() if weight.grad is not None})
        policy.zero_grad()
    *others, last = gradients
    return max(
        float((mine[name] - expected).norm() / expected.norm()) for mine in others for name, expected in last.items()
    )


@dataclass(frozen=True, slots=True)
class SequencePlan:
    """Causal attention within neighbouring sequences by stock kernels: one call for all sequences of one length."""

    runs: list[tuple[int, int]]
    """(length, how many neighbours have it)."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
        layer: int,
    ) -> Tensor:
        """See `rl.policy.layouts.attention.AttentionPlan`."""
        assert window is None and softcap is None, "the models measured here have neither"
        outputs = []
        start = 0
        for length, count in self.runs:
            stop = start + length * count
            # [1, H, T, D] -> [sequences, H, length, D], views all.
            queries, keys, values = (
                each[0, :, start:stop].unflatten(1, (count, length)).transpose(0, 1) for each in (query, key, value)
            )
            output_SHTD = scaled_dot_product_attention(
                queries, keys, values, is_causal=True, scale=scaling, enable_gqa=True
            )
            outputs.append(output_SHTD.transpose(1, 2).flatten(0, 1))
            start = stop
        return torch.cat(outputs)[None]


def grouped(trajectories: Sequence[Trajectory], max_tokens: int) -> list[list[Trajectory]]:
    """Trajectories sorted by length, as many at a time as fit `max_tokens` when padded to the longest of them."""
    groups: list[list[Trajectory]] = []
    for trajectory in sorted(trajectories, key=lambda each: len(each.token_ids_T)):
        if not groups or (len(groups[-1]) + 1) * len(trajectory.token_ids_T) > max_tokens:
            groups.append([])
        groups[-1].append(trajectory)
    return groups


def filled(trajectories: Sequence[Trajectory], max_tokens: int) -> list[list[Trajectory]]:
    """Trajectories sorted by length, as many at a time as fit `max_tokens` without padding."""
    groups: list[list[Trajectory]] = []
    used = max_tokens
    for trajectory in sorted(trajectories, key=lambda each: len(each.token_ids_T)):
        length = len(trajectory.token_ids_T)
        if used + length > max_tokens:
            groups.append([])
            used = 0
        groups[-1].append(trajectory)
        used += length
    return groups


def _train_rows(policy: TreePolicy, hidden_TD: Tensor, group: Sequence[Trajectory], starts: Sequence[int]) -> None:
    """The loss of trajectories that start at these rows of the hidden states, and its gradient."""
    device = hidden_TD.device
    row_E = torch.cat([start + each.row_E for start, each in zip(starts, group, strict=True)]).to(device)
    target_E = torch.cat([each.target_E() for each in group]).to(device)
    head = output_head(base_causal_lm(policy.model))
    chunk_rows = max(1, HEAD_CHUNK_LOGITS[device.type] // len(head.weight_VD))
    logprob_E, _ = edge_logprobs(hidden_TD, head, row_E, target_E, policy.temperature, chunk_rows=chunk_rows)
    parts = [(each.old_logprob_E, each.w_pos_E, each.w_neg_E) for each in group]
    old_E, w_pos_E, w_neg_E = (torch.cat(column).to(device) for column in zip(*parts, strict=True))
    _backward(logprob_E, old_E, w_pos_E, w_neg_E)


def _backward(logprob_E: Tensor, old_logprob_E: Tensor, w_pos_E: Tensor, w_neg_E: Tensor) -> None:
    loss = LossConfig()
    ratio_E = log_ratio(logprob_E, old_logprob_E)
    ppo_clip(ratio_E, w_pos_E, w_neg_E, loss.clip_low, loss.clip_high).sum().backward()


def _backbone(policy: TreePolicy) -> nn.Module:
    return base_causal_lm(policy.model).base_model


def _device(policy: TreePolicy) -> torch.device:
    return next(policy.parameters()).device
