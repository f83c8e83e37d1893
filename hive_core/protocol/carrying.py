"""Bytes from one socket to another, as the proxy and an agent's loopback carry them.

Much is spliced through a pipe in the kernel and never seen here. Little is copied, which costs less then: a splice pays
for each page, and a plain writer to a unix socket has no more in it at once than the kernel's own limit, some 200 KiB.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
from collections.abc import Callable, Iterator

import trio

PIPE_BYTES = 1024 * 1024
SEND_BUFFER_BYTES = 1024 * 1024  # of a unix socket that bytes are carried to: with the kernel's own, a third slower
COPY_BYTES = 256 * 1024  # what fills this is much, and what comes next is spliced
_FLAGS = os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE


class SideGone(Exception):
    """One of the two sockets has failed; `sock` is it."""

    def __init__(self, sock: trio.socket.SocketType, cause: OSError) -> None:
        super().__init__(cause.strerror or str(cause))
        self.sock = sock


class Pipes:
    """Large pipes, at most `limit` at once: their pages count for all that a user runs. An idle connection has none."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open = 0

    @contextlib.contextmanager
    def lend(self) -> Iterator[tuple[int, int] | None]:
        """A pipe for as long as much is carried; None where there is none to be had."""
        pipe = self._make() if self._open < self._limit else None
        self._open += pipe is not None
        try:
            yield pipe
        finally:
            self._open -= pipe is not None
            for end in pipe or ():
                os.close(end)

    def _make(self) -> tuple[int, int] | None:
        try:
            pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:  # the process may open no more files
            return None
        try:
            fcntl.fcntl(pipe[1], fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        except OSError:  # the user may have no more pages
            for end in pipe:
                os.close(end)
            return None
        return pipe


async def carry(
    source: trio.socket.SocketType,
    sink: trio.socket.SocketType,
    pipes: Pipes,
    count: Callable[[int], None] = lambda _: None,
) -> None:
    """Carry all that comes until the source ends, and end the sink's side then. Raises SideGone.

    count is told of bytes as the sink's socket takes them. Cancelled, what was read but not taken is lost.
    """
    carried: int | None = None
    while carried != 0:
        await trio.lowlevel.checkpoint()  # who always has more lets others go between
        carried = await _copy(source, sink, count)
        if carried == COPY_BYTES:
            with pipes.lend() as pipe:
                while pipe is not None and carried is not None and carried >= COPY_BYTES:
                    await trio.lowlevel.checkpoint()
                    carried = await _splice(source, sink, pipe, count)
        if carried is None:
            await trio.lowlevel.wait_readable(source)
    try:
        sink.shutdown(socket.SHUT_WR)
    except OSError as exc:
        raise SideGone(sink, exc) from None


async def _splice(
    source: trio.socket.SocketType, sink: trio.socket.SocketType, pipe: tuple[int, int], count: Callable[[int], None]
) -> int | None:
    """One pipe full: how many bytes; 0 at the end, None while there is nothing."""
    try:
        carried = left = os.splice(source.fileno(), pipe[1], PIPE_BYTES, flags=_FLAGS)
    except BlockingIOError:
        return None
    except OSError as exc:
        raise SideGone(source, exc) from None
    while left:
        try:
            taken = os.splice(pipe[0], sink.fileno(), left, flags=_FLAGS)
        except BlockingIOError:
            await trio.lowlevel.wait_writable(sink)
        except OSError as exc:
            raise SideGone(sink, exc) from None
        else:
            left -= taken
            count(taken)
    return carried


async def _copy(
    source: trio.socket.SocketType, sink: trio.socket.SocketType, count: Callable[[int], None]
) -> int | None:
    """The same without a pipe, of at most COPY_BYTES."""
    try:
        view = memoryview(os.read(source.fileno(), COPY_BYTES))
    except BlockingIOError:
        return None
    except OSError as exc:
        raise SideGone(source, exc) from None
    carried = len(view)
    while view:
        try:
            taken = os.write(sink.fileno(), view)
        except BlockingIOError:
            await trio.lowlevel.wait_writable(sink)
        except OSError as exc:
            raise SideGone(sink, exc) from None
        else:
            view = view[taken:]
            count(taken)
    return carried


def hung_up(sock: trio.socket.SocketType) -> bool:
    """Whether the other side of a unix socket has closed it altogether, and not only said that it sends no more."""
    poll = select.poll()
    poll.register(sock.fileno(), 0)
    return bool(poll.poll(0))
