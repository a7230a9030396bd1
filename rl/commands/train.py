"""grove train"""

from __future__ import annotations

import argparse

from rl.commands.shared import Commands, add_command, add_settings, print_summary, warn

TRAIN = """\
Trains a policy. The configuration is checked first; all problems are shown together, before anything is started.
Everything is written to run.dir: resolved settings, metrics, scored trees, checkpoints, curve and report.
"""

TRAIN_EXAMPLES = """\
examples:
  grove train experiment=hop_search
  grove train experiment=hop_search rollout=tree_grpo credit=tree_grpo seed=2 run.name=tree_grpo
  grove train experiment=gsm8k task.train.path=train.jsonl task.eval.path=test.jsonl
  grove train 'rewards.sources.brief={fn: my_rewards.py:brief, weight: 0.2}'
  grove train ~rewards.sources.tool_success              leave one source out
  grove train --config-dir my_conf experiment=mine       groups and experiments of your own
"""


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(commands, "train", _train, summary="train a policy", about=TRAIN, examples=TRAIN_EXAMPLES)
    add_settings(parser)


def _train(arguments: argparse.Namespace) -> int:
    from conf.checks import require_runnable
    from conf.compose import compose

    cfg = compose(arguments.overrides, arguments.config_dir)
    require_runnable(cfg, warn=warn)
    from rl.loop import train

    print_summary(train(cfg))
    return 0
