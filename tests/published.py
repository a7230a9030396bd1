"""Weights as engines get them, for tests: pieces of whole tensors, and whole tensors of pieces."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from rollout.shards import Arriving, Piece, Published, Rows, as_bytes, piece_of


def rows_of(name: str, tensor: Tensor, start: int = 0, stop: int | None = None) -> tuple[Rows, np.ndarray]:
    """Some rows of a tensor, all by default, as one process gives them."""
    part = tensor[start:stop] if tensor.ndim else tensor
    return Rows(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), start), as_bytes(part)


def piece(*given: tuple[Rows, np.ndarray], put: Callable[[Any], Any] = list) -> Piece:
    """One process's part of a group."""
    arrays = [array for _, array in given]
    return piece_of([rows for rows, _ in given], arrays, payload=put(arrays))


def published(weights: dict[str, Tensor], version: int = 1, put: Callable[[Any], Any] = list) -> Published:
    """Whole tensors of one process, in two groups."""
    named = [rows_of(name, weight) for name, weight in weights.items()]
    half = len(named) // 2
    return Published(version, tuple((piece(*part, put=put),) for part in (named[:half], named[half:])))


async def brought(payload: Any) -> list[np.ndarray]:
    """Bytes that lie in the piece itself."""
    return payload


def arrived(sent: Published, fetch: Callable[[Any], Any] = brought) -> dict[str, Tensor]:
    """What an engine gets, group by group, all of it."""

    async def collected() -> dict[str, Tensor]:
        whole: dict[str, Tensor] = {}
        async for tensors in Arriving(sent, fetch).tensors():
            assert not whole.keys() & tensors.keys(), "a tensor comes once"
            whole |= tensors
        return whole

    return asyncio.run(collected())


def of_ranks(parts: Sequence[Iterable[tuple[list[Rows], list[Tensor]]]], version: int = 1) -> Published:
    """What several processes give, each its groups in order."""
    pieces = [[piece_of(rows, [as_bytes(each) for each in tensors]) for rows, tensors in part] for part in parts]
    return Published(version, tuple(tuple(each for each in group if each.rows) for group in zip(*pieces, strict=True)))


async def in_groups(*groups: dict[str, Tensor]) -> AsyncIterator[dict[str, Tensor]]:
    """What an engine is given."""
    for group in groups:
        yield group
