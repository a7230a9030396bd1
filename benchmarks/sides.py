"""Three ways to the same gradient of one model: trees packed, trajectories padded, trajectories packed one behind the other.

All three run the policy loss that `rl.policy.loss.ppo_clip` is, take the output layer on trained rows alone, and compute
at most so many tokens at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from benchmarks.forests import Forest, Trajectory, grouped
from conf.schema import Layout, LossConfig
from rl.policy.layouts.attention import ATTENTION_NAME, AttentionPlan
from rl.policy.logprobs import edge_logprobs
from rl.policy.loss import log_ratio, ppo_clip
from rl.policy.model import HEAD_CHUNK_LOGITS, TreePolicy, head_weight
from rl.policy.pack import pack, plan_packs

Side = Callable[[TreePolicy, Forest, int], None]
"""(policy, forest, most tokens at once): adds the gradient of the forest to the policy's parameters."""


def packed(layout: Layout, pad_multiple: int = 1) -> Side:
    """Grove's own: every token once. Planning and packing are part of the work."""

    def side(policy: TreePolicy, forest: Forest, max_tokens: int) -> None:
        for trees in plan_packs(forest.credits(), max_tokens):
            batch = pack(trees, pad_multiple).to(_device(policy))
            logprob_E = policy(batch, layout).logprob_E
            _backward(logprob_E, batch.old_logprob_E.float(), batch.w_pos_E.float(), batch.w_neg_E.float())

    return side


def padded(policy: TreePolicy, forest: Forest, max_tokens: int) -> None:
    """Every trajectory a row of its own, sorted by length, in groups; the model's stock attention."""
    device = _device(policy)
    policy.model.set_attn_implementation("sdpa")
    for group in grouped(forest.trajectories(), max_tokens):
        ids_BT = pad_sequence([each.token_ids_T for each in group], batch_first=True).to(device)
        # Padding comes last and attention is causal: no real token sees it, so no mask slows the kernel down.
        hidden_BTD = policy.model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
        starts = [row * ids_BT.shape[1] for row in range(len(group))]
        _train_rows(policy, hidden_BTD.flatten(0, 1), group, starts)
    policy.model.set_attn_implementation(ATTENTION_NAME)


def varlen(plan_of: Callable[[list[int], torch.device], AttentionPlan]) -> Side:
    """Trajectories one behind the other without padding, attention within each.

    Args:
        plan_of: from the trajectories' lengths, ascending, and the device.
    """

    def side(policy: TreePolicy, forest: Forest, max_tokens: int) -> None:
        device = _device(policy)
        for group in _filled(forest.trajectories(), max_tokens):
            lengths = [len(each.token_ids_T) for each in group]
            ids_T = torch.cat([each.token_ids_T for each in group]).to(device)
            position_T = torch.cat([torch.arange(length) for length in lengths]).to(device)
            hidden_TD = policy.model.base_model(
                input_ids=ids_T[None],
                position_ids=position_T[None],
                use_cache=False,
                tree_plan=plan_of(lengths, device),
            ).last_hidden_state[0]
            starts = [sum(lengths[:index]) for index in range(len(lengths))]
            _train_rows(policy, hidden_TD, group, starts)

    return side


@dataclass(frozen=True, slots=True)
class SequencePlan:
    """Causal attention within neighbouring sequences by stock kernels: one call for all sequences of one length."""

    runs: list[tuple[int, int]]
    """(length, how many neighbours have it)."""

    @classmethod
    def of(cls, lengths: list[int], device: torch.device) -> SequencePlan:
        """For sequences of these lengths, sorted by length; the same on any device."""
        return cls([(length, len(list(same))) for length, same in groupby(lengths)])

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
            parts = [
                each[0, :, start:stop].unflatten(1, (count, length)).transpose(0, 1) for each in (query, key, value)
            ]
            output_SHTD = scaled_dot_product_attention(*parts, is_causal=True, scale=scaling, enable_gqa=True)
            outputs.append(output_SHTD.transpose(1, 2).flatten(0, 1))
            start = stop
        return torch.cat(outputs)[None]


def _filled(trajectories: Sequence[Trajectory], max_tokens: int) -> list[list[Trajectory]]:
    """Sorted by length, as many at a time as fit."""
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
    head = head_weight(policy.model)
    chunk_rows = max(1, HEAD_CHUNK_LOGITS[device.type] // len(head))
    logprob_E, _ = edge_logprobs(hidden_TD, head, row_E, target_E, policy.temperature, chunk_rows=chunk_rows)
    parts = [(each.old_logprob_E, each.w_pos_E, each.w_neg_E) for each in group]
    old_E, w_pos_E, w_neg_E = (torch.cat(column).to(device) for column in zip(*parts, strict=True))
    _backward(logprob_E, old_E, w_pos_E, w_neg_E)


def _backward(logprob_E: Tensor, old_logprob_E: Tensor, w_pos_E: Tensor, w_neg_E: Tensor) -> None:
    loss = LossConfig()
    ratio_E = log_ratio(logprob_E, old_logprob_E)
    ppo_clip(ratio_E, w_pos_E, w_neg_E, loss.clip_low, loss.clip_high).sum().backward()


def _device(policy: TreePolicy) -> torch.device:
    return next(policy.parameters()).device
