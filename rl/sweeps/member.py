"""The process of one member: `grove train` that ends with its sweep and never trains beside another of its folder.

python -m rl.sweeps.member SWEEP_PID RUN_DIR setting ...
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import sys
import time
from pathlib import Path
from typing import IO

PR_SET_PDEATHSIG = 1
"""Of prctl(2): a signal that the kernel sends when the parent dies."""
LOCK_LIMIT_S = 180.0
"""Longest wait for a member that a killed sweep left behind and that now writes its checkpoint."""


def main(words: list[str]) -> int:
    """Train; returns the exit code of `grove train`."""
    sweep_pid, folder, settings = int(words[0]), Path(words[1]), words[2:]
    end_with_parent(sweep_pid)
    lock = locked(folder)
    if lock is None:
        print(f"error: another process still trains in {folder} after {LOCK_LIMIT_S:.0f} s; stop it first.")
        return 1
    from rl.cli import main as grove

    return grove(["train", *settings])


def end_with_parent(parent: int) -> None:
    """Get SIGTERM, which leaves a checkpoint behind, when the sweep is killed. Where the kernel has no such thing,
    a killed sweep leaves its members running; its next start waits for them."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(1)  # it died before we asked


def locked(folder: Path, limit_s: float = LOCK_LIMIT_S) -> IO[str] | None:
    """A lock on a folder, held until the file is closed or this process ends; None when it stays taken."""
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
                print(f"waiting for the process that still trains in {folder}", flush=True)
                told = True
            time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
