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
from collections.abc import Callable

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
    """Empty pipes, which are lent while there is something in them: an idle connection holds none.

    limit: how many are kept, and how many are large
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: list[tuple[int, int]] = []
        self._open = 0

    def take(self) -> tuple[int, int] | None:
        """A pipe; None while the process may open no more files. The first ones are large."""
        if self._kept:
            return self._kept.pop()
        try:
            pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        self._open += 1
        if self._open <= self._limit:
            with contextlib.suppress(OSError):  # a user without the right to more has so many pages for all pipes
                fcntl.fcntl(pipe[1], fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        return pipe

    def give_back(self, pipe: tuple[int, int]) -> None:
        """An empty pipe."""
        if len(self._kept) < self._limit:
            self._kept.append(pipe)
        else:
            self.drop(pipe)

    def drop(self, pipe: tuple[int, int]) -> None:
        self._open -= 1
        for end in pipe:
            os.close(end)

    def close(self) -> None:
        while self._kept:
            self.drop(self._kept.pop())


async def carry(
    source: trio.socket.SocketType,
    sink: trio.socket.SocketType,
    pipes: Pipes,
    count: Callable[[int], None] = lambda _: None,
) -> None:
    """Carry all that comes until the source ends, and end the sink's side then. Raises SideGone.

    count is told of bytes as the sink's socket takes them. Cancelled, what was read but not taken is lost.
    """
    is_much = False
    while True:
        await trio.lowlevel.checkpoint()  # who always has more lets others go between
        pipe = pipes.take() if is_much else None
        if pipe is None:
            carried = await _copy(source, sink, count)
        else:
            left = True
            try:
                carried = await _splice(source, sink, pipe, count)
                left = False
            finally:
                if left:
                    pipes.drop(pipe)
            pipes.give_back(pipe)
        if carried is None:
            await trio.lowlevel.wait_readable(source)
        elif not carried:
            break
        is_much = carried is not None and carried >= COPY_BYTES
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
    """The same without a pipe, and less of it."""
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
