"""The ways out: a listener on the sandbox's own loopback for each, whose bytes go to a socket of the host.

The agent's program needs an http:// address, of the model (model.sock) and of the hive's proxy (egress.sock); the
sandbox has no network but its loopback. Bytes pass unread.
"""

from __future__ import annotations

import functools

import trio

HOST_PATIENCE_S = 60.0
READ_BYTES = 64 * 1024


async def serve_loopback(host_socket: str, *, task_status: trio.TaskStatus[int]) -> None:
    """Serve until cancelled; `started` with the port. One connection's trouble ends that connection alone."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    task_status.started(listeners[0].socket.getsockname()[1])
    await trio.serve_listeners(functools.partial(_relay, host_socket), listeners)


async def _relay(host_socket: str, program: trio.SocketStream) -> None:
    async with program:
        host = await _dial(host_socket)
        if host is None:
            return
        async with host, trio.open_nursery() as pumps:
            pumps.start_soon(_pump, program, host, pumps.cancel_scope)
            pumps.start_soon(_pump, host, program, pumps.cancel_scope)


async def _dial(path: str) -> trio.SocketStream | None:
    """Connect to the host; None when it stays away. To the program a daemon that starts anew is only a pause."""
    delay_s = 0.1
    with trio.move_on_after(HOST_PATIENCE_S):
        while True:
            try:
                return await trio.open_unix_socket(path)
            except OSError:
                await trio.sleep(delay_s)
                delay_s = min(2 * delay_s, 1.0)
    return None


async def _pump(source: trio.SocketStream, sink: trio.SocketStream, both: trio.CancelScope) -> None:
    """Carry bytes one way; the end of them is passed on as such, a broken side ends both ways."""
    try:
        while data := await source.receive_some(READ_BYTES):
            await sink.send_all(data)
        await sink.send_eof()
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        both.cancel()
