"""How bytes get from the learner's process to engines' processes: by a broadcast, or by memory that both map."""

from __future__ import annotations

import base64
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, Store  # pyright: ignore[reportPrivateImportUsage]

from rollout.meeting import interface_of, until, until_all

GROUP = "group"
"""What the group's own keys begin with, in a store that it shares with who uses it."""


class Giver(Protocol):
    """How bytes leave the learner's end."""

    def lay_out(self, buffer: Tensor) -> Any:
        """What must be told of the buffer before it is given."""
        ...

    def give(self, key: str, buffer: Tensor) -> None:
        """Bring it to everybody, who take it under `key`."""
        ...


class Taker(Protocol):
    """How bytes come to an engine's end."""

    def take(self, key: str, num_bytes: int, handle: Any) -> Tensor:
        """The bytes, in memory of this process's own."""
        ...


class Broadcast:
    """A group of processes of its own, apart from those that the learner or an engine is in; the learner's is 0."""

    def __init__(self, store: Store, rank: int, size: int, device: torch.device, host: str, limit_s: float) -> None:
        self._store, self._device, self._limit_s = store, device, limit_s
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            # The wait below ends first and raises; NCCL's own watchdog would end the process.
            options._timeout = timedelta(seconds=2 * limit_s)
            self._group: Any = dist.ProcessGroupNCCL(PrefixStore(GROUP, store), rank, size, options)
        else:
            options: Any = ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]
            interface = interface_of(host)
            named = {"interface": interface} if interface else {"hostname": host}
            options._devices = [ProcessGroupGloo.create_device(**named)]
            options._timeout = timedelta(seconds=limit_s)
            self._group = ProcessGroupGloo(PrefixStore(GROUP, store), rank, size, options)

    def lay_out(self, buffer: Tensor) -> None:
        """Its size says everything."""

    def give(self, key: str, buffer: Tensor) -> None:
        """As a `Giver` does."""
        self._broadcast(buffer)

    def take(self, key: str, num_bytes: int, handle: Any) -> Tensor:
        """As a `Taker` does."""
        buffer = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        self._broadcast(buffer)
        return buffer

    def _broadcast(self, buffer: Tensor) -> None:
        if buffer.numel():
            options = dist.BroadcastOptions()
            options.rootRank, options.rootTensor = 0, 0
            work = self._group.broadcast([buffer], options)
            try:
                until(self._store, work.is_completed, lambda: "a broadcast did not end", self._limit_s)
            except RuntimeError:
                self._group.abort()  # NCCL learns of no dead process by itself, and would keep its GPU busy
                raise
            work.wait()


class Shared:
    """The learner's end of a buffer that engines on its device map; written anew once all have taken what was there."""

    def __init__(self, store: Store, num: int, device: torch.device, limit_s: float) -> None:
        self._store, self._num, self._device, self._limit_s = store, num, device, limit_s
        self._buffer = torch.empty(0, dtype=torch.uint8, device=device)
        self._handle: list[Any] = []

    def lay_out(self, buffer: Tensor) -> list[Any]:
        """Copy it to where the others look, and tell how they map that."""
        if buffer.numel() > self._buffer.numel():
            self._buffer = torch.empty_like(buffer)
            self._handle = _handle_of(self._buffer)
        self._buffer[: buffer.numel()].copy_(buffer)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._handle

    def give(self, key: str, buffer: Tensor) -> None:
        """Wait until all have taken it."""
        until_all(self._store, key, self._num, self._limit_s)


class Mapped:
    """An engine's end of it."""

    def __init__(self, store: Store, number: int, device: torch.device) -> None:
        self._store, self._number, self._device = store, number, device
        self._handle: Any = None
        self._buffer = torch.empty(0)

    def take(self, key: str, num_bytes: int, handle: Any) -> Tensor:
        """Copy it, and say so."""
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
