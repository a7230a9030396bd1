"""Attention over a pack by segments, on any device.

The pack is cut into its segments (runs without a fork). A segment's keys are its ancestors and itself, so the last key
belongs to its last query and plain causal order holds inside. Segments of like shape share one call: agents make
hundreds of segments of a few tokens, and one call for each would cost more than the attention itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rl.policy.mask import ancestor_ranges, segments

QUERY_MULTIPLE = 8
KEY_MULTIPLE = 32
LONG_TOKENS = 512
"""Lengths below this are rounded up to a multiple, so that short segments fall into few shapes; longer ones keep their
own shape, because a call is then worth its cost and padding, with the mask it needs, is not."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Queries [start, stop) and the ranges of tokens before `start` that all of them see."""

    start: int
    stop: int
    ancestors: list[tuple[int, int]]

    def num_queries(self) -> int:
        """Tokens of the segment."""
        return self.stop - self.start

    def num_keys(self) -> int:
        """Tokens its last query sees."""
        return sum(stop - start for start, stop in self.key_ranges())

    def key_ranges(self) -> list[tuple[int, int]]:
        """Ranges of its keys, in the order of its path."""
        return [*self.ancestors, (self.start, self.stop)]


@dataclass(slots=True)
class Block:
    """G segments of one shape, padded on the left, so that the last key belongs to the last query in all of them."""

    num_segments: int
    num_queries: int
    num_keys: int
    mask_G1QK: Tensor
    """bool [G, 1, Q, K], or [1, 1, Q, K] where no segment is padded."""


@dataclass(slots=True)
class SegmentPlan:
    """What one pack's attention needs in every layer; made once per pack."""

    query_index: Tensor
    """int64, token of every query of every block, padding included."""
    key_index: Tensor
    """int64, token of every key of every block, padding included."""
    output_index_T: Tensor
    """int64 [T], where each token's result is among the queries."""
    blocks: list[Block]

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
        assert window is None and softcap is None, "not yet"
        num_heads, head_dim = query.shape[1], query.shape[3]
        query_QHD = query[0].transpose(0, 1).index_select(0, self.query_index)
        # Keys and values are gathered as one tensor: the gather, and the scattered addition behind it, dominate.
        pair_KHD = torch.cat([key[0], value[0]], dim=-1).transpose(0, 1).index_select(0, self.key_index)
        blocks = self.blocks
        queries = query_QHD.split([block.num_segments * block.num_queries for block in blocks])
        pairs = pair_KHD.split([block.num_segments * block.num_keys for block in blocks])
        outputs = [_attend(*block, scaling) for block in zip(blocks, queries, pairs, strict=True)]
        output_THD = torch.cat(outputs).index_select(0, self.output_index_T)
        return output_THD.view(1, -1, num_heads, head_dim)


def plan_segments(end_T: Tensor) -> SegmentPlan:
    """Group a pack's segments into blocks.

    Args:
        end_T: int64 [T], see `rl.policy.mask`; the plan's tensors are on its device.
    """
    runs = zip(segments(end_T), ancestor_ranges(end_T), strict=True)
    shapes: dict[tuple[int, int], list[Segment]] = {}
    for segment in (Segment(start, stop, ancestors) for (start, stop), ancestors in runs):
        shape = _rounded(segment.num_queries(), QUERY_MULTIPLE), _rounded(segment.num_keys(), KEY_MULTIPLE)
        shapes.setdefault(shape, []).append(segment)
    query_index, key_index, output_index = [], [], [0] * len(end_T)
    for (num_queries, num_keys), members in shapes.items():
        for segment in members:
            _pad_left(query_index, [(segment.start, segment.stop)], num_queries - segment.num_queries())
            _pad_left(key_index, segment.key_ranges(), num_keys - segment.num_keys())
            first = len(query_index) - segment.num_queries()
            output_index[segment.start : segment.stop] = range(first, len(query_index))

    def on_device(index: list[int]) -> Tensor:
        return torch.tensor(index, dtype=torch.int64, device=end_T.device)

    return SegmentPlan(
        query_index=on_device(query_index),
        key_index=on_device(key_index),
        output_index_T=on_device(output_index),
        blocks=[_block(shape, members, end_T.device) for shape, members in shapes.items()],
    )


def _attend(block: Block, query: Tensor, pair: Tensor, scaling: float | None) -> Tensor:
    """One call for all segments of a block; query [G*Q, H, D], pair [G*K, H of keys, 2D] -> [G*Q, H, D]."""
    query_GHQD = query.unflatten(0, (block.num_segments, block.num_queries)).transpose(1, 2)
    pair_GHKD = pair.unflatten(0, (block.num_segments, block.num_keys)).transpose(1, 2)
    # Query head h belongs to key head h // repeats. Kernels that take a mask do not all take grouped heads.
    pair_GHKD = pair_GHKD.repeat_interleave(query_GHQD.shape[1] // pair_GHKD.shape[1], dim=1)
    key_GHKD, value_GHKD = pair_GHKD.chunk(2, dim=-1)
    output_GHQD = scaled_dot_product_attention(
        query_GHQD, key_GHKD, value_GHKD, attn_mask=block.mask_G1QK, scale=scaling
    )
    return output_GHQD.transpose(1, 2).flatten(0, 1)


def _block(shape: tuple[int, int], members: list[Segment], device: torch.device) -> Block:
    num_queries, num_keys = shape
    query_pad_G = torch.tensor([num_queries - segment.num_queries() for segment in members], device=device)
    key_pad_G = torch.tensor([num_keys - segment.num_keys() for segment in members], device=device)
    query_Q1 = torch.arange(num_queries, device=device)[:, None]
    key_K = torch.arange(num_keys, device=device)
    mask_GQK = (key_K - num_keys <= query_Q1 - num_queries)[None]
    if query_pad_G.any() or key_pad_G.any():
        # Padded queries see everything: nobody reads them, but a row that saw nothing would be NaN in backward.
        mask_GQK = mask_GQK & (key_K >= key_pad_G[:, None, None]) | (query_Q1 < query_pad_G[:, None, None])
    return Block(len(members), num_queries, num_keys, mask_GQK[:, None])


def _pad_left(index: list[int], ranges: Iterable[tuple[int, int]], num_padding: int) -> None:
    """Append padding (token 0, masked or unread) and then the tokens of the ranges."""
    index += [0] * num_padding
    index += chain.from_iterable(range(start, stop) for start, stop in ranges)


def _rounded(length: int, multiple: int) -> int:
    return length if length >= LONG_TOKENS else -(-length // multiple) * multiple
