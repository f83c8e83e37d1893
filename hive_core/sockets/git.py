"""git.sock: what an agent fetches from its projects, and what it pushes to them.

The client sends one JSON line, `{"service": "git-upload-pack" | "git-receive-pack", "project": …, "protocol": …}`, and
nothing before its answer: `{"ok": true}`, or `{"ok": false, "error": {"code", "message"}}`. Behind a yes both speak
git's own protocol, our side being git itself.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import trio

from hive_core.procedures.pushes import GitServices
from hive_core.protocol.lines import LineSplitter, decode, encode
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName, parse_project_name, shown
from hive_core.sockets.unix import Connection

AT_ONCE = 3  # gits of one agent; the others wait
PER_MINUTE = 120  # connections of one agent
LINE_BYTES = 4 * 1024
SERVICES = ("git-upload-pack", "git-receive-pack")
ASK_WITHIN_S = 30.0


class GitDesk:
    def __init__(self, name: AgentName, services: GitServices) -> None:
        self._name = name
        self._services = services
        self._at_once = trio.Semaphore(AT_ONCE)
        self._begun: deque[float] = deque(maxlen=PER_MINUTE)

    async def serve(self, stream: Connection) -> None:
        """Serve one connection to its end."""
        try:
            request = await _request(stream)
            self._check_rate()
            service, protocol = request.get("service"), request.get("protocol")
            if service not in SERVICES:
                raise Refusal("usage", f"cannot do {shown(service)}: the services are {' and '.join(SERVICES)}")
            name = parse_project_name(request.get("project"))
        except Refusal as refusal:
            await stream.send_all(encode({"ok": False, "error": refusal.to_wire()}))
            return
        async with self._at_once, self._services.seats.seat(self._name):
            try:
                await self._services.check(self._name, name)  # in here: it may have waited for long
            except Refusal as refusal:
                await stream.send_all(encode({"ok": False, "error": refusal.to_wire()}))
                return
            await stream.send_all(encode({"ok": True}))
            async with self._services.while_allowed(self._name, name):
                if service == "git-upload-pack":
                    await self._services.upload(name, stream.sock, protocol if isinstance(protocol, str) else None)
                else:
                    await self._services.receive(self._name, name, stream.sock)

    def _check_rate(self) -> None:
        now_s = time.monotonic()
        if len(self._begun) == PER_MINUTE and now_s - self._begun[0] < 60:
            raise Refusal("unavailable", f"cannot serve more than {PER_MINUTE} requests in a minute; wait a moment")
        self._begun.append(now_s)


async def _request(stream: Connection) -> dict[str, Any]:
    """The one line. Raises Refusal for anything else, also for what follows it already."""
    splitter = LineSplitter(LINE_BYTES)
    with trio.move_on_after(ASK_WITHIN_S):
        while data := await stream.receive_some(LINE_BYTES):
            lines = list(splitter.feed(data))
            if isinstance(line := lines[0] if lines else b"", Refusal):
                raise line
            if lines and (len(lines) > 1 or splitter.unfinished):
                raise Refusal("usage", "cannot read the request: wait for its answer before you go on")
            if lines:
                return decode(line)
    raise Refusal("usage", "cannot read the request: one JSON line is needed")
