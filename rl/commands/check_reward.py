"""grove check-reward"""

from __future__ import annotations

import argparse
from typing import Any

from conf.errors import ConfigError
from conf.subject import LEVELS
from rl.commands.shared import Commands, add_command

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


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "check-reward",
        _check_reward,
        summary="is a reward fit for a run?",
        about=CHECK_REWARD,
        examples=CHECK_REWARD_EXAMPLES,
    )
    parser.add_argument("fn", metavar="FILE:NAME", help="the function or class, as rewards.sources.NAME.fn")
    parser.add_argument("--trees", default="", metavar="RUN_OR_FILE", help="recorded trees (default: a sample)")
    parser.add_argument("--level", default="", choices=LEVELS, help="as rewards.sources.NAME.level")
    parser.add_argument(
        "--model", default="", metavar="SETTINGS", help="a served model for a function that asks for `model`"
    )
    parser.add_argument("--arg", action="append", default=[], metavar="NAME=VALUE", help="an argument of the function")
    parser.add_argument("--column", action="append", default=[], metavar="NAME=VALUE", help="a column of your data")
    parser.add_argument("--timeout", type=float, metavar="S", help="seconds for all scores of one tree")


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
