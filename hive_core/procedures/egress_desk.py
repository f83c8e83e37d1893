"""The daemon's side of the hive's proxy: starts it when needed, tells it who may reach what, hears what was reached.

The proxy is a process of its own: it carries bulk, and reads what agents and strangers send. It gets each agent's
listening socket, of which the daemon keeps another descriptor: so whoever connects while a proxy is started anew waits
in the queue. Both talk in JSON lines on a stream socket, which is the proxy's stdin; it ends with it.
"""

from __future__ import annotations

import logging
import math
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import trio

from hive_core.destinations import Allowed, find
from hive_core.egress import program
from hive_core.egress.channel import Channel, ChannelBroken
from hive_core.egress.reports import ASK
from hive_core.egress_rules import expand
from hive_core.limits import Limits
from hive_core.protocol.paths import explain
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName
from hive_core.services.access import ACCESS, Access
from hive_core.services.connections import Connection, Connections
from hive_core.services.reach import entries_of
from hive_core.store.bus import DEPLOYED, WANTED
from hive_core.store.door import Store

log = logging.getLogger(__name__)
DOORS = "egress_doors"  # the bus topic: an agent's socket is there, or is no more
REST_FIRST_S, REST_LAST_S = 0.1, 10.0  # between two proxies
STEADY_S = 60.0  # one that ran for so long had no trouble to start
PING_EVERY_S = 15.0
ANSWER_WITHIN_S = 60.0  # a proxy that takes no line, or answers no ping, for so long is ended
ASKING_AT_ONCE = 32  # answers of one agent that are under way; beyond them the proxy answers by itself
FAULT = "something went wrong on the host"
PROXY_GONE = "the hive's proxy ended, and is started anew"

Ask = Callable[[AgentName, str, str, int], Awaitable[str]]  # agent, how, host, port → a clause that follows the reason


@dataclass(slots=True)
class _Door:
    """An agent's egress.sock, and what the proxy was told of it; None: nothing yet."""

    sock: socket.socket
    told: list[dict[str, Any]] | None = None


class _Proxy:
    """One process of the proxy, as long as it runs."""

    def __init__(self, process: trio.Process, channel: Channel) -> None:
        self.process = process
        self.channel = channel
        self.open: dict[int, Connection] = {}  # by the proxy's own numbers
        self.own_ports: list[int] = []  # that it was told
        self._waits_since: dict[object, float] = {}  # for a line to be taken, or a ping answered

    async def send(self, form: dict[str, Any], file: socket.socket | None = None) -> None:
        """Raises ChannelBroken when it is gone."""
        key = object()
        self._waits_since[key] = trio.current_time()
        try:
            await self.channel.send(form, file)
        finally:
            del self._waits_since[key]

    def hear_pong(self) -> None:
        self._waits_since.pop("pong", None)

    async def watch(self) -> None:
        """End it when it does nothing any more; and when this is cancelled, whoever waits for it to take a line."""
        async with trio.open_nursery() as pings:
            try:
                while min(self._waits_since.values(), default=math.inf) > trio.current_time() - ANSWER_WITHIN_S:
                    if "pong" not in self._waits_since:
                        self._waits_since["pong"] = trio.current_time()
                        pings.start_soon(self.send, {"op": "ping"})
                    await trio.sleep(PING_EVERY_S)
                log.error("the proxy did nothing for %.0f s, and is ended", ANSWER_WITHIN_S)
            finally:  # before what is sent is waited for
                self.process.kill()


class EgressDesk:
    """running: the turn of an agent that runs, or None.
    ask: what becomes of the wish for a destination that is not listed.
    own_ports: of this hive on this machine, which no agent reaches whatever its rules say."""

    def __init__(
        self,
        store: Store,
        access: Access,
        connections: Connections,
        limits: Limits,
        running: Callable[[AgentName], int | None],
        ask: Ask,
        own_ports: Callable[[], Collection[int]],
    ) -> None:
        self._store = store
        self._access = access
        self._connections = connections
        self._limits = limits
        self._running = running
        self._ask = ask
        self._own_ports = own_ports
        self._doors: dict[AgentName, _Door] = {}
        self._policies: dict[AgentName, str | None] = {}  # that are deployed
        self._rules: dict[AgentName, tuple[Allowed, ...]] = {}
        self._left: set[AgentName] = set()  # doors that are no more, and the proxy still has
        self._asking: Counter[str] = Counter()
        self._telling = trio.Lock()  # else of two who tell the older word could come last
        self.pid: int | None = None  # of the proxy that runs
        self.moves = 0  # how often what some agent may reach has changed

    # -- doors --------------------------------------------------------------------------------------------------------

    async def hold(self, name: AgentName, sock: socket.socket) -> None:
        """Whoever connects to this listening socket is the agent, until cancelled: then what it has open is cut."""
        with sock:
            self._doors[name] = _Door(sock)
            self._store.bus.publish([DOORS])
            try:
                await trio.sleep_forever()
            finally:
                del self._doors[name]
                trio.lowlevel.notify_closing(sock)
                self._left.add(name)
                self._store.bus.publish([DOORS])

    def allowed(self, name: AgentName) -> tuple[Allowed, ...]:
        """What is deployed of an agent lets it reach."""
        return self._rules.get(name, ())

    # -- the process --------------------------------------------------------------------------------------------------

    async def serve(self) -> None:
        """Keep a proxy running from the first connection on until cancelled; it ends with that."""
        rest_s = REST_FIRST_S
        while True:
            await self._until_needed()
            began_s = trio.current_time()
            try:
                await self._serve_one()
            except OSError as exc:
                log.error("cannot run the proxy: %s", explain(exc))
            rest_s = REST_FIRST_S if trio.current_time() - began_s > STEADY_S else min(2 * rest_s, REST_LAST_S)
            log.warning("the proxy has ended; in %.1f s another is started for whoever connects", rest_s)
            await trio.sleep(rest_s)

    async def _until_needed(self) -> None:
        """Until an agent connects: most hives that run for a test, and many others, need no proxy at all."""
        with self._store.bus.listen(DOORS, DEPLOYED) as listener:
            needed = False
            while not needed:
                await self._know()
                async with trio.open_nursery() as nursery:

                    async def watch(sock: socket.socket, scope: trio.CancelScope) -> None:
                        nonlocal needed
                        with suppress(trio.ClosedResourceError):
                            if sock.fileno() < 0:  # since this was to begin
                                return
                            await trio.lowlevel.wait_readable(sock)
                            needed = True
                            scope.cancel()

                    for door in self._doors.values():
                        nursery.start_soon(watch, door.sock, nursery.cancel_scope)
                    await listener.wait()
                    nursery.cancel_scope.cancel()

    async def _serve_one(self) -> None:
        ours, theirs = socket.socketpair()
        channel = Channel(ours)
        try:
            with theirs:
                process = await trio.lowlevel.open_process(
                    program.command(), stdin=theirs, stdout=subprocess.DEVNULL, env=program.environment(), cwd="/"
                )
            await self._serve_until_its_end(_Proxy(process, channel))
        finally:
            channel.close()

    async def _serve_until_its_end(self, proxy: _Proxy) -> None:
        self.pid = proxy.process.pid
        for door in self._doors.values():
            door.told = None
        self._left.clear()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(proxy.watch)
                nursery.start_soon(self._feed, proxy)
                await self._listen(proxy, nursery)
                nursery.cancel_scope.cancel()
        except* ChannelBroken:
            pass
        finally:
            self.pid = None
            self._lose(proxy)
            with trio.CancelScope(shield=True):
                await proxy.process.wait()

    def _lose(self, proxy: _Proxy) -> None:
        now_ms = self._now_ms()
        for one in proxy.open.values():
            one.ended_at_ms, one.verdict, one.reason = now_ms, "cut", PROXY_GONE
            self._connections.ended(one)
        proxy.open.clear()

    # -- what the proxy is told ---------------------------------------------------------------------------------------

    async def _feed(self, proxy: _Proxy) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._follow_access, proxy)
            with self._store.bus.listen(DEPLOYED, WANTED, DOORS) as listener:
                while True:
                    await self._know()
                    await self._tell(proxy)
                    await listener.wait()

    async def _follow_access(self, proxy: _Proxy) -> None:
        with self._store.bus.listen(ACCESS) as listener:
            while True:
                await listener.wait()
                await self._tell(proxy)

    async def _know(self) -> None:
        """What each agent may reach, by what is deployed of it now."""
        rows = await self._store.rows("SELECT name, policy FROM agents")
        policies = {AgentName(row["name"]): row["policy"] for row in rows}
        if policies != self._policies:
            self._policies, self.moves = policies, self.moves + 1
            self._rules = {name: expand(entries_of(policy)) for name, policy in policies.items()}

    async def _tell(self, proxy: _Proxy) -> None:
        """Tell the proxy what it does not know yet. Of whom is halted it lets nothing pass, and cuts what is open."""
        async with self._telling:
            if (ports := sorted(self._own_ports())) != proxy.own_ports:
                proxy.own_ports = ports
                await proxy.send({"op": "own_ports", "ports": ports})
            while self._left:
                await proxy.send({"op": "end", "agent": self._left.pop()})
            for name, door in list(self._doors.items()):
                halted = self._access.halted(name) is not None
                rules = [] if halted else [one.to_wire() for one in self.allowed(name)]
                if door.told == rules or self._doors.get(name) is not door:
                    continue
                first, door.told = door.told is None, rules
                if halted and not first:
                    await proxy.send({"op": "cut", "agent": name})
                if first:
                    form = {"op": "serve", "agent": name, "rules": rules, "limits": self._wire_limits(name)}
                    await proxy.send(form, door.sock)
                else:
                    await proxy.send({"op": "rules", "agent": name, "rules": rules})

    def _wire_limits(self, name: AgentName) -> dict[str, Any]:
        limits = self._limits
        return {
            "connections": limits.egress_connections,
            "bytes_per_day": limits.egress_day_bytes,
            "bytes_today": self._connections.bytes_today(name),
            "connection_s": limits.egress_connection_s,
            "idle_s": limits.egress_idle_s,
            "connect_s": limits.egress_connect_s,
        }

    # -- what the proxy tells -----------------------------------------------------------------------------------------

    async def _listen(self, proxy: _Proxy, nursery: trio.Nursery) -> None:
        """Hear the proxy until it has ended. Raises ChannelBroken."""
        while (told := await proxy.channel.next()) is not None:
            try:
                self._hear(proxy, told, nursery)
            except (KeyError, TypeError, ValueError) as exc:
                log.error("the proxy said what it should not: %r", exc)

    def _hear(self, proxy: _Proxy, told: dict[str, Any], nursery: trio.Nursery) -> None:
        if told["op"] == "begun":
            name = AgentName(told["agent"])
            turn, where = self._running(name), (told["host"], int(told["port"]), told["how"])
            one = Connection(name, turn, *where, began_at_ms=self._now_ms())
            proxy.open[int(told["id"])] = one
            self._connections.began(one)
        elif told["op"] == "ended":
            one = proxy.open.pop(int(told["id"]))
            one.address, one.verdict, one.reason = told["address"], told["verdict"], told["reason"]
            one.sent, one.received = int(told["sent"]), int(told["received"])
            one.ended_at_ms = max(one.began_at_ms, self._now_ms())
            self._connections.ended(one)
        elif told["op"] == "pong":
            proxy.hear_pong()
        elif told["op"] == "ask" and self._asking[told["agent"]] < ASKING_AT_ONCE:
            self._asking[told["agent"]] += 1
            nursery.start_soon(self._answer, proxy, told)

    async def _answer(self, proxy: _Proxy, told: dict[str, Any]) -> None:
        try:
            name = AgentName(told["agent"])
            if (halted := self._access.halted(name)) is not None:
                sentence = halted.sentence
            else:
                sentence = await self._not_listed(name, told["how"], told["host"], int(told["port"]))
        except Refusal as refusal:
            log.warning("cannot ask what %s may reach: %s", told["agent"], refusal.message)
            sentence = ASK
        except Exception:  # what an agent asks for ends no daemon
            log.exception("a wish of %s failed", told["agent"])
            sentence = FAULT
        finally:
            self._asking[told["agent"]] -= 1
        await proxy.send({"op": "answer", "id": told["id"], "sentence": sentence})

    async def _not_listed(self, name: AgentName, how: str, host: str, port: int) -> str:
        """What becomes of the wish for what an agent's rules do not have. Raises Refusal."""
        found = find(self.allowed(name), how, host, port)
        if isinstance(found, Allowed):
            return "it is since a moment ago; try again"
        return await self._ask(name, how, host, port)

    @staticmethod
    def _now_ms() -> int:
        return int(time.time() * 1000)
