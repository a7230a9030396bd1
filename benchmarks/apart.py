"""A piece of work in a fresh process of its own: how long it takes, and how much memory above what was there before."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType

import torch

Step = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Measured:
    """One step."""

    seconds: float
    peak_mib: float
    """Highest resident memory during the step, above that before it."""


class Apart:
    """Measures a step in a process that has done nothing else.

    The process is forked from a small server that has only imported `preload`, so it starts at once, and neither the
    caller's memory nor that of another step counts.

    Args:
        make: called in the process; what it sets up, and warms up, counts for nothing. Must be picklable.
        num_threads: of torch.
        preload: modules that take long to import; those of the first call count.
    """

    def __init__(self, make: Callable[[], Step], num_threads: int, preload: list[str]) -> None:
        context = get_context("forkserver")
        context.set_forkserver_preload(preload)
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, num_threads))
        self._process.start()
        theirs.close()
        self._answer()  # ready: setting up must not overlap with another's step

    def step(self) -> Measured:
        """Run the step once; only after another has ended is the machine free for it.

        Raises: RuntimeError when the process dies.
        """
        self._pipe.send(None)
        measured = self._answer()
        assert measured is not None, "only the first message says nothing but ready"
        return measured

    def _answer(self) -> Measured | None:
        try:
            return self._pipe.recv()
        except EOFError as error:
            self._process.join()
            raise RuntimeError(
                f"a measured process ended with code {self._process.exitcode}, so there is no figure for it. Its own "
                "error is above; without one it was killed, most likely for lack of memory: close other programs."
            ) from error

    def __enter__(self) -> Apart:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipe.close()
        self._process.join()


def _serve(pipe: Connection, make: Callable[[], Step], num_threads: int) -> None:
    """What the process does: a step for each message, until the other end of the pipe is closed or dies."""
    torch.set_num_threads(num_threads)
    step = make()
    pipe.send(None)
    with suppress(EOFError):
        while True:
            pipe.recv()
            pipe.send(_measured(step))


def _measured(step: Step) -> Measured:
    gc.collect()
    # A subprocess inherits its parent's ru_maxrss on Linux, and ru_maxrss never falls; this peak can be set back.
    Path("/proc/self/clear_refs").write_text("5")
    before_mib = status_mib("VmRSS")
    started = time.perf_counter()
    step()
    seconds = time.perf_counter() - started
    return Measured(seconds=seconds, peak_mib=status_mib("VmHWM") - before_mib)


def status_mib(name: str) -> float:
    """VmRSS, VmHWM ... of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024
