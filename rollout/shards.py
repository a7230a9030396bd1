"""A version of the policy in pieces: rows of its tensors, as each learner process holds them, and whole tensors again.

Nobody holds all of it at once. Rows come in groups of bounded size, every group from every process; the pieces of one
group make whole tensors, which an engine takes before it asks for the next group.
"""

from __future__ import annotations

import asyncio
import time
import warnings
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from conf.errors import DamagedWeights

Fetch = Callable[[Any], Awaitable[list[np.ndarray]]]
"""Brings the bytes of a piece, wherever they lie."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of one tensor."""

    name: str
    """As on the hub."""
    dtype: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    start: int
    """The first row; how many there are, the bytes say."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What one process gives to one group: rows of several tensors, and a checksum of their bytes."""

    rows: tuple[Rows, ...]
    payload: Any
    """Where the bytes are: one array of uint8 for each of `rows`, or what `Fetch` brings them by."""
    checksum: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Published:
    """A version of the policy, ready to be taken by engines."""

    version: int
    groups: tuple[tuple[Piece, ...], ...]

    @property
    def size_bytes(self) -> int:
        """Of all pieces."""
        return sum(piece.size_bytes for group in self.groups for piece in group)


@dataclass(slots=True)
class Arrival:
    """How long an engine's update took, in seconds."""

    fetch_seconds: float = 0.0
    """Waiting for pieces and checking them."""
    load_seconds: float = 0.0
    """Everything else: making tensors whole, and the engine's own work."""


def as_bytes(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor, without a copy where it lies on the CPU, row behind row; uint8 [bytes]."""
    return tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy()


def checksum_of(arrays: Sequence[np.ndarray]) -> str:
    """The same for the same bytes: a guard against damage, not against malice."""
    digest = xxhash.xxh3_128()
    for array in arrays:
        digest.update(array.data)
    return digest.hexdigest()


def piece_of(rows: Sequence[Rows], arrays: Sequence[np.ndarray], payload: Any = None) -> Piece:
    """The piece that these bytes make.

    Args:
        payload: where the bytes will be found; the arrays themselves by default.
    """
    size = sum(array.nbytes for array in arrays)
    return Piece(tuple(rows), list(arrays) if payload is None else payload, checksum_of(arrays), size)


def check_piece(piece: Piece, arrays: Sequence[np.ndarray]) -> None:
    """Raises: DamagedWeights when the bytes are not those that were published."""
    found = checksum_of(arrays)
    if found == piece.checksum and len(arrays) == len(piece.rows):
        return
    raise DamagedWeights(
        f"weights of {piece.rows[0].name} and {len(piece.rows) - 1} other tensors arrived with checksum {found} and "
        f"were sent with {piece.checksum}: an engine would sample from a policy that nobody trained. They are sent "
        "once more; if that fails too, look for broken memory or a broken network between the nodes."
    )


def whole_tensors(parts: Sequence[tuple[Sequence[Rows], Sequence[Tensor]]]) -> dict[str, Tensor]:
    """The tensors that the rows of one group make, by name, in the order in which they first come.

    One that comes in a single part shares its bytes with what was given and must not be written to.

    Args:
        parts: of each process: which rows, and the bytes of each, uint8 [bytes].
    Raises: DamagedWeights where rows are missing or come twice.
    """
    of_name: dict[str, list[tuple[Rows, Tensor]]] = {}
    for rows_given, given in parts:
        for rows, flat in zip(rows_given, given, strict=True):
            of_name.setdefault(rows.name, []).append((rows, _tensor(rows, flat)))
    return {name: _joined(name, sorted(found, key=lambda each: each[0].start)) for name, found in of_name.items()}


def _tensor(rows: Rows, flat: Tensor) -> Tensor:
    if not flat.numel():  # a process may have no rows of a small tensor
        return torch.empty(0, *rows.shape[1:], dtype=getattr(torch, rows.dtype), device=flat.device)
    typed = flat.view(getattr(torch, rows.dtype))
    return typed.reshape(-1, *rows.shape[1:]) if rows.shape else typed.reshape(())


def without_copy(arrays: Sequence[np.ndarray]) -> list[Tensor]:
    """Tensors on the memory of arrays, which nobody may write to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns of arrays that cannot be written to
        return [torch.from_numpy(array) for array in arrays]


def _joined(name: str, found: list[tuple[Rows, Tensor]]) -> Tensor:
    shape = found[0][0].shape
    if not shape:
        return found[0][1]
    held = [(rows.start, part) for rows, part in found if len(part)]
    stops = [0, *(start + len(part) for start, part in held)]
    if [start for start, _ in held] != stops[:-1] or stops[-1] != shape[0]:
        got = ", ".join(f"{start} to {start + len(part)}" for start, part in held)
        raise DamagedWeights(
            f"weights of {name}: rows {got} arrived of the {shape[0]} it has. This is a fault of Grove's: please "
            "report it with the model and learner.num_processes."
        )
    return held[0][1] if len(held) == 1 else torch.cat([part for _, part in held])


@dataclass(slots=True)
class Arriving:
    """The groups of a published version as they are asked for: fetched one ahead, checked, made whole."""

    published: Published
    fetch: Fetch
    arrival: Arrival = field(default_factory=Arrival)

    async def tensors(self) -> AsyncGenerator[dict[str, Tensor]]:
        """Whole tensors by name, group by group.

        Raises: DamagedWeights.
        """
        started = time.monotonic()
        groups = self.published.groups
        coming = [asyncio.ensure_future(self._group(group)) for group in groups[:1]]
        try:
            for number in range(len(groups)):
                asked = time.monotonic()
                parts = await coming.pop()
                self.arrival.fetch_seconds += time.monotonic() - asked
                coming += [asyncio.ensure_future(self._group(group)) for group in groups[number + 1 : number + 2]]
                yield whole_tensors(parts)
        finally:
            for each in coming:
                each.cancel()
        self.arrival.load_seconds = time.monotonic() - started - self.arrival.fetch_seconds

    async def _group(self, group: tuple[Piece, ...]) -> list[tuple[Sequence[Rows], list[Tensor]]]:
        parts = []
        for piece in group:
            arrays = await self.fetch(piece.payload)
            check_piece(piece, arrays)
            parts.append((piece.rows, without_copy(arrays)))
        return parts
