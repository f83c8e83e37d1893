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
from pathlib import Path
from typing import Any

from hive_core.egress_rules import expand
from tests.bench.figures import figure, say
from tests.bench.group_start import CHECKOUT

ROUNDS = 7
BYTES = 1024 * 1024 * 1024
CONNECTS = 300
PIECE = 1024 * 1024
LIMITS = {"connections": 100, "connection_s": 3600.0, "idle_s": 300.0, "connect_s": 20.0}


def measure() -> Iterator[dict[str, Any]]:
    with _host() as port, _proxy(port) as path:
        yield from _throughput(path, port)
        yield _connect(path, port)


def _throughput(path: Path, port: int) -> Iterator[dict[str, Any]]:
    say(f"egress_throughput: {ROUNDS} x {BYTES >> 20} MiB each way, with and without the proxy")
    for name, take in (("egress_throughput", _download), ("egress_throughput_up", _upload)):
        proxied, direct = [], []
        for _ in range(ROUNDS):
            direct.append(take(_direct(port)))
            proxied.append(take(_tunnel(path, port)))
        yield figure(
            name, statistics.median(proxied), "GB/s", "directly on loopback", statistics.median(direct), digits=2
        )


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


def _tunnel(path: Path, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))
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


def _hear(sock: socket.socket) -> None:
    """As the daemon does, for a proxy waits while nobody hears it."""
    while sock.recv(65_536):
        pass
