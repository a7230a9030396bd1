"""Attention over a pack by groups of segments, on any device.

The pack is cut into chunks of neighbouring tokens. All that a chunk's tokens see lies on the path of its first token or
in the chunk, so a chunk is one attention call over [that path | chunk] under a small mask. At best a chunk is one
segment (a run without a fork), which wastes nothing but the triangle above its diagonal. But agents make hundreds of
segments of a few tokens, and siblings share their path, so neighbours are joined wherever one larger call is cheaper.
Neighbours of one shape under one mask, such as the answers to one prompt, go into one call side by side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rl.policy.layouts.attention import masked_attention
from rl.policy.mask import ancestor_ranges, depths, last_tokens, segments

PIECE_TOKENS = 256
"""Segments are first cut into pieces of at most this length, so that long ones need not pay for a whole square."""

CALL_PAIRS = {"cpu": 2**12, "cuda": 2**17}
"""What one more call costs, in pairs of a query and a key; measured on a CPU, estimated for a GPU."""

KEY_PAIRS = 16
"""What it costs to bring one more key and value into a call, and its gradient back, in pairs."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Queries [start, stop) and the ranges of tokens that are their keys, the chunk itself last."""

    start: int
    stop: int
    key_ranges: list[tuple[int, int]]
    mask_QK: Tensor | None
    """bool [Q, K]; None where the chunk begins a tree and never forks, which is plain causal order."""


@dataclass(frozen=True, slots=True)
class Call:
    """Neighbouring chunks with as many queries, as many keys and the same mask, as one batch of attention."""

    chunks: list[Chunk]

    @property
    def num_queries(self) -> int:
        """Of all its chunks."""
        return self.chunks[-1].stop - self.chunks[0].start

    @property
    def sees_itself_alone(self) -> bool:
        """Whether its chunks have no other keys than their own."""
        return all(len(chunk.key_ranges) == 1 for chunk in self.chunks)


class SegmentPlan:
    """The calls of one pack, for each window that a layer asks for.

    Args:
        end_T: int64 [T], see `rl.policy.mask`; the masks are on its device.
    """

    def __init__(self, end_T: Tensor) -> None:
        self.end_T = end_T
        self._calls: dict[int | None, list[Call]] = {}

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
        calls = self.calls(window)
        if all(call.sees_itself_alone for call in calls):
            keys, values = _split(key, calls), _split(value, calls)
        else:
            ranges = [[chunk.key_ranges for chunk in call.chunks] for call in calls]
            keys, values = _Gathered.apply(key, ranges), _Gathered.apply(value, ranges)
        outputs = []
        for call, query_CHQD, key_CHKD, value_CHKD in zip(calls, _split(query, calls), keys, values, strict=True):
            mask_QK = call.chunks[0].mask_QK
            output_CQHD = masked_attention(query_CHQD, key_CHKD, value_CHKD, mask_QK, scaling=scaling, softcap=softcap)
            outputs.append(output_CQHD.flatten(0, 1))
        return (torch.cat(outputs) if len(outputs) > 1 else outputs[0])[None]

    def calls(self, window: int | None) -> list[Call]:
        """The calls that a layer makes, in the order of the pack."""
        if window not in self._calls:
            self._calls[window] = plan_calls(plan_chunks(self.end_T, window))
        return self._calls[window]


def plan_calls(chunks: list[Chunk]) -> list[Call]:
    """Put neighbours that are alike into one call."""
    calls: list[Call] = []
    for chunk in chunks:
        if calls and _alike(calls[-1].chunks[-1], chunk):
            calls[-1].chunks.append(chunk)
        else:
            calls.append(Call([chunk]))
    return calls


def _alike(one: Chunk, other: Chunk) -> bool:
    if one.stop - one.start != other.stop - other.start:
        return False
    if one.mask_QK is None or other.mask_QK is None:
        return one.mask_QK is other.mask_QK
    return torch.equal(one.mask_QK, other.mask_QK)


def plan_chunks(end_T: Tensor, window: int | None = None) -> list[Chunk]:
    """Cut a pack into chunks: pieces of segments, joined to the piece before while that makes the sum of costs smaller.

    Args:
        end_T: int64 [T], see `rl.policy.mask`.
        window: see `AttentionPlan.attend`; a chunk leaves out what none of its tokens sees.
    """
    depth_T = depths(end_T)
    depth = depth_T.tolist()
    call_pairs = CALL_PAIRS.get(end_T.device.type, CALL_PAIRS["cuda"])

    def num_hidden(start: int, shallowest: int) -> int:
        """Tokens at the top of the path of `start` that are out of every query's window."""
        return 0 if window is None else min(depth[start], max(0, shallowest - window + 1))

    def cost(piece: _Piece) -> int:
        num_queries = piece.stop - piece.start
        num_keys = num_queries + depth[piece.start] - num_hidden(piece.start, piece.shallowest)
        # Kernels for plain causal order leave out the upper triangle.
        num_pairs = num_queries * num_keys // (2 if piece.is_causal else 1)
        return call_pairs + KEY_PAIRS * num_keys + num_pairs

    joined: list[_Piece] = []
    for piece in _pieces(end_T, depth, window):
        if joined:
            both = joined[-1].followed_by(piece, window)
            if cost(both) <= cost(joined[-1]) + cost(piece):
                joined[-1] = both
                continue
        joined.append(piece)

    return [
        _chunk(piece, depth[piece.start] - num_hidden(piece.start, piece.shallowest), end_T, depth_T, window)
        for piece in joined
    ]


@dataclass(frozen=True, slots=True)
class _Piece:
    """Neighbouring tokens that may become a chunk."""

    start: int
    stop: int
    ancestors: list[tuple[int, int]]
    """Ranges of the path before `start`."""
    segment: int
    """Number of the segment it lies in; -1 for several."""
    shallowest: int
    """Least depth of its tokens."""
    is_causal: bool
    """It begins a tree, never forks, and no window hides any of it."""

    def followed_by(self, other: _Piece, window: int | None) -> _Piece:
        """Both as one."""
        one_segment = self.segment == other.segment and self.segment >= 0
        return _Piece(
            start=self.start,
            stop=other.stop,
            ancestors=self.ancestors,
            segment=self.segment if one_segment else -1,
            shallowest=min(self.shallowest, other.shallowest),
            is_causal=self.is_causal and one_segment and (window is None or other.stop - self.start <= window),
        )


def _pieces(end_T: Tensor, depth: list[int], window: int | None) -> Iterator[_Piece]:
    runs = zip(segments(end_T), ancestor_ranges(end_T), strict=True)
    for segment, ((first, last), ancestors) in enumerate(runs):
        for start in range(first, last, PIECE_TOKENS):
            stop = min(start + PIECE_TOKENS, last)
            above = [(first, start)] if start > first else []
            is_causal = depth[start] == 0 and (window is None or stop - start <= window)
            yield _Piece(start, stop, [*ancestors, *above], segment, depth[start], is_causal)


def _chunk(piece: _Piece, num_above: int, end_T: Tensor, depth_T: Tensor, window: int | None) -> Chunk:
    """The call for a piece and the nearest `num_above` tokens of the path before it."""
    key_ranges = [*last_tokens(piece.ancestors, num_above), (piece.start, piece.stop)]
    if piece.is_causal:
        return Chunk(piece.start, piece.stop, key_ranges, None)
    key_K = torch.cat([torch.arange(*part, device=end_T.device) for part in key_ranges])
    query_Q1 = torch.arange(piece.start, piece.stop, device=end_T.device)[:, None]
    mask_QK = (key_K <= query_Q1) & (query_Q1 < end_T[key_K])
    if window is not None:
        mask_QK &= depth_T[query_Q1] - depth_T[key_K] < window
    return Chunk(piece.start, piece.stop, key_ranges, mask_QK)


def _split(heads: Tensor, calls: list[Call]) -> list[Tensor]:
    """Of each call, its chunks' own tokens as [C, heads, Q, head_dim]; views."""
    heads_HTD = heads.squeeze(0)  # not heads[0], whose backward would fill a whole tensor with zeros first
    parts = heads_HTD.split([call.num_queries for call in calls], dim=1) if len(calls) > 1 else [heads_HTD]
    return [part.unflatten(1, (len(call.chunks), -1)).transpose(0, 1) for call, part in zip(calls, parts, strict=True)]


class _Gathered(torch.autograd.Function):
    """Keys (or values) [C, heads, K, head_dim] of every call. Backward adds range by range: torch's own would fill a
    whole pack with zeros for each range, or add row by row; and in float32, since a token of the prompt sums over all
    branches."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, ranges: list[list[list[tuple[int, int]]]]) -> tuple[Tensor, ...]:
        ctx.ranges = ranges
        ctx.shape, ctx.dtype = heads.shape, heads.dtype
        return tuple(_gathered(heads, chunks) for chunks in ranges)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        wide = torch.promote_types(ctx.dtype, torch.float32)
        total = torch.zeros(ctx.shape, dtype=wide, device=grads[0].device)
        for grad_CHKD, chunks in zip(grads, ctx.ranges, strict=True):
            for grad_HKD, parts in zip(grad_CHKD, chunks, strict=True):
                offset = 0
                for start, stop in parts:
                    total[0, :, start:stop] += grad_HKD[:, offset : offset + stop - start]
                    offset += stop - start
        return total.to(ctx.dtype), None


def _gathered(heads: Tensor, chunks: list[list[tuple[int, int]]]) -> Tensor:
    """One call's keys: of each chunk, its ranges one behind the other."""
    num_keys = sum(stop - start for start, stop in chunks[0])
    gathered_CHKD = heads.new_empty(len(chunks), heads.shape[1], num_keys, heads.shape[3])
    for gathered_HKD, parts in zip(gathered_CHKD, chunks, strict=True):
        torch.cat([heads[0, :, start:stop] for start, stop in parts], dim=1, out=gathered_HKD)
    return gathered_CHKD
