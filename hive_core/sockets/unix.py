"""Unix sockets that listen, and JSON lines over a trio stream."""

from __future__ import annotations

import logging
import os
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import trio

from hive_core.protocol.lines import LINE_LIMIT_BYTES, LineSplitter, decode, encode
from hive_core.protocol.refusal import Refusal

log = logging.getLogger(__name__)
SEND_TIMEOUT_S = 30.0


def listen_unix(path: Path, mode: int = 0o600) -> socket.socket:
    """A listening socket at `path`; one that a dead daemon left is replaced, anything else is refused."""
    if os.path.lexists(path):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise Refusal("refused", f"cannot listen on {path}: something that is not a socket is there")
        path.unlink()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        # The directory is 0700 already; the umask closes the moment between bind and chmod all the same.
        before = os.umask(0o177)
        try:
            sock.bind(str(path))
        finally:
            os.umask(before)
        path.chmod(mode)
        sock.listen(128)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


async def serve_unix(sock: socket.socket, handler: Callable[[trio.SocketStream], Awaitable[None]]) -> None:
    """Hand each connection to `handler`, until cancelled. A handler that fails ends its own connection alone."""

    async def guarded(stream: trio.SocketStream) -> None:
        async with stream:
            try:
                await handler(stream)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass
            except Exception:
                log.exception("a connection on %s failed", path)

    path = sock.getsockname()
    await trio.serve_listeners(guarded, [trio.SocketListener(trio.socket.from_stdlib_socket(sock))])


class Lines:
    """JSON lines over a stream: objects in, objects out. A bad line is yielded as its Refusal."""

    def __init__(self, stream: trio.SocketStream, limit_bytes: int = LINE_LIMIT_BYTES) -> None:
        self._stream = stream
        self._splitter = LineSplitter(limit_bytes)

    async def objects(self) -> AsyncIterator[dict[str, Any] | Refusal]:
        """Until the other side hangs up; half a line at the end is dropped."""
        async for data in self._stream:
            for line in self._splitter.feed(bytes(data)):
                if isinstance(line, Refusal):
                    yield line
                elif line.strip():
                    try:
                        yield decode(line)
                    except Refusal as refusal:
                        yield refusal

    async def send(self, obj: object) -> None:
        """Send one object whole. A peer that does not read for 30 s is let go: raises BrokenResourceError."""
        try:
            with trio.fail_after(SEND_TIMEOUT_S):
                await self._stream.send_all(encode(obj))
        except trio.TooSlowError:
            raise trio.BrokenResourceError("the peer does not read") from None
