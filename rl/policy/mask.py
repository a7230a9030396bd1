"""Who sees whom in a pack: all of it follows from `end_T`, one integer per token.

`end_T[k]` is one past the last token of the subtree below token k in depth-first order, so token q sees token k exactly
if k <= q < end_T[k]. In a layer with a sliding window of W tokens, k must also be less than W tokens above q on the
path: q itself counts, as in transformers' own sliding windows.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ancestor_mask(end_T: Tensor, window: int | None = None) -> Tensor:
    """The whole mask, written out: the reference that faster forms are tested against.

    Args:
        end_T: int64 [T].
        window: tokens of its own path that a token sees, itself included; None for all.
    Returns: bool [T, T], row q is True at the tokens that q sees, itself included.
    """
    index_T = torch.arange(len(end_T), device=end_T.device)
    query_T1 = index_T[:, None]
    seen_TT = (index_T <= query_T1) & (query_T1 < end_T)
    if window is not None:
        depth_T = depths(end_T)
        seen_TT &= depth_T[:, None] - depth_T < window
    return seen_TT


def depths(end_T: Tensor) -> Tensor:
    """Tokens before each token on its own path, int64 [T]: all tokens before it but those whose subtrees have ended.

    Equal to `PackedBatch.position_T`.
    """
    index_T = torch.arange(len(end_T), device=end_T.device)
    return index_T - torch.searchsorted(end_T.sort().values, index_T, right=True)


def block_table(end_T: Tensor, block: int = 128, window: int | None = None) -> tuple[Tensor, Tensor]:
    """Which square blocks of the mask hold anything, and which are seen whole, without writing the mask out.

    Of each block of keys the largest and the smallest end are enough: a block of queries below it sees some of it if it
    starts before the largest, and all of it if it stops at or before the smallest. With a window the depths' extremes
    bound the distances, so a block may be called partial that holds nothing; none that holds something is left out.

    Args:
        end_T: int64 [T]; T is a multiple of `block`.
        block: tokens on a side.
        window: see `ancestor_mask`.
    Returns: (seen_BB, whole_BB), bool [T / block, T / block], rows are blocks of queries; a whole block is also seen.
    """
    assert len(end_T) % block == 0, "packs for a block table are padded to whole blocks"
    end_BN = end_T.view(-1, block)
    index_B = torch.arange(len(end_BN), device=end_T.device)
    start_B1 = index_B[:, None] * block
    above_BB = index_B < index_B[:, None]
    seen_BB = above_BB & (start_B1 < end_BN.amax(1))
    whole_BB = above_BB & (start_B1 + block <= end_BN.amin(1))
    seen_BB.fill_diagonal_(True)
    if window is not None:
        depth_BN = depths(end_T).view(-1, block)
        seen_BB &= depth_BN.amin(1)[:, None] - depth_BN.amax(1) < window
        whole_BB &= depth_BN.amax(1)[:, None] - depth_BN.amin(1) < window
    return seen_BB, whole_BB


def segments(end_T: Tensor) -> list[tuple[int, int]]:
    """Maximal runs of tokens without a fork between them, as (start, stop).

    Two neighbours are in one run exactly if they share their end: the first then has the second as its only child.
    """
    if len(end_T) == 0:
        return []
    starts = [0, *(torch.nonzero(end_T[1:] != end_T[:-1]).flatten() + 1).tolist()]
    return list(zip(starts, [*starts[1:], len(end_T)], strict=True))


def ancestor_ranges(end_T: Tensor) -> list[list[tuple[int, int]]]:
    """For each of `segments(end_T)`, the tokens before it on its path: ranges in order, touching ones joined."""
    end = end_T.tolist()
    open_segments: list[tuple[int, int]] = []
    ranges = []
    for start, stop in segments(end_T):
        while open_segments and end[open_segments[-1][0]] <= start:
            open_segments.pop()
        ranges.append(_joined(open_segments))
        open_segments.append((start, stop))
    return ranges


def last_tokens(ranges: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """The last `count` tokens of ranges in order; all of them where they hold fewer."""
    kept: list[tuple[int, int]] = []
    for start, stop in reversed(ranges):
        if count <= 0:
            break
        kept.append((max(start, stop - count), stop))
        count -= stop - start
    return kept[::-1]


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined
