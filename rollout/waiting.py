"""Waiting for Ray with a limit, and saying what is awaited."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayTaskError

from conf.errors import GroveError, WaitTimeout

logger = logging.getLogger(__name__)


class _Waited(threading.local):
    """Each thread's own count."""

    seconds = 0.0


_waited = _Waited()


@contextmanager
def waiting() -> Iterator[None]:
    """Time in this block is time in which this thread waits for others."""
    started = time.monotonic()
    try:
        yield
    finally:
        _waited.seconds += time.monotonic() - started


def waited_seconds() -> float:
    """What this thread has waited for others so far."""
    return _waited.seconds


SAY_AFTER_S = 30.0
"""A wait longer than this is logged, and again each time as long."""


def wait_some(refs: Sequence[ray.ObjectRef[Any]], *, limit_s: float, what: str) -> list[ray.ObjectRef[Any]]:
    """The refs that are ready, at least one.

    Args:
        limit_s: longest wait, in seconds.
        what: what is awaited, for the log and the error.
    Raises: WaitTimeout when none came in time.
    """
    started = time.monotonic()
    while True:
        waited_s = time.monotonic() - started
        if waited_s >= limit_s:
            raise WaitTimeout(
                f"{what} did not come within {limit_s:.0f} s. Look into the run's logs/ folder for the process that "
                "hangs, or raise the limit if the work is really that long."
            )
        with waiting():
            ready, _ = ray.wait(list(refs), num_returns=1, timeout=min(SAY_AFTER_S, limit_s - waited_s))
        if ready:
            return ready
        logger.warning("still waiting for %s after %.0f s (limit %.0f s)", what, time.monotonic() - started, limit_s)


def wait_all(refs: Sequence[ray.ObjectRef[Any]], *, limit_s: float, what: str) -> list[Any]:
    """Values of all refs, in order. Raises WaitTimeout, and whatever a call raised."""
    started = time.monotonic()
    waiting = list(refs)
    while waiting:
        left_s = max(0.1, limit_s - (time.monotonic() - started))
        ready = wait_some(waiting, limit_s=left_s, what=f"{what} ({len(waiting)} of {len(refs)} left)")
        for ref in ready:
            value_of(ref)
        waiting = [ref for ref in waiting if ref not in ready]
    return [value_of(ref) for ref in refs]


def value_of(ref: ray.ObjectRef[Any]) -> Any:
    """Value of a ref that is ready.

    Raises: what the call raised; one of Grove's own errors as it was raised, without Ray's account of where, since its
    message is written for the user.
    """
    try:
        return ray.get(ref)
    except RayTaskError as error:
        if isinstance(error.cause, GroveError):
            raise error.cause from error
        raise
