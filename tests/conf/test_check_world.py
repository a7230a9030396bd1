"""Rules about worlds."""

from __future__ import annotations

import pytest

from conf import check_world
from conf.schema import Config, TaskConfig, ToolFormat, WorldConfig


def texts(task: TaskConfig) -> str:
    return "\n".join(problem.text for rule in check_world.rules() for problem in rule(Config(task=task)))


@pytest.mark.parametrize(
    ("task", "text"),
    [
        (TaskConfig(world=WorldConfig(fn="a:B"), tools=["c:d"]), "the tools would never be called"),
        (TaskConfig(world=WorldConfig(fn="a:B"), tool_format=ToolFormat.words), "which no world reads"),
        (TaskConfig(generator="textworld"), "Use task=textworld, or task.world.fn=rollout.envs.textworld:TextWorld"),
        (TaskConfig(generator="verifiers", world=WorldConfig(fn="a:B")), "task.verifiers.taskset is empty"),
    ],
)
def test_what_cannot_work_is_told(task: TaskConfig, text: str):
    assert text in texts(task)


def test_a_package_that_is_missing_is_told_before_the_run(monkeypatch: pytest.MonkeyPatch):
    task = TaskConfig(generator="textworld", world=WorldConfig(fn="a:B"))
    monkeypatch.setitem(check_world.PACKAGE_OF, "textworld", "no_such_package")
    assert 'needs the package "no_such_package", which is not installed' in texts(task)


def test_a_chat_with_tools_and_a_world_alone_are_fine():
    assert texts(TaskConfig(tools=["a:b"])) == texts(TaskConfig(world=WorldConfig(fn="a:B"))) == ""
