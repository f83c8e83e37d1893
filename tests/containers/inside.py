"""What an agent's program would find of its network, tried in a container: what it may reach, and what it may not.

`look_around` runs this file's PROGRAM there, with the harness's own listener and environment of the hive's proxy.
"""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from hive_core.egress.reaching import system_resolver
from hive_core.sockets.unix import listen_unix
from tests.containers.drivers import dirs_in, run
from tests.egress_desk import Desk, open_desk, resolver_of

PROGRAM = r"""
import ctypes, json, os, socket, subprocess, sys, urllib.error, urllib.request
import trio
from hive_agent.claude_command import proxy_variables
from hive_agent.loopback import serve_loopback
from hive_agent.runner import Seat

given, told = json.load(open("/state/given")), {}

def asks(port, target):
    "The first line of what the proxy answers to one request, as it is written."
    with socket.create_connection(("127.0.0.1", port), 60) as sock:
        sock.sendall(target.encode("latin-1"))
        return sock.makefile("rb").readline().decode().strip()

def connects(family, address, kind=socket.SOCK_STREAM):
    with socket.socket(getattr(socket, family), kind) as sock:
        sock.settimeout(60)
        address = tuple(address) if isinstance(address, list) else address
        if kind == socket.SOCK_DGRAM:
            sock.sendto(b"x", address)
        else:
            sock.connect(address)
    return "reached"

def attempt(name, try_it, *arguments):
    try:
        told[name] = try_it(*arguments)
    except urllib.error.HTTPError as exc:
        told[name] = f"{exc.code} {exc.reason}"
    except socket.gaierror as exc:
        told[name] = "no such name"
    except OSError as exc:
        told[name] = f"errno {exc.errno}" if exc.errno else str(exc)

def make(family, kind, protocol):
    socket.socket(getattr(socket, family), getattr(socket, kind), protocol).close()
    return "made"

def fetches(url):
    return urllib.request.urlopen(url, timeout=60).read().decode()

def runs(words):
    done = subprocess.run(words, capture_output=True, text=True, cwd="/state", stdin=subprocess.DEVNULL)
    return [done.returncode, done.stdout[-4000:], done.stderr[-4000:]]

def look(port):
    for name, target in given["asks"].items():
        attempt(name, asks, port, target)
    for name, (family, address) in given["connects"].items():
        attempt(name, connects, family, address)
    for name, address in given["datagrams"].items():
        attempt(name, connects, "AF_INET", address, socket.SOCK_DGRAM)
    for name, words in given["sockets"].items():
        attempt(name, make, *words)
    for name, host in given["names"].items():
        attempt(name, lambda: socket.getaddrinfo(host, 443) and "found")
    for name, url in given["urls"].items():
        attempt(name, fetches, url)
    for name, words in given["commands"].items():
        attempt(name, runs, words)

async def main():
    async with trio.open_nursery() as nursery:
        port = await nursery.start(serve_loopback, "/run/hive/egress.sock")
        seat = Seat("iris", "/run/hive", "/state", "/root", "/root/.claude", os.environ["PATH"], None, True, 0, port)
        os.environ.update(proxy_variables(seat), **given["environment"])
        await trio.to_thread.run_sync(look, port)
        nursery.cancel_scope.cancel()

trio.run(main)
json.dump(told, open("/state/told", "w"))
"""
KINDS = ("asks", "connects", "datagrams", "sockets", "names", "urls", "commands", "environment")


@asynccontextmanager
async def open_exit(
    folder: Path,
    entries: Iterable[Any],
    names: Mapping[str, list[str]] | None = None,
    own_ports: Sequence[int] = (),
    **limits: Any,
) -> AsyncIterator[Desk]:
    """The hive's proxy behind iris's egress.sock, with rules; names: what the machine's resolver is to know, in the
    place of what it does."""
    run_dir = dirs_in(folder).run
    async with open_desk(run_dir, system_resolver() if names is None else resolver_of(names)) as desk:
        await desk.channel.send({"op": "own_ports", "ports": list(own_ports)})
        with listen_unix(run_dir / "egress.sock") as listener:
            await desk.serve_on(listener, entries, **limits)
        yield desk


async def look_around(folder: Path, sandbox: str, **given: Mapping[str, Any]) -> dict[str, Any]:
    """What became of each thing that was tried in a container of iris's, by its name.

    asks: requests to the proxy as they are written → the first line of the answer. connects, datagrams: to an address.
    sockets: to make one. names: to resolve one. urls: to fetch one, over redirects. commands: to run one → code, stdout
    and stderr. environment: more of it, for all of them.
    """
    dirs = dirs_in(folder)
    dirs.make()
    (dirs.state / "given").write_text(json.dumps({kind: given.get(kind, {}) for kind in KINDS}))
    (dirs.run / "program.py").write_text(PROGRAM)
    code, said = await run(folder, sandbox, f"{sys.executable} -P /run/hive/program.py")
    assert code == 0, said
    told: dict[str, Any] = json.loads((dirs.state / "told").read_text())
    return told
