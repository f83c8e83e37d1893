"""An agent of a real hive that is given the host's network, keeps it over a restart of the daemon, and loses it."""

from __future__ import annotations

import ctypes
import socket
import sys
from typing import Any

from hive_core.cli.client import Client
from tests.daemons import Daemon
from tests.swarm.test_changes import approve, ask, mail_of
from tests.swarm.test_outlive import WELCOME, open_swarm, pid_of, spawn


def _rule(port: int, name: str, number: int) -> dict[str, Any]:
    """Asked so for the time `number` iris tells whether it reaches a port of the host's loopback, whether an abstract
    socket, and whether its way to the model, which no other user of the machine may take, is open to itself."""
    connect = f"import socket; socket.create_connection(('127.0.0.1', {port}))"
    knock = f"import socket; socket.socket(socket.AF_UNIX).connect(chr(0) + '{name}')"
    run = f'{sys.executable} -c "{connect}" 2>/dev/null && echo reaches it || echo is alone'
    run += f'; {sys.executable} -c "{knock}" 2>/dev/null && echo and a socket'
    run += "; curl -s $ANTHROPIC_BASE_URL | grep -q 'the relay of this hive' || echo not its model; true"
    told = {"to": "operator", "body": f"{number}: iris {{found}}"}
    return {
        "from": "operator",
        "match": f"reach {number}",
        "do": [{"run": run, "save": "found"}, {"tool": "send", "args": told}],
    }


def _asked(daemon: Daemon, client: Client, number: int) -> str:
    client.call("send", to="iris", body=f"reach {number}")
    return str(daemon.wait_message(client, f"{number}: iris ")["body"]).strip()


def _tells_sockets_apart() -> bool:
    return ctypes.CDLL(None).syscall(444, None, ctypes.c_ulong(0), 1) >= 6  # landlock_create_ruleset(2)


def _network(client: Client) -> str:
    return next(agent["network"] for agent in client.call("list")["agents"] if agent["name"] == "iris")


def _toml(daemon: Daemon, network: str) -> str:
    text = (daemon.state / "proposed" / "iris" / "config" / "agent.toml").read_text()
    lines = [line for line in text.splitlines(keepends=True) if not line.startswith("network")]
    return "".join([*lines, f'network = "{network}"\n'])


def test_a_click_gives_it_at_the_turns_edge_and_another_takes_it_back() -> None:
    give_and_take_back()


def give_and_take_back(*flags: str) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as abstract,
        open_swarm(*flags) as daemon,
    ):
        port, name = server.getsockname()[1], daemon.folder.name
        abstract.bind(f"\0{name}")
        abstract.listen()
        client = daemon.start()
        spawn(client, "iris", [WELCOME, *(_rule(port, name, number) for number in range(4))])
        assert (_asked(daemon, client, 0), _network(client)) == ("0: iris is alone", "private")
        before = pid_of(daemon, "iris")
        given = approve(client, ask(daemon, client, agent__toml=_toml(daemon, "host")))
        assert (given["state"], given["proof"]) == ("done", "healthy")
        reaches = "reaches it" if _tells_sockets_apart() else "reaches it\nand a socket"
        assert (_asked(daemon, client, 1), _network(client)) == (f"1: iris {reaches}", "host")
        after = pid_of(daemon, "iris")
        assert after != before, "its container is another"
        daemon.kill()
        client = daemon.start()
        assert (_asked(daemon, client, 2), _network(client)) == (f"2: iris {reaches}", "host")
        assert pid_of(daemon, "iris") == after, "the next daemon leaves it as it is"
        assert approve(client, ask(daemon, client, agent__toml=_toml(daemon, "private")))["state"] == "done"
        assert (_asked(daemon, client, 3), _network(client)) == ("3: iris is alone", "private")
        assert pid_of(daemon, "iris") != after
        assert not [body for body in mail_of(client, "hm1nd") if "crash" in body]
