"""The command line. Torch, Ray and the engines are imported only once the configuration has proved sound."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from conf.errors import ConfigError, GroveError
from conf.subject import LEVELS
from rl import completion

RED, YELLOW, PLAIN = "\033[31m", "\033[33m", "\033[0m"
INTERRUPTED = 130
"""Exit code of a process that Ctrl-C ended, as shells have it."""

ABOUT = """\
Train language-model agents by reinforcement learning, with rewards for single steps, on trees of trajectories.

A run is described by settings: `group=choice` takes a whole YAML file, `key=value` changes one setting.
"""

EXAMPLES = """\
examples:
  grove train experiment=hop_search                      the demo: a tiny model learns to search, on two cores
  grove train experiment=hop_search seed=1 rollout=chains credit=grpo
  grove train experiment=hop_search run.resume=true      continue where it stopped
  grove train rewards.sources.mine.fn=my_rewards.py:polite credit=tree_step
  grove eval runs/hop_search-seed0 --prompts 512         held-out success of a run's newest checkpoint
  grove report runs/hop_search-seed0                     curve.png and report.html once more
  grove replay runs/hop_search-seed0 credit=grpo         what other credit would have made of the run's trees
  grove new reward brevity                               a file to start a reward from, and its test
  grove new reward neater --level pair --model           one that lets a model compare two steps
  grove check-reward brevity.py:brevity                  is it fit for a run? tried on recorded trees
  grove config experiment=hop_search                     every setting of that run
  grove config --keys rollout                            what can be set, with types, defaults and meaning
  source <(grove completion bash)                        Tab completes commands, keys and choices
"""

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

EVALUATE_EXAMPLES = """\
examples:
  grove eval runs/hop_search-seed0                       the newest checkpoint, on run.eval_prompts held-out prompts
  grove eval runs/hop_search-seed0 --prompts 512
  grove eval runs/hop_search-seed0 rollout.num_workers=8
  grove eval models/mine task=gsm8k task.eval.path=test.jsonl                 a model that no run of Grove made
"""

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

REPORT_EXAMPLES = """\
examples:
  grove report runs/hop_search-seed0                     also while the run goes on
"""

CHECK_REWARD = """\
Tries a reward on recorded trees, in a process and under a deadline as a run would. Shows what one call is about,
whether all can be sent to that process and back, failures, range, named parts, determinism, time, what a model that it
asks costs, empty and endless steps, correlation with length and with the outcome. Ends with what to type to use it.
Exits with 1 where a run could not use it.

What a call is about follows from the arguments that the function asks for:
  step, siblings                         one step
  trajectory, facts, answer              one trajectory; one step with --level step
  step, other                            two steps tried at the same fork
  trajectory, other_trajectory           two trajectories of a prompt
  steps / trajectories                   all of a tree at once
  tree, with --level tree                a tree
A parameter of another name is filled by its annotation: Node, StepFacts, Tree or Prompt.
"""

CHECK_REWARD_EXAMPLES = """\
examples:
  grove check-reward my_rewards.py:brevity
  grove check-reward my_rewards.py:brevity --trees runs/hop_search-seed0      on the trees of a run of yours
  grove check-reward my_rewards.py:bonus --arg size=0.5 --column level=3
  grove check-reward my_rewards.py:majority --level tree
  grove check-reward my_rewards.py:judged --model '{url: http://127.0.0.1:8000/v1, path: the-model}'
  grove check-reward my_rewards.py:judged \\
      --model '{url: https://api.openai.com/v1, path: gpt-5-mini, api_key_env: OPENAI_API_KEY, timeout_s: 20}'
  grove check-reward rewards.sources.format:tool_success                      one that ships
"""

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

CONFIG_EXAMPLES = """\
examples:
  grove config experiment=hop_search > hop_search.yaml
  grove config experiment=hop_search rollout.num_workers=64 --check
  grove config --keys                                    every setting
  grove config --keys timeout num_leaves                 those that contain one of the words
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Returns: 0; 2 for a configuration that cannot run; 1 for what went wrong on the way; 130 after Ctrl-C.
    """
    words = sys.argv[1:] if argv is None else argv
    try:
        return _run(words)
    except GroveError as error:
        _say(f"error: {error}", RED)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        _say("stopped. The same command with run.resume=true continues a training run.", YELLOW)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader, e.g. `head`, has seen enough; without this Python complains once more while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(words: list[str]) -> int:
    if words[:1] == ["__complete"]:
        _print_lines(completion.candidates(words[1:]))
        return 0
    parser = _parser()
    arguments, more = parser.parse_known_args(words)
    wrong = [word for word in more if word.startswith("-") or "overrides" not in arguments]
    if wrong:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if "overrides" in arguments:
        arguments.overrides += more  # settings that follow an option
    if arguments.command is None:
        parser.print_help()
        return 0
    _find_packages_here()
    return arguments.run(arguments)


def _find_packages_here() -> None:
    """Let a config name modules of the folder one works in; at the end, so that they hide no installed package."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)


def _parser() -> argparse.ArgumentParser:
    look: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(prog="grove", description=ABOUT, epilog=EXAMPLES, **look)
    parser.add_argument("--version", action="version", version=f"grove {metadata.version('grove-rl')}")
    commands = parser.add_subparsers(dest="command", metavar="command")

    train = commands.add_parser("train", help="train a policy", description=TRAIN, epilog=TRAIN_EXAMPLES, **look)
    _add_settings(train)
    train.set_defaults(run=_train)

    evaluate = commands.add_parser(
        "eval", help="measure held-out success of a run or a model", epilog=EVALUATE_EXAMPLES, **look
    )
    evaluate.add_argument("path", metavar="RUN_OR_MODEL", help="a run's folder, or a Hugging Face checkpoint's")
    evaluate.add_argument("--prompts", type=_count, metavar="N", help="held-out prompts (default: run.eval_prompts)")
    evaluate.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    evaluate.set_defaults(run=_evaluate)

    rollout = commands.add_parser(
        "rollout", help="grow and score trees without training", description=ROLLOUT, epilog=ROLLOUT_EXAMPLES, **look
    )
    rollout.add_argument("out", metavar="OUT", help="folder to write to; one that was begun is finished")
    rollout.add_argument("--prompts", type=_count, required=True, metavar="N", help="prompts to grow a tree of")
    rollout.add_argument("--held-out", action="store_true", help="prompts of the held-out data")
    rollout.add_argument(
        "--export",
        action="append",
        default=[],
        choices=completion.EXPORTS,
        help="write the trees as this too; repeatable",
    )
    rollout.add_argument("--format", default="jsonl", choices=completion.FORMATS, help="of exports (default: jsonl)")
    _add_settings(rollout)
    rollout.set_defaults(run=_rollout)

    report = commands.add_parser(
        "report", help="write a run's curve and report once more", epilog=REPORT_EXAMPLES, **look
    )
    report.add_argument("path", metavar="RUN", help="the run's folder")
    report.set_defaults(run=_report)

    replay = commands.add_parser(
        "replay", help="other credit for a run's recorded trees", description=REPLAY, epilog=REPLAY_EXAMPLES, **look
    )
    replay.add_argument("path", metavar="RUN", help="the run's folder")
    replay.add_argument("--steps", default="", metavar="FIRST[:LAST]", help="recorded steps (default: all)")
    _add_settings(replay, "of rewards, select or credit")
    replay.set_defaults(run=_replay)

    check = commands.add_parser(
        "check-reward",
        help="is a reward fit for a run?",
        description=CHECK_REWARD,
        epilog=CHECK_REWARD_EXAMPLES,
        **look,
    )
    check.add_argument("fn", metavar="FILE:NAME", help="the function or class, as rewards.sources.NAME.fn")
    check.add_argument("--trees", default="", metavar="RUN_OR_FILE", help="recorded trees (default: a sample)")
    check.add_argument("--level", default="", choices=LEVELS, help="as rewards.sources.NAME.level")
    check.add_argument(
        "--model", default="", metavar="SETTINGS", help="a served model for a function that asks for `model`"
    )
    check.add_argument("--arg", action="append", default=[], metavar="NAME=VALUE", help="an argument of the function")
    check.add_argument("--column", action="append", default=[], metavar="NAME=VALUE", help="a column of your data")
    check.add_argument("--timeout", type=float, metavar="S", help="seconds for all scores of one tree")
    check.set_defaults(run=_check_reward)

    new = commands.add_parser("new", help="files to start from", description=NEW, epilog=NEW_EXAMPLES, **look)
    new.add_argument("what", choices=("reward",), help="what to start")
    new.add_argument("name", metavar="NAME", help="its name: a file NAME.py and a test are written here")
    new.add_argument("--level", default="step", choices=LEVELS, help="what it scores (default: step)")
    new.add_argument("--model", action="store_true", help="let a model judge")
    new.set_defaults(run=_new)

    config = commands.add_parser("config", help="show settings", epilog=CONFIG_EXAMPLES, **look)
    _add_settings(config)
    config.add_argument("--keys", action="store_true", help="list what can be set; words narrow the list")
    config.add_argument("--check", action="store_true", help="also run every check that `train` runs")
    config.set_defaults(run=_config)

    complete = commands.add_parser("completion", help="print a completion script for your shell", **look)
    complete.add_argument("shell", choices=completion.SHELLS)
    complete.set_defaults(run=_completion)
    return parser


def _add_settings(parser: argparse.ArgumentParser, what: str = "group=choice, key=value or ~key") -> None:
    parser.add_argument("overrides", nargs="*", metavar="setting", help=what)
    parser.add_argument("--config-dir", default="", metavar="DIR", help="folder of your own groups and experiments")


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is no number of prompts; give 1 or more")
    return number


def _train(arguments: argparse.Namespace) -> int:
    from conf.checks import require_runnable
    from conf.compose import compose

    cfg = compose(arguments.overrides, arguments.config_dir)
    require_runnable(cfg, warn=_warn)
    from rl.loop import train

    _print_summary(train(cfg))
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    if not Path(arguments.path).is_dir():
        raise ConfigError(
            f"there is no folder \"{arguments.path}\" to evaluate: give a run's folder or a checkpoint's."
        )
    from rl.evaluate import evaluate_run

    _print_summary(evaluate_run(arguments.path, arguments.overrides, arguments.prompts))
    return 0


def _rollout(arguments: argparse.Namespace) -> int:
    from conf.checks import require_runnable
    from conf.compose import compose

    out = Path(arguments.out)
    cfg = compose([*arguments.overrides, f"run.dir={out / 'unused'}"], arguments.config_dir)
    require_runnable(cfg, warn=_warn)
    from rl.generate import generate

    held_out, exports, ending = arguments.held_out, arguments.export, arguments.format
    _print_summary(generate(cfg, out, arguments.prompts, held_out=held_out, exports=exports, ending=ending))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    folder = Path(arguments.path)
    if not folder.is_dir():
        raise ConfigError(f'there is no run folder "{folder}" to report on: runs lie under runs/, one folder each.')
    from rl.view import write_report

    print(write_report(folder))
    return 0


def _replay(arguments: argparse.Namespace) -> int:
    folder = Path(arguments.path)
    if not folder.is_dir():
        raise ConfigError(f'there is no run folder "{folder}" to replay: runs lie under runs/, one folder each.')
    from rich import print as print_rich

    from rl.replay import replay_run
    from rl.replay_page import replay_table, write_replay

    replay = replay_run(folder, arguments.overrides, arguments.steps, _warn, arguments.config_dir)
    print_rich(replay_table(replay))
    print(write_replay(replay))
    return 0


def _check_reward(arguments: argparse.Namespace) -> int:
    from rich import print as print_rich

    from conf.schema import SourceConfig
    from rl.check_reward import check_reward, check_table, model_of, recorded_trees_of

    check = check_reward(
        arguments.fn,
        recorded_trees_of(arguments.trees),
        args=_named_values("--arg", arguments.arg),
        columns=_named_values("--column", arguments.column),
        level=arguments.level,
        timeout_s=arguments.timeout or SourceConfig().timeout_s,
        model=model_of(arguments.model) if arguments.model else None,
    )
    print_rich(check_table(check))
    if check.passed:
        print(f"grove train experiment=hop_search {check.setting}")
    return 0 if check.passed else 1


def _named_values(option: str, texts: list[str]) -> dict[str, Any]:
    import yaml

    values: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ConfigError(f'{option} "{text}" names no value. Write {option} NAME=VALUE, e.g. {option} size=0.5.')
        values[name] = yaml.safe_load(value)
    return values


def _new(arguments: argparse.Namespace) -> int:
    from rl.scaffold import new_reward

    reward, test = new_reward(arguments.name, Path.cwd(), level=arguments.level, model=arguments.model)
    level = " --level tree" if arguments.level == "tree" else ""  # the other levels are read from the arguments
    model = " --model '{url: http://127.0.0.1:8000/v1, path: the-model}'" if arguments.model else ""
    _print_lines(
        [
            f"wrote {reward.name} and {test.name}; next:",
            f"  python -m pytest {test.name}",
            f"  grove check-reward {reward.name}:{arguments.name}{level}{model}",
        ]
    )
    return 0


def _config(arguments: argparse.Namespace) -> int:
    if arguments.keys:
        lines = _key_lines(arguments.overrides, arguments.config_dir)
        if not lines:
            raise ConfigError(f"no setting contains {' or '.join(arguments.overrides)}. All: grove config --keys")
        _print_lines(lines)
        return 0
    from conf.checks import require_runnable
    from conf.compose import compose, to_yaml

    cfg = compose(arguments.overrides, arguments.config_dir)
    if arguments.check:
        require_runnable(cfg, warn=_warn)
    sys.stdout.write(to_yaml(cfg))
    sys.stdout.flush()
    return 0


def _completion(arguments: argparse.Namespace) -> int:
    print(completion.script(arguments.shell), end="")
    return 0


def _key_lines(words: list[str], config_dir: str) -> list[str]:
    """Groups with their choices, then every setting whose name contains one of the words (all without words)."""
    from conf.keys import all_keys, group_choices, type_name

    lines = []
    for group, choices in group_choices(config_dir).items():
        if not words or group in words:
            lines.append(f"{group}={'|'.join(choices)}")
    for key in all_keys():
        if words and not any(word in key.name for word in words):
            continue
        lines.append(f"{key.name}: {type_name(key.kind)} = {key.default}")
        lines += [f"    {line}" for line in key.doc.splitlines()]
    return lines


def _print_summary(summary: Mapping[str, Any]) -> None:
    width = max(map(len, summary), default=0)
    for name, value in summary.items():
        print(f"{name:<{width}}  {_shown(value)}")


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(each)}" for name, each in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _print_lines(lines: list[str]) -> None:
    for line in lines:
        print(line)
    sys.stdout.flush()  # a closed pipe shows here, where it is caught


def _warn(text: str) -> None:
    _say(f"warning: {text}", YELLOW)


def _say(text: str, color: str) -> None:
    print(f"{color}{text}{PLAIN}" if _is_colored(sys.stderr) else text, file=sys.stderr)


def _is_colored(stream: TextIO) -> bool:
    return stream.isatty() and "NO_COLOR" not in os.environ


if __name__ == "__main__":
    sys.exit(main())
