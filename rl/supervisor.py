"""Keeps a training run alive: in a process of its own, started again from its last checkpoint when it is lost.

What can be replaced in the middle of a run is replaced there (rollout workers, reward processes, the reward service).
This is for the rest: a learner process, Ray itself, or the run's own process, killed by whomever.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from rl.exit_codes import ERROR, LOST, TOLD
from rl.interrupts import INTERRUPTS, end_with_parent, handed_on
from rl.run_folder import RunFolder

PAUSE_S = 3.0
"""Before a run is started again: what belonged to the lost one ends meanwhile."""


class Child(Protocol):
    """What of `subprocess.Popen` is used."""

    def wait(self) -> int:
        """Its exit code, negative for a signal."""
        ...

    def send_signal(self, sig: int) -> None:
        """Send it a signal."""
        ...


def why_lost(code: int) -> str | None:
    """Why a run that ended so should be started again; None when it is done, was refused, or was stopped.

    Args:
        code: exit code of the process, or minus the signal that ended it.
    """
    if code == LOST:
        return "lost a part that it cannot replace"
    if code == ERROR:
        return "lost Ray"
    if code < 0 and -code not in INTERRUPTS:
        return f"was killed by {signal.Signals(-code).name}"
    return None


def supervise(
    words: Sequence[str],
    run_dir: Path,
    max_restarts: int,
    tell: Callable[[str], None],
    start: Callable[[Sequence[str]], Child],
    pause_s: float = PAUSE_S,
) -> int:
    """Train in a process of its own until the run is done, was stopped, or was lost too often.

    Interrupts are handed on to that process, which leaves a checkpoint; it also ends when this process is killed.

    Args:
        words: options and settings of `grove train`.
        run_dir: the run's folder; each restart is noted in its restarts.jsonl.
        max_restarts: so often it is started again.
        tell: shows the user a line.
        start: makes the process that trains with these words (`start_process`).
    Returns: the exit code for this process.
    """
    number = 0
    while True:
        child = start([*words, "run.resume=true"] if number else words)
        with handed_on(child.send_signal) as stopped:
            code = child.wait()
        why = None if stopped else why_lost(code)
        if why is None:
            # of one that was stopped, the signal that it was sent: Ray, while it starts, makes an abort of SIGTERM
            ended_by = stopped[0] if stopped else -code
            return ERROR if code == TOLD else code if code >= 0 else 128 + ended_by
        if number == max_restarts:
            tell(
                f"the run {why}; run.max_restarts={max_restarts} is used up. See {run_dir / 'logs'}; go on by hand with"
            )
            tell(f"  grove train {' '.join(words)} run.resume=true")
            return LOST
        number += 1
        tell(f"the run {why}; starting it again from its last checkpoint ({number} of {max_restarts})")
        RunFolder(run_dir).note_restart(why)
        time.sleep(pause_s)


def start_process(command: Sequence[str]) -> subprocess.Popen[bytes]:
    """A process that trains, in a group of its own, which ends with us."""
    # Spinning threads would take the cores that engines and learner work on.
    environment = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ
    # An own group: of a terminal's Ctrl-C only the one that we hand on arrives.
    return subprocess.Popen(command, env=environment, process_group=0, preexec_fn=end_with_parent)
