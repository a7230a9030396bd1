"""grove eval"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from conf.errors import ConfigError
from rl.commands.shared import Commands, add_command, add_settings, count

ABOUT = """\
Measures success on held-out prompts, with intervals over prompts. With several samples of each prompt also pass@k (one
of k is right), pass^k (all of k are), the majority's answer and, with --score, the best of k and a weighted vote. Ends
with what differences such an evaluation can tell from chance. Samples whose outcome nobody knows are counted apart.
"""

EXAMPLES = """\
examples:
  grove eval runs/hop_search-seed0                       the newest checkpoint, on run.eval_prompts held-out prompts
  grove eval runs/hop_search-seed0 --prompts 512 --samples 8
  grove eval runs/hop_search-seed0 --greedy
  grove eval runs/hop_search-seed0 --samples 8 --k 1,4,8 --score progress run.eval_score_fold=mean
  grove eval runs/hop_search-seed0 --json > eval.json
  grove eval models/mine task=gsm8k rewards=gsm8k task.eval.path=test.jsonl   a model that no run of Grove made
  grove eval runs/a/checkpoints/step_000060/model --config-dir conf task=mine       a run's model on another task
"""


def add(commands: Commands) -> None:
    """Declare the command."""
    summary = "measure held-out success of a run or a model"
    parser = add_command(commands, "eval", _evaluate, summary=summary, about=ABOUT, examples=EXAMPLES)
    parser.add_argument("path", metavar="RUN_OR_MODEL", help="a run's folder, or a Hugging Face checkpoint's")
    parser.add_argument("--prompts", type=count, metavar="N", help="held-out prompts (run.eval_prompts)")
    parser.add_argument("--samples", type=count, metavar="N", help="trajectories of each prompt (run.eval_samples)")
    parser.add_argument("--k", metavar="1,4,8", help="of pass@k, pass^k and best of k (run.eval_k)")
    parser.add_argument("--score", metavar="SOURCE", help="what best of k goes by (run.eval_score)")
    heat = parser.add_mutually_exclusive_group()
    heat.add_argument("--temperature", type=float, metavar="T", help="sampling temperature (run.eval_temperature)")
    heat.add_argument("--greedy", action="store_true", help="always the likeliest token, one sample")
    parser.add_argument("--out", default="", metavar="FILE", help="what each prompt came to, as JSON lines")
    parser.add_argument("--json", action="store_true", help="print all numbers as one JSON object")
    add_settings(parser, "settings to change")


def _evaluate(arguments: argparse.Namespace) -> int:
    if not Path(arguments.path).is_dir():
        raise ConfigError(
            f"there is no folder \"{arguments.path}\" to evaluate: give a run's folder or a checkpoint's."
        )
    from rl.evaluate import evaluate_run, evaluation_json

    done = evaluate_run(
        arguments.path, [*arguments.overrides, *options(arguments)], arguments.out, arguments.config_dir
    )
    if arguments.json:
        json.dump(evaluation_json(done), sys.stdout, indent=2)
        print()
        return 0
    from rich import print as print_rich

    from rl.evaluate_table import evaluation_table

    print_rich(evaluation_table(done))
    return 0


def options(arguments: argparse.Namespace) -> list[str]:
    """The command's options as the settings that they stand for."""
    given = {
        "run.eval_prompts": arguments.prompts,
        "run.eval_samples": 1 if arguments.greedy and not arguments.samples else arguments.samples,
        "run.eval_k": "[]" if arguments.greedy and arguments.k is None else arguments.k and f"[{arguments.k}]",
        "run.eval_score": arguments.score,
        "run.eval_temperature": 0 if arguments.greedy else arguments.temperature,
    }
    return [f"{key}={value}" for key, value in given.items() if value is not None]
