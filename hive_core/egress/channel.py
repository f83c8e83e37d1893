"""What the daemon and the proxy say to each other: JSON lines over a unix socket, open files with them.

The daemon says:
  {"op": "serve", "agent": A, "rules": [Allowed…], "limits": {…}}   with the listening socket of the agent's egress.sock
  {"op": "rules", "agent": A, "rules": [Allowed…]}                  connections that they do not allow are cut
  {"op": "cut", "agent": A}        its connections are cut; others may follow
  {"op": "end", "agent": A}        they are cut, and its socket is served no more
  {"op": "own_ports", "ports": [P…]}   of the hive's on this machine, which nobody reaches
  {"op": "ping"}                   it says pong
  {"op": "answer", "id": I, "sentence": S}   to "ask": what the agent is told
The proxy says:
  {"op": "begun", "id": I, "agent": A, "host": H, "port": P, "how": "tunnel" or a method}
  {"op": "ask", "id": I, "agent": A, "host": H, "port": P, "how": …}   it is not in the agent's rules
  {"op": "ended", "id": I, "address": IP or null, "sent": bytes to the host, "received": bytes from it, "took_ms": T,
   "verdict": "passed", "refused", "failed" or "cut", "reason": S or null}
  {"op": "pong"}
An id counts from 1 in each process of the proxy. Of every "begun" there is one "ended", unless the process dies.
"""

from __future__ import annotations

import array
import contextlib
import socket
from collections import deque
from typing import Any

import trio

from hive_core.protocol.lines import LineSplitter, decode, encode
from hive_core.protocol.refusal import Refusal

RECEIVE_BYTES = 64 * 1024
FILES_AT_ONCE = 16


class ChannelBroken(Exception):
    """The other side is gone, or said what nobody here understands."""


class Channel:
    """One end. Of its tasks one reads; any may send."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = trio.socket.from_stdlib_socket(sock)
        self._sending = trio.Lock()
        self._splitter = LineSplitter()
        self._lines: deque[dict[str, Any]] = deque()
        self._files: deque[socket.socket] = deque()

    async def send(self, line: dict[str, Any], file: socket.socket | None = None) -> None:
        """Send a line whole, also when cancelled meanwhile. Raises ChannelBroken."""
        view = memoryview(encode(line))
        with trio.CancelScope(shield=True):
            async with self._sending:
                try:
                    if file is not None:
                        rights = array.array("i", [file.fileno()])
                        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
                        view = view[await self._sock.sendmsg([view[:1]], control) :]
                    while view:
                        view = view[await self._sock.send(view) :]
                except OSError as exc:
                    raise ChannelBroken("the other side has hung up") from exc

    async def next(self) -> dict[str, Any] | None:
        """The next line, or None after the last. Raises ChannelBroken."""
        while not self._lines:
            try:
                data, control, _, _ = await self._sock.recvmsg(
                    RECEIVE_BYTES, socket.CMSG_SPACE(FILES_AT_ONCE * 4), socket.MSG_CMSG_CLOEXEC
                )
            except OSError as exc:
                raise ChannelBroken("the other side has hung up") from exc
            for level, kind, rights in control:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    numbers = array.array("i")
                    numbers.frombytes(rights[: len(rights) - len(rights) % numbers.itemsize])
                    self._files.extend(socket.socket(fileno=number) for number in numbers)
            if not data:
                return None
            for line in self._splitter.feed(data):
                try:
                    if isinstance(line, Refusal):
                        raise line
                    self._lines.append(decode(line))
                except Refusal as refusal:
                    raise ChannelBroken(refusal.message) from None
        return self._lines.popleft()

    def take_file(self) -> socket.socket:
        """The socket that came with the line that was taken last: they come in the order of the lines."""
        if not self._files:
            raise ChannelBroken("a socket is missing that this line needs")
        return self._files.popleft()

    def hang_up(self) -> None:
        """Say that nothing more comes; what the other side still says is heard."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._sock.close()
        while self._files:
            self._files.popleft().close()
