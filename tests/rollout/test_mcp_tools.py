"""Tools of MCP servers: what the policy is told of them, what they see of us, and what a dead one costs."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from conf.errors import ConfigError
from conf.schema import McpServerConfig, TaskConfig
from rollout import mcp_tools
from rollout.toolbox import task_tools
from rollout.tools import Tool, ToolOutcome, ToolReply

pytest.importorskip("mcp", reason="needs the extra mcp: requirements/envs.txt")
pytestmark = pytest.mark.slow  # each starts a server
SERVER = [sys.executable, str(Path(__file__).with_name("mcp_server.py"))]


def tools(**settings: Any) -> dict[str, Tool]:
    return task_tools(TaskConfig(mcp_servers={"tiny": McpServerConfig(**{"command": SERVER} | settings)}))


def call(tool: Tool, timeout_s: float = 20.0, **arguments: Any) -> ToolReply:
    return asyncio.run(tool.call(arguments, {}, timeout_s))


def test_tools_are_listed_with_their_schemas_and_called(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JUDGE_API_KEY", "hush")
    found = tools(env={"MINE": "1"})
    assert list(found) == ["add", "environment", "pid", "fail", "die", "hang"]
    add = found["add"]
    assert add.schema["function"]["description"] == "Add two numbers."
    assert (add.parameters["a"]["type"], add.required) == ("integer", ["a"])
    assert call(add, a=1, b=2) == ToolReply(ToolOutcome.returned, "3")
    assert call(add, a=1) == ToolReply(ToolOutcome.returned, "2")
    assert call(add, c=1).text == 'add has no argument "c", it takes a, b'
    assert call(add, a="one").text == 'add: "a" must be integer, not "one"'
    names = call(found["environment"]).text.split()
    assert "MINE" in names and "PATH" in names and "JUDGE_API_KEY" not in names
    reply = call(found["fail"], why="no such page")
    assert reply.outcome is ToolOutcome.refused and "no such page" in reply.text


def test_a_server_that_dies_crashes_its_call_and_is_started_again():
    found = tools()
    first = call(found["pid"]).text
    assert call(found["pid"]).text == first  # one server, asked again
    reply = call(found["die"])
    assert reply.outcome is ToolOutcome.crashed and reply.text.startswith("die ")
    second = call(found["pid"])
    assert second.outcome is ToolOutcome.returned and second.text != first


def test_a_server_that_hangs_is_killed_and_started_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mcp_tools, "PING_TIMEOUT_S", 1.0)
    found = tools()
    started = time.monotonic()
    assert call(found["hang"], 1.0) == ToolReply(ToolOutcome.crashed, "hang did not return within 1 s")
    assert time.monotonic() - started < 20
    assert call(found["add"], a=1).text == "2"


def test_a_server_that_runs_already_is_asked_at_its_address():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    here = {"command": [], "url": f"http://127.0.0.1:{port}/mcp"}
    with pytest.raises(ConfigError, match=rf"task.mcp_servers.tiny \(http://127.0.0.1:{port}/mcp\): the server "):
        tools(**here, start_timeout_s=5.0)
    with subprocess.Popen([*SERVER, str(port)], stderr=subprocess.DEVNULL) as process:
        try:
            wait_for(port)
            found = tools(**here)
            assert call(found["add"], a=1, b=2).text == "3"
        finally:
            process.kill()
    assert call(found["add"], 5.0, a=1).outcome is ToolOutcome.crashed


def wait_for(port: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise TimeoutError("the server does not listen")


def test_a_choice_of_tools(tmp_path: Path):
    assert list(tools(tools=["pid", "add"])) == ["pid", "add"]
    with pytest.raises(ConfigError, match=r'task.mcp_servers.tiny.tools names "ad", but the server has add, env'):
        tools(tools=["ad"])
    both = {"one": McpServerConfig(command=SERVER), "two": McpServerConfig(command=SERVER)}
    with pytest.raises(ConfigError, match=r"task.mcp_servers.two has a tool called add, and so has another server"):
        task_tools(TaskConfig(mcp_servers=both))
    mine = tmp_path / "mine.py"
    mine.write_text('def add() -> str:\n    """Add."""\n    return ""\n')
    with pytest.raises(ConfigError, match=r"a tool called add is named by task.tools and offered by an MCP server"):
        task_tools(TaskConfig(tools=[f"{mine}:add"], mcp_servers={"one": McpServerConfig(command=SERVER)}))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ["no-such-program"],
            r"task.mcp_servers.tiny \(no-such-program\): the server did not start: FileNotFoundError",
        ),
        ([sys.executable, "-c", "raise SystemExit(3)"], r"the server did not start"),
        (["sleep", "60"], r"the server was not there within 2 s"),
    ],
)
def test_a_server_that_does_not_start_is_told_before_the_run(command: list[str], message: str):
    started = time.monotonic()
    with pytest.raises(ConfigError, match=message):
        tools(command=command, start_timeout_s=2.0)
    assert time.monotonic() - started < 15
