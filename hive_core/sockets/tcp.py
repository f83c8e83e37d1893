"""Tcp sockets that listen: the dashboard's, and those of agents' pages."""

from __future__ import annotations

import errno
import socket

from hive_core.config import Config
from hive_core.protocol.paths import explain
from hive_core.protocol.refusal import Refusal

SLOW_READER_MS = 20_000


def listen_tcp(host: str, port: int) -> socket.socket:
    """A listening socket. Raises OSError when the port is busy or the host is not this machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # hypercorn's writes cannot be cancelled: without this a reader that does not read would hold up a stop.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SLOW_READER_MS)
        sock.bind((host, port))
        sock.listen(128)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def listen_dashboard(config: Config) -> socket.socket:
    try:
        return listen_tcp(config.dashboard_host, config.dashboard_port)
    except OSError as exc:
        where = f"{config.dashboard_host}:{config.dashboard_port}"
        setting = "dashboard_port" if exc.errno in (errno.EADDRINUSE, errno.EACCES) else "dashboard_host"
        raise Refusal("refused", f"cannot serve the dashboard on {where}: {explain(exc, setting)}") from None
