"""grove compare"""

from __future__ import annotations

import argparse
from pathlib import Path

from rl.commands.shared import Commands, add_command, print_lines, run_folder

COMPARE = """\
Compares runs at a point that all of them have reached. Runs that differ by their seed alone are one group; each group
is compared with the first. A sweep's folder stands for all of its finished members.

Says what is within noise, how many seeds would settle it, and which runs cannot be compared. Prints a table; writes
compare.html, compare.png and compare.json.
"""

COMPARE_EXAMPLES = """\
examples:
  grove compare runs/sweeps/hop_search-credit-seed
  grove compare runs/a-seed0 runs/a-seed1 runs/b-seed0 runs/b-seed1
  grove compare runs/sweeps/hop_search-credit-seed --baseline grpo --at steps
  grove compare runs/a-seed0 runs/b-seed0 --metric rollout/success_share
"""


WIDTH = 160
"""Columns of the table in a file or a pipe."""


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands, "compare", _compare, summary="is one better, or is it luck?", about=COMPARE, examples=COMPARE_EXAMPLES
    )
    parser.add_argument("paths", nargs="+", metavar="RUN_OR_SWEEP", help="folders of runs and of sweeps")
    parser.add_argument("--metric", default="eval/success_share", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--at", default="tokens", choices=("tokens", "steps"), help="what is equal (default: tokens)")
    parser.add_argument("--baseline", default="", metavar="LABEL", help="group to compare with (default: the first)")
    parser.add_argument("--out", default="", metavar="DIR", help="where to write (default: the first RUN_OR_SWEEP)")


def _compare(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from rl.compare import compare
    from rl.compare_page import comparison_table, sentences, write_comparison

    paths = [run_folder(path, "compare") for path in arguments.paths]
    by_steps = arguments.at == "steps"
    found = compare(paths, arguments.metric, by_steps=by_steps, baseline=arguments.baseline)
    terminal = Console()
    (terminal if terminal.is_terminal else Console(width=WIDTH)).print(comparison_table(found))
    print_lines(["", *sentences(found), str(write_comparison(found, Path(arguments.out or paths[0])))])
    return 0
