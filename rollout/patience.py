"""Waits with a limit that say what they wait for; those for Ray are in `rollout.waiting`."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from conf.errors import WaitTimeout

logger = logging.getLogger(__name__)

Found = TypeVar("Found")
SAY_AFTER_S = 30.0
"""A wait longer than this is logged, and again each time as long."""


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


def wait_for(come: Callable[[float], Found | None], *, limit_s: float, what: str) -> Found:
    """What comes within the limit.

    Args:
        come: waits for at most so many seconds, as it is told; what came, or None.
        limit_s: longest wait, in seconds.
        what: what is awaited, for the log and the error.
    Raises: WaitTimeout when it did not come in time; whatever `come` raises.
    """
    started = time.monotonic()
    while (left_s := limit_s - (time.monotonic() - started)) > 0:
        with waiting():
            found = come(min(SAY_AFTER_S, left_s))
        if found is not None:
            return found
        waited_s = time.monotonic() - started
        if waited_s < limit_s:
            logger.warning("still waiting for %s after %.0f s (limit %.0f s)", what, waited_s, limit_s)
    raise WaitTimeout(
        f"{what} did not come within {limit_s:.0f} s. Look into the run's logs/ folder for the process that hangs, or "
        f"raise the limit if the work is really that long."
    )


async def some_done(
    tasks: Collection[asyncio.Task[Any]], *, limit_s: float, what: str, all_of_them: bool = False
) -> tuple[set[asyncio.Task[Any]], set[asyncio.Task[Any]]]:
    """Tasks that have ended, at least one or all unless the limit passed, and the others; nothing is cancelled.

    Args:
        limit_s: longest wait, in seconds.
        what: what the tasks do, for the log.
    """
    started, ended, waiting = time.monotonic(), set(), set(tasks)
    wanted = asyncio.ALL_COMPLETED if all_of_them else asyncio.FIRST_COMPLETED
    while waiting and (left_s := limit_s - (time.monotonic() - started)) > 0:
        done, waiting = await asyncio.wait(waiting, timeout=min(SAY_AFTER_S, left_s), return_when=wanted)
        ended |= done
        if not waiting or (ended and not all_of_them):
            break
        waited_s = time.monotonic() - started
        if waited_s < limit_s:
            logger.warning("still waiting for %d %s after %.0f s (limit %.0f s)", len(waiting), what, waited_s, limit_s)
    return ended, waiting
