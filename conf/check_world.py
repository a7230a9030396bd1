"""Rules about worlds: who answers a turn, and what a generated world needs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from conf.problem import Problem
from conf.schema import Config, ToolFormat

WORLD_OF = {
    "textworld": "rollout.envs.textworld:TextWorld",
    "reasoning_gym": "rollout.envs.reasoning_gym:ReasoningGym",
    "verifiers": "rollout.envs.verifiers:VerifiersWorld",
}
"""Generators whose questions only their own world can answer."""
PACKAGE_OF = {"textworld": "textworld", "reasoning_gym": "reasoning_gym", "verifiers": "verifiers"}


def rules() -> list[Callable[[Config], list[Problem]]]:
    """Every rule of this module."""
    return [one_answers_a_turn, generator_has_its_world, package_is_installed, taskset_is_named]


def one_answers_a_turn(cfg: Config) -> list[Problem]:
    """Tools or a world, not both; and a world reads free text."""
    task, found = cfg.task, []
    if task.world.fn and task.tools:
        found.append(
            Problem(
                f'task.world.fn="{task.world.fn}" and task.tools={task.tools}: a turn is answered by a world or by '
                "tools, and the tools would never be called. Leave one of the two out."
            )
        )
    if task.world.fn and task.tool_format is ToolFormat.words:
        found.append(
            Problem(
                "task.tool_format=words ends a turn at </call> or </answer>, which no world reads. Use "
                "task.tool_format=hermes with task.world.fn."
            )
        )
    return found


def generator_has_its_world(cfg: Config) -> list[Problem]:
    """Questions of a generated world go with it."""
    wanted = WORLD_OF.get(cfg.task.generator, "")
    if not wanted or cfg.task.world.fn:
        return []
    return [
        Problem(
            f"task.generator={cfg.task.generator}, but task.world.fn is empty: nobody would answer the policy's turns. "
            f"Use task={cfg.task.generator}, or task.world.fn={wanted}."
        )
    ]


def package_is_installed(cfg: Config) -> list[Problem]:
    """Optional packages are looked for before a run starts."""
    package = PACKAGE_OF.get(cfg.task.generator, "")
    if not package or importlib.util.find_spec(package) is not None:
        return []
    return [
        Problem(
            f'task.generator={cfg.task.generator} needs the package "{package}", which is not installed: pip install '
            "--no-deps -r requirements/envs.txt."
        )
    ]


def taskset_is_named(cfg: Config) -> list[Problem]:
    """verifiers: the taskset is the user's."""
    if cfg.task.generator != "verifiers" or cfg.task.verifiers.taskset:
        return []
    return [
        Problem(
            "task.verifiers.taskset is empty, so there are no tasks. Name a taskset's class, e.g. "
            "task.verifiers.taskset=my_taskset.py:MyTaskset."
        )
    ]
