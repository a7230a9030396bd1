"""A full disk: what is written waits until somebody makes room."""

from __future__ import annotations

import errno
import logging
import re
import time
from collections.abc import Callable
from typing import TypeVar

from conf.errors import DiskFull, WaitTimeout
from rl.interrupts import raise_if_held_back
from rollout.patience import wait_for

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

FULL_WORDS = re.compile(r"no space left|disk quota|inline_container", re.IGNORECASE)
"""How safetensors (the system's words) and torch.save (its zip writer's file) tell of it; neither raises OSError."""
PAUSE_S = 2.0
"""Between two tries."""


def is_full(error: BaseException) -> bool:
    """Whether the disk, or a quota on it, had no room."""
    by_number = isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}
    return isinstance(error, DiskFull) or by_number or FULL_WORDS.search(str(error)) is not None


def once_there_is_room(write: Callable[[], Result], *, what: str, limit_s: float) -> Result:
    """What `write` returns, called again for as long as the disk is full.

    Args:
        write: writes all or nothing, so that it can be called again.
        what: is written, for messages.
        limit_s: longest wait for room, in seconds; 0 tries once.
    Raises: DiskFull when nobody made room within the limit; KeyboardInterrupt when one came meanwhile; whatever else
        `write` raises, at once.
    """
    refused: Exception | None = None

    def attempt(timeout_s: float) -> tuple[Result] | None:
        nonlocal refused
        given_up = time.monotonic() + timeout_s
        while refused is None or time.monotonic() < given_up:
            if refused is not None:
                raise_if_held_back()
                time.sleep(min(PAUSE_S, timeout_s))
            try:
                return (write(),)
            except Exception as error:
                if not is_full(error):
                    raise
                if refused is None and limit_s > 0:
                    logger.warning("no space left for %s; the run waits up to %.0f s for room", what, limit_s)
                refused = error
        return None

    try:
        return (attempt(0.0) or wait_for(attempt, limit_s=limit_s, what=f"room on the disk for {what}"))[0]
    except WaitTimeout:
        if isinstance(refused, DiskFull):
            raise refused from None
        raise DiskFull(
            f"{what} could not be written ({refused}), and nobody made room within run.disk_wait_s={limit_s:g}: what "
            "came after would be lost. Free some space or choose another run.dir, then go on with run.resume=true."
        ) from refused
