"""Jobs of this machine: a process in a session of its own, which no terminal takes down with it."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from conf.errors import LaunchError
from rl.interrupts import INTERRUPTS
from rl.jobs.follow import followed
from rl.jobs.plan import Plan
from rl.jobs.record import Launch, State

SAME_START_S = 1.0
"""By how much two readings of one process's start may differ."""
POLL_S = 0.1
KILL_LIMIT_S = 10.0


class ThisMachine:
    """launch.kind=local"""

    def shown(self, plan: Plan) -> str:
        """The command."""
        return shlex.join(plan.start_words(sys.executable))

    def start(self, plan: Plan) -> Launch:
        """Start the process; its output goes on at the end of logs/console.log."""
        log = plan.here / "logs" / "console.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        words, to_log = plan.start_words(sys.executable), os.O_WRONLY | os.O_CREAT | os.O_APPEND
        process_id = os.posix_spawn(
            words[0],
            words,
            {**os.environ, "PYTHONUNBUFFERED": "1"},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, str(log), to_log, 0o666),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            setsid=True,
            setsigdef=INTERRUPTS,  # `nohup grove launch` must not make a run that nothing can stop
        )
        return Launch(
            kind="local",
            job=str(process_id),
            run_dir=plan.there,
            log=str(log),
            process_started=psutil.Process(process_id).create_time(),
        )

    def state(self, launch: Launch) -> State | None:
        """Running while the very process is there."""
        return State.running if _process(launch) else None

    def stop(self, launch: Launch) -> None:
        """SIGTERM, on which a run saves; after the limit SIGKILL, to all that it started."""
        process = _process(launch)
        if process is None:
            return
        process.send_signal(signal.SIGTERM)
        if _is_gone(launch, launch.stop_limit_s):
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            for each in [process, *process.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
        if not _is_gone(launch, KILL_LIMIT_S):
            raise LaunchError(
                f"process {launch.job} goes on {KILL_LIMIT_S:.0f} s after it was killed: it hangs in the kernel, "
                f"mostly on a disk or a GPU that does not answer."
            )

    def log(self, launch: Launch, *, follow: bool) -> Iterator[str]:
        """logs/console.log"""
        return followed(Path(launch.log), is_over=lambda: not (follow and _process(launch)))


def _process(launch: Launch) -> psutil.Process | None:
    """The process of the launch, unless it has ended and its id may be another's."""
    try:
        process = psutil.Process(int(launch.job))
        if abs(process.create_time() - launch.process_started) > SAME_START_S:
            return None
        return None if process.status() == psutil.STATUS_ZOMBIE else process
    except psutil.NoSuchProcess:
        return None


def _is_gone(launch: Launch, limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while _process(launch):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True
