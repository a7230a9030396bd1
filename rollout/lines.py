"""Weights straight from the learner's memory into the engines', without a copy in the memory of a host.

Every learner process has a line, at which engine processes listen. It says in a small store what comes next, then
brings it: by a broadcast (NCCL between GPUs, gloo between CPUs), or by a buffer that both processes map (CUDA IPC on
one GPU, shared memory on CPUs of one node). A group of tensors goes at a time, so neither side holds a second model.

A line is for those who were there when it was made. Who comes later gets its weights from the object store, and where
a line breaks, everybody does (`rl.policy.weights`).
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroupGloo, Store  # pyright: ignore[reportPrivateImportUsage]

from conf.errors import DamagedWeights, LineBroken
from conf.schema import WeightPath
from rollout.deltas import applied, difference
from rollout.meeting import LOOPBACK, interface_of, meeting_address, meeting_at, open_meeting
from rollout.shards import Rows, whole_tensors

HERE, END, GIVEN_UP = "here", "end", "given up"
LOOK_EVERY_S = 0.002
CONNECT_LIMIT_S = 10.0
"""A line was there before anybody was told of it."""
NOBODY = "no engine listens"
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
        self._carrier: _Carrier | None = None
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
        size = brought = 0
        broken = "" if self._num else NOBODY
        for key in self._told:  # of the last sending, which everybody has read to its end
            self._store.delete_key(key)
        self._told = []
        number = 0
        for rows, tensors in groups:
            if broken:
                continue
            try:
                buffer = _flat(tensors, self._device)
                size += buffer.numel()
                brought += self._give(sending, number, rows, tensors, buffer)
            except RuntimeError as error:
                broken = _first_line(error)
            number += 1
        try:
            if not broken:
                self._tell(f"{sending}/{number}", END)
                self._told += _until_all(self._store, f"{sending}/{END}", self._num, self._limit_s)
        except RuntimeError as error:
            broken = _first_line(error)
        return Sent(size, brought, "" if broken == NOBODY else broken)

    def _give(self, sending: int, number: int, rows: Sequence[Rows], tensors: Sequence[Tensor], buffer: Tensor) -> int:
        """Returns: how many bytes everybody was brought."""
        if self._carrier is None:
            _until_all(self._store, HERE, self._num, self._limit_s)
            self._carrier = _sending(self.path, self._store, self._num, self._device, self._host, self._limit_s)
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
            "handle": self._carrier.lay_out(brought),
        }
        self._tell(key, json.dumps(told))
        self._carrier.give(key, brought)
        self._told += [f"{key}/{each}" for each in range(self._num)] if self.path is WeightPath.ipc else []
        return len(brought)

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

    def groups(self, offer: Offer) -> Iterator[dict[str, Tensor]]:
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


def give_up(address: str, why: str) -> None:
    """Have a learner process wait for nobody at its line any more, since somebody there is gone.

    Raises: torch.distributed.DistError when it does not answer.
    """
    meeting_at(address, CONNECT_LIMIT_S).set(GIVEN_UP, why)


def _until_all(store: Store, what: str, num: int, limit_s: float) -> list[str]:
    """Wait until all receivers have said something; returns the keys under which they did."""
    keys, deadline = [f"{what}/{number}" for number in range(num)], time.monotonic() + limit_s
    while not store.check(keys):
        if store.check([GIVEN_UP]):
            raise RuntimeError(store.get(GIVEN_UP).decode())
        if time.monotonic() > deadline:
            silent = sum(not store.check([key]) for key in keys)
            raise RuntimeError(f"{silent} of {num} engine processes said nothing for {limit_s:g} s")
        time.sleep(LOOK_EVERY_S)
    return keys


def checksum_of(buffer: Tensor) -> str:
    """The same for the same bytes in the same order, computed where they are: on a GPU without leaving it.

    Two sums modulo 2^64 over its words of 8 bytes w_1, w_2 ...: of w_i, and of i w_i.

    Args:
        buffer: uint8 [bytes].
    """
    words_W = torch.nn.functional.pad(buffer, (0, -buffer.numel() % 8)).view(torch.int64)
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
        self._carrier: _Carrier = (
            _Mapped(self._store, number, device)
            if offer.path is WeightPath.ipc
            else _Broadcast(self._store, number + 1, offer.num_receivers + 1, device, offer.own_host, offer.limit_s)
        )

    def take(self, sending: int, number: int) -> _Part | None:
        key = f"{sending}/{number}"
        told = self._store.get(key).decode()
        if told == END:
            return None
        found = json.loads(told)
        rows = [Rows(**(each | {"shape": tuple(each["shape"])})) for each in found["rows"]]
        buffer = self._carrier.take(key, found["bytes"], found["handle"])
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


class _Carrier(Protocol):
    """How bytes get from one end to the others."""

    def lay_out(self, buffer: Tensor) -> Any:
        """What must be told of the buffer before it is given."""
        ...

    def give(self, key: str, buffer: Tensor) -> None: ...

    def take(self, key: str, num_bytes: int, handle: Any) -> Tensor:
        """The bytes, in memory of this process's own."""
        ...


def _sending(path: WeightPath, store: Store, num: int, device: torch.device, host: str, limit_s: float) -> _Carrier:
    if path is WeightPath.ipc:
        return _Shared(store, num, device, limit_s)
    return _Broadcast(store, 0, num + 1, device, host, limit_s)


class _Broadcast:
    """A group of processes of its own, apart from those that the learner or an engine is in; the learner's is 0."""

    def __init__(self, store: Store, rank: int, size: int, device: torch.device, host: str, limit_s: float) -> None:
        self._device, self._limit = device, timedelta(seconds=limit_s)
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            # The wait below ends first and raises; NCCL's own watchdog would end the process.
            options._timeout = 2 * self._limit
            self._group: Any = dist.ProcessGroupNCCL(store, rank, size, options)
        else:
            options: Any = ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]
            interface = interface_of(host)
            named = {"interface": interface} if interface else {"hostname": host}
            options._devices = [ProcessGroupGloo.create_device(**named)]
            options._timeout = self._limit
            self._group = ProcessGroupGloo(store, rank, size, options)

    def lay_out(self, buffer: Tensor) -> None:
        """Its size says everything."""

    def give(self, key: str, buffer: Tensor) -> None:
        self._broadcast(buffer)

    def take(self, key: str, num_bytes: int, handle: Any) -> Tensor:
        buffer = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        self._broadcast(buffer)
        return buffer

    def _broadcast(self, buffer: Tensor) -> None:
        if buffer.numel():
            options = dist.BroadcastOptions()
            options.rootRank, options.rootTensor = 0, 0
            self._group.broadcast([buffer], options).wait(self._limit)


class _Shared:
    """The learner's end of a buffer that engines on its device map; written anew once all have taken what was there."""

    def __init__(self, store: Store, num: int, device: torch.device, limit_s: float) -> None:
        self._store, self._num, self._device, self._limit_s = store, num, device, limit_s
        self._buffer = torch.empty(0, dtype=torch.uint8, device=device)
        self._handle: list[Any] = []

    def lay_out(self, buffer: Tensor) -> list[Any]:
        if buffer.numel() > self._buffer.numel():
            self._buffer = torch.empty_like(buffer)
            self._handle = _handle_of(self._buffer)
        self._buffer[: buffer.numel()].copy_(buffer)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._handle

    def give(self, key: str, buffer: Tensor) -> None:
        _until_all(self._store, key, self._num, self._limit_s)

    def take(self, key: str, num_bytes: int, handle: Any) -> Tensor:
        raise AssertionError("the learner's end takes nothing")


class _Mapped:
    """An engine's end of it."""

    def __init__(self, store: Store, number: int, device: torch.device) -> None:
        self._store, self._number, self._device = store, number, device
        self._handle: Any = None
        self._buffer = torch.empty(0)

    def lay_out(self, buffer: Tensor) -> None:
        raise AssertionError("an engine's end gives nothing")

    def give(self, key: str, buffer: Tensor) -> None:
        raise AssertionError("an engine's end gives nothing")

    def take(self, key: str, num_bytes: int, handle: Any) -> Tensor:
        if handle != self._handle:
            self._handle, self._buffer = handle, _mapped(handle, self._device)
        own = self._buffer[:num_bytes].clone()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._store.set(f"{key}/{self._number}", "")
        return own


def _handle_of(buffer: Tensor) -> list[Any]:
    """What another process maps the buffer by, as JSON has it: nothing that is unpickled."""
    storage = buffer.untyped_storage()
    found = storage._share_cuda_() if buffer.is_cuda else storage._share_filename_cpu_()
    return [{"bytes": base64.b64encode(each).decode()} if isinstance(each, bytes) else each for each in found]


def _mapped(handle: list[Any], device: torch.device) -> Tensor:
    """The memory of another process: of the very device of this one, uint8 [bytes]."""
    found = [base64.b64decode(each["bytes"]) if isinstance(each, dict) else each for each in handle]
    if device.type == "cuda":
        # The first part is the number of the GPU as the other process counts them; here it may have another.
        found[0] = torch.cuda.current_device() if device.index is None else device.index
        storage = torch.UntypedStorage._new_shared_cuda(*found)
    else:
        storage = torch.UntypedStorage._new_shared_filename_cpu(*found)
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _flat(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """The bytes of tensors, one behind the other; uint8 [bytes]."""
    parts = [each.detach().to(device).contiguous().flatten().view(torch.uint8) for each in tensors]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8, device=device)


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _broken(offer: Offer, error: Exception) -> LineBroken:
    return LineBroken(
        f"the learner's lines ({', '.join(offer.lines)}, cluster.weights={offer.path.value}) broke while version "
        f"{offer.version} came: {_first_line(error)}"
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
