"""grove rollout"""

from __future__ import annotations

import argparse
from pathlib import Path

from rl.commands.shared import Commands, add_command, add_settings, count, print_summary, warn
from rl.completion import EXPORTS, FORMATS

ROLLOUT = """\
Grows trees by a policy, scores them with the configured rewards and records them, without training: data for process
reward models, preferences, or a closer look. Stopped half-way, the same command goes on. --export writes

  steps         a row for each step with all of its scores
  trajectories  prompt, completions, labels: what process reward models are trained on
  pairs         the best and the worst step of each fork by how their trajectories ended: prompt, chosen, rejected
"""

ROLLOUT_EXAMPLES = """\
examples:
  grove rollout data/hops experiment=hop_search --prompts 200 --export steps --export pairs --format parquet
  grove rollout data/gsm8k experiment=gsm8k model.path=models/mine task.train.path=train.jsonl --prompts 1000 \\
      --export trajectories
  grove check-reward my_rewards.py:brevity --trees data/hops
"""


def add(commands: Commands) -> None:
    """Declare the command."""
    summary = "grow and score trees without training"
    parser = add_command(commands, "rollout", _rollout, summary=summary, about=ROLLOUT, examples=ROLLOUT_EXAMPLES)
    parser.add_argument("out", metavar="OUT", help="folder to write to; one that was begun is finished")
    parser.add_argument("--prompts", type=count, required=True, metavar="N", help="prompts to grow a tree of")
    parser.add_argument("--held-out", action="store_true", help="prompts of the held-out data")
    parser.add_argument(
        "--export", action="append", default=[], choices=EXPORTS, help="write the trees as this too; repeatable"
    )
    parser.add_argument("--format", default="jsonl", choices=FORMATS, help="of exports (default: jsonl)")
    add_settings(parser)


def _rollout(arguments: argparse.Namespace) -> int:
    from conf.checks import require_runnable
    from conf.compose import compose

    out = Path(arguments.out)
    cfg = compose([*arguments.overrides, f"run.dir={out / 'unused'}"], arguments.config_dir)
    require_runnable(cfg, warn=warn)
    from rl.generate import generate

    held_out, exports, ending = arguments.held_out, arguments.export, arguments.format
    print_summary(generate(cfg, out, arguments.prompts, held_out=held_out, exports=exports, ending=ending))
    return 0
