"""The ways out: a listener on the sandbox's own loopback for each, whose bytes go to a socket of the host.

The agent's program needs an http:// address, of the model (model.sock) and of the hive's proxy (egress.sock); the
sandbox has no network but its loopback. Bytes pass unread but for how an answer of the proxy begins. On a
loopback that others of the machine are on too, a connection is another user's unless the kernel says that it is of
ours.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Callable

import trio

from hive_core.protocol.carrying import SEND_BUFFER_BYTES, Pipes, SideGone, carry

HOST_PATIENCE_S = 60.0
PIPES_LIMIT = 2  # every agent may be of one user
LOOKS = 3  # at the kernel's table, from which a row may be missing while others leave it
REFUSED_S = 5.0  # that another's program has to read why
REFUSED_BYTES = 1024 * 1024
BEGIN_BYTES = 1024
Heed = Callable[[bytes], None]
_ORPHAN = "0"  # the inode of a socket that nobody holds any more: its uid says nothing


async def serve_loopback(
    host_socket: str, *, shared: bool = False, heed: Heed | None = None, task_status: trio.TaskStatus[int]
) -> None:
    """Serve until cancelled; `started` with the port. One connection's trouble ends that connection alone.

    shared: others of the machine are on this loopback; none but our own user is let through.
    heed: told how the answer to each CONNECT begins.
    """
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    task_status.started(listeners[0].socket.getsockname()[1])
    pipes = Pipes(PIPES_LIMIT)
    refused: set[str] = set()  # whose programs were told of

    async def serve(program: trio.SocketStream) -> None:
        async with program:
            if shared and (uid := _uid_of_peer(program)) != str(os.getuid()):
                if uid not in refused:
                    refused.add(uid)
                    print(f"refused uid {uid} a connection to this agent's loopback port", file=sys.stderr)
                await _refuse(program)
            else:
                await _relay(host_socket, program, pipes, heed)

    await trio.serve_listeners(serve, listeners)


def _uid_of_peer(program: trio.SocketStream) -> str:
    """Whose socket is at the other end, as this user namespace calls him; "unknown" of one that is gone."""
    try:
        ours, theirs = program.socket.getsockname(), program.socket.getpeername()
    except OSError:
        return "unknown"
    pair = f"{_hex(theirs)} {_hex(ours)}".encode()
    mapped = f"{_hex(theirs, mapped=True)} {_hex(ours, mapped=True)}".encode()
    for _ in range(LOOKS):
        for table, wanted in (("/proc/net/tcp", pair), ("/proc/net/tcp6", mapped)):
            if uid := _find_uid(table, wanted):
                return uid
    return "unknown"


def _find_uid(table: str, pair: bytes) -> str | None:
    try:
        with open(table, "rb") as rows:
            row = next((row for row in rows if pair in row), b"").decode().split()
    except OSError:  # without IPv6 there is no table of it
        return None
    return row[7] if row and row[9] != _ORPHAN else None


def _hex(address: tuple[str, int], *, mapped: bool = False) -> str:
    """An address of IPv4 as the kernel's tables have it; mapped: in an IPv6 one."""
    words = [0, 0, int.from_bytes(b"\0\0\xff\xff", sys.byteorder)] if mapped else []
    words.append(int.from_bytes(socket.inet_aton(address[0]), sys.byteorder))
    return "".join(f"{word:08X}" for word in words) + f":{address[1]:04X}"


async def _refuse(program: trio.SocketStream) -> None:
    why = b"cannot connect: this port is of an agent of the hive, and lets its own user through alone\n"
    head = b"HTTP/1.1 403 Forbidden\r\nContent-Type: text/plain\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
    with trio.move_on_after(REFUSED_S), contextlib.suppress(trio.BrokenResourceError):
        await program.send_all(head % len(why) + why)
        await program.send_eof()
        taken = 0
        while taken < REFUSED_BYTES and (data := await program.receive_some()):
            taken += len(data)


async def _relay(host_socket: str, program: trio.SocketStream, pipes: Pipes, heed: Heed | None) -> None:
    is_tunnel = False

    async def look(source: trio.SocketStream, heed: Heed) -> None:
        """At how a side begins, which is carried all the same."""
        nonlocal is_tunnel
        begin = await source.socket.recv(BEGIN_BYTES, socket.MSG_PEEK)
        if source is program:
            is_tunnel = begin.startswith(b"CONNECT ")
        elif is_tunnel:
            heed(begin)

    host = await _dial(host_socket)
    if host is None:
        return
    async with host, trio.open_nursery() as ways:

        async def one_way(source: trio.SocketStream, sink: trio.SocketStream) -> None:
            try:
                if heed is not None:
                    await look(source, heed)
                await carry(source.socket, sink.socket, pipes)
            except (SideGone, OSError):
                ways.cancel_scope.cancel()

        ways.start_soon(one_way, program, host)
        ways.start_soon(one_way, host, program)


async def _dial(path: str) -> trio.SocketStream | None:
    """Connect to the host; None when it stays away. To the program a daemon that starts anew is only a pause."""
    delay_s = 0.1
    with trio.move_on_after(HOST_PATIENCE_S):
        while True:
            try:
                host = await trio.open_unix_socket(path)
                host.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
                return host
            except OSError:
                await trio.sleep(delay_s)
                delay_s = min(2 * delay_s, 1.0)
    return None
