"""grove completion"""

from __future__ import annotations

import argparse

from rl.commands.shared import Commands, add_command
from rl.completion import SHELLS, script


def add(commands: Commands) -> None:
    """Declare the command."""
    summary = "print a completion script for your shell"
    parser = add_command(commands, "completion", _completion, summary=summary)
    parser.add_argument("shell", choices=SHELLS)


def _completion(arguments: argparse.Namespace) -> int:
    print(script(arguments.shell), end="")
    return 0
