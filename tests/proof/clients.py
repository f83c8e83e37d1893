"""Clients of a real daemon that outlive it: what was not answered is asked again, with the same key or fence.

Each notes what it was told in one `Told`, and every answer ticks the `Pulse`, which says when to strike.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from hive_agent.link import HostLink, Unwelcome
from hive_agent.serve import new_fence
from hive_core.protocol.lines import encode
from hive_core.protocol.refusal import Refusal
from tests.hives import open_services
from tests.proof.promises import Acked, Leased, Sent, Told

AGENTS = ("ada", "bob", "cyd")
RETRY_S = 0.02
KILLED_SHARE = 0.05  # of the turns
RECV_SHARE = 0.2  # of the turns, in which the program takes more mail
RECV_WAIT_S = 0.5
AHEAD_MOST = 40
INITIALIZE = {
    "jsonrpc": "2.0",
    "id": 0,
    "method": "initialize",
    "params": {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "proof", "version": "1"}},
}


async def add_agents(state_dir: Path) -> None:
    """Agents whose program no daemon will start here, so that their sockets are served and free for ours."""
    state_dir.mkdir(mode=0o700, exist_ok=True)
    async with open_services(state_dir) as services:
        await services.add_agents(*AGENTS)
        await services.sql("UPDATE agents SET settings = json_set(settings, '$.program', 'claude')")


class Pulse:
    """How many answers the clients have had.

    sends    those of senders
    turns    those of harnesses, which come back later than senders when the daemon does
    broken   what a client saw that it must not see; with the first such sentence there is no need to go on
    """

    def __init__(self) -> None:
        self.sends = 0
        self.turns = 0
        self.broken: list[str] = []
        self._beat = trio.Event()

    def tick(self, *, sends: int = 0, turns: int = 0) -> None:
        self.sends += sends
        self.turns += turns
        self._beat.set()
        self._beat = trio.Event()

    def halt(self, sentence: str) -> None:
        self.broken.append(sentence)
        self._beat.set()

    async def reaches(self, turns: int) -> None:
        """Return when harnesses had so many answers, or when something is broken."""
        while self.turns < turns and not self.broken:
            await self._beat.wait()

    async def keep_pace(self) -> None:
        """Let a sender wait for the harnesses when it is far ahead of them."""
        while self.sends > self.turns + AHEAD_MOST and not self.broken:
            await self._beat.wait()


class Lost(Exception):
    """The daemon is away, or went away before it answered."""


class Lines:
    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._rest = bytearray()

    async def send(self, obj: object) -> None:
        try:
            await self._stream.send_all(encode(obj))
        except trio.BrokenResourceError:
            raise Lost from None

    async def next(self) -> dict[str, Any]:
        while (end := self._rest.find(b"\n")) < 0:
            try:
                data = await self._stream.receive_some()
            except trio.BrokenResourceError:
                raise Lost from None
            if not data:
                raise Lost
            self._rest += data
        line = bytes(self._rest[:end])
        del self._rest[: end + 1]
        answer: dict[str, Any] = json.loads(line)
        return answer


@asynccontextmanager
async def connect(path: Path) -> AsyncIterator[Lines]:
    try:
        stream = await trio.open_unix_socket(os.fspath(path))
    except OSError:
        raise Lost from None
    async with stream:
        yield Lines(stream)


class Sender:
    """Sends one message after the other. `first_words` opens a connection; `ask` sends one message over it."""

    name: str

    def __init__(self, path: Path, told: Told, pulse: Pulse, chance: random.Random) -> None:
        self._path = path
        self._told = told
        self._pulse = pulse
        self._chance = chance
        self.stop = False

    async def first_words(self, lines: Lines) -> None:
        """What has to be said before the first message."""

    async def ask(self, lines: Lines, to: str, body: str, key: str) -> int:
        """The number of the message."""
        raise NotImplementedError

    async def run(self) -> None:
        """Send until told to stop; the last message is answered then."""
        pending: tuple[str, str, str] | None = None
        number = 0
        while not (self.stop and pending is None):
            try:
                async with connect(self._path) as lines:
                    await self.first_words(lines)
                    while not (self.stop and pending is None):
                        if pending is None:
                            number += 1
                            to = self._chance.choice([name for name in AGENTS if name != self.name])
                            pending = (to, f"{self.name} says {number}", f"{self.name}-{number}")
                        message = await self.ask(lines, *pending)
                        self._told.sends.append(Sent(message, self.name, pending[:1], pending[1], pending[2]))
                        pending = None
                        self._pulse.tick(sends=1)
                        await self._pulse.keep_pace()
            except Lost:
                await trio.sleep(RETRY_S)


class Operator(Sender):
    """Speaks to host.sock."""

    name = "operator"

    async def ask(self, lines: Lines, to: str, body: str, key: str) -> int:
        await lines.send({"v": 1, "verb": "send", "args": {"to": to, "body": body, "key": key}})
        answer = await lines.next()
        assert answer["ok"], answer
        return int(answer["result"]["message"])


class Program(Sender):
    """Speaks to an agent's mcp.sock as the agent's program does."""

    def __init__(self, name: str, path: Path, told: Told, pulse: Pulse, chance: random.Random) -> None:
        super().__init__(path, told, pulse, chance)
        self.name = name

    async def first_words(self, lines: Lines) -> None:
        await greet(lines)

    async def ask(self, lines: Lines, to: str, body: str, key: str) -> int:
        return int((await call_tool(lines, "send", {"to": to, "body": body}, key))["message"])


async def greet(lines: Lines) -> None:
    """What is said on mcp.sock before the first call."""
    await lines.send(INITIALIZE)
    await lines.next()
    await lines.send({"jsonrpc": "2.0", "method": "notifications/initialized"})


async def call_tool(lines: Lines, tool: str, arguments: dict[str, Any], key: str) -> dict[str, Any]:
    call = {"name": tool, "arguments": arguments, "_meta": {"claudecode/toolUseId": key}}
    await lines.send({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": call})
    result = (await lines.next())["result"]
    assert not result.get("isError"), result
    answer: dict[str, Any] = result["structuredContent"]
    return answer


class Harness:
    """Takes turns as an agent's harness does, over the link that it uses.

    Now and then it is killed in a turn. The next one says hello without knowing of that turn, and all that the killed
    one had said of it comes late: for its own turn, and for whichever runs by then.
    """

    def __init__(self, name: str, path: Path, told: Told, pulse: Pulse, chance: random.Random) -> None:
        self.name = name
        self._path = path
        self._told = told
        self._pulse = pulse
        self._chance = chance
        self._killed_in: dict[str, Any] | None = None  # the lease of the harness before
        self.calm = False  # True: every turn ends well from now on

    async def run(self) -> None:
        """Take turns until cancelled."""
        while True:
            async with trio.open_nursery() as life:
                link = HostLink(os.fspath(self._path))
                life.start_soon(self._keep, link, life.cancel_scope)
                await link.welcomed.wait()
                try:
                    await self._live(link)
                except Refusal as refusal:
                    self._pulse.halt(f"{self.name} cannot go on: {refusal.message}")
                life.cancel_scope.cancel()
            await trio.sleep(RETRY_S)

    async def _keep(self, link: HostLink, life: trio.CancelScope) -> None:
        with contextlib.suppress(Unwelcome):  # the hang-up of the one before is not seen yet
            await link.run()
        life.cancel()

    async def _live(self, link: HostLink) -> None:
        """Return when killed."""
        lease: dict[str, Any] | None = None
        while True:
            if lease is None:
                fence = new_fence()
                link.hold(fence)
                lease = await link.request({"op": "lease", "fence": fence})
            self._told.leases.append(_as_leased(self.name, lease, [lease["message"]]))
            self._pulse.tick(turns=1)
            if self._killed_in is not None:
                late, self._killed_in = self._killed_in, None
                for turn in (late["turn"], lease["turn"]):
                    await self._ack(link, {"turn": turn, "fence": late["fence"], "outcome": "done", "next": None})
            elif self._chance.random() < KILLED_SHARE and not self.calm:
                self._killed_in = lease
                return
            if self._chance.random() < RECV_SHARE:
                await self._take_more(lease)
            outcome = self._chance.choices(("done", "failed", "waiting"), (8, 1, 1))[0]
            if self.calm:
                outcome = "done"
            following = new_fence()
            link.hold(lease["fence"], following)
            form = {"turn": lease["turn"], "fence": lease["fence"], "outcome": outcome, "next": following}
            lease = (await self._ack(link, form)).get("lease")

    async def _take_more(self, lease: dict[str, Any]) -> None:
        """What the program of a turn does, on a connection of its own; it is not asked again."""
        try:
            async with connect(self._path.with_name("mcp.sock")) as lines:
                await greet(lines)
                taken = await call_tool(lines, "recv", {"max": 3, "wait_seconds": RECV_WAIT_S}, f"recv-{new_fence()}")
        except Lost:
            return
        self._told.leases.append(_as_leased(self.name, lease, taken["messages"]))

    async def _ack(self, link: HostLink, form: dict[str, Any]) -> dict[str, Any]:
        answer = await link.request({"op": "ack", **form})
        if answer["counted"]:
            self._told.acks.append(Acked(form["turn"], self.name, form["outcome"], form["fence"]))
            self._pulse.tick(turns=1)
        return answer


def _as_leased(agent: str, lease: dict[str, Any], messages: list[dict[str, Any]]) -> Leased:
    numbers, attempts = (tuple(message[key] for message in messages) for key in ("id", "attempt"))
    return Leased(lease["turn"], agent, lease["fence"], numbers, attempts)
