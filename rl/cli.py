"""The command line. Torch, Ray and the engines are imported only once the configuration has proved sound."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from importlib import metadata
from pathlib import Path

from conf.errors import ConfigError, GroveError, WaitTimeout, WorkerLost
from rl.commands import (
    check,
    check_reward,
    compare,
    completion,
    config,
    evaluate,
    export,
    jobs,
    launch,
    logs,
    new,
    replay,
    report,
    rollout,
    stop,
    train,
)
from rl.commands.shared import RED, YELLOW, print_lines, say
from rl.completion import SETTINGS, candidates
from rl.exit_codes import ERROR, INTERRUPTED, LOST, REFUSED, TOLD
from rollout.process import collect_seldom

COMMANDS = (
    train,
    check,
    launch,
    jobs,
    logs,
    stop,
    evaluate,
    rollout,
    report,
    compare,
    replay,
    export,
    check_reward,
    new,
    config,
    completion,
)
"""In the order of the help."""

ABOUT = """\
Train language-model agents by reinforcement learning, with rewards for single steps, on trees of trajectories.

A run is described by settings: `group=choice` takes a whole YAML file, `key=value` changes one setting.
"""

EXAMPLES = """\
examples:
  grove train experiment=hop_search                      the demo: a tiny model learns to search, on two cores
  grove train experiment=hop_search seed=1 rollout=chains credit=grpo
  grove train experiment=hop_search run.resume=true      continue where it stopped
  grove check experiment=hop_search                      one step of it, small, and a plan: before it costs anything
  grove train rewards.sources.mine.fn=my_rewards.py:polite credit=tree_step
  grove launch local experiment=hop_search               the same in the background; also on Ray, Slurm, Kubernetes
  grove jobs                                             how launched runs are doing
  grove eval runs/hop_search-seed0 --prompts 512         held-out success of a run's newest checkpoint
  grove report runs/hop_search-seed0                     curve.png and report.html once more
  grove train -m experiment=hop_search seed=1,2,3        a sweep: one run for each seed
  grove compare runs/sweeps/hop_search-seed              is one better, or is it luck?
  grove replay runs/hop_search-seed0 credit=grpo         what other credit would have made of the run's trees
  grove export runs/hop_search-seed0 searcher --best     its best model as a folder for the Hugging Face hub
  grove new reward brevity                               a file to start a reward from, and its test
  grove new reward neater --level pair --model           one that lets a model compare two steps
  grove check-reward brevity.py:brevity                  is it fit for a run? tried on recorded trees
  grove config experiment=hop_search                     every setting of that run
  grove config --keys rollout                            what can be set, with types, defaults and meaning
  source <(grove completion bash)                        Tab completes commands, keys and choices
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Returns: 0, or what `rl.exit_codes` names.
    """
    collect_seldom()
    words = sys.argv[1:] if argv is None else argv
    is_supervised = words[:1] == [train.TRAIN_HERE]
    try:
        return _run(words)
    except GroveError as error:
        say(f"error: {error}", RED)
        return _exit_code(error, is_supervised)
    except KeyboardInterrupt:
        say("stopped. The same command with run.resume=true continues a training run.", YELLOW)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader, e.g. `head`, has seen enough; without this Python complains once more while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return TOLD if is_supervised else ERROR
    except Exception:
        if not is_supervised:
            raise
        traceback.print_exc()  # a bug: Python's own exit code is the one that means something else here
        return TOLD


def _exit_code(error: GroveError, is_supervised: bool) -> int:
    if isinstance(error, ConfigError):
        return REFUSED
    if isinstance(error, (WorkerLost, WaitTimeout)):
        return LOST
    return TOLD if is_supervised else ERROR


def _run(words: list[str]) -> int:
    if words[:1] == ["__complete"]:
        print_lines(candidates(words[1:], grove_parser()))
        return 0
    parser = grove_parser()
    is_supervised = words[:1] == [train.TRAIN_HERE]
    arguments, more = parser.parse_known_args(["train", *words[1:]] if is_supervised else words)
    wrong = [word for word in more if word.startswith("-") or SETTINGS not in arguments]
    if wrong:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if SETTINGS in arguments:
        arguments.overrides += more  # settings that follow an option
    if arguments.command is None:
        parser.print_help()
        return 0
    _find_packages_here()
    return train.train_here(arguments) if is_supervised else arguments.run(arguments)


def _find_packages_here() -> None:
    """Let a config name modules of the folder one works in; at the end, so that they hide no installed package."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)


def grove_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="grove",
        description=ABOUT,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"grove {metadata.version('grove-rl')}")
    commands = parser.add_subparsers(dest="command", metavar="command")
    for command in COMMANDS:
        command.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
