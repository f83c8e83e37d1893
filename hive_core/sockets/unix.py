"""Unix sockets that listen, and JSON lines over a trio stream."""

from __future__ import annotations

import errno
import logging
import os
import socket
import stat
import struct
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
ACCEPT_REST_S = 0.1
_PEER = struct.Struct("3i")  # of SO_PEERCRED: pid, uid, gid
LINES_IN_A_ROW = 16


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


class Connection:
    """One peer of a unix socket: bytes in, bytes out.

    A task that waits for nothing is not switched away from, as after each operation of trio's own stream: an answer
    that fits into the socket's buffer is sent at once. Who has data to read waits its turn.
    """

    __slots__ = ("_came", "_most", "_sock")  # of each there is one for every idle agent

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._came: list[int] | None = None
        self._most = 0

    async def receive_some(self, max_bytes: int = RECEIVE_BYTES) -> bytes:
        """What has come, empty at a hang-up. Raises trio.BrokenResourceError or trio.ClosedResourceError."""
        while True:
            await trio.lowlevel.wait_readable(self._fd())
            try:
                return self._sock.recv(max_bytes) if self._came is None else self._receive_descriptors(max_bytes)
            except BlockingIOError:
                pass
            except OSError as exc:
                raise self._broken() from exc

    def take_descriptors(self, most: int) -> list[int]:
        """From now on descriptors that come with the bytes are kept in this list, for whoever takes them out of it.

        They stand there in their order once the bytes that they came with were received. Those over `most` are closed
        at once, those that nobody took with the connection. Without this the kernel closes them all.
        """
        self._came, self._most = [], most
        return self._came

    def _receive_descriptors(self, max_bytes: int) -> bytes:
        assert self._came is not None
        data, new, _, _ = socket.recv_fds(self._sock, max_bytes, self._most, socket.MSG_CMSG_CLOEXEC)
        room = self._most - len(self._came)
        self._came += new[:room]
        for descriptor in new[room:]:
            os.close(descriptor)
        return data

    def peer_uid(self) -> int:
        """Whose process has connected: the kernel says so."""
        return int(_PEER.unpack(self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))[1])

    async def send_all(self, data: bytes, descriptor: int | None = None) -> None:
        """Hand all of it to the socket, an open file with it. Cancelled, it may have sent a part.

        Raises as `receive_some` does.
        """
        view = memoryview(data)
        if descriptor is not None:
            # Nothing was sent before: there is room for a byte.
            view = view[socket.send_fds(self._sock, [view[:1]], [descriptor]) :]
        while True:
            try:
                view = view[self._sock.send(view) :]
            except BlockingIOError:
                pass
            except OSError as exc:
                raise self._broken() from exc
            if not view:
                return
            await trio.lowlevel.wait_writable(self._fd())

    @property
    def sock(self) -> socket.socket:
        """The socket itself, for a process that goes on with it; it is closed with the connection."""
        return self._sock

    def _fd(self) -> int:
        if (fd := self._sock.fileno()) < 0:
            raise trio.ClosedResourceError("this connection was closed")
        return fd

    def _broken(self) -> trio.BrokenResourceError | trio.ClosedResourceError:
        if self._sock.fileno() < 0:
            return trio.ClosedResourceError("this connection was closed")
        return trio.BrokenResourceError("the peer has hung up")

    def close(self) -> None:
        """Hang up; whoever waits for the connection gets a ClosedResourceError."""
        while self._came:
            os.close(self._came.pop())
        if self._sock.fileno() >= 0:
            trio.lowlevel.notify_closing(self._sock)
            self._sock.close()


async def serve_unix(sock: socket.socket, handler: Callable[[Connection], Awaitable[None]]) -> None:
    """Hand each connection to `handler`, until cancelled. A handler that fails ends its own connection alone.

    Connections over CONNECTIONS_LIMIT are closed at once: one client must not take every descriptor.
    """
    path, count = sock.getsockname(), 0

    async def guarded(stream: Connection) -> None:
        nonlocal count
        try:
            # A hang-up comes out of a handler's nursery in a group.
            try:
                await handler(stream)
            except* (trio.BrokenResourceError, trio.ClosedResourceError):
                pass
        except Exception:
            log.exception("a connection on %s failed", path)
        finally:
            count -= 1
            stream.close()

    with sock:
        async with trio.open_nursery() as nursery:
            while True:
                stream = await _accept(sock)
                if count == CONNECTIONS_LIMIT:
                    log.warning("a connection on %s over the limit of %d was closed", path, CONNECTIONS_LIMIT)
                    stream.close()
                else:
                    count += 1
                    nursery.start_soon(guarded, stream)


async def _accept(sock: socket.socket) -> Connection:
    """The next connection. While the process may open no more files, it waits in the queue of the socket."""
    while True:
        await trio.lowlevel.wait_readable(sock)
        try:
            return Connection(sock.accept()[0])
        except (BlockingIOError, ConnectionAbortedError):
            pass  # it has left already
        except OSError as exc:
            if exc.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                raise
            log.error("cannot take a connection on %s now: %s", sock.getsockname(), exc.strerror)
            await trio.sleep(ACCEPT_REST_S)


class Lines:
    """JSON lines over a stream: objects in, objects out. Whoever sends many at once lets others go between."""

    __slots__ = ("_in_a_row", "_ready", "_splitter", "_stream")

    def __init__(self, stream: Connection, limit_bytes: int = LINE_LIMIT_BYTES) -> None:
        self._stream = stream
        self._splitter = LineSplitter(limit_bytes)
        self._ready: deque[bytes | Refusal] = deque()
        self._in_a_row = 0  # lines that were taken without waiting for any

    async def next_line(self) -> bytes | Refusal | None:
        """The next line, the Refusal of one that is too long or that a hang-up cut in half, or None after the last."""
        while not self._ready:
            data = await self._stream.receive_some()
            if not data:
                return self._splitter.end()
            self._ready.extend(self._splitter.feed(data))
            self._in_a_row = 0
        self._in_a_row += 1
        if self._in_a_row > LINES_IN_A_ROW:
            # What is read at once can be thousands of lines, each of which has its answer without waiting.
            await trio.lowlevel.checkpoint()
            self._in_a_row = 1
        return self._ready.popleft()

    async def next(self) -> dict[str, Any] | Refusal | None:
        """The next object, the Refusal of a bad line or of one that a hang-up cut in half, or None after the last."""
        while isinstance(line := await self.next_line(), bytes):
            if line.strip():
                try:
                    return decode(line)
                except Refusal as refusal:
                    return refusal
        return line

    async def send(self, obj: object) -> None:
        """Send one object whole. A peer that does not read holds up its own connection and nothing else."""
        await self._stream.send_all(encode(obj))
