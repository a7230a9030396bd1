"""grove train"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rl.commands.shared import (
    YELLOW,
    Commands,
    add_command,
    add_settings,
    print_lines,
    print_summary,
    say,
    warn,
)
from rl.exit_codes import ERROR, INTERRUPTED

TRAIN_HERE = "__train"
"""The hidden command that trains in its own process."""

TRAIN = """\
Trains a policy. The configuration is checked first; all problems are shown together, before anything is started.
Everything is written to run.dir: resolved settings, metrics, scored trees, checkpoints, curve and report.

With -m settings may name several values, and every combination is trained: a,b or choice(a,b), range(0,3), glob(tree*).
The same command once more goes on with a sweep that was stopped; finished members are not trained again.
"""

TRAIN_EXAMPLES = """\
examples:
  grove train experiment=hop_search
  grove train experiment=hop_search rollout=tree_grpo credit=tree_grpo seed=2 run.name=tree_grpo
  grove train experiment=gsm8k task.train.path=train.jsonl task.eval.path=test.jsonl
  grove train 'rewards.sources.brief={fn: my_rewards.py:brief, weight: 0.2}'
  grove train ~rewards.sources.tool_success              leave one source out
  grove train --config-dir my_conf experiment=mine       groups and experiments of your own
  grove train -m experiment=hop_search credit=tree_step,grpo seed=1,2,3
  grove train -m experiment=hop_search sweep=optuna 'learner.learning_rate=tag(log, interval(1e-4, 1e-2))'
"""


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(commands, "train", _train, summary="train a policy", about=TRAIN, examples=TRAIN_EXAMPLES)
    parser.add_argument("-m", "--multirun", action="store_true", help="a sweep: one run for each combination of values")
    add_settings(parser)


def _train(arguments: argparse.Namespace) -> int:
    if arguments.multirun:
        return _sweep(arguments)
    from conf.checks import require_runnable
    from conf.compose import compose

    cfg = compose(arguments.overrides, arguments.config_dir)
    require_runnable(cfg, warn=warn)
    if cfg.run.max_restarts == 0:
        return train_here(arguments)
    from rl.supervisor import start_process, supervise

    def start(words: Sequence[str]) -> subprocess.Popen[bytes]:
        return start_process([sys.executable, "-m", "rl.cli", TRAIN_HERE, *words])

    own = ["--config-dir", arguments.config_dir] if arguments.config_dir else []
    return supervise([*own, *arguments.overrides], Path(cfg.run.dir), cfg.run.max_restarts, warn, start)


def train_here(arguments: argparse.Namespace) -> int:
    """Train in this process, which nobody starts again."""
    from conf.compose import compose
    from rl.loop import train

    print_summary(train(compose(arguments.overrides, arguments.config_dir)))
    return 0


def _sweep(arguments: argparse.Namespace) -> int:
    from conf.sweep import read_sweep
    from rl.sweeps.record import Status
    from rl.sweeps.run import run_sweep

    sweep = read_sweep(arguments.overrides, arguments.config_dir)
    try:
        record = run_sweep(sweep, warn)
    except KeyboardInterrupt:
        say(f"stopped. The same command goes on with the sweep in {sweep.folder}.", YELLOW)
        return INTERRUPTED
    failed = record.count(Status.failed)
    if failed:
        say(
            f"{failed} of {len(record.members)} members failed. Their logs: {record.path}/MEMBER/logs/train.log. The "
            f"same command with sweep.retry_failed=true tries them again.",
            YELLOW,
        )
    print_lines([f"compare: grove compare {record.path}"])
    return ERROR if failed else 0
