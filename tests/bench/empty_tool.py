"""The peer of `mcp_send`: the hive's own MCP server on a unix socket, with a tool that does nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, cast

import trio

from hive_core.sockets.agent import AgentDesk, SendArguments, Tool, serve_agent
from hive_core.sockets.unix import listen_unix, serve_unix


class EmptyDesk:
    def __init__(self) -> None:
        self.tools = {"send": Tool("send", "Does nothing.", SendArguments, self._nothing)}

    async def call(self, name: str, arguments: dict[str, Any], key: str | None) -> dict[str, Any]:
        parsed = self.tools[name].arguments.model_validate(arguments)
        return await self.tools[name].call(parsed, key)

    async def _nothing(self, _: Any, __: str | None) -> dict[str, Any]:
        return {"message": 1}


async def main(path: str) -> None:
    desk = cast("AgentDesk", EmptyDesk())
    await serve_unix(listen_unix(Path(path)), lambda stream: serve_agent(desk, stream))


if __name__ == "__main__":
    trio.run(main, sys.argv[1])
