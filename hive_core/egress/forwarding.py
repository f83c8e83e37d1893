"""A plain request and its answer, each read and written anew by h11: what that cannot read is not passed on."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable

import h11
import trio

from hive_core.destinations import HTTP_PORT, authority
from hive_core.egress.heads import HEAD_LIMIT_BYTES, Asked, Head, No, end_to_end

RECEIVE_BYTES = 256 * 1024


class Counted:
    """A socket, and what is told of the bytes that it takes and gives. More than one task may send."""

    def __init__(
        self,
        sock: trio.socket.SocketType,
        sent: Callable[[int], None] | None = None,
        received: Callable[[int], None] | None = None,
    ) -> None:
        self._sock = sock
        self._sent = sent
        self._received = received
        self._sending = trio.Lock()

    async def send(self, data: bytes | None) -> None:
        view = memoryview(data or b"")
        async with self._sending:
            while view:
                taken = await self._sock.send(view)
                if self._sent is not None:
                    self._sent(taken)
                view = view[taken:]

    async def receive(self) -> bytes:
        data = await self._sock.recv(RECEIVE_BYTES)
        if self._received is not None:
            self._received(len(data))
        return data


async def forward(head: Head, client: Counted, host: Counted) -> bytes | None:
    """Pass a request on and its answer back; then what came behind the request, or None where the client is to be left.

    Raises No while nothing of an answer was sent, AnswerCut behind that, and ClientGone.
    """
    exchange = _Exchange(head.asked, head.conn, client, host)
    async with trio.open_nursery() as nursery:
        # Beside each other: a host may answer before it has read all, and what is left is not sent then.
        nursery.start_soon(exchange.guarded, exchange.pass_request, nursery.cancel_scope)
        nursery.start_soon(exchange.guarded, exchange.pass_answer, nursery.cancel_scope)
    if exchange.trouble is not None:
        raise exchange.trouble
    if head.conn.our_state is h11.DONE and head.conn.their_state is h11.DONE:
        return head.conn.trailing_data[0]
    return None


class AnswerCut(Exception):
    """The host's answer ended in the middle."""


class ClientGone(Exception):
    """The client has hung up, or has broken off its request."""


class _Exchange:
    def __init__(self, asked: Asked, inner: h11.Connection, client: Counted, host: Counted) -> None:
        self._asked = asked
        self._inner = inner
        self._outer = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_LIMIT_BYTES)
        self._client = client
        self._host = host
        self._is_answered = False
        self.trouble: No | AnswerCut | ClientGone | None = None

    async def guarded(self, passing: Callable[[], Awaitable[bool]], scope: trio.CancelScope) -> None:
        """Until one of the two says that all is done, or has trouble."""
        try:
            if await passing():
                scope.cancel()
        except (No, AnswerCut, ClientGone) as exc:
            self.trouble = self.trouble or exc
            scope.cancel()

    async def pass_request(self) -> bool:
        name = authority(self._asked.host, self._asked.port).removesuffix(f":{HTTP_PORT}").encode()
        headers = [(b"Host", name), (b"Connection", b"close"), *self._asked.headers]
        request = h11.Request(method=self._asked.how, target=self._asked.target, headers=headers)
        await self._to_host(request)
        if self._inner.they_are_waiting_for_100_continue and not self._is_answered:
            await self._to_client(h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue"))
        while True:
            try:
                event = self._inner.next_event()
                if event is h11.NEED_DATA:
                    if not (data := await self._client.receive()):
                        raise ClientGone
                    self._inner.receive_data(data)
                    continue
            except OSError:
                raise ClientGone from None
            except h11.RemoteProtocolError as exc:
                if self._is_answered:
                    raise ClientGone from None
                raise No(400, f"cannot read the request: {exc}") from None
            if not isinstance(event, h11.Data):
                await self._to_host(h11.EndOfMessage())
                return False
            await self._to_host(h11.Data(data=event.data))

    async def pass_answer(self) -> bool:
        event = await self._of_host()
        while isinstance(event, h11.InformationalResponse):
            event = await self._of_host()
        if not isinstance(event, h11.Response):
            raise self._unreadable("it is none")
        self._is_answered = True
        headers = end_to_end(event)
        await self._to_client(h11.Response(status_code=event.status_code, headers=headers, reason=event.reason))
        while isinstance(event := await self._of_host(), h11.Data):
            await self._to_client(h11.Data(data=event.data))
        await self._to_client(h11.EndOfMessage())
        return True

    async def _of_host(self) -> h11.Event | type[h11.PAUSED]:
        try:
            while (event := self._outer.next_event()) is h11.NEED_DATA:
                data = await self._host.receive()
                if not data and self._outer.their_state is h11.SEND_RESPONSE:
                    raise self._unreadable("it hung up without a whole one")
                self._outer.receive_data(data)
        except h11.RemoteProtocolError as exc:
            raise self._unreadable(str(exc)) from None
        except OSError as exc:
            raise self._unreadable(exc.strerror or str(exc)) from None
        return event  # type: ignore[return-value]

    def _unreadable(self, why: str) -> No | AnswerCut:
        if self._is_answered:
            return AnswerCut(f"the answer of {self._asked} was cut: {why}")
        return No(502, f"cannot read the answer of {self._asked}: {why}", "failed")

    async def _to_host(self, event: h11.Event) -> None:
        # A host that takes no more has perhaps answered; if not, its side says so.
        with contextlib.suppress(OSError):
            await self._host.send(self._outer.send(event))

    async def _to_client(self, event: h11.Event) -> None:
        try:
            await self._client.send(self._inner.send(event))
        except OSError:
            raise ClientGone from None
        except h11.LocalProtocolError as exc:
            raise self._unreadable(str(exc)) from None
