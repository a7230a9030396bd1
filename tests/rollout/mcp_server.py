"""A tiny MCP server for tests: `python mcp_server.py` talks over its standard streams."""

from __future__ import annotations

import os
import time

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("tiny")


@server.tool()
def add(a: int, b: int = 1) -> str:
    """Add two numbers."""
    return str(a + b)


@server.tool()
def environment() -> str:
    """Tell the environment."""
    return " ".join(sorted(os.environ))


@server.tool()
def pid() -> str:
    """Tell the process."""
    return str(os.getpid())


@server.tool()
def fail(why: str) -> str:
    """Fail."""
    raise ToolError(why)


@server.tool()
def die() -> str:
    """End the server."""
    os._exit(3)


@server.tool()
def hang() -> str:
    """Hang, and the server with it."""
    time.sleep(60)
    return "late"


if __name__ == "__main__":
    server.run("stdio")
