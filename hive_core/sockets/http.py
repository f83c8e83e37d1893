"""HTTP over a socket that we made ourselves, tcp or unix, by hypercorn."""

from __future__ import annotations

import socket
from functools import partial
from typing import Any

import trio
from hypercorn.config import Config
from hypercorn.trio import serve
from starlette.types import ASGIApp, Receive, Scope, Send

GRACE_S = 0.5


async def serve_asgi(app: ASGIApp, sock: socket.socket, stopping: trio.Event | None = None) -> None:
    """Serve an application on a listening socket until cancelled, or until `stopping` is set and answers have ended.

    The socket comes ready: hypercorn leaves files of unix sockets behind, and their modes to the umask.
    """
    config = Config()
    config.bind = [f"fd://{sock.detach()}"]
    config.graceful_timeout = GRACE_S
    config.include_server_header = False
    config.accesslog = None
    config.errorlog = None
    application: Any = partial(_without_lifespan, app)  # hypercorn's types name its own scopes
    await serve(application, config, shutdown_trigger=stopping.wait if stopping is not None else None)


async def _without_lifespan(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Our applications are opened by the daemon; hypercorn's own question about start and end is answered here."""
    if scope["type"] != "lifespan":
        await app(scope, receive, send)
        return
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
