"""The body of a call on its way through the relay (model.py)."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx2
import trio
from starlette.types import Message, Receive

PIECE_WITHIN_S = 60.0  # how long a body may pause
BODY_LIMIT_BYTES = 64 * 1024 * 1024
KEPT_BYTES = 2 * 1024 * 1024  # of a body, until its answer begins
AT_ONCE_S = 1.0  # a close that was on the way before a request came behind is seen within that


class RequestBody:
    """A request's body as it comes, and after it the wait for the hang-up: ASGI tells both on one channel.

    With its `length` it is whole: the provider begins to work then, although HTTP/2 can leave the stream open.
    """

    def __init__(self, receive: Receive, length: int | None) -> None:
        self._receive = receive
        self._length = length
        self._whole = trio.Event()
        self._kept: bytearray | None = bytearray()  # None: it cannot be sent again
        self._handed_at = trio.current_time()
        self.size = 0
        self.too_long = False

    @property
    def was_read(self) -> bool:
        """Whether all of it was handed on: then the provider may have begun to work, whatever came back."""
        return self._whole.is_set()

    def can_be_sent_again(self) -> bool:
        """Whether all that was handed on is still here, and the last of it was handed on just now."""
        return self._kept is not None and trio.current_time() - self._handed_at < AT_ONCE_S

    def forget(self) -> None:
        """It is not sent again."""
        self._kept = None

    async def pieces(self) -> AsyncIterator[bytes]:
        """What was handed on before, and the rest as it comes. Raises httpx2.HTTPError when it does not come."""
        if self._kept:
            yield bytes(self._kept)
        while not self._whole.is_set():
            piece = await self._next()
            self._handed_at = trio.current_time()
            yield piece

    async def _next(self) -> bytes:
        with trio.move_on_after(PIECE_WITHIN_S) as pause:
            message: Message = await self._receive()
        if pause.cancelled_caught or message["type"] == "http.disconnect":
            self.forget()
            raise httpx2.ReadError("the agent hung up")
        piece: bytes = message.get("body", b"")
        self.size += len(piece)
        if self.size > BODY_LIMIT_BYTES:
            self.too_long = True
            self.forget()
            raise httpx2.WriteError("the body is too long")
        if self.size > KEPT_BYTES:
            self.forget()
        elif self._kept is not None:
            self._kept += piece
        if not message.get("more_body", False) or self.size == self._length:
            self._whole.set()
        return piece

    async def wait_hung_up(self, scope: trio.CancelScope) -> None:
        """Cancel `scope` when the agent hangs up: nobody waits for the answer, and it costs."""
        await self._whole.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass
        scope.cancel()
