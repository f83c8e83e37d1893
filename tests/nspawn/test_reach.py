"""A whole hive whose agent reaches what its configuration names, by an approval, and nothing else: in a container of
systemd-nspawn's, and in bubblewrap."""

from __future__ import annotations

import http.server
import json
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from hive_core.cli.client import Client
from tests.daemons import Daemon
from tests.swarm.test_changes import approve, ask
from tests.swarm.test_host_network import give_and_take_back
from tests.swarm.test_outlive import WELCOME, open_swarm, spawn

# Two names of this machine that no_proxy has not; a hive takes one for what it is only when it is named.
NAMED, OTHER = "127.0.0.2", "127.0.0.3"
LOOK = r"""
import json, os, socket, sys, urllib.error, urllib.parse, urllib.request

given, told = json.load(open("/state/given")), {}
proxy = urllib.parse.urlsplit(os.environ.get("https_proxy", "http://none:1"))
for name, url in given["urls"].items():
    try:
        told[name] = urllib.request.urlopen(url, timeout=60).read().decode()
    except urllib.error.HTTPError as exc:
        told[name] = f"{exc.code} {exc.reason}"
    except OSError as exc:
        told[name] = str(exc)
for name, target in given["tunnels"].items():
    with socket.create_connection((proxy.hostname, proxy.port), 60) as sock:
        sock.sendall(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
        told[name] = sock.makefile("rb").readline().decode().strip().removeprefix("HTTP/1.1 ")
for name, (family, address) in given["around"].items():
    address = tuple(address) if isinstance(address, list) else address
    try:
        with socket.socket(getattr(socket, family)) as sock:
            sock.settimeout(60)
            sock.connect(address)
            told[name] = "reached"
    except OSError as exc:
        told[name] = exc.errno
json.dump(told, open("/state/told", "w"))
"""
LOOKS = [
    {
        "from": "operator",
        "match": f"look {number}",
        "do": [
            {"run": f"{sys.executable} -P /state/look.py && echo well", "save": "end"},
            {"tool": "send", "args": {"to": "operator", "body": f"looked {number}: {{end}}"}},
        ],
    }
    for number in (1, 2)
]


@contextmanager
def serving() -> Iterator[int]:
    """A server on every address of this machine: a page, and one that leads to the same by another address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            away = self.path == "/away"
            self.send_response(302 if away else 200)
            if away:
                self.send_header("Location", f"http://{OTHER}:{self.server.server_address[1]}/")
            self.send_header("Content-Length", "0" if away else "7")
            self.end_headers()
            self.wfile.write(b"" if away else b"served\n")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("0.0.0.0", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def look(daemon: Daemon, client: Client, number: int, **given: Any) -> dict[str, Any]:
    """What iris finds, looking so for the time `number`."""
    state = daemon.state / "agents" / "iris" / "state"
    (state / "look.py").write_text(LOOK)
    (state / "given").write_text(json.dumps({"urls": {}, "tunnels": {}, "around": {}, **given}))
    client.call("send", to="iris", body=f"look {number}")
    assert "well" in daemon.wait_message(client, f"looked {number}")["body"]
    told: dict[str, Any] = json.loads((state / "told").read_text())
    return told


@pytest.mark.parametrize("sandbox", ["bwrap", "nspawn"])
def test_an_agent_reaches_what_was_approved_and_nothing_else(sandbox: str) -> None:
    with serving() as port, open_swarm(f"--sandbox={sandbox}") as daemon:
        client = daemon.start()
        spawn(client, "iris", [WELCOME, *LOOKS])
        page, dashboard = f"http://{NAMED}:{port}/", urllib.parse.urlsplit(client.call("status")["dashboard"]).port
        before = look(daemon, client, 1, urls={"page": page})
        toml = (daemon.state / "proposed" / "iris" / "config" / "agent.toml").read_text()
        listed = [f"http://{NAMED}:{port}", f"{NAMED}:{dashboard}", "localhost:443"]
        done = approve(client, ask(daemon, client, agent__toml=f"{toml}egress = {json.dumps(listed)}\n"))
        assert (done["state"], done["proof"]) == ("done", "healthy")
        told = look(
            daemon,
            client,
            2,
            urls={"page": page, "by a redirect": f"{page}away", "another": f"http://{OTHER}:{port}/"},
            tunnels={
                "unlisted": "elsewhere.example:443",
                "this machine by name": "localhost:443",
                "the dashboard": f"{NAMED}:{dashboard}",
                "for plain requests": f"{NAMED}:{port}",
            },
            around={
                "the dashboard itself": ["AF_INET", ["127.0.0.1", dashboard]],
                "the page itself": ["AF_INET", [NAMED, port]],
                "the network": ["AF_INET", ["192.0.2.1", 443]],
                "a name server": ["AF_INET", ["192.0.2.1", 53]],
            },
        )
        reach = client.call("reach", agent="iris")
    # What is behind the semicolon is how to ask for it.
    told = {name: found.partition(";")[0] if isinstance(found, str) else found for name, found in told.items()}
    by_name = told.pop("this machine by name")
    assert by_name.startswith("403 cannot connect to localhost:443: ")
    assert by_name.endswith(" is a loopback address, which `addresses` of its entry does not name")
    unlisted, the_hives = "is not in egress of agent.toml", "of this machine is the hive's own"
    plain = "is in egress of agent.toml for plain requests (GET, HEAD), not for tunnels"
    no_way, nobody = 101, 111
    assert before["page"].startswith(f"403 cannot connect: http://{NAMED}:{port} {unlisted}")
    assert told == {
        "page": "served\n",
        "by a redirect": f"403 cannot connect: http://{OTHER}:{port} {unlisted}",
        "another": f"403 cannot connect: http://{OTHER}:{port} {unlisted}",
        "unlisted": f"403 cannot connect: elsewhere.example:443 {unlisted}",
        "the dashboard": f"403 cannot connect to {NAMED}:{dashboard}: port {dashboard} {the_hives}",
        "for plain requests": f"403 cannot connect: {NAMED}:{port} {plain}",
        "the dashboard itself": nobody,
        "the page itself": nobody,
        "the network": no_way,
        "a name server": no_way,
    }
    (host,) = reach["hosts"]
    assert (host["host"], host["port"], host["connections"]) == (NAMED, port, 2)
    assert reach["total"]["refused"] == sum(one["count"] for one in reach["refusals"]) == 7


def test_an_agent_in_a_container_of_systemd_nspawns_is_given_the_hosts_network_and_loses_it() -> None:
    give_and_take_back("--sandbox=nspawn")
