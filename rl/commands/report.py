"""grove report"""

from __future__ import annotations

import argparse

from rl.commands.shared import Commands, add_command, run_folder

REPORT_EXAMPLES = """\
examples:
  grove report runs/hop_search-seed0                     also while the run goes on
"""


def add(commands: Commands) -> None:
    """Declare the command."""
    summary = "write a run's curve and report once more"
    parser = add_command(commands, "report", _report, summary=summary, examples=REPORT_EXAMPLES)
    parser.add_argument("path", metavar="RUN", help="the run's folder")


def _report(arguments: argparse.Namespace) -> int:
    folder = run_folder(arguments.path, "report on")
    from rl.view import write_report

    print(write_report(folder))
    return 0
