"""Attention over a pack by FlexAttention with a block table: the fastest layout on a GPU.

FlexAttention has no backward on a CPU: there only a forward pass can run, operation by operation. On a GPU it is
compiled once for all packs, not once for each: lengths are dynamic, and the block table and `end_T` are inputs like the
keys are. What makes it compile again: whether gradients are wanted, whether a layer has a window or a cap, a second
model with other heads, and a pack of one block, whose table has no size to be dynamic in.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import cast

import torch
from torch import Tensor
from torch._dynamo.decorators import maybe_mark_dynamic
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from conf.errors import ConfigError
from rl.policy.mask import block_table, depths

BLOCK = 128
"""Tokens on a side of a block; packs are padded to a multiple of it."""

LEAST_HEAD_DIM = 16
"""FlexAttention on a GPU takes no smaller heads."""

MOST_COMPILED = 64
"""Far above the cases listed at the top, for a policy, a critic and a reference; torch's own limit is 8."""

BlockTables = tuple[Tensor, ...]
"""For each row of blocks: how many partial ones and which, how many whole ones and which; then the same by columns."""


class FlexPlan:
    """The block tables of one pack, for each window that a layer asks for.

    Args:
        end_T: int64 [T], see `rl.policy.mask`; T is a multiple of `BLOCK`.
    """

    def __init__(self, end_T: Tensor) -> None:
        self.end_T = end_T
        self.depth_T = depths(end_T)
        self._tables: dict[int | None, BlockTables] = {}

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

        Raises: ConfigError for heads that are too small, and for a backward pass on a CPU.
        """
        on_gpu = query.device.type == "cuda"
        if on_gpu:
            _require_head_dim(query)
        elif query.requires_grad:
            raise ConfigError(
                f"learner.layout=flex cannot train on {query.device.type}: FlexAttention has no backward there. Use "
                "learner.layout=segments, or auto."
            )
        # As a tensor it is an input: compiled for dynamic lengths, a number would be taken for one more of them.
        cap = None if softcap is None else torch.full((), softcap, device=query.device)
        # The usual scale is a constant of the kernel; a number would turn dynamic once two models differ in it.
        scale = None if scaling == query.shape[3] ** -0.5 else scaling
        arguments = query, key, value, self.end_T, self.depth_T, self.tables(window)
        if not on_gpu:
            return _attend(*arguments, scale, window, cap)
        mark_lengths(*arguments)
        return _compiled()(*arguments, scale, window, cap)

    def tables(self, window: int | None) -> BlockTables:
        """The tables of a layer with this window."""
        if window not in self._tables:
            self._tables[window] = block_tables(self.end_T, window)
        return self._tables[window]


def block_tables(end_T: Tensor, window: int | None = None) -> BlockTables:
    """The block table in the eight parts that `BlockMask` is made of, each int32 [1, 1, B] or [1, 1, B, B]."""
    seen_BB, whole_BB = block_table(end_T, BLOCK, window)
    partial_BB = seen_BB & ~whole_BB
    return (*_counted(partial_BB), *_counted(whole_BB), *_counted(partial_BB.T), *_counted(whole_BB.T))


def _counted(blocks_BB: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each row has, and their columns in order, the others' behind them."""
    columns = blocks_BB.int().argsort(dim=1, descending=True, stable=True)
    return blocks_BB.sum(1, dtype=torch.int32)[None, None], columns.int()[None, None]


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    end_T: Tensor,
    depth_T: Tensor,
    tables: BlockTables,
    scale: float | None,
    window: int | None,
    softcap: Tensor | None,
) -> Tensor:
    """Attention [1, T, heads, head_dim]; the block mask is made here, so that its length is dynamic when compiled."""

    def sees(batch: Tensor, head: Tensor, query_token: Tensor, key_token: Tensor) -> Tensor:
        is_ancestor = (key_token <= query_token) & (query_token < end_T[key_token])
        if window is None:
            return is_ancestor
        return is_ancestor & (depth_T[query_token] - depth_T[key_token] < window)

    def capped(score: Tensor, batch: Tensor, head: Tensor, query_token: Tensor, key_token: Tensor) -> Tensor:
        assert softcap is not None, "used only with a cap"
        return softcap * torch.tanh(score / softcap)

    length = query.shape[2]
    output = flex_attention(
        query,
        key,
        value,
        score_mod=None if softcap is None else capped,
        block_mask=BlockMask((length, length), *tables, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=sees),
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor), "log-sum-exps were not asked for"
    return output.transpose(1, 2)


def mark_lengths(
    query: Tensor, key: Tensor, value: Tensor, end_T: Tensor, depth_T: Tensor, tables: BlockTables
) -> None:
    """Tell the compiler which sizes change from pack to pack.

    It would find out by itself at the second length, but then two compiled forms fit the first one, and a checkpointed
    layer may get one in its forward pass and the other when it is computed again.
    """
    for heads in (query, key, value):
        maybe_mark_dynamic(heads, 2)
    for tokens in (end_T, depth_T):
        maybe_mark_dynamic(tokens, 0)
    for table in tables:
        maybe_mark_dynamic(table, list(range(2, table.ndim)))


@cache
def _compiled() -> Callable[..., Tensor]:
    # fullgraph: an error where it cannot be compiled, since uncompiled it would write out all T * T scores.
    compiled = torch.compile(_attend, fullgraph=True, recompile_limit=MOST_COMPILED)  # pyright: ignore[reportCallIssue]
    return cast(Callable[..., Tensor], compiled)


def _require_head_dim(query: Tensor) -> None:
    if query.shape[3] < LEAST_HEAD_DIM:
        raise ConfigError(
            f"learner.layout=flex needs heads of at least {LEAST_HEAD_DIM}, but the model's have {query.shape[3]}: "
            "torch has no kernel for them. Use learner.layout=segments or varlen."
        )
