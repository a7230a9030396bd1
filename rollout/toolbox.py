"""The tools of a task: its functions, run here or in processes of their own, and those of its MCP servers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from conf.errors import ConfigError
from conf.schema import TaskConfig, ToolSandbox
from rollout.apart import Apart, Bounds
from rollout.mcp_tools import server_tools
from rollout.tools import Tool, load_tools, run_apart

SHIPPED = "rollout.envs."
"""Modules whose tools need no process: they keep their own limits."""


def task_tools(task: TaskConfig) -> dict[str, Tool]:
    """Every tool of the task, by name.

    Raises: ConfigError for a function that cannot be loaded or described, a server that cannot be asked, or a name used
        twice.
    """
    tools = load_tools(task.tools, task)
    if task.tool_sandbox is ToolSandbox.process:
        tools = _in_processes(tools, task)
    offered = server_tools(task.mcp_servers) if task.mcp_servers else {}
    for name in tools.keys() & offered.keys():
        raise ConfigError(
            f"a tool called {name} is named by task.tools and offered by an MCP server, and the policy calls tools by "
            "name. Rename the function, or choose the server's tools with task.mcp_servers.NAME.tools."
        )
    return tools | offered


def _in_processes(tools: dict[str, Tool], task: TaskConfig) -> dict[str, Tool]:
    apart = Apart(
        task.tool_processes, Bounds(memory_mib=task.tool_memory_limit_mib, pass_env=tuple(task.tool_pass_env))
    )
    return {
        tool.name: tool if spec.startswith(SHIPPED) else replace(tool, runner=_runner(apart, _from_anywhere(spec)))
        for spec, tool in zip(task.tools, tools.values(), strict=True)
    }


def _runner(apart: Apart, spec: str) -> Callable[[dict[str, Any], float], Awaitable[Any]]:
    async def run(arguments: dict[str, Any], timeout_s: float) -> Any:
        call = partial(apart.call, spec)
        return await run_apart(call, {"arguments": arguments, "timeout_s": timeout_s})

    return run


def _from_anywhere(spec: str) -> str:
    """A file by its full path: calls begin in folders of their own."""
    place, colon, name = spec.rpartition(":")
    return f"{Path(place).expanduser().resolve()}:{name}" if colon and place.endswith(".py") else spec
