"""An agent's one way out: its socket, what it may reach, its limits, and what of it is open."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import socket
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from ipaddress import ip_address

import trio

from hive_core.destinations import TUNNEL, Allowed, WhyNot, find, hindrance
from hive_core.egress.channel import ChannelBroken
from hive_core.egress.forwarding import AnswerCut, ClientGone, Counted, forward
from hive_core.egress.heads import Head, No, end_of_head, parse_head
from hive_core.egress.reaching import Resolver, reach
from hive_core.egress.reports import Passage, Reports
from hive_core.protocol.carrying import SEND_BUFFER_BYTES, Pipes, SideGone, carry, hung_up

log = logging.getLogger(__name__)

HEAD_S = 30.0  # for a whole head, however slowly it comes; so long a client may be silent between two requests, too
LINGER_S = 10.0  # for a host to end what it sends to an agent that has hung up; and for an agent to read a no
LINGER_BYTES = 1024 * 1024
ACCEPT_REST_S = 0.1
RECEIVE_BYTES = 64 * 1024
TURNED_AWAY_AT_ONCE = 16  # over the limit of connections; the next ones wait in the socket's queue
HUNG_UP = "the agent hung up"
DAY_S = 24 * 3600

Socket = trio.socket.SocketType


@dataclass(frozen=True, slots=True)
class Bounds:
    """The limits of an agent.

    connections    open at once
    connection_s   how long one may be open, idle_s: without a byte, connect_s: to come about
    bytes_per_day  both ways, days by UTC; None: any number
    bytes_today    those that an earlier process has carried
    requests_per_s how many are taken up in the long run, and `burst` at once; the next ones wait their turn
    """

    connections: int
    connection_s: float
    idle_s: float
    connect_s: float
    bytes_per_day: int | None = None
    bytes_today: int = 0
    requests_per_s: float = 200.0
    burst: int = 1_000


class Exit:
    """Serves the socket of one agent. `own_ports` may change under it."""

    def __init__(
        self,
        agent: str,
        rules: tuple[Allowed, ...],
        bounds: Bounds,
        reports: Reports,
        pipes: Pipes,
        resolve: Resolver,
        own_ports: Collection[int],
    ) -> None:
        self._agent = agent
        self._rules = rules
        self._bounds = bounds
        self._reports = reports
        self._pipes = pipes
        self._resolve = resolve
        self._own_ports = own_ports
        self._passages: set[Passage] = set()
        self._admitted = self._turned_away = 0
        self._left = trio.Event()
        self._day, self._bytes_today = _today(), bounds.bytes_today
        self._paced_at = -math.inf  # of trio's clock: the turn of the request that was taken up last
        self._scope = trio.CancelScope()

    async def serve(self, listener: socket.socket) -> None:
        """Until `end`. The trouble of a connection is its own."""
        with trio.socket.from_stdlib_socket(listener) as sock, self._scope:
            async with trio.open_nursery() as nursery:
                while (client := await self._accept(sock)) is not None:
                    is_over = self._admitted >= self._bounds.connections
                    if is_over:
                        self._turned_away += 1
                    else:
                        self._admitted += 1
                    nursery.start_soon(self._serve_client, client, is_over)

    def set_rules(self, rules: tuple[Allowed, ...]) -> None:
        """From now on; what is open and not allowed by them is cut."""
        self._rules = rules
        for passage in self._passages:
            if passage.allowed is not None and not self._still_allowed(passage):
                passage.cut("it is no longer in egress of agent.toml")

    def _still_allowed(self, passage: Passage) -> bool:
        asked = passage.asked
        found = find(self._rules, asked.how, asked.host, asked.port)
        if isinstance(found, WhyNot):
            return False
        if passage.address is None:  # under way, by the networks that were named before
            return found == passage.allowed
        return hindrance(ip_address(passage.address), found.networks, is_own=False) is None

    def cut(self) -> None:
        """Cut what is open."""
        for passage in self._passages:
            passage.cut("the daemon cut it")

    def end(self) -> None:
        """Cut what is open, and serve no more."""
        self.cut()
        self._scope.cancel()

    # -- clients ------------------------------------------------------------------------------------------------------

    async def _accept(self, sock: Socket) -> Socket | None:
        """The next client; None if there will be no more."""
        while True:
            while self._admitted >= self._bounds.connections and self._turned_away >= TURNED_AWAY_AT_ONCE:
                await self._left.wait()
                self._left = trio.Event()
            try:
                return (await sock.accept())[0]
            except OSError as exc:
                if exc.errno == errno.ECONNABORTED:
                    continue
                log.error("cannot take a connection of %s: %s", self._agent, exc.strerror)
                if exc.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    return None
                await trio.sleep(ACCEPT_REST_S)

    async def _serve_client(self, client: Socket, is_over: bool) -> None:
        try:
            with client:
                rest: bytes | None = b""
                while rest is not None:
                    rest = await self._serve_request(client, bytearray(rest), is_over)
        except ChannelBroken:
            raise
        except (OSError, SideGone):
            pass  # the agent has hung up
        except Exception:
            log.exception("a connection of %s failed", self._agent)
        finally:
            if is_over:
                self._turned_away -= 1
            else:
                self._admitted -= 1
            self._left.set()

    async def _serve_request(self, client: Socket, data: bytearray, is_over: bool) -> bytes | None:
        """One request; what came behind it, or None where the client is to be left."""
        try:
            end = await _read_head(client, data)
            if end is None:
                return None
            await self._wait_turn()
            head = parse_head(data, end)
        except No as no:
            await _tell(client, no)
            return None
        now = trio.current_time()
        passage = Passage(
            self._reports.next_id(),
            head.asked,
            now,
            now + self._bounds.connection_s,
            self._bounds.idle_s,
            trio.CancelScope(),
        )
        self._passages.add(passage)
        refused: No | None = None
        rest = None
        try:
            await self._reports.begun(self._agent, passage)
            with passage.scope:
                passage.touch()
                passage.allowed = await self._allowed(passage, is_over)
                rest = await (self._tunnel if head.asked.how == TUNNEL else self._forward)(head, client, passage)
                passage.end("passed")
            self._explain(passage)
        except No as no:
            refused = no
            passage.end(no.verdict, no.sentence)
        except AnswerCut as exc:
            passage.end("failed", str(exc))
        except SideGone as exc:
            if exc.sock is client:
                passage.end("passed", HUNG_UP)
            else:
                passage.end("failed", f"the host broke off: {exc}")
        except ClientGone:
            passage.end("passed", HUNG_UP)
        except Exception:
            passage.end("failed", "the proxy had a fault")
            raise
        finally:
            self._passages.discard(passage)
            await self._reports.ended(passage)
        if refused is not None:
            await _tell(client, refused, with_body=head.asked.how != "HEAD")
        return rest

    async def _wait_turn(self) -> None:
        """Each request costs the proxy and the daemon work that other agents wait for."""
        now, step_s = trio.current_time(), 1 / self._bounds.requests_per_s
        self._paced_at = max(self._paced_at, now - self._bounds.burst * step_s) + step_s
        if self._paced_at > now:
            await trio.sleep(self._paced_at - now)

    def _explain(self, passage: Passage) -> None:
        """Which limit has cut it, if one has."""
        if passage.scope.cancelled_caught and passage.reason is None:
            if trio.current_time() >= passage.ends_at:
                passage.end("cut", f"it was open for {self._bounds.connection_s:g} s, the limit")
            elif passage.idle_s < self._bounds.idle_s:
                passage.end("passed", HUNG_UP)
            else:
                passage.end("cut", f"nothing was sent for {self._bounds.idle_s:g} s, the limit")

    async def _allowed(self, passage: Passage, is_over: bool) -> Allowed:
        """What lets it pass. Raises No."""
        asked = passage.asked
        if is_over:
            limit = f"{self._bounds.connections} connections are open, the limit of {self._agent}"
            raise No(429, f"cannot connect to {asked}: {limit}; try again when one has ended")
        if self._is_used_up():
            raise No(429, f"cannot connect to {asked}: {self._used_up()}")
        found = find(self._rules, asked.how, asked.host, asked.port)
        if isinstance(found, WhyNot):
            raise No(403, f"cannot connect: {found.reason}; {await self._reports.ask(self._agent, passage)}")
        return found

    async def _reach(self, passage: Passage) -> Socket:
        assert passage.allowed is not None
        within_s = self._bounds.connect_s
        reached = await reach(passage.asked, passage.allowed, self._resolve, self._own_ports, within_s)
        passage.address = reached.address
        passage.touch()
        return reached.sock

    async def _tunnel(self, head: Head, client: Socket, passage: Passage) -> None:
        gone: list[SideGone] = []
        with await self._reach(passage) as host:
            with contextlib.suppress(OSError):
                client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
            await _send_all(client, b"HTTP/1.1 200 Connection established\r\n\r\n")
            sent, received = self._counters(passage)
            async with trio.open_nursery() as nursery:

                async def one_way(source: Socket, sink: Socket, count: Callable[[int], None], early: bytes) -> None:
                    try:
                        await _send_all(sink, early, count)
                        await carry(source, sink, self._pipes, count)
                        if source is client and hung_up(client):
                            passage.idle_s = LINGER_S
                            passage.touch()
                    except SideGone as exc:
                        gone.append(exc)
                        nursery.cancel_scope.cancel()

                nursery.start_soon(one_way, client, host, sent, head.conn.trailing_data[0])
                nursery.start_soon(one_way, host, client, received, b"")
        if gone:
            raise gone[0]

    async def _forward(self, head: Head, client: Socket, passage: Passage) -> bytes | None:
        with await self._reach(passage) as host:
            sent, received = self._counters(passage)
            return await forward(head, Counted(client), Counted(host, sent, received))

    # -- bytes --------------------------------------------------------------------------------------------------------

    def _counters(self, passage: Passage) -> tuple[Callable[[int], None], Callable[[int], None]]:
        def sent(count: int) -> None:
            passage.sent += count
            self._count(passage, count)

        def received(count: int) -> None:
            passage.received += count
            self._count(passage, count)

        return sent, received

    def _count(self, passage: Passage, count: int) -> None:
        self._bytes_today += count
        if self._is_used_up():
            passage.cut(self._used_up())
        else:
            passage.touch()

    def _is_used_up(self) -> bool:
        if self._day != (today := _today()):
            self._day, self._bytes_today = today, 0
        return self._bounds.bytes_per_day is not None and self._bytes_today >= self._bounds.bytes_per_day

    def _used_up(self) -> str:
        return f"{self._agent} has carried {self._bounds.bytes_per_day:,} bytes today, the limit; more from 00:00 UTC"


def _today() -> int:
    return int(time.time() // DAY_S)


async def _read_head(client: Socket, data: bytearray) -> int | None:
    """Read until `data` holds a whole head; how many bytes it has, or None where none comes. Raises No."""
    seen = 0
    with trio.move_on_after(HEAD_S):
        while (end := end_of_head(data, seen)) is None:
            seen = len(data)
            more = await client.recv(RECEIVE_BYTES)
            if not more:
                return None
            data += more
        return end
    if not data:
        return None
    raise No(408, f"cannot read the request: its head did not come within {HEAD_S:g} s")


async def _tell(client: Socket, no: No, *, with_body: bool = True) -> None:
    """Answer with a no, and let the client read it: what it still sends is taken, up to a limit."""
    with trio.move_on_after(LINGER_S):
        await _send_all(client, no.answer(with_body=with_body))
        client.shutdown(socket.SHUT_WR)
        taken = 0
        while taken < LINGER_BYTES and (data := await client.recv(RECEIVE_BYTES)):
            taken += len(data)


async def _send_all(sock: Socket, data: bytes, count: Callable[[int], None] | None = None) -> None:
    """Raises SideGone."""
    view = memoryview(data)
    while view:
        try:
            taken = await sock.send(view)
        except OSError as exc:
            raise SideGone(sock, exc) from None
        if count is not None:
            count(taken)
        view = view[taken:]
