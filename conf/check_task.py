"""Rules about a task's tools: do their limits leave them room, and is what they need there?"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from conf.problem import Problem, value_of
from conf.schema import Config, ToolFormat, ToolSandbox

PYTHON = "rollout.envs.python_tool:python"
SEARCH = "rollout.envs.retrieval:search"
AT_LEAST_ONE = (
    "task.tool_processes",
    "task.python.memory_mib",
    "task.python.disk_mib",
    "task.python.max_output_chars",
    "task.corpus.top_k",
    "task.corpus.max_passage_chars",
)
ABOVE_ZERO = ("task.python.cpu_s", "task.python.wall_s")
NOT_NEGATIVE = ("task.tool_memory_limit_mib", "task.corpus.k1")
LEAST_MEMORY_MIB = 64
"""Python itself takes some tens of MiB."""


def rules() -> list[Callable[[Config], list[Problem]]]:
    """Every rule of this module."""
    return [
        numbers_of_tools,
        processes_have_memory,
        programs_end_before_the_call,
        corpus_is_there,
        servers_can_be_reached,
        words_are_no_programs,
    ]


def numbers_of_tools(cfg: Config) -> list[Problem]:
    """Counts, sizes and times."""
    found = []
    for keys, is_right, wanted in (
        (AT_LEAST_ONE, lambda value: value >= 1, "1 or more"),
        (ABOVE_ZERO, lambda value: value > 0, "above 0"),
        (NOT_NEGATIVE, lambda value: value >= 0, "0 or more"),
        (("task.corpus.b",), lambda value: 0 <= value <= 1, "from 0 to 1"),
    ):
        for key in keys:
            value = value_of(cfg, key)
            if not is_right(value):
                found.append(Problem(f"{key}={value} cannot be: it must be {wanted}."))
    return found


def processes_have_memory(cfg: Config) -> list[Problem]:
    """A limit below what an empty interpreter takes ends every call."""
    limits = {}
    if cfg.task.tool_sandbox is ToolSandbox.process:
        limits["task.tool_memory_limit_mib"] = (cfg.task.tool_memory_limit_mib, "tool")
    if cfg.task.world.num_processes:
        limits["task.world.memory_limit_mib"] = (cfg.task.world.memory_limit_mib, "world")
    return [
        Problem(
            f"{key}={limit} is less than Python itself takes: no {what} could run. Use {key}={LEAST_MEMORY_MIB} or "
            "more, or 0 for no limit."
        )
        for key, (limit, what) in limits.items()
        if 0 < limit < LEAST_MEMORY_MIB
    ]


def programs_end_before_the_call(cfg: Config) -> list[Problem]:
    """A program over its own limit is told to the policy; a call over the tool's limit is lost."""
    wall_s, limit_s = cfg.task.python.wall_s, cfg.task.tool_timeout_s
    if PYTHON not in cfg.task.tools or wall_s < limit_s:
        return []
    return [
        Problem(
            f"task.python.wall_s={wall_s:g} is not below task.tool_timeout_s={limit_s:g}: a program that runs too long "
            "would count as a crash of the tool and its trajectory train nothing, where the policy should be told. Use "
            f"task.tool_timeout_s={wall_s + 10:g}."
        )
    ]


def corpus_is_there(cfg: Config) -> list[Problem]:
    """What is searched is a file of the user's."""
    path = cfg.task.corpus.path
    if SEARCH not in cfg.task.tools:
        return [
            Problem(
                f'task.corpus.path="{path}" is never searched, as task.tools does not name {SEARCH}. Add it, or leave '
                "the corpus out.",
                fatal=False,
            )
        ] * bool(path)
    if not path:
        return [
            Problem(
                f"task.tools names {SEARCH}, but task.corpus.path is empty: there is nothing to search. Give "
                "task.corpus.path=passages.jsonl, with one passage in each line."
            )
        ]
    if Path(path).expanduser().is_file():
        return []
    return [
        Problem(
            f'task.corpus.path: there is no file "{path}". Give a .jsonl file, relative to the folder you start in.'
        )
    ]


def servers_can_be_reached(cfg: Config) -> list[Problem]:
    """A server is started by a command or runs at an address, and the package that talks to it is there."""
    servers, found = cfg.task.mcp_servers, []
    if servers and importlib.util.find_spec("mcp") is None:
        found.append(
            Problem(
                'task.mcp_servers needs the package mcp: pip install "grove-rl[mcp]", or take '
                f"{', '.join(servers)} out."
            )
        )
    for name, server in servers.items():
        key = f"task.mcp_servers.{name}"
        if bool(server.command) == bool(server.url):
            has = "both a command and a url" if server.url else "neither a command nor a url"
            found.append(
                Problem(
                    f"{key} has {has}: a server is started by the one or runs at the other. Give e.g. "
                    f"{key}.command=[python,my_server.py]."
                )
            )
        if server.url and server.env:
            found.append(Problem(f"{key}.env is of no use to a server that runs already at {server.url}: take it out."))
        if not server.start_timeout_s > 0:
            found.append(Problem(f"{key}.start_timeout_s={server.start_timeout_s} cannot be: it must be above 0."))
    return found


def words_are_no_programs(cfg: Config) -> list[Problem]:
    """Programs need quotes, brackets and line ends, which a word-level vocabulary does not have."""
    if cfg.task.tool_format is not ToolFormat.words or PYTHON not in cfg.task.tools:
        return []
    return [
        Problem(
            f"task.tool_format=words splits a call into words, and {PYTHON} takes programs, whose line ends would be "
            "lost. Use task.tool_format=hermes or llama."
        )
    ]
