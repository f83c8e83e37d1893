"""`hive-agent connect --socket PATH HOST PORT`: stdio on one side, a tunnel through the hive's proxy on the other.

For programs that know no proxy but run a command instead of connecting, ssh first of all (`ProxyCommand`). Exit code 1,
and the proxy's one line on stderr, when it does not let the tunnel be. Standard library alone, one thread.
"""

from __future__ import annotations

import os
import re
import select
import socket
import sys

HEAD_LIMIT_BYTES = 16 * 1024
READ_BYTES = 64 * 1024
ANSWER_WITHIN_S = 90.0  # the proxy has limits of its own, which are shorter
USAGE = "connect --socket PATH HOST PORT"
_HOST = re.compile(r"[A-Za-z0-9._:-]{1,255}")


def main(arguments: list[str], program: str) -> int:
    if len(arguments) != 4 or arguments[0] != "--socket":
        print(f"usage: {program} {USAGE}", file=sys.stderr)
        return 2
    path, host, port = arguments[1:]
    if not _HOST.fullmatch(host) or not (port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536):
        print(f"{program}: cannot connect: {host[:80]!r} {port[:8]!r} is no host and port", file=sys.stderr)
        return 2
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as proxy:
        proxy.settimeout(ANSWER_WITHIN_S)
        proxy.connect(path)
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        proxy.sendall(f"CONNECT {where} HTTP/1.1\r\nHost: {where}\r\n\r\n".encode("ascii"))
        refused, rest = _read_answer(proxy)
        if refused:
            print(f"{program}: cannot connect to {where}: {refused}", file=sys.stderr)
            return 1
        proxy.settimeout(None)
        _write(1, rest)
        _carry(proxy)
    return 0


def _read_answer(proxy: socket.socket) -> tuple[str, bytes]:
    """Why there is no tunnel, an empty text where there is one, and the first bytes that came through it."""
    head = b""
    while b"\r\n\r\n" not in head:
        if len(head) > HEAD_LIMIT_BYTES or not (data := proxy.recv(READ_BYTES)):
            return "the hive's proxy hung up", b""
        head += data
    head, _, rest = head.partition(b"\r\n\r\n")
    code, _, reason = head.split(b"\r\n")[0].decode("utf-8", "replace").partition(" ")[2].partition(" ")
    return "" if re.fullmatch(r"2\d\d", code) else (reason or code or "it said something else"), rest


def _carry(proxy: socket.socket) -> None:
    """Bytes both ways until the far side ends; the end of stdin is passed on as such."""
    sources = [0, proxy.fileno()]
    while True:
        for source in select.select(sources, [], [])[0]:
            if source == 0:
                data = os.read(0, READ_BYTES)
                if data:
                    proxy.sendall(data)
                else:
                    sources.remove(0)
                    proxy.shutdown(socket.SHUT_WR)
            else:
                if not (data := proxy.recv(READ_BYTES)):
                    return
                _write(1, data)


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
