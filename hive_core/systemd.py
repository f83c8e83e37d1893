"""sd_notify: one datagram to the service manager, or nothing where there is none. See sd_notify(3)."""

from __future__ import annotations

import os
import socket


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
