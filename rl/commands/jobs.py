"""grove jobs"""

from __future__ import annotations

import argparse
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rl.commands.shared import Commands, add_command, print_lines, run_folder, warn

if TYPE_CHECKING:
    from rl.jobs.control import Status

JOBS_EXAMPLES = """\
examples:
  grove jobs                                             every launched run below runs/
  grove jobs /shared/runs
"""

HEADINGS = ("run", "where", "job", "state", "step", "held-out", "launched")


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(commands, "jobs", _jobs, summary="how launched runs are doing", examples=JOBS_EXAMPLES)
    parser.add_argument(
        "path", nargs="?", default="runs", metavar="FOLDER", help="where run folders lie (default: runs)"
    )


def _jobs(arguments: argparse.Namespace) -> int:
    from rl.jobs.control import statuses_below

    root = Path(arguments.path)
    statuses = statuses_below(run_folder(arguments.path, "look into")) if root.exists() else []
    if not statuses:
        print(f"no run below {root} was launched; start one with grove launch")
        return 0
    for status in statuses:
        if status.why:
            warn(f"{status.folder}: {status.why}")
    print_lines(table([HEADINGS, *map(_row, statuses)]))
    return 0


def table(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows as lines with columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _row(status: Status) -> tuple[str, ...]:
    launch, step, success = status.launch, status.step, status.success_share
    return (
        str(status.folder),
        launch.kind,
        launch.job,
        status.state.value,
        "-" if step is None else f"{step}/{launch.num_steps}",
        "-" if success is None else f"{success:.1%}",
        f"{datetime.fromtimestamp(launch.launched_at):%Y-%m-%d %H:%M}",
    )
