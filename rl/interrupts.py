"""Ctrl-C, a scheduler's SIGTERM or SIGUSR1 and a lost terminal's SIGHUP, at moments when there is a state to save."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator

PREEMPTIONS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""SIGUSR1 is what Slurm sends some time before the end where it is asked to (--signal=B:USR1@120)."""
INTERRUPTS = (signal.SIGINT, *PREEMPTIONS)
PR_SET_PDEATHSIG = 1

_held_back: list[int] = []
"""Interrupts that came while a block of `uninterrupted` runs."""


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold an interrupt back until the block is through, then raise KeyboardInterrupt. Main thread only."""
    try:
        with _handled(INTERRUPTS, _held_back.append):
            yield
        raise_if_held_back()
    finally:
        _held_back.clear()


def raise_if_held_back() -> None:
    """Raise KeyboardInterrupt within `uninterrupted` where one came, for a wait that helps nobody then."""
    if _held_back:
        raise KeyboardInterrupt


@contextlib.contextmanager
def end_as_interrupt() -> Iterator[None]:
    """What preempts raises KeyboardInterrupt, so that such a run leaves the checkpoint that Ctrl-C leaves."""

    def interrupt(number: int) -> None:
        raise KeyboardInterrupt

    with _handled(PREEMPTIONS, interrupt):
        yield


@contextlib.contextmanager
def handed_on(send: Callable[[int], None]) -> Iterator[list[int]]:
    """Interrupts go to another process instead of this one; yields the list of those that came."""
    came: list[int] = []

    def hand_on(number: int) -> None:
        came.append(number)
        send(number)

    with _handled(INTERRUPTS, hand_on):
        yield came


def end_with_parent() -> None:
    """This process gets SIGTERM, on which a run leaves a checkpoint, when the one that started it ends. Linux alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextlib.contextmanager
def handlers_kept() -> Iterator[None]:
    """Our handlers are in place again after the block, where a library takes signals for itself, as Ray does at its
    start: a preemption while engines load would abort the process, and nobody would know that it was stopped."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {each: handler for each in INTERRUPTS if callable(handler := signal.getsignal(each))}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextlib.contextmanager
def _handled(signals: Iterable[signal.Signals], handler: Callable[[int], None]) -> Iterator[None]:
    # nohup and a shell's `&` have signals ignored on purpose, and so they stay
    heard = [each for each in signals if signal.getsignal(each) is not signal.SIG_IGN]
    before = {each: signal.signal(each, lambda number, _: handler(number)) for each in heard}
    try:
        yield
    finally:
        for each, former in before.items():
            signal.signal(each, former)
