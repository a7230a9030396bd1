"""grove stop"""

from __future__ import annotations

import argparse

from rl.commands.shared import Commands, add_command

STOP = """\
Has a launched run save a checkpoint and end. One that takes longer than its launch.stop_limit_s is killed; the
checkpoint before is then its newest. `grove launch` with the same settings continues it.
"""

STOP_EXAMPLES = """\
examples:
  grove stop runs/hop_search-seed0
"""


def add(commands: Commands) -> None:
    """Declare the command."""
    summary = "save and end a launched run"
    parser = add_command(commands, "stop", _stop, summary=summary, about=STOP, examples=STOP_EXAMPLES)
    parser.add_argument("path", metavar="RUN", help="the run's folder, or its name below runs/")


def _stop(arguments: argparse.Namespace) -> int:
    from rl.jobs.control import launch_in, newest_step, state_of, stop

    folder, launch = launch_in(arguments.path)
    state = state_of(folder, launch)
    if not state.is_live:
        print(f"{folder} does not run: it is {state.value}")
        return 0
    print(f"stopping {folder}, which may take {launch.stop_limit_s} s to save", flush=True)
    state, step = stop(folder, launch), newest_step(folder)
    saved = f"; its newest checkpoint is of step {step}" if step is not None else ""
    print(f"{folder} is {state.value}{saved}. Continue it with:\n  {launch.command}")
    return 0
