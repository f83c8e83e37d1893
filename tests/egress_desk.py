"""The daemon's side of the proxy, for tests of it: what it says, what it hears; and hosts on loopback to reach."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import h11
import trio

from hive_core.egress.channel import Channel
from hive_core.egress.reaching import Found, Resolver
from hive_core.egress.serving import serve_proxy
from hive_core.egress_rules import expand

LIMITS = {"connections": 20, "connection_s": 60.0, "idle_s": 60.0, "connect_s": 20.0}
HERE = ["127.0.0.0/8"]


def named(to: str) -> dict[str, Any]:
    """An entry for a host whose addresses are on this machine."""
    return {"to": to, "addresses": HERE}


class Desk:
    """Says what the daemon says. `told` holds what the proxy said, but for what `ended` and `begun` took."""

    def __init__(self, sock: socket.socket, folder: Path) -> None:
        self.channel = Channel(sock)
        self.folder = folder
        self.sentence: str | None = "asked the operator (approval 12)"
        self.asked: list[dict[str, Any]] = []
        self._begun: dict[int, dict[str, Any]] = {}
        self._tell, self._told = trio.open_memory_channel[dict[str, Any]](1000)

    async def hear(self) -> None:
        """Until the proxy hangs up."""
        while (line := await self.channel.next()) is not None:
            if line["op"] == "ask":
                self.asked.append(line)
                if self.sentence is not None:
                    await self.channel.send({"op": "answer", "id": line["id"], "sentence": self.sentence})
            elif line["op"] == "begun":
                self._begun[line["id"]] = line
            else:
                await self._tell.send(self._begun.pop(line["id"]) | line)

    async def ended(self) -> dict[str, Any]:
        """The next connection that has ended: what was told when it began, and then."""
        return await self._told.receive()

    @property
    def under_way(self) -> int:
        return len(self._begun)

    async def serve(self, entries: Iterable[Any], agent: str = "iris", **limits: Any) -> Path:
        """Have an agent served; its egress.sock."""
        path = self.folder / f"{agent}.sock"
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen(128)
            await self.serve_on(listener, entries, agent, **limits)
        return path

    async def serve_on(
        self, listener: socket.socket, entries: Iterable[Any], agent: str = "iris", **limits: Any
    ) -> None:
        line = {"op": "serve", "agent": agent, "rules": wire(entries), "limits": {**LIMITS, **limits}}
        await self.channel.send(line, listener)

    async def say(self, op: str, agent: str = "iris", **more: Any) -> None:
        await self.channel.send({"op": op, "agent": agent, **more})


def wire(entries: Iterable[Any]) -> list[dict[str, Any]]:
    return [one.to_wire() for one in expand(entries)]


def resolver_of(names: Mapping[str, list[str]]) -> Resolver:
    """Names as the table has them, of each the addresses; others are unknown."""

    async def resolve(host: str, port: int) -> list[Found]:
        await trio.lowlevel.checkpoint()
        if host not in names:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET6 if ":" in one else socket.AF_INET, (one, port)) for one in names[host]]

    return resolve


@asynccontextmanager
async def open_desk(folder: Path, resolver: Resolver | None = None) -> AsyncIterator[Desk]:
    """A proxy in this process. resolver: a name for this machine is enough for most (`here.example`)."""
    ours, theirs = socket.socketpair()
    desk = Desk(ours, folder)
    resolver = resolver or resolver_of({"here.example": ["127.0.0.1"]})
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_proxy, theirs, lambda: resolver)
            nursery.start_soon(desk.hear)
            yield desk
            desk.channel.hang_up()
    finally:
        desk.channel.close()


@asynccontextmanager
async def open_host(
    serve: Callable[[trio.SocketStream], Awaitable[None]], address: str = "127.0.0.1"
) -> AsyncIterator[int]:
    """A host on loopback, that does so with each connection; its port."""

    async def guarded(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await serve(stream)
        await stream.aclose()

    (listener,) = await trio.open_tcp_listeners(0, host=address)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, guarded, [listener])
        yield listener.socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def echo(stream: trio.SocketStream) -> None:
    """A host that gives back what comes, and ends when it ends."""
    while data := await stream.receive_some(65_536):
        await stream.send_all(data)
    await stream.send_eof()


async def dial(path: Path) -> trio.SocketStream:
    return await trio.open_unix_socket(str(path))


async def read_all(stream: trio.SocketStream) -> bytes:
    return b"".join([data async for data in stream])


async def ask(path: Path, request: bytes) -> bytes:
    """One request, and all that comes until the proxy hangs up."""
    async with await dial(path) as stream:
        await stream.send_all(request)
        await stream.send_eof()
        return await read_all(stream)


async def tunnel(path: Path, target: str) -> trio.SocketStream:
    """A tunnel that the proxy has said yes to."""
    stream = await dial(path)
    await stream.send_all(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += await stream.receive_some(1)
    assert head == b"HTTP/1.1 200 Connection established\r\n\r\n", head
    return stream


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


class Scripted:
    """A host of plain requests: `heard` are the heads and bodies that came; each is answered with `answer`."""

    def __init__(self, answer: bytes, wait_for_body: bool = True) -> None:
        self.answer = answer
        self.heard: list[bytes] = []
        self._wait_for_body = wait_for_body

    async def __call__(self, stream: trio.SocketStream) -> None:
        conn, taken = h11.Connection(h11.SERVER), b""
        while (event := conn.next_event()) is not h11.PAUSED and not isinstance(event, h11.EndOfMessage):
            if event is h11.NEED_DATA:
                data = await stream.receive_some(65_536)
                if not data:
                    return
                taken += data
                conn.receive_data(data)
            elif isinstance(event, h11.Request) and not self._wait_for_body:
                break
        self.heard.append(taken)
        await stream.send_all(self.answer)
        await stream.send_eof()
