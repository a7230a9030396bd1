"""A sweep whose members are real processes that train nothing, so that twelve of them take seconds.

    python short_members.py sweep setting ...     what `grove train -m` does, with the members below
    python short_members.py SWEEP_PID RUN_DIR setting ...     one member

A member counts to STEPS, a tick at a time, and keeps the count in its folder as a checkpoint; SIGTERM ends it between
two ticks. Each start and each tick is a line in starts.txt and ticks.txt beside all members. seed=5 is poisoned.
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from pathlib import Path

from conf.compose import compose
from conf.sweep import read_sweep
from rl.interrupts import end_as_interrupt
from rl.locks import locked
from rl.sweeps.member import end_with_sweep
from rl.sweeps.process import launch_locally
from rl.sweeps.run import run_sweep

STEPS, TICK_S = 4, 0.1
POISONED = 5


def sweep(settings: list[str]) -> int:
    program = (sys.executable, __file__)
    run_sweep(read_sweep(settings), print, partial(launch_locally, program=program))
    return 0


def member(parent: int, folder: Path, settings: list[str]) -> int:
    end_with_sweep(parent)
    lock = locked(folder, limit_s=30)
    assert lock is not None
    cfg = compose(settings)
    count = folder / "count"
    with (folder.parent / "starts.txt").open("a") as starts, (folder.parent / "ticks.txt").open("a") as ticks:
        starts.write(f"{folder.name}\n")
        starts.flush()
        if cfg.seed == POISONED:
            raise ValueError("this seed is poisoned")
        with end_as_interrupt():
            for step in range(int(count.read_text()) if count.exists() else 0, STEPS):
                time.sleep(TICK_S)
                ticks.write(f"{folder.name} {step + 1}\n")
                ticks.flush()
                count.write_text(str(step + 1))
    (folder / "summary.json").write_text(json.dumps({"success_after": 0.5, "steps": STEPS}))
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "sweep":
        sys.exit(sweep(sys.argv[2:]))
    sys.exit(member(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
