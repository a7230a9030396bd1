"""Locks on folders: one process at a time, freed by the kernel when the process ends, however it ends."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

POLL_S = 0.2


def locked(folder: Path, limit_s: float = 0.0, tell: Callable[[], None] = lambda: None) -> IO[str] | None:
    """A lock on a folder, which is made where it is missing, held until the file is closed or this process ends.

    Args:
        limit_s: longest wait for another process that holds it.
        tell: called once if it has to be waited for.
    Returns: None when it stays taken.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("w")
    deadline, told = time.monotonic() + limit_s, False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() >= deadline:
                file.close()
                return None
            if not told:
                tell()
                told = True
            time.sleep(POLL_S)
