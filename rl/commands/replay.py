"""grove replay"""

from __future__ import annotations

import argparse

from rl.commands.shared import Commands, add_command, add_settings, run_folder, warn

REPLAY = """\
Gives credit to a run's recorded trees once more, with other weights, another recipe or another selection, and compares
it with the credit that the run trained on. Nothing is sampled, scored or trained. Prints a table, writes replay.html.
"""

REPLAY_EXAMPLES = """\
examples:
  grove replay runs/hop_search-seed0 credit=grpo
  grove replay runs/hop_search-seed0 credit.terms.fork.weight=0.3 rewards.sources.progress.weight=0.5
  grove replay runs/hop_search-seed0 select=dapo --steps 10:20       only steps 10 to 20
"""


def add(commands: Commands) -> None:
    """Declare the command."""
    summary = "other credit for a run's recorded trees"
    parser = add_command(commands, "replay", _replay, summary=summary, about=REPLAY, examples=REPLAY_EXAMPLES)
    parser.add_argument("path", metavar="RUN", help="the run's folder")
    parser.add_argument("--steps", default="", metavar="FIRST[:LAST]", help="recorded steps (default: all)")
    add_settings(parser, "of rewards, select or credit")


def _replay(arguments: argparse.Namespace) -> int:
    folder = run_folder(arguments.path, "replay")
    from rich import print as print_rich

    from rl.replay import replay_run
    from rl.replay_page import replay_table, write_replay

    replay = replay_run(folder, arguments.overrides, arguments.steps, warn, arguments.config_dir)
    print_rich(replay_table(replay))
    print(write_replay(replay))
    return 0
