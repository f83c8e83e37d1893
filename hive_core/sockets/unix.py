"""Unix sockets that listen, and JSON lines over a trio stream."""

from __future__ import annotations

import logging
import os
import socket
import stat
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import trio

from hive_core.protocol.lines import LINE_LIMIT_BYTES, LineSplitter, decode, encode
from hive_core.protocol.refusal import Refusal

log = logging.getLogger(__name__)
CONNECTIONS_LIMIT = 128
RECEIVE_BYTES = 64 * 1024


def listen_unix(path: Path, mode: int = 0o600) -> socket.socket:
    """A listening socket at `path`; one that a dead daemon left is replaced, anything else is refused."""
    if os.path.lexists(path):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise Refusal("refused", f"cannot listen on {path}: something that is not a socket is there")
        path.unlink()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        # The directory is 0700 and the daemon's umask 077. To set another one here, even for a moment, would reach
        # the directories that other threads make just then.
        sock.bind(str(path))
        path.chmod(mode)
        sock.listen(128)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


async def serve_unix(sock: socket.socket, handler: Callable[[trio.SocketStream], Awaitable[None]]) -> None:
    """Hand each connection to `handler`, until cancelled. A handler that fails ends its own connection alone.

    Connections over CONNECTIONS_LIMIT are closed at once: one client must not take every descriptor.
    """
    limit = trio.CapacityLimiter(CONNECTIONS_LIMIT)

    async def guarded(stream: trio.SocketStream) -> None:
        async with stream:
            try:
                limit.acquire_on_behalf_of_nowait(stream)
            except trio.WouldBlock:
                log.warning("a connection on %s over the limit of %d was closed", path, CONNECTIONS_LIMIT)
                return
            try:
                # A hang-up comes out of a handler's nursery in a group.
                try:
                    await handler(stream)
                except* (trio.BrokenResourceError, trio.ClosedResourceError):
                    pass
            except Exception:
                log.exception("a connection on %s failed", path)
            finally:
                limit.release_on_behalf_of(stream)

    path = sock.getsockname()
    await trio.serve_listeners(guarded, [trio.SocketListener(trio.socket.from_stdlib_socket(sock))])


class Lines:
    """JSON lines over a stream: objects in, objects out."""

    def __init__(self, stream: trio.SocketStream, limit_bytes: int = LINE_LIMIT_BYTES) -> None:
        self._stream = stream
        self._splitter = LineSplitter(limit_bytes)
        self._ready: deque[bytes | Refusal] = deque()

    async def next(self) -> dict[str, Any] | Refusal | None:
        """The next object, the Refusal of a bad line or of one that a hang-up cut in half, or None after the last."""
        while True:
            while not self._ready:
                data = await self._stream.receive_some(RECEIVE_BYTES)
                if not data:
                    return self._splitter.end()
                self._ready.extend(self._splitter.feed(bytes(data)))
            line = self._ready.popleft()
            if isinstance(line, Refusal):
                return line
            if line.strip():
                try:
                    return decode(line)
                except Refusal as refusal:
                    return refusal

    async def send(self, obj: object) -> None:
        """Send one object whole. A peer that does not read holds up its own connection and nothing else."""
        await self._stream.send_all(encode(obj))
