"""Members as processes: started, watched, stopped, and what their end says."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from rl.sweeps.record import MemberRecord, SweepRecord

TAIL_BYTES = 64 * 1024
"""Of a log, in which the reason of a failure is looked for."""
MAX_REASON = 300
"""Characters of a reason; the log has the rest."""
ERROR = re.compile(r"^(?:\x1b\[\d+m)?error: (.*)")
EXCEPTION = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Timeout|Lost|Failed|Interrupt|Exit)\b.*")
COLOR = re.compile(r"\x1b\[[\d;]*m")
PROGRAM = (sys.executable, "-m", "rl.sweeps.member")


class Process(Protocol):
    """A member's process."""

    def poll(self) -> int | None:
        """Its exit code, minus the signal's number where one ended it; None while it runs."""

    def silent_s(self) -> float:
        """Seconds since it last printed or wrote metrics."""
        ...

    def stop(self) -> None:
        """Ask it to end, with a checkpoint."""

    def kill(self) -> None:
        """End it and whatever it started, now."""


class Launch(Protocol):
    """Starts members."""

    def __call__(self, record: SweepRecord, member: MemberRecord, gpus: str | None) -> Process:
        """Start a member.

        Args:
            gpus: CUDA_VISIBLE_DEVICES for it; None leaves the environment as it is.
        """
        ...


def settings_of(record: SweepRecord, member: MemberRecord) -> list[str]:
    """All settings of a member's `grove train`."""
    folder = record.folder(member).path
    place = [f"run.name={_quoted(f'{record.run_name}-{member.name}')}", f"run.dir={_quoted(str(folder))}"]
    config_dir = ["--config-dir", record.config_dir] if record.config_dir else []
    # the sweep itself starts a lost member again
    return [*member.overrides, *place, "run.resume=true", "run.max_restarts=0", *config_dir]


def command_of(record: SweepRecord, member: MemberRecord) -> str:
    """What to type to train a member alone."""
    return shlex.join(["grove", "train", *settings_of(record, member)])


def _quoted(text: str) -> str:
    """A text as a value in Hydra's grammar."""
    return "'" + text.replace("'", r"\'") + "'"


@dataclass(slots=True)
class LocalProcess:
    """A member in a process group of its own, so that a Ctrl-C for the sweep does not reach it twice."""

    process: subprocess.Popen[bytes]
    output: IO[bytes]
    watched: tuple[Path, ...]
    """Files whose growth is a sign of life."""
    started: float

    def poll(self) -> int | None:
        """See `Process`."""
        code = self.process.poll()
        if code is not None and not self.output.closed:
            self.output.close()
            self._kill_group()  # what a crashed driver left of its engines would keep cores and GPUs
        return code

    def silent_s(self) -> float:
        """See `Process`."""
        signs = [self.started]
        for file in self.watched:
            with contextlib.suppress(FileNotFoundError):
                signs.append(file.stat().st_mtime)
        return time.time() - max(signs)

    def stop(self) -> None:
        """See `Process`; the driver alone is told, for the parts must live on to write the checkpoint."""
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """See `Process`."""
        self._kill_group()
        self.process.kill()

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)


def launch_locally(
    record: SweepRecord, member: MemberRecord, gpus: str | None, program: Sequence[str] = PROGRAM
) -> LocalProcess:
    """Start a member on this machine; with cluster.address it is a driver whose parts Ray places on the cluster.

    Args:
        program: the command that trains, to be followed by our process id, the run folder and all settings.
    """
    folder = record.folder(member)
    folder.logs.mkdir(parents=True, exist_ok=True)
    log = record.log(member)
    output = log.open("ab")
    output.write(f"$ {command_of(record, member)}\n".encode())
    output.flush()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"}
    if gpus is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpus
    process = subprocess.Popen(
        [*program, str(os.getpid()), str(folder.path), *settings_of(record, member)],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )
    return LocalProcess(process, output, (log, folder.metrics), time.time())


def gpu_slots(visible: list[str], parallel: int) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each place that members run in: GPUs dealt out evenly, what is left over to the first.

    >>> gpu_slots(["0", "1", "2", "3", "4"], 2)
    ['0,1,2', '3,4']
    """
    if parallel == 1 or not visible:
        return [None] * parallel
    each, more = divmod(len(visible), parallel)
    sizes = [each + (place < more) for place in range(parallel)]
    starts = [sum(sizes[:place]) for place in range(parallel)]
    return [",".join(visible[start : start + size]) for start, size in zip(starts, sizes, strict=True)]


def reason_of(log: Path, exit_code: int) -> str:
    """Why a process failed, in one line: what it said last, and how it ended."""
    ended = _ending(exit_code)
    said = _last_words(log)
    return f"{said} ({ended})" if said else ended


def _ending(exit_code: int) -> str:
    if exit_code >= 0:
        return f"exit code {exit_code}"
    name = signal.Signals(-exit_code).name
    memory = ", as the kernel does when memory runs out" if -exit_code == signal.SIGKILL else ""
    return f"killed by {name}{memory}"


def _last_words(log: Path) -> str:
    """The last error in a log; before any, its last line."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL_BYTES))
            lines = COLOR.sub("", file.read().decode("utf-8", errors="replace")).splitlines()
    except FileNotFoundError:
        return ""
    starts = [place for place, line in enumerate(lines) if line.startswith("$ grove train")]
    lines = [line.strip() for line in lines[starts[-1] + 1 if starts else 0 :] if line.strip()]
    for line in reversed(lines):
        if found := ERROR.match(line):
            return found[1][:MAX_REASON]
    for line in reversed(lines):
        if EXCEPTION.match(line):
            return line[:MAX_REASON]
    return lines[-1][:MAX_REASON] if lines else ""
