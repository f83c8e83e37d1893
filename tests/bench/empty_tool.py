"""The peer of `mcp_send`: the hive's own MCP server on a unix socket, with a tool that does nothing."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import trio

from hive_core.sockets.agent import AgentDesk, serve_agent
from hive_core.sockets.tool import declared
from hive_core.sockets.unix import listen_unix, serve_unix

(_SEND,) = (tool for tool in declared(AgentDesk) if tool.name == "send")


class EmptyDesk(AgentDesk):
    """Its `send` takes and answers what the real one does, and does nothing."""

    def __init__(self) -> None:
        self.tools = {"send": replace(_SEND, call=_nothing)}


async def _nothing(*_: Any) -> dict[str, Any]:
    return {"message": 1}


async def main(path: str) -> None:
    desk = EmptyDesk()
    await serve_unix(listen_unix(Path(path)), lambda stream: serve_agent(desk, stream))


if __name__ == "__main__":
    trio.run(main, sys.argv[1])
