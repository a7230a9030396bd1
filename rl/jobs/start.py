"""What a launched job runs: `python -m rl.jobs.start --versions A==1,B==2 -- train ...`.

It looks whether this Python is the one the run was made for, takes over what the launcher passed, trains, and writes
down how that ended. Until the first two are done it imports the standard library alone.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from conf.errors import GroveError
from rl.exit_codes import ERROR, INTERRUPTED, REFUSED
from rl.jobs.passed import forget_passed, take_passed
from rl.jobs.record import Ending, clear_ending, write_ending
from rl.jobs.versions import differences, from_text, pinned_versions, refusal


def main(argv: list[str] | None = None) -> int:
    """Run the job; the exit code is that of the command."""
    parser = argparse.ArgumentParser(prog="rl.jobs.start", description=__doc__)
    parser.add_argument("--versions", default="", help="what must be installed")
    parser.add_argument("--run-dir", required=True, help="where the ending is written down")
    parser.add_argument("words", nargs="+", help="of the grove command")
    arguments = parser.parse_args(argv)
    folder = Path(arguments.run_dir)
    wrong = differences(from_text(arguments.versions), pinned_versions())
    if wrong:
        print(f"error: {refusal(wrong, f'the Python of this job ({sys.executable})')}", file=sys.stderr)
        _write_down(folder, REFUSED)
        return REFUSED
    clear_ending(folder)
    code = ERROR
    try:
        take_passed()
        code = _run([*arguments.words, *_resume(folder)])
    except GroveError as error:
        print(f"error: {error}", file=sys.stderr)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else ERROR
    finally:
        _write_down(folder, code)
        forget_passed()
    return code


def _resume(folder: Path) -> list[str]:
    """The setting that continues a run, where the folder holds one: it is here that this can be seen."""
    return ["run.resume=true"] if (folder / "metrics.jsonl").exists() else []


def _run(words: list[str]) -> int:
    from rl.cli import main as grove
    from rl.interrupts import end_as_interrupt

    try:
        with end_as_interrupt():  # also before the run itself listens, and while it closes
            return grove(words)
    except KeyboardInterrupt:
        return INTERRUPTED


def _write_down(folder: Path, code: int) -> None:
    try:
        write_ending(folder, Ending(exit_code=code, at=time.time(), pid=os.getpid()))
    except OSError as error:
        print(f"warning: {folder} cannot be told that the run ended with {code} ({error})", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
