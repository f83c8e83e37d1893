"""An agent's tools, called through a real socket as its program calls them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from hive_core.protocol.words import MANAGER, AgentName
from hive_core.services.archive import Archive
from hive_core.sockets.agent import AgentDesk, serve_agent
from hive_core.sockets.forge_tools import ForgeTools
from hive_core.sockets.manager_tools import ManagerTools
from tests.dashboards import hive_of
from tests.hives import Peer, Services, connect, serve

INITIALIZE = {
    "jsonrpc": "2.0",
    "id": 0,
    "method": "initialize",
    "params": {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}},
}
INITIALIZED = {"jsonrpc": "2.0", "method": "notifications/initialized"}


class Program(Peer):
    """An MCP client as small as one can be."""

    number = 0

    async def greet(self) -> Any:
        answer = await self.ask(INITIALIZE)
        await self.send(INITIALIZED)
        return answer["result"]

    async def request(self, method: str, **params: Any) -> Any:
        await self.begin(method, **params)
        answer = await self.read()
        assert answer["id"] == self.number, answer
        return answer

    async def begin(self, method: str, **params: Any) -> None:
        self.number += 1
        await self.send({"jsonrpc": "2.0", "id": self.number, "method": method, "params": params})

    async def tools(self) -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = (await self.request("tools/list"))["result"]["tools"]
        return listed

    async def call(self, tool: str, use: str | None = None, /, **arguments: Any) -> Any:
        """What the tool answered; `use` is the id of the call."""
        result = await self.result(tool, use, **arguments)
        assert not result.get("isError"), result
        return result["structuredContent"]

    async def result(self, tool: str, use: object = None, /, **arguments: Any) -> Any:
        meta = {} if use is None else {"_meta": {"claudecode/toolUseId": use}}
        return (await self.request("tools/call", name=tool, arguments=arguments, **meta))["result"]

    async def refusal(self, tool: str, use: str | None = None, /, **arguments: Any) -> str:
        """The sentence with which the call is refused; the connection goes on."""
        result = await self.result(tool, use, **arguments)
        assert result["isError"], result
        assert (await self.call("whoami"))["name"]
        text: str = result["content"][0]["text"]
        return text


def desk_for(hive: Services, name: str, forge: ForgeTools | None = None) -> AgentDesk:
    archive = Archive(hive.store, hive.broker.limits, hive.state_dir / "bodies")
    manager = ManagerTools(hive_of(hive)) if name == MANAGER else None
    return AgentDesk(AgentName(name), hive.broker, hive.agents, archive, hive.loose_ends, manager, forge)


@asynccontextmanager
async def program(door: Path) -> AsyncIterator[Program]:
    """A client of the socket that stands at `door`."""
    async with connect(door) as peer:
        client = Program(peer.stream)
        await client.greet()
        yield client


@asynccontextmanager
async def program_of(hive: Services, name: str, folder: Path) -> AsyncIterator[Program]:
    """A client of an agent's own socket, which is made in `folder`."""
    handler = partial(serve_agent, desk_for(hive, name))
    async with serve(folder / f"{name}.sock", handler) as door, program(door) as client:
        yield client
