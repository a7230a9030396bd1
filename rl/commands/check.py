"""grove check"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from conf.check_machine import num_cores
from rl.commands.shared import (
    GREEN,
    PLAIN,
    RED,
    YELLOW,
    Commands,
    add_command,
    add_settings,
    count,
    print_lines,
    say,
    warn,
)
from rl.dry_run.machines import DEFAULT, Machines

if TYPE_CHECKING:
    from rl.dry_run.found import Stage

COLORS = {"error": RED, "warning": YELLOW, "note": PLAIN}

CHECK = """\
Tries a run before it costs anything: composes and checks the settings, then takes one whole step on this machine's CPU
with a tiny model of the same architecture and vocabulary: your data, tools and rewards, the step's credit and update, a
checkpoint, and going on from it. Ends with a plan of the run, and refuses settings that do nothing.

Nothing is written outside of a temporary folder, and no cluster and no tracker is asked. Models at endpoints that
rewards ask get a handful of requests about one short tree (--no-judges: none).
"""

CHECK_EXAMPLES = """\
examples:
  grove check experiment=hop_search
  grove check experiment=gsm8k task.train.path=train.jsonl task.eval.path=test.jsonl
  grove check experiment=gsm8k task.train.path=train.jsonl task.eval.path=test.jsonl --nodes 2 --gpus 8 --gpu-gib 80
  grove check experiment=hop_search rollout.num_trees=4  refused: the expander of this run has no use for it
  grove check experiment=hop_search --json | jq .memory
"""


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "check",
        _check,
        summary="try one step of a run, small, before it costs anything",
        about=CHECK,
        examples=CHECK_EXAMPLES,
    )
    add_settings(parser)
    parser.add_argument("--json", action="store_true", help="the result as JSON on standard output")
    parser.add_argument("--no-judges", action="store_true", help="ask no model at an endpoint")
    parser.add_argument("--nodes", type=count, metavar="N", help="plan for N machines instead of this one ...")
    parser.add_argument("--gpus", type=int, metavar="N", help="... with N GPUs each")
    parser.add_argument("--cores", type=count, default=num_cores(), metavar="N", help="... and N cores each")
    parser.add_argument("--gpu-gib", type=float, default=0.0, metavar="G", help="memory of one GPU, for the plan")


def _check(arguments: argparse.Namespace) -> int:
    from conf.checks import require_runnable
    from conf.compose import compose
    from conf.settle import settled

    cfg = compose(arguments.overrides, arguments.config_dir)
    machines = None
    if arguments.nodes is not None or arguments.gpus is not None:
        machines = Machines(arguments.nodes or 1, arguments.gpus or 0, arguments.cores)
    require_runnable(settled(cfg), warn=warn, elsewhere=machines is not None)
    from rl.dry_run.check import check_run
    from rl.dry_run.plan import as_json, memory_lines, token_lines

    found = check_run(
        cfg, _tell, asks_judges=not arguments.no_judges, machines=machines, gpu_bytes=int(arguments.gpu_gib * 2**30)
    )
    if arguments.json:
        print_lines([json.dumps(as_json(found), indent=2)])
    else:
        _print_section("the run's processes", found.places.splitlines())
        _print_section("memory of a process", memory_lines(found.memory))
        _print_section("tokens of a step, at most", token_lines(found.tokens))
        theirs = {key: values for key, values in found.replaced.items() if values[0] != DEFAULT}
        _print_section("smaller here", [f"{key}={run}: {dry}" for key, (run, dry) in theirs.items()])
    for finding in found.findings:
        say(f"{finding.weight.value}: {finding.text}", COLORS[finding.weight.value])
    say(*(("passed", GREEN) if found.passed else ("not passed", RED)))
    return 0 if found.passed else 2 if found.is_refused else 1


def _tell(stage: Stage) -> None:
    text = f"{stage.name:<22} {stage.seconds:6.1f} s  {stage.detail}".rstrip()
    say(text if stage.passed else f"{text} FAILED", PLAIN if stage.passed else RED)


def _print_section(title: str, lines: list[str]) -> None:
    if lines:
        print_lines(["", title, *(f"  {line}" for line in lines)])
