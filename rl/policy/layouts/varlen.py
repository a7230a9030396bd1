"""Attention over a pack by variable-length flash attention: for a GPU without a compiler.

Every segment (run without a fork) is one sequence: its tokens are the queries, its ancestors and itself the keys. The
last key belongs to the last query, and flash attention lines causal order up at that end. Ancestors' keys are copied
for each segment below them, so memory grows with the sum of all segments' path lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.varlen import varlen_attn

from conf.errors import ConfigError
from rl.policy.mask import ancestor_ranges, last_tokens, segments

VarlenKernel = Callable[..., Tensor]
"""Called as `torch.nn.attention.varlen.varlen_attn` is: window_size=(left, 0) is causal from the last key backwards, a
query sees `left` keys before its own, -1 is all."""


@dataclass(frozen=True, slots=True)
class Sequences:
    """The segments of a pack as sequences, N of them; K is the sum of their keys."""

    key_index_K: Tensor
    """int64 [K], token of every key."""
    query_start: Tensor
    """int32 [N + 1], where each sequence's queries start; they lie in the pack's own order."""
    key_start: Tensor
    """int32 [N + 1]."""
    most_queries: int
    most_keys: int


class VarlenPlan:
    """The sequences of one pack, for each window that a layer asks for.

    Args:
        end_T: int64 [T], see `rl.policy.mask`; the plan's tensors are on its device.
        kernel: computes the attention.
    """

    def __init__(self, end_T: Tensor, kernel: VarlenKernel | None = None) -> None:
        self.end_T = end_T
        self.kernel = kernel or _flash
        self._sequences: dict[int | None, Sequences] = {}

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
        """See `rl.policy.layouts.attention.AttentionPlan`.

        Raises: ConfigError for a cap of the scores, for float32, and without a GPU.
        """
        if softcap is not None:
            raise ConfigError(
                f"learner.layout=varlen knows no cap of the attention scores, but the model caps them at {softcap}: it "
                "would train another model than the engine samples from. Use learner.layout=flex or segments."
            )
        sequences = self.sequences(window)
        output_THD = self.kernel(
            query[0].transpose(0, 1),
            _Gathered.apply(key[0].transpose(0, 1), sequences.key_index_K),
            _Gathered.apply(value[0].transpose(0, 1), sequences.key_index_K),
            sequences.query_start,
            sequences.key_start,
            sequences.most_queries,
            sequences.most_keys,
            scale=scaling,
            # The kernel counts the keys before a query's own.
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return output_THD[None]

    def sequences(self, window: int | None) -> Sequences:
        """What a layer's call needs."""
        if window not in self._sequences:
            self._sequences[window] = plan_sequences(self.end_T, window)
        return self._sequences[window]


def plan_sequences(end_T: Tensor, window: int | None = None) -> Sequences:
    """Lay out a pack's segments as sequences, without keys that none of their queries has in its window.

    Args:
        end_T: int64 [T], see `rl.policy.mask`.
        window: see `AttentionPlan.attend`.
    """
    key_ranges = [
        [*(ancestors if window is None else last_tokens(ancestors, window - 1)), segment]
        for segment, ancestors in zip(segments(end_T), ancestor_ranges(end_T), strict=True)
    ]
    num_queries = [ranges[-1][1] - ranges[-1][0] for ranges in key_ranges]
    num_keys = [sum(stop - start for start, stop in ranges) for ranges in key_ranges]

    def starts(lengths: list[int]) -> Tensor:
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=end_T.device)

    return Sequences(
        key_index_K=torch.cat([torch.arange(*part) for ranges in key_ranges for part in ranges]).to(end_T.device),
        query_start=starts(num_queries),
        key_start=starts(num_keys),
        most_queries=max(num_queries),
        most_keys=max(num_keys),
    )


class _Gathered(torch.autograd.Function):
    """Rows by index. Backward adds in float32, since a token of the prompt sums over all branches."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index_K: Tensor) -> Tensor:
        ctx.save_for_backward(index_K)
        ctx.shape, ctx.dtype = rows.shape, rows.dtype
        return rows.index_select(0, index_K)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (index_K,) = ctx.saved_tensors
        wide = torch.promote_types(ctx.dtype, torch.float32)
        total = torch.zeros(ctx.shape, dtype=wide, device=index_K.device)
        return total.index_add_(0, index_K, grads[0].to(wide)).to(ctx.dtype), None


def _flash(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """torch's kernel, where it can run."""
    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16):
        raise ConfigError(
            f"learner.layout=varlen was given {query.dtype} on {query.device.type}, but flash attention computes only "
            "bfloat16 and float16 on a GPU. Use model.dtype=bfloat16 there, or learner.layout=segments."
        )
    output = varlen_attn(query, *args, **kwargs)
    assert isinstance(output, Tensor), "log-sum-exps were not asked for"
    return output
