"""An agent in a real sandbox wishes for a host by trying it, and what becomes of that; and what a kill costs it."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from hive_core.cli.client import Client
from tests.checkouts import Checkout
from tests.daemons import Daemon
from tests.nspawn.test_reach import NAMED, serving
from tests.processes import look_until, pids_naming
from tests.swarm.test_outlive import WELCOME, open_swarm, spawn

# Asks the proxy for a tunnel and says how it answered, and what came through; holds it until a file is there.
TRY = """
import os, socket, sys, urllib.parse
proxy, where = urllib.parse.urlsplit(os.environ["https_proxy"]), sys.argv[1]
with socket.create_connection((proxy.hostname, proxy.port), 60) as sock:
    sock.sendall(f"CONNECT {where} HTTP/1.1\\r\\nHost: {where}\\r\\n\\r\\n".encode())
    answer = sock.makefile("rb")
    print(answer.readline().decode().strip().removeprefix("HTTP/1.1 "))
    if "hold" in sys.argv:
        answer.readline()
        open("/state/held", "w").close()
        print("then", answer.read())
"""
TRIES = {
    "from": "operator",
    "do": [
        {"run": f"sh -c '{sys.executable} -P /state/try.py '{{body}}", "save": "found"},
        {"tool": "send", "args": {"to": "operator", "body": "found {found}"}},
    ],
}
TELLS = {"from": "system", "match": "approval", "do": [{"tool": "send", "args": {"to": "operator", "body": "{body}"}}]}


def deploy(daemon: Daemon, client: Client, name: str, entries: list[str]) -> None:
    """Let an agent reach these, by a commit that is approved."""
    config = daemon.state / "proposed" / name / "config"
    toml = f"{(config / 'agent.toml').read_text()}egress = {json.dumps(entries)}\n"
    sha = Checkout(config).commit(agent__toml=toml)
    asked = client.call("request_apply_commit", agent=name, sha=sha, reason="a test")
    digest = client.call("show", approval=asked["approval"])["digest"]
    assert client.call("approve", approval=asked["approval"], digest=digest)["state"] == "done"


class Iris:
    """A hive with iris, who tries what she is told."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.client = daemon.start()
        spawn(self.client, "iris", [WELCOME, TRIES, TELLS])
        self.state = daemon.state / "agents" / "iris" / "state"
        (self.state / "try.py").write_text(TRY)
        self._seen = 0

    def send(self, words: str) -> None:
        self.client.call("send", to="iris", body=f" {words}")

    def said(self) -> str:
        event = self.daemon.events(self.client, self._is_hers, after=self._seen)
        self._seen = event["seq"]
        return str(self.client.call("message", message=event["data"]["message"])["body"]).removeprefix("found ")

    def _is_hers(self, event: dict[str, Any]) -> bool:
        return event["kind"] == "message_sent" and (event["actor"], event["agent"]) == ("iris", "operator")

    def tries(self, where: str) -> str:
        self.send(where)
        return self.said()

    def let(self, *entries: str) -> None:
        deploy(self.daemon, self.client, "iris", list(entries))

    def connections(self, verdict: str) -> list[dict[str, Any]]:
        self.client.call("reach", agent="iris")  # what is not written yet is by now
        events = [e for e in self.client.stream("events") if e["kind"] == "connection"]
        return [e["data"] for e in events if e["data"]["verdict"] == verdict]


def proxy_of(daemon: Daemon) -> int:
    def parent(pid: int) -> int:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

    return look_until(lambda: [pid for pid in pids_naming("hive_core.egress") if parent(pid) == daemon.process.pid])[0]


def test_what_an_agent_tries_is_asked_for_and_a_click_lets_it_with_the_next_try() -> None:
    with serving() as port, open_swarm() as daemon:
        iris, where = Iris(daemon), "unlisted.example:443"
        refused = iris.tries(where)
        (card,) = iris.client.call("pending")["approvals"]
        told = f"asked the operator (approval {card['id']}); you are told when it is decided"
        assert refused == f"403 cannot connect: {where} is not in egress of agent.toml; {told}"
        assert (card["kind"], card["requested_by"], card["payload"]["to"]) == ("egress", "iris", where)
        assert f"the operator is asked already (approval {card['id']})" in iris.tries(where)
        assert iris.client.call("approve", approval=card["id"], digest=card["digest"])["state"] == "done"
        assert f"iris wants {where}: approved" in iris.said()
        # It is listed now, and what is left is where its name leads.
        assert f"502 cannot connect to {where}: its name cannot be resolved" in iris.tries(where)
        own = iris.tries(f"localhost:{port}")
        assert own.endswith(
            'it is no public name, and needs an entry with addresses = ["127.0.0.1"]; let hm1nd propose it'
        )
        assert iris.client.call("pending")["approvals"] == []
        turns = {one["turn"] for one in iris.connections("refused")}
        assert len(turns) == 3
        assert None not in turns


def test_a_killed_proxy_and_a_killed_daemon_cut_what_is_open_and_the_next_try_works() -> None:
    with serving() as port, open_swarm() as daemon:
        iris, where = Iris(daemon), f"{NAMED}:{port}"
        iris.let(where)
        for kill in (lambda: os.kill(proxy_of(daemon), signal.SIGKILL), daemon.kill):
            (iris.state / "held").unlink(missing_ok=True)
            iris.send(f"{where} hold")
            look_until((iris.state / "held").exists)
            proxy = proxy_of(daemon)
            assert iris.client.call("reach", agent="iris")["total"]["open"] == 1
            kill()
            look_until(lambda proxy=proxy: not Path(f"/proc/{proxy}").exists())  # type: ignore[misc]
            if daemon.process.poll() is not None:
                iris.client = daemon.start()
            assert iris.said() == "200 Connection established\nthen b''"
            assert iris.tries(where) == "200 Connection established"
        reasons = {one["reason"] for one in iris.connections("cut")}
        assert reasons == {"the hive's proxy ended, and is started anew", "the daemon ended while it was open"}


@pytest.mark.parametrize("verb", ["pause", "kill", "estop"])
def test_a_pause_a_kill_and_an_estop_cut_what_is_open(verb: str) -> None:
    with serving() as port, open_swarm() as daemon:
        iris, where = Iris(daemon), f"{NAMED}:{port}"
        iris.let(where)
        iris.send(f"{where} hold")
        look_until((iris.state / "held").exists)
        iris.client.call(verb, **({} if verb == "estop" else {"agent": "iris"}))
        daemon.events(iris.client, lambda e: e["kind"] == "connection" and e["data"]["how"] == "tunnel")
        (ended,) = iris.connections("passed" if verb == "kill" else "cut")
        assert verb == "kill" or ended["reason"] == "the daemon cut it"
