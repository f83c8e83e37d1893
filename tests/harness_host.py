"""The host's side of harness.sock, spoken step by step by a test."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from hive_core.protocol.harness import PROTOCOL_VERSION
from hive_core.protocol.lines import decode, encode
from hive_core.sockets.harness import BESIDE
from tests.processes import PATIENCE_S


class HarnessConnection:
    """One connection of a harness."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.told: list[dict[str, Any]] = []  # what it said beside its turns, which is answered at once
        self._stream = stream
        self._rest = b""

    async def hang_up(self) -> None:
        await self._stream.aclose()

    async def next(self) -> dict[str, Any] | None:
        """The next request of its turns, None when the harness hung up."""
        while (request := await self._next()) is not None and request["op"] in BESIDE:
            self.told.append(request)
            with contextlib.suppress(trio.BrokenResourceError):
                await self.answer(request, counted=True)
        return request

    async def _next(self) -> dict[str, Any] | None:
        with trio.fail_after(PATIENCE_S):
            while b"\n" not in self._rest:
                data = await self._stream.receive_some()
                if not data:
                    return None
                self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return decode(line)

    async def expect(self, op: str) -> dict[str, Any]:
        request = await self.next()
        assert request is not None, f"the harness hung up instead of asking for {op}"
        assert request["op"] == op, request
        return request

    async def answer(self, request: dict[str, Any], **fields: Any) -> None:
        await self._stream.send_all(encode({"id": request["id"], "ok": True, **fields}))

    async def send_raw(self, data: bytes) -> None:
        await self._stream.send_all(data)

    async def refuse(self, request: dict[str, Any], code: str, message: str) -> None:
        error = {"code": code, "message": message}
        await self._stream.send_all(encode({"id": request["id"], "ok": False, "error": error}))

    async def welcome(self, agent: str = "iris", role: str = "agent") -> dict[str, Any]:
        """Take the hello and answer it; returns the hello."""
        hello = await self.expect("hello")
        await self.answer(hello, version=PROTOCOL_VERSION, agent=agent, role=role)
        return hello

    async def give(self, lease: dict[str, Any]) -> str:
        """Answer the lease that the harness asks for next; returns the fence that it chose."""
        request = await self.expect("lease")
        await self.answer(request, **{**lease, "fence": request["fence"]})
        return str(request["fence"])

    async def take_turn(self, lease: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
        """Give a turn, take its lines, and return them with the ack, which is answered."""
        await self.give(lease)
        return await self.rest_of_turn()

    async def rest_of_turn(self, stop: bool = False) -> tuple[list[str], dict[str, Any]]:
        """Take all that comes until the ack, which is answered: the lines and the ack."""
        lines, ack = await self.lines_and_ack()
        await self.answer(ack, counted=True, stop=stop)
        return lines, ack

    async def lines_and_ack(self, running: bool = True) -> tuple[list[str], dict[str, Any]]:
        """Take all that comes until the ack, which is not answered: the lines and the ack."""
        lines: list[str] = []
        while (request := await self.next()) is not None and request["op"] == "lines":
            assert not request["lines"] or request["first"] == len(lines)
            lines += request["lines"]
            await self.answer(request, kept=len(lines), running=running)
        assert request is not None
        assert request["op"] == "ack", request
        return lines, request


class HarnessHost:
    def __init__(self, listener: trio.SocketListener) -> None:
        self._listener = listener
        self._connections: list[HarnessConnection] = []

    async def accept(self) -> HarnessConnection:
        with trio.fail_after(PATIENCE_S):
            self._connections.append(HarnessConnection(await self._listener.accept()))
        return self._connections[-1]

    async def die(self) -> None:
        """As a killed daemon does: everything is closed, the file stays behind."""
        await self._listener.aclose()
        for connection in self._connections:
            await connection.hang_up()


@asynccontextmanager
async def open_host(run_dir: Path) -> AsyncIterator[HarnessHost]:
    """Listen on harness.sock in `run_dir`, in the place of what an earlier host left there; dies with the block."""
    path = run_dir / "harness.sock"
    path.unlink(missing_ok=True)
    sock = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    await sock.bind(str(path))
    sock.listen()
    host = HarnessHost(trio.SocketListener(sock))
    try:
        yield host
    finally:
        with trio.CancelScope(shield=True):
            await host.die()


def a_lease(turn: int = 1, body: str = "hello", *, sender: str = "operator", **changes: Any) -> dict[str, Any]:
    """The answer to a lease; `changes` go into its settings, apart from session and attempt."""
    session, attempt = changes.pop("session", None), changes.pop("attempt", 1)
    message = {
        "id": 100 + turn,
        "sender": sender,
        "body": body,
        "sent_at_ms": 1_800_000_000_000,
        "in_reply_to": None,
        "cause": "operator" if sender == "operator" else "turn",
        "cause_id": None,
        "attempt": attempt,
    }
    settings = {"program": "rehearsal", "model": "sonnet", "tools": ["Bash", "Read"], "prompt": "", **changes}
    return {
        "turn": turn,
        "fence": "",  # the harness chooses it
        "message": message,
        "waiting": 0,
        "refused": 0,
        "settings": settings,
        "session": session,
        "credential": "api_key",
    }
