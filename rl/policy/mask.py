"""Who sees whom in a pack: all of it follows from `end_T`, one integer per token.

`end_T[k]` is one past the last token of the subtree below token k in depth-first order, so token q sees token k exactly
if k <= q < end_T[k].
"""

from __future__ import annotations

import torch
from torch import Tensor


def ancestor_mask(end_T: Tensor) -> Tensor:
    """The whole mask, written out: the reference that faster forms are tested against.

    Args:
        end_T: int64 [T].
    Returns: bool [T, T], row q is True at the tokens that q sees, itself included.
    """
    index_T = torch.arange(len(end_T), device=end_T.device)
    query_T1 = index_T[:, None]
    return (index_T <= query_T1) & (query_T1 < end_T)


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


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined
