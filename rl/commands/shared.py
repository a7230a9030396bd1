"""What commands share: how they take settings, and how they speak.

A command's module has `add(commands)`, which declares it, and imports torch, Ray and the engines only where it runs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from conf.errors import ConfigError
from rl.completion import SETTINGS

if TYPE_CHECKING:
    from rl.jobs.record import Launch

RED, YELLOW, GREEN, PLAIN = "\033[31m", "\033[33m", "\033[32m", "\033[0m"

Commands = Any
"""What `argparse.ArgumentParser.add_subparsers` returns."""


def add_command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    summary: str,
    about: str = "",
    examples: str = "",
) -> argparse.ArgumentParser:
    """Declare a command.

    Args:
        run: does it; returns the exit code.
        summary: its line in `grove --help`.
        about, examples: before and after the options in its own help.
    """
    parser = commands.add_parser(
        name,
        help=summary,
        description=about or None,
        epilog=examples or None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    return parser


def add_settings(
    parser: argparse.ArgumentParser, what: str = "group=choice, key=value or ~key", *, config_dir: bool = True
) -> None:
    """Let a command take settings, after its own words."""
    parser.add_argument(SETTINGS, nargs="*", metavar="setting", help=what)
    if config_dir:
        parser.add_argument("--config-dir", default="", metavar="DIR", help="folder of your own groups and experiments")


def count(text: str) -> int:
    """An option's value that is 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too few; give 1 or more")
    return number


def run_folder(path: str, purpose: str) -> Path:
    """The run folder that a user named.

    Raises: ConfigError when there is none.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(f'there is no run folder "{folder}" to {purpose}: runs lie under runs/, one folder each.')
    return folder


def print_summary(summary: Mapping[str, Any]) -> None:
    """Names and values, one pair a line."""
    width = max(map(len, summary), default=0)
    for name, value in summary.items():
        print(f"{name:<{width}}  {_shown(value)}")


def print_lines(lines: list[str]) -> None:
    """Lines for people or pipes."""
    for line in lines:
        print(line)
    sys.stdout.flush()  # a closed pipe shows here, where it is caught


def print_log(launch: Launch, *, follow: bool = True) -> int:
    """What a launched run prints; Ctrl-C ends the printing, not the run."""
    from rl.jobs.control import log_of

    try:
        for piece in log_of(launch, follow=follow):
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        say("the run goes on", YELLOW)
    return 0


def warn(text: str) -> None:
    """A warning on standard error."""
    say(f"warning: {text}", YELLOW)


def say(text: str, color: str) -> None:
    """A line on standard error, coloured for people."""
    print(f"{color}{text}{PLAIN}" if _is_colored(sys.stderr) else text, file=sys.stderr)


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(each)}" for name, each in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_colored(stream: TextIO) -> bool:
    return stream.isatty() and "NO_COLOR" not in os.environ
