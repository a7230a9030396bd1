"""grove logs"""

from __future__ import annotations

import argparse

from rl.commands.shared import Commands, add_command, print_log

LOGS_EXAMPLES = """\
examples:
  grove logs runs/hop_search-seed0
  grove logs hop_search-seed0 --follow                   until the run ends; Ctrl-C leaves it running
"""


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(commands, "logs", _logs, summary="what a launched run prints", examples=LOGS_EXAMPLES)
    parser.add_argument("path", metavar="RUN", help="the run's folder, or its name below runs/")
    parser.add_argument("--follow", action="store_true", help="go on until the run ends")


def _logs(arguments: argparse.Namespace) -> int:
    from rl.jobs.control import launch_in

    _, launch = launch_in(arguments.path)
    return print_log(launch, follow=arguments.follow)
