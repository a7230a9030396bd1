from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conf import check_task
from conf.schema import (
    Config,
    CorpusConfig,
    McpServerConfig,
    PythonToolConfig,
    TaskConfig,
    ToolFormat,
    ToolSandbox,
    WorldConfig,
)


def problems(**task: Any) -> list[str]:
    cfg = Config(task=TaskConfig(**task))
    return [problem.text for rule in check_task.rules() for problem in rule(cfg)]


def test_the_defaults_are_fine():
    assert problems() == []
    assert problems(tools=[check_task.PYTHON]) == []


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"tool_processes": 0}, "task.tool_processes=0 cannot be: it must be 1 or more."),
        ({"tool_memory_limit_mib": -1}, "task.tool_memory_limit_mib=-1 cannot be: it must be 0 or more."),
        ({"python": PythonToolConfig(cpu_s=0)}, "task.python.cpu_s=0 cannot be: it must be above 0."),
        ({"corpus": CorpusConfig(b=1.5)}, "task.corpus.b=1.5 cannot be: it must be from 0 to 1."),
        (
            {"tool_sandbox": ToolSandbox.process, "tool_memory_limit_mib": 8},
            "task.tool_memory_limit_mib=8 is less than Python itself takes",
        ),
        (
            {"world": WorldConfig(fn="a:B", num_processes=1, memory_limit_mib=8)},
            "task.world.memory_limit_mib=8 is less than Python itself takes: no world could run",
        ),
        (
            {"tools": [check_task.PYTHON], "tool_timeout_s": 5.0},
            "task.python.wall_s=8 is not below task.tool_timeout_s=5",
        ),
        ({"tools": [check_task.PYTHON], "tool_format": ToolFormat.words}, "task.tool_format=words splits a call"),
        ({"tools": [check_task.SEARCH]}, "task.corpus.path is empty: there is nothing to search"),
        (
            {"tools": [check_task.SEARCH], "corpus": CorpusConfig(path="nowhere.jsonl")},
            'there is no file "nowhere.jsonl"',
        ),
        ({"corpus": CorpusConfig(path="passages.jsonl")}, "is never searched, as task.tools does not name"),
        ({"mcp_servers": {"wiki": McpServerConfig()}}, "task.mcp_servers.wiki has neither a command nor a url"),
        (
            {"mcp_servers": {"wiki": McpServerConfig(command=["a"], url="http://b")}},
            "task.mcp_servers.wiki has both a command and a url",
        ),
        (
            {"mcp_servers": {"wiki": McpServerConfig(env={"A": "1"}, url="http://b")}},
            "task.mcp_servers.wiki.env is of no use",
        ),
        (
            {"mcp_servers": {"wiki": McpServerConfig(command=["a"], start_timeout_s=0)}},
            "task.mcp_servers.wiki.start_timeout_s=0 cannot be",
        ),
    ],
)
def test_what_cannot_run_is_told_with_what_to_do(task: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(check_task.importlib.util, "find_spec", lambda name: object())
    (told,) = problems(**task)
    assert message in told


def test_servers_need_the_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(check_task.importlib.util, "find_spec", lambda name: None)
    (told,) = problems(mcp_servers={"wiki": McpServerConfig(command=["a"])})
    assert told == 'task.mcp_servers needs the package mcp: pip install "grove-rl[mcp]", or take wiki out.'


def test_the_names_of_shipped_tools_are_those_they_have(tmp_path: Path):
    from rollout.envs import python_tool, retrieval

    assert (check_task.PYTHON, check_task.SEARCH) == (python_tool.NAME, retrieval.NAME)
    (tmp_path / "passages.jsonl").write_text("{}")
    assert problems(tools=[retrieval.NAME], corpus=CorpusConfig(path=str(tmp_path / "passages.jsonl"))) == []
