"""grove eval"""

from __future__ import annotations

import argparse
from pathlib import Path

from conf.errors import ConfigError
from rl.commands.shared import Commands, add_command, add_settings, count, print_summary

EVALUATE_EXAMPLES = """\
examples:
  grove eval runs/hop_search-seed0                       the newest checkpoint, on run.eval_prompts held-out prompts
  grove eval runs/hop_search-seed0 --prompts 512
  grove eval runs/hop_search-seed0 rollout.num_workers=8
  grove eval models/mine task=gsm8k task.eval.path=test.jsonl                 a model that no run of Grove made
"""


def add(commands: Commands) -> None:
    """Declare the command."""
    summary = "measure held-out success of a run or a model"
    parser = add_command(commands, "eval", _evaluate, summary=summary, examples=EVALUATE_EXAMPLES)
    parser.add_argument("path", metavar="RUN_OR_MODEL", help="a run's folder, or a Hugging Face checkpoint's")
    parser.add_argument("--prompts", type=count, metavar="N", help="held-out prompts (default: run.eval_prompts)")
    add_settings(parser, "settings to change", config_dir=False)


def _evaluate(arguments: argparse.Namespace) -> int:
    if not Path(arguments.path).is_dir():
        raise ConfigError(
            f"there is no folder \"{arguments.path}\" to evaluate: give a run's folder or a checkpoint's."
        )
    from rl.evaluate import evaluate_run

    print_summary(evaluate_run(arguments.path, arguments.overrides, arguments.prompts))
    return 0
