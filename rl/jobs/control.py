"""Launching, watching and stopping runs, whatever place runs them."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from conf.errors import ConfigError, LaunchError, WaitTimeout
from conf.schema import Config
from conf.settle import settled
from rl import checkpoint
from rl.jobs.follow import last_lines
from rl.jobs.place import place_of
from rl.jobs.plan import Plan, changed_settings
from rl.jobs.record import Launch, State, clear_ending, launches_below, read_ending, read_launch, write_launch
from rl.metrics import read_metrics
from rl.run_folder import RunFolder

STEP_LINE = re.compile(r"^step (?P<step>\d+)/\d+(?:\s+held-out (?P<success>[\d.]+)%)?", re.MULTILINE)
NUM_TAIL_LINES = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """One line of `grove jobs`."""

    folder: Path
    launch: Launch
    state: State
    why: str = ""
    """Why the state is unknown."""
    step: int | None = None
    """Steps finished; None before the first metrics."""
    success_share: float | None = None
    """Of the newest held-out evaluation."""


def require_continues(folder: Path, cfg: Config) -> None:
    """A launch goes on with the run that is in its folder: that must be the same run.

    Raises: ConfigError naming what differs, unless run.resume=true says that it is meant.
    """
    run = RunFolder(folder)
    if cfg.run.resume or not run.metrics.exists() or not run.config.exists():
        return
    stored = yaml.safe_load(run.config.read_text(encoding="utf-8"))
    changed = changed_settings(settled(cfg), stored if isinstance(stored, dict) else {})
    if changed:
        lines = "\n".join(f"  {line}" for line in changed)
        raise ConfigError(
            f"{folder} holds a run with other settings, and a launch would go on with it:\n{lines}\nUse another "
            f"run.name or seed for another run, or run.resume=true to continue this one with the new settings."
        )


def start(plan: Plan) -> Launch:
    """Start the job of a plan and write down where it is.

    Raises: LaunchError, WaitTimeout when the place refuses; ConfigError when the run folder cannot be written.
    """
    place = place_of(plan.launch.kind.value)
    clear_ending(plan.here)
    launch = dataclasses.replace(
        place.start(plan),
        command=plan.command,
        environment=list(plan.launch.environment),
        launched_at=time.time(),
        stop_limit_s=plan.launch.stop_limit_s,
        answer_limit_s=plan.launch.answer_limit_s,
        num_steps=plan.num_steps,
    )
    write_launch(plan.here, launch)
    return launch


def state_of(folder: Path, launch: Launch) -> State:
    """How a launched run is doing.

    Raises: LaunchError, WaitTimeout when whoever runs it does not answer.
    """
    state = place_of(launch.kind).state(launch)
    if state is not None:
        return state
    ending = read_ending(folder)
    return ending.state if ending else State.lost


def status_of(folder: Path, launch: Launch) -> Status:
    """How a launched run is doing and how far it has come; `unknown` where nobody answers."""
    why = ""
    try:
        state = state_of(folder, launch)
    except (LaunchError, WaitTimeout) as error:
        state, why = State.unknown, str(error)
    step, success_share = _progress(folder, launch, state)
    return Status(folder=folder, launch=launch, state=state, why=why, step=step, success_share=success_share)


def statuses_below(root: Path) -> list[Status]:
    """Of every launched run in the folders of `root`, the newest launch last."""
    return [status_of(folder, launch) for folder, launch in launches_below(root)]


def stop(folder: Path, launch: Launch) -> State:
    """Have a run save and end; returns how it ended."""
    place_of(launch.kind).stop(launch)
    return state_of(folder, launch)


def log_of(launch: Launch, *, follow: bool) -> Iterator[str]:
    """What a run printed; with `follow` also what it still prints."""
    return place_of(launch.kind).log(launch, follow=follow)


def launch_in(path: str) -> tuple[Path, Launch]:
    """The newest launch of a run, named by its folder, or by its name below runs/.

    Raises: ConfigError when it was never launched.
    """
    for folder in (Path(path), Path("runs") / path):
        launch = read_launch(folder)
        if launch is not None:
            return folder, launch
    raise ConfigError(
        f'"{path}" is no run that `grove launch` started: neither {path} nor runs/{path} holds a launch.json. '
        f"List those there are with: grove jobs"
    )


def newest_step(folder: Path) -> int | None:
    """Step of the newest checkpoint, as far as the folder can be seen from here."""
    steps = [each.step for each in checkpoint.checkpoints(folder / "checkpoints")]
    return max(steps, default=None)


def _progress(folder: Path, launch: Launch, state: State) -> tuple[int | None, float | None]:
    """Steps and newest held-out success: from the metrics where they can be seen from here, else from the log."""
    metrics = RunFolder(folder).metrics
    if metrics.exists():
        rows: list[dict[str, Any]] = read_metrics(metrics)
        measured = [row["eval/success_share"] for row in rows if row.get("eval/success_share") is not None]
        return (int(rows[-1]["step"]) if rows else None), (measured[-1] if measured else None)
    if state is State.unknown:
        return None, None
    found = list(STEP_LINE.finditer(_tail(launch)))
    measured = [float(line["success"]) / 100 for line in found if line["success"]]
    return (int(found[-1]["step"]) if found else None), (measured[-1] if measured else None)


def _tail(launch: Launch) -> str:
    if launch.log:
        return "\n".join(last_lines(Path(launch.log), NUM_TAIL_LINES))
    try:
        return "".join(log_of(launch, follow=False))
    except (LaunchError, WaitTimeout):
        return ""
