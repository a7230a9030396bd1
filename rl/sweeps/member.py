"""The process of one member: `grove train` that ends with its sweep and never trains beside another of its folder.

python -m rl.sweeps.member SWEEP_PID RUN_DIR setting ...
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from rl.interrupts import end_with_parent
from rl.locks import locked

LOCK_LIMIT_S = 180.0
"""Longest wait for a member that a killed sweep left behind and that now writes its checkpoint."""


def main(words: list[str]) -> int:
    """Train; returns the exit code of `grove train`."""
    sweep_pid, folder, settings = int(words[0]), Path(words[1]), words[2:]
    end_with_sweep(sweep_pid)
    lock = locked(folder, LOCK_LIMIT_S, lambda: print(f"waiting for the process that still trains in {folder}"))
    if lock is None:
        print(f"error: another process still trains in {folder} after {LOCK_LIMIT_S:.0f} s; stop it first.")
        return 1
    from rl.cli import main as grove

    return grove(["train", *settings])


def end_with_sweep(sweep_pid: int) -> None:
    """End, with a checkpoint, when the sweep is killed. Where the kernel has no such thing, a killed sweep leaves its
    members running; its next start waits for them."""
    end_with_parent()
    if os.getppid() != sweep_pid:
        sys.exit(1)  # it died before we asked


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
