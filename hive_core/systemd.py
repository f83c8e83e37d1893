"""sd_notify: one datagram to the service manager, or nothing where there is none. See sd_notify(3)."""

from __future__ import annotations

import os
import socket

import trio


def notify(state: str) -> None:
    """Tell the service manager; silent when it does not listen, since nothing depends on it."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address[0] == "@":
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.connect(address)
            sock.sendall(state.encode())
        except OSError:
            pass


async def serve_watchdog() -> None:
    """Tell the service manager again and again that this loop runs, twice in each of its WATCHDOG_USEC.

    It restarts a daemon that hangs. Returns at once where no watchdog was asked for, or of another process.
    """
    asked, process = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if not asked.isdecimal() or not int(asked) or process not in ("", str(os.getpid())):
        return
    while True:
        notify("WATCHDOG=1")
        await trio.sleep(int(asked) / 1e6 / 2)
