"""Tools of MCP servers: listed with their schemas, called with a time limit, and a dead server made anew."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from typing import Any

from conf.errors import ConfigError, ToolError
from conf.schema import McpServerConfig
from rollout.apart import CallFailed
from rollout.tools import Tool, run_apart

PING_TIMEOUT_S = 5.0
"""A server that leaves a call unanswered and then this as well is taken for dead."""
CLOSE_TIMEOUT_S = 10.0
MARGIN_S = 1.0
INVALID_PARAMS = -32602
"""JSON-RPC: the arguments are wrong, which is the policy's to hear."""
NOT_INSTALLED = 'task.mcp_servers needs the package mcp: pip install "grove-rl[mcp]", or take the servers out.'


def server_tools(servers: Mapping[str, McpServerConfig]) -> dict[str, Tool]:
    """The tools of every server, by name; each server is started to be asked, and again at its first call.

    Raises: ConfigError for a server that cannot be started or asked, a tool it does not have, or a name used twice.
    """
    tools: dict[str, Tool] = {}
    for name, cfg in servers.items():
        server = Server(name, cfg)
        for schema in _chosen(server.listed(), name, cfg.tools):
            if schema["name"] in tools:
                raise ConfigError(
                    f"task.mcp_servers.{name} has a tool called {schema['name']}, and so has another server: the "
                    f"policy calls tools by name. Choose with task.mcp_servers.{name}.tools."
                )
            tools[schema["name"]] = _tool(server, schema)
    return tools


def _chosen(schemas: list[dict[str, Any]], name: str, wanted: Sequence[str]) -> list[dict[str, Any]]:
    found = {schema["name"]: schema for schema in schemas}
    missing = [each for each in wanted if each not in found]
    if missing:
        raise ConfigError(
            f'task.mcp_servers.{name}.tools names "{missing[0]}", but the server has {", ".join(found) or "no tools"}.'
        )
    return [found[each] for each in wanted] if wanted else schemas


def _tool(server: Server, schema: dict[str, Any]) -> Tool:
    async def run(arguments: dict[str, Any], timeout_s: float) -> str:
        asked = {"tool": schema["name"], "arguments": arguments, "timeout_s": timeout_s}
        return await run_apart(server.call, asked)

    def never() -> None:
        raise AssertionError("the server runs it")

    return Tool(
        name=schema["name"],
        schema={"type": "function", "function": schema},
        function=never,
        columns=(),
        optional_columns=frozenset(),
        runner=run,
    )


class Server:
    """One server and the connection to it, made when it is first needed and again after it was lost."""

    def __init__(self, name: str, cfg: McpServerConfig) -> None:
        self._name, self._cfg = name, cfg
        self._lock = threading.Lock()
        self._connections: list[_Connection] = []
        weakref.finalize(self, _close_all, self._connections)

    def listed(self) -> list[dict[str, Any]]:
        """Name, description and parameters of each of its tools; blocks.

        Raises: ConfigError when it does not start or answer.
        """
        connection = None
        try:
            connection = _Connection(self._cfg)
            return connection.ask(connection.listed(), self._cfg.start_timeout_s)
        except ImportError as error:
            raise ConfigError(NOT_INSTALLED) from error
        except CallFailed as error:
            raise ConfigError(
                f"task.mcp_servers.{self._name} ({_place(self._cfg)}): the server {error}, so its tools are not known. "
                "Start it by hand to see why; of our environment it sees HOME, PATH and the like, and what "
                f"task.mcp_servers.{self._name}.env gives it."
            ) from error
        finally:
            if connection is not None:
                connection.close()

    def call(self, tool: str, arguments: dict[str, Any], timeout_s: float) -> str:
        """Call a tool; blocks. Its time begins when the server is there.

        Raises: ToolError when the tool or the server refuses; CallFailed when it does not answer.
        """
        connection = self._connected()
        try:
            return connection.ask(connection.called(tool, arguments), timeout_s)
        except CallFailed:
            if not connection.answers():
                self._drop(connection)
            raise

    def close(self) -> None:
        """End the connection, and a server that we started."""
        _close_all(self._connections)

    def _connected(self) -> _Connection:
        with self._lock:
            if not self._connections:
                self._connections.append(_Connection(self._cfg))
            return self._connections[0]

    def _drop(self, connection: _Connection) -> None:
        with self._lock, suppress(ValueError):  # another call that failed with it was faster
            self._connections.remove(connection)
        connection.close()


def _place(cfg: McpServerConfig) -> str:
    return cfg.url or " ".join(cfg.command)


def _close_all(connections: list[_Connection]) -> None:
    while connections:
        connections.pop().close()


class _Connection:
    """A client and its event loop, in a thread of their own: the library wants one task to open and to close it."""

    def __init__(self, cfg: McpServerConfig) -> None:
        self._cfg = cfg
        self._loop = asyncio.new_event_loop()
        self._opened: Future[Any] = Future()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="mcp server", daemon=True)
        self._thread.start()
        try:
            self._client = self._opened.result(cfg.start_timeout_s)
        except ImportError:
            raise
        except (FutureTimeoutError, TimeoutError):
            self.close()
            raise CallFailed(f"was not there within {cfg.start_timeout_s:g} s") from None
        except Exception as error:
            raise CallFailed(f"did not start: {_told(error)}") from error

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        stopping = asyncio.ensure_future(self._stop.wait())
        holding = asyncio.ensure_future(self._hold())
        # A server that hangs while it starts is given up by cancelling: leaving its context kills it.
        await asyncio.wait({stopping, holding}, return_when=asyncio.FIRST_COMPLETED)
        for task in (stopping, holding):
            task.cancel()
        await asyncio.gather(stopping, holding, return_exceptions=True)

    async def _hold(self) -> None:
        try:
            from mcp import Client, StdioServerParameters, stdio_client  # pyright: ignore[reportMissingImports]

            with open(os.dup(2), "w", encoding="utf-8", errors="replace") as log:  # noqa: PTH123
                target: Any = self._cfg.url
                if not target:
                    program, *arguments = self._cfg.command
                    parameters = StdioServerParameters(command=program, args=arguments, env=dict(self._cfg.env))
                    target = stdio_client(parameters, errlog=log)
                async with Client(target) as client:
                    self._opened.set_result(client)
                    await asyncio.Event().wait()
        except BaseException as error:
            if not self._opened.done():
                self._opened.set_exception(error if isinstance(error, Exception) else TimeoutError())
            raise

    async def listed(self) -> list[dict[str, Any]]:
        """Every page of its tools."""
        found, cursor = [], None
        while True:
            page = await self._client.list_tools(cursor=cursor)
            found += [_schema(tool) for tool in page.tools]
            cursor = page.next_cursor
            if not cursor:
                return found

    async def called(self, tool: str, arguments: dict[str, Any]) -> str:
        """A tool's result as text. Raises: ToolError when the tool says that it failed."""
        result = await self._client.call_tool(tool, arguments)
        text = "\n".join(_text(part) for part in result.content)
        if result.is_error:
            raise ToolError(text or "the tool failed and does not say why")
        return text

    def ask(self, question: Coroutine[Any, Any, Any], timeout_s: float) -> Any:
        """Wait for an answer. Raises: ToolError as the server told it; CallFailed."""
        from mcp import MCPError  # pyright: ignore[reportMissingImports]

        if not self._thread.is_alive() or self._loop.is_closed():
            question.close()
            raise CallFailed("has lost its server")
        asked = asyncio.run_coroutine_threadsafe(asyncio.wait_for(question, timeout_s), self._loop)
        try:
            return asked.result(timeout_s + MARGIN_S)
        except ToolError:
            raise
        except (FutureTimeoutError, TimeoutError):
            asked.cancel()
            raise CallFailed(f"did not return within {timeout_s:g} s") from None
        except MCPError as error:
            if error.error.code == INVALID_PARAMS:
                raise ToolError(error.error.message) from None
            raise CallFailed(f"failed: {error.error.message}") from None
        except BaseException as error:
            raise CallFailed(f"failed: {_told(error)}") from None

    def answers(self) -> bool:
        """Whether the server still answers at all."""
        try:
            self.ask(self.listed(), PING_TIMEOUT_S)
        except (CallFailed, ToolError):
            return False
        return True

    def close(self) -> None:
        """End the connection and wait for the end of a server that we started."""
        with suppress(RuntimeError):  # its loop is closed already
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(CLOSE_TIMEOUT_S)


def _schema(tool: Any) -> dict[str, Any]:
    parameters = {key: value for key, value in dict(tool.input_schema).items() if key not in ("$schema", "title")}
    parameters.setdefault("type", "object")
    parameters.setdefault("properties", {})
    return {"name": tool.name, "description": tool.description or "", "parameters": parameters}


def _text(part: Any) -> str:
    return part.text if part.type == "text" else f"({part.type} that cannot be shown)"


def _told(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):  # what anyio wraps around the one thing that went wrong
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"
