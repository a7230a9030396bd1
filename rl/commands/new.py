"""grove new"""

from __future__ import annotations

import argparse
from pathlib import Path

from conf.subject import LEVELS
from rl.commands.shared import Commands, add_command, print_lines

NEW = """\
Writes NAME.py, a reward that works, and test_NAME.py, its test, into this folder. Change them to what you want to pay.
"""

NEW_EXAMPLES = """\
examples:
  grove new reward brevity                               scores every step
  grove new reward correct --level trajectory            scores every trajectory
  grove new reward neater --level pair                   compares two steps tried at the same fork
  grove new reward majority --level tree                 sees a whole tree in one call
  grove new reward judged --model                        a model scores every step; also with each of the levels
then:
  python -m pytest test_brevity.py
  grove check-reward brevity.py:brevity
"""


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(commands, "new", _new, summary="files to start from", about=NEW, examples=NEW_EXAMPLES)
    parser.add_argument("what", choices=("reward",), help="what to start")
    parser.add_argument("name", metavar="NAME", help="its name: a file NAME.py and a test are written here")
    parser.add_argument("--level", default="step", choices=LEVELS, help="what it scores (default: step)")
    parser.add_argument("--model", action="store_true", help="let a model judge")


def _new(arguments: argparse.Namespace) -> int:
    from rl.scaffold import new_reward

    reward, test = new_reward(arguments.name, Path.cwd(), level=arguments.level, model=arguments.model)
    level = " --level tree" if arguments.level == "tree" else ""  # the other levels are read from the arguments
    model = " --model '{url: http://127.0.0.1:8000/v1, path: the-model}'" if arguments.model else ""
    print_lines(
        [
            f"wrote {reward.name} and {test.name}; next:",
            f"  python -m pytest {test.name}",
            f"  grove check-reward {reward.name}:{arguments.name}{level}{model}",
        ]
    )
    return 0
