"""What the proxy of agents costs, beside the same host connected to directly."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import trio

from hive_agent.loopback import serve_loopback
from hive_core.egress_rules import expand
from tests.bench.figures import figure, say
from tests.bench.group_start import CHECKOUT

ROUNDS = 7
BYTES = 1024 * 1024 * 1024
CONNECTS = 300
PIECE = 1024 * 1024
LIMITS = {"connections": 100, "connection_s": 3600.0, "idle_s": 300.0, "connect_s": 20.0}


def measure() -> Iterator[dict[str, Any]]:
    with _host() as port, _proxy(port) as path, _loopback(path) as inside:
        yield from _throughput(path, inside, port)
        yield _connect(path, port)


def _throughput(path: Path, inside: int, port: int) -> Iterator[dict[str, Any]]:
    """At the proxy's socket, and as an agent's program has it: with its harness's loopback between."""
    say(f"egress_throughput: {ROUNDS} x {BYTES >> 20} MiB each way, directly and both ways through the proxy")
    for way, take in (("", _download), ("_up", _upload)):
        proxied, led, direct = [], [], []
        for _ in range(ROUNDS):
            direct.append(take(_direct(port)))
            proxied.append(take(_tunnel(path, port)))
            led.append(take(_tunnel(inside, port)))
        peer = "directly on loopback", statistics.median(direct)
        yield figure(f"egress_throughput{way}", statistics.median(proxied), "GB/s", *peer, digits=2)
        yield figure(f"egress_throughput_agent{way}", statistics.median(led), "GB/s", *peer, digits=2)


def _connect(path: Path, port: int) -> dict[str, Any]:
    say(f"egress_connect: {CONNECTS} connections until the first byte is back, with and without the proxy")
    proxied, direct = [], []
    for _ in range(CONNECTS):
        for times, dial in ((direct, lambda: _direct(port)), (proxied, lambda: _tunnel(path, port))):
            begin = time.perf_counter()
            with dial() as sock:
                sock.sendall(b"e")
                assert sock.recv(1) == b"e"
                times.append((time.perf_counter() - begin) * 1e3)
    return figure("egress_connect", statistics.median(proxied) - statistics.median(direct), "ms added", digits=2)


def _direct(port: int) -> socket.socket:
    return socket.create_connection(("localhost", port))


def _tunnel(proxy: Path | int, port: int) -> socket.socket:
    """By the proxy's socket, or by a port of a loopback that leads there."""
    if isinstance(proxy, int):
        sock = _direct(proxy)
    else:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(proxy))
    sock.sendall(f"CONNECT localhost:{port} HTTP/1.1\r\nHost: localhost:{port}\r\n\r\n".encode())
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += sock.recv(1)
    assert head.startswith(b"HTTP/1.1 200 "), head
    return sock


def _download(sock: socket.socket) -> float:
    """GB/s."""
    taken, buffer = 0, bytearray(PIECE)
    with sock:
        begin = time.perf_counter()
        sock.sendall(b"d")
        while count := sock.recv_into(buffer):
            taken += count
        assert taken == BYTES
        return taken / (time.perf_counter() - begin) / 1e9


def _upload(sock: socket.socket) -> float:
    piece = bytes(PIECE)
    with sock:
        begin = time.perf_counter()
        sock.sendall(b"u")
        for _ in range(BYTES // PIECE):
            sock.sendall(piece)
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(1) == b"u"
        return BYTES / (time.perf_counter() - begin) / 1e9


# -- the host ---------------------------------------------------------------------------------------------------------


@contextmanager
def _host() -> Iterator[int]:
    """Does what the first byte of a connection says: d sends so many bytes, u takes all, e sends the byte back."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = multiprocessing.get_context("fork").Process(target=_serve, args=(listener,), daemon=True)
        process.start()
        try:
            yield listener.getsockname()[1]
        finally:
            process.kill()
            process.join()


def _serve(listener: socket.socket) -> None:
    piece, buffer = bytes(PIECE), bytearray(PIECE)
    while True:
        with listener.accept()[0] as sock:
            what = sock.recv(1)
            if what == b"d":
                for _ in range(BYTES // PIECE):
                    sock.sendall(piece)
            elif what == b"u":
                while sock.recv_into(buffer):
                    pass
            if what != b"d":
                sock.sendall(what)


# -- the proxy --------------------------------------------------------------------------------------------------------


@contextmanager
def _proxy(port: int) -> Iterator[Path]:
    """A proxy, as the daemon starts one, that serves an agent; its egress.sock."""
    ours, theirs = socket.socketpair()
    with tempfile.TemporaryDirectory() as folder, ours, socket.socket(socket.AF_UNIX) as listener:
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "hive_core.egress"],
                stdin=theirs,
                cwd=CHECKOUT,
                env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
            )
        path = Path(folder) / "egress.sock"
        listener.bind(str(path))
        listener.listen(128)
        rules = [one.to_wire() for one in expand([{"to": f"localhost:{port}", "addresses": ["127.0.0.1", "::1"]}])]
        line = json.dumps({"op": "serve", "agent": "iris", "rules": rules, "limits": LIMITS}).encode() + b"\n"
        sent = socket.send_fds(ours, [line[:1]], [listener.fileno()])
        ours.sendall(line[sent:])
        hearing = threading.Thread(target=_hear, args=(ours,))
        hearing.start()
        try:
            yield path
        finally:
            ours.shutdown(socket.SHUT_WR)
            process.wait()
            hearing.join()


@contextmanager
def _loopback(path: Path) -> Iterator[int]:
    """An agent's loopback, as its harness has it, to that socket; its port."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=trio.run, args=(_lead_out, path, theirs), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        process.kill()
        process.join()


async def _lead_out(path: Path, told: Connection) -> None:
    async with trio.open_nursery() as nursery:
        told.send(await nursery.start(serve_loopback, str(path)))


def _hear(sock: socket.socket) -> None:
    """As the daemon does, for a proxy waits while nobody hears it."""
    while sock.recv(65_536):
        pass
