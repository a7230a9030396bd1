"""Weights straight from the learner's memory into the engines', without a copy in the memory of a host.

Every learner process has a line, at which engine processes listen. It says in a small store what comes next, then
brings it: by a broadcast (NCCL between GPUs, gloo between CPUs), or by a buffer that both processes map (CUDA IPC on
one GPU, shared memory on CPUs of one node). A group of tensors goes at a time, so neither side holds a second model,
unless changes alone are to be sent.

A line is for those who were there when it was made. Who comes later gets its weights from the object store, and where
a line breaks, everybody does (`rl.policy.weights`).
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Generator, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from conf.errors import DamagedWeights, LineBroken, first_line
from conf.schema import WeightPath
from rollout.carriers import Broadcast, Giver, Mapped, Shared, Taker
from rollout.deltas import applied, difference
from rollout.meeting import CONNECT_LIMIT_S, GIVEN_UP, LOOPBACK, meeting_address, meeting_at, open_meeting, until_all
from rollout.shards import Rows, whole_tensors

HERE, END = "here", "end"
CHUNK_WORDS = 2**20
"""Of a checksum at a time: its working memory is three times as much."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What an engine must know to take a version from the learner's lines."""

    version: int
    sending: int
    """Number of this sending: a version that is sent again is another."""
    path: WeightPath
    lines: tuple[str, ...]
    """Addresses of the lines that it hears."""
    receiver: int
    """Number of the engine's first process among those who hear these lines."""
    num_receivers: int
    limit_s: float
    """Longest wait for the learner to meet, to say what comes, or to bring it."""
    own_host: str = LOOPBACK
    """Address of the engine's node at which the learner's nodes reach it."""

    def of(self, version: int, sending: int) -> Offer:
        """The same lines, for a version that comes by them now."""
        return replace(self, version=version, sending=sending)

    def plain(self) -> dict[str, Any]:
        """As it goes to a process that is told in plain values."""
        return asdict(self) | {"path": self.path.value}

    @classmethod
    def from_plain(cls, found: dict[str, Any]) -> Offer:
        """What `plain` made."""
        return cls(**(found | {"path": WeightPath(found["path"]), "lines": tuple(found["lines"])}))


@dataclass(frozen=True, slots=True)
class Sent:
    """What a learner process tells of a version that it sent."""

    size_bytes: int
    brought_bytes: int
    """Of them, what went to each engine: less where only changes were sent."""
    broken: str = ""
    """Why the line broke; "" when everybody there took everything."""


class Sender:
    """A learner process's end of its line.

    Args:
        path: broadcast or ipc.
        num_receivers: engine processes that listen.
        device: where the weights are.
        limit_s: longest wait for all engines to meet, or to take a group.
        host: address of this node at which the engines reach it.
        delta: broadcast what has changed since the last version, where that is less; needs a copy of the weights.
    """

    def __init__(
        self,
        path: WeightPath,
        num_receivers: int,
        device: torch.device,
        limit_s: float,
        host: str = LOOPBACK,
        *,
        delta: bool = False,
    ) -> None:
        self.path, self._num, self._device = path, num_receivers, device
        self._host, self._limit_s = host, limit_s
        self._store = open_meeting(limit_s, host)
        self._giver: Giver | None = None
        self._told: list[str] = []
        self._keeps_last = delta
        self._last: dict[int, Tensor] = {}
        """The bytes of each group that everybody has."""

    @property
    def address(self) -> str:
        """What the engines are told."""
        return meeting_address(self._store)

    def send(self, sending: int, groups: Iterable[tuple[Sequence[Rows], Sequence[Tensor]]]) -> Sent:
        """Bring all groups to everybody at the line.

        It goes through all of them whatever happens: making the groups is a call that the learner's processes make
        together. A line that broke is of no more use: who lets it go tells all that still listen.
        """
        size, brought, broken = 0, 0, ""
        for key in self._told:  # of the last sending, which everybody has read to its end
            self._store.delete_key(key)
        self._told = []
        number = 0
        for rows, tensors in groups:
            if broken or not self._num:
                continue
            try:
                buffer = _flat(tensors, self._device)
                size += buffer.numel()
                brought += self._give(sending, number, rows, tensors, buffer)
            except RuntimeError as error:
                broken = first_line(error)
            number += 1
        try:
            if self._num and not broken:
                self._tell(f"{sending}/{number}", END)
                self._told += until_all(self._store, f"{sending}/{END}", self._num, self._limit_s)
        except RuntimeError as error:
            broken = first_line(error)
        return Sent(size, brought, broken)

    def _give(self, sending: int, number: int, rows: Sequence[Rows], tensors: Sequence[Tensor], buffer: Tensor) -> int:
        """Returns: how many bytes everybody was brought."""
        if self._giver is None:
            self._giver = self._joined()
        key, last = f"{sending}/{number}", self._last.get(number)
        delta = None
        if last is not None and len(last) == len(buffer) > 0:
            delta = difference(last, buffer, tensors[0].element_size())
        if self._keeps_last:
            self._last[number] = buffer
        brought = buffer if delta is None else delta
        told = {
            "rows": [asdict(each) for each in rows],
            "sizes": [_num_bytes(each) for each in tensors],
            "checksum": checksum_of(buffer),
            "bytes": len(brought),
            "keep": self._keeps_last,
            "word_bytes": 0 if delta is None else tensors[0].element_size(),
            "handle": self._giver.lay_out(brought),
        }
        self._tell(key, json.dumps(told))
        self._giver.give(key, brought)
        self._told += [f"{key}/{each}" for each in range(self._num)] if self.path is WeightPath.ipc else []
        return len(brought)

    def _joined(self) -> Giver:
        until_all(self._store, HERE, self._num, self._limit_s)
        if self.path is WeightPath.ipc:
            return Shared(self._store, self._num, self._device, self._limit_s)
        return Broadcast(self._store, 0, self._num + 1, self._device, self._host, self._limit_s)

    def _tell(self, key: str, value: str) -> None:
        self._store.set(key, value)
        self._told.append(key)


class Receiver:
    """An engine process's end of all the lines that it hears.

    Args:
        device: where the weights are to come.
        place: of this process among those of its engine.
    """

    def __init__(self, device: torch.device, place: int = 0) -> None:
        self._device, self._place = device, place
        self._heard: tuple[str, ...] = ()
        self._number = place
        self._lines: list[_HeardLine] = []

    def groups(self, offer: Offer) -> Generator[dict[str, Tensor]]:
        """Whole tensors by name, group by group; not to be written to.

        Raises: LineBroken; DamagedWeights, once everything has come.
        """
        damaged: DamagedWeights | None = None
        self._join(offer)
        over = False
        try:
            for number in itertools.count():
                parts = [line.take(offer.sending, number) for line in self._lines]
                if any(part is None for part in parts):
                    break
                try:
                    tensors = whole_tensors([part.checked() for part in parts if part is not None])
                except DamagedWeights as error:
                    damaged = damaged or error  # the others at the line wait for this end too, so it goes on to take
                    continue
                if damaged is None:
                    yield tensors
            for line in self._lines:
                line.has_all(offer.sending, damaged=damaged is not None)
            over = True
        except RuntimeError as error:
            raise _broken(offer, error) from error
        finally:
            if not over:  # or the learner would wait for this end
                self._leave()
        if damaged is not None:
            raise damaged

    def _leave(self) -> None:
        for line in self._lines:
            with contextlib.suppress(dist.DistError):
                line.give_up(f"engine process {self._number} could not take the weights")
        self._heard, self._lines = (), []

    def _join(self, offer: Offer) -> None:
        if self._heard == offer.lines:
            return
        self._heard, self._lines, self._number = (), [], offer.receiver + self._place
        try:
            self._lines = [_HeardLine(address, self._number, offer, self._device) for address in offer.lines]
        except RuntimeError as error:
            raise _broken(offer, error) from error
        self._heard = offer.lines


def checksum_of(buffer: Tensor) -> str:
    """The same for the same bytes in the same order, computed where they are: on a GPU without leaving it.

    Two sums modulo 2^64 over its words of 8 bytes w_1, w_2 ...: of w_i, and of i w_i.

    Args:
        buffer: uint8 [bytes].
    """
    missing = -buffer.numel() % 8
    words_W = (torch.nn.functional.pad(buffer, (0, missing)) if missing else buffer).view(torch.int64)
    plain = weighted = torch.zeros((), dtype=torch.int64, device=buffer.device)
    for number, words_C in enumerate(words_W.split(CHUNK_WORDS)):
        start = 1 + number * CHUNK_WORDS
        place_C = torch.arange(start, start + len(words_C), device=buffer.device)
        plain, weighted = plain + words_C.sum(), weighted + (words_C * place_C).sum()
    return f"{int(plain) % 2**64:016x}{int(weighted) % 2**64:016x}"


@dataclass(frozen=True, slots=True)
class _Part:
    """What one line brought for a group."""

    rows: list[Rows]
    sizes: list[int]
    checksum: str
    buffer: Tensor

    def checked(self) -> tuple[list[Rows], list[Tensor]]:
        found = checksum_of(self.buffer)
        if found != self.checksum:
            raise DamagedWeights(
                f"weights of {self.rows[0].name} and {len(self.rows) - 1} other tensors arrived with checksum {found} "
                f"and were sent with {self.checksum}: an engine would sample from a policy that nobody trained. They "
                "are sent once more; if that fails too, look for broken memory or a broken network between the nodes, "
                "or set cluster.weights=object_store."
            )
        return self.rows, list(self.buffer.split(self.sizes))


class _HeardLine:
    """One line, as an engine's process hears it."""

    def __init__(self, address: str, number: int, offer: Offer, device: torch.device) -> None:
        self._number = number
        self._last: dict[int, Tensor] = {}
        """The bytes of each group of the last version, where changes to it may come."""
        self._store = meeting_at(address, min(CONNECT_LIMIT_S, offer.limit_s))
        self._store.set_timeout(timedelta(seconds=offer.limit_s))
        self._store.set(f"{HERE}/{number}", "")
        self._taker: Taker = (
            Mapped(self._store, number, device)
            if offer.path is WeightPath.ipc
            else Broadcast(self._store, number + 1, offer.num_receivers + 1, device, offer.own_host, offer.limit_s)
        )

    def take(self, sending: int, number: int) -> _Part | None:
        key = f"{sending}/{number}"
        told = self._store.get(key).decode()
        if told == END:
            return None
        found = json.loads(told)
        rows = [Rows(**(each | {"shape": tuple(each["shape"])})) for each in found["rows"]]
        buffer = self._taker.take(key, found["bytes"], found["handle"])
        if found["word_bytes"]:
            if number not in self._last:
                raise RuntimeError("changes came to a version that did not arrive")
            buffer = applied(self._last[number], buffer, found["word_bytes"])
        if found["keep"]:
            self._last[number] = buffer
        return _Part(rows, found["sizes"], found["checksum"], buffer)

    def has_all(self, sending: int, *, damaged: bool) -> None:
        if damaged:
            self._last = {}  # whatever comes next must not build on it
        self._store.set(f"{sending}/{END}/{self._number}", "")

    def give_up(self, why: str) -> None:
        self._store.set(GIVEN_UP, why)


def _flat(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """The bytes of tensors, one behind the other; uint8 [bytes]."""
    parts = [each.detach().to(device).contiguous().flatten().view(torch.uint8) for each in tensors]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8, device=device)


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _broken(offer: Offer, error: Exception) -> LineBroken:
    return LineBroken(
        f"the learner's lines ({', '.join(offer.lines)}, cluster.weights={offer.path.value}) broke while version "
        f"{offer.version} came: {first_line(error)}"
    )
