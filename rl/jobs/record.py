"""What a launch writes into the run folder: launch.json, of the launcher, and launch_ending.json, of the job itself.

Neither holds a secret: of the environment variables that were passed, only the names are written.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from conf.errors import ConfigError, DataError

LAUNCH = "launch.json"
ENDING = "launch_ending.json"
STOPPED = (129, 130, 143)
"""Exit codes of what a hangup, Ctrl-C or SIGTERM ended; the last also of a run that was still being loaded."""


class State(Enum):
    """How a launched run is doing."""

    waiting = "waiting"
    """For its place: resources, a queue, an image."""
    running = "running"
    finished = "finished"
    failed = "failed"
    stopped = "stopped"
    """It was asked to, and saved."""
    lost = "lost"
    """Its process is gone and did not say why: killed, out of memory, or the machine went down."""
    unknown = "unknown"
    """Whoever runs it does not answer."""

    @property
    def is_live(self) -> bool:
        """Whether it may still write to its folder."""
        return self in (State.waiting, State.running, State.unknown)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One launch of a run."""

    kind: str
    """As launch.kind."""
    job: str
    """Its name where it runs: a process id, or that of the Ray job, the Slurm job or the RayJob."""
    run_dir: str
    """The run's folder as the job sees it."""
    log: str = ""
    """The file that its output goes to, where that can be read from here."""
    address: str = ""
    """Job server of a Ray cluster, or namespace of Kubernetes."""
    command: str = ""
    """What continues it."""
    environment: list[str] = field(default_factory=list)
    """Names of the variables that were passed."""
    launched_at: float = 0.0
    """Seconds since 1970."""
    process_started: float = 0.0
    """Of the process, seconds since 1970: a process id alone may be another's by now."""
    stop_limit_s: int = 120
    answer_limit_s: float = 20.0
    num_steps: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a job ended, by its own word."""

    exit_code: int
    at: float
    pid: int

    @property
    def state(self) -> State:
        """What the exit code says."""
        if self.exit_code in STOPPED:
            return State.stopped
        return State.finished if self.exit_code == 0 else State.failed


def write_launch(folder: Path, launch: Launch) -> None:
    """Write launch.json, readable by its owner alone.

    Raises: ConfigError when the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / LAUNCH, dataclasses.asdict(launch))
    except OSError as error:
        raise ConfigError(
            f"{folder / LAUNCH} cannot be written ({error}): nobody could find the run again. Choose a run.dir that "
            f"you may write to."
        ) from error


def read_launch(folder: Path) -> Launch | None:
    """The newest launch of the run in a folder; None where it was never launched.

    Raises: DataError when launch.json is damaged.
    """
    values = _read(folder / LAUNCH)
    if values is None:
        return None
    try:
        return Launch(**values)
    except TypeError as error:
        raise DataError(
            f"{folder / LAUNCH} is not of this Grove ({error}). Remove it, and look for the job by hand."
        ) from error


def launches_below(root: Path) -> list[tuple[Path, Launch]]:
    """Every launched run in the folders of `root`, the newest launch last."""
    found = [(file.parent, launch) for file in root.glob(f"*/{LAUNCH}") if (launch := read_launch(file.parent))]
    return sorted(found, key=lambda each: each[1].launched_at)


def write_ending(folder: Path, ending: Ending) -> None:
    """Write launch_ending.json."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / ENDING, dataclasses.asdict(ending))


def read_ending(folder: Path) -> Ending | None:
    """How the newest job of the run ended; None while it runs, or when it could not say."""
    values = _read(folder / ENDING)
    return None if values is None else Ending(**values)


def clear_ending(folder: Path) -> None:
    """Forget how an earlier job ended."""
    (folder / ENDING).unlink(missing_ok=True)


def _write(path: Path, values: Mapping[str, Any]) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(json.dumps(values, indent=2) + "\n")
    beside.replace(path)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}). Remove it, and look for the job by hand.") from error
    if not isinstance(values, dict):
        raise DataError(f"{path} holds no record of a launch. Remove it, and look for the job by hand.")
    return values
