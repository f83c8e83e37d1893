"""What the reconciler takes: of time until a crash is told, until many agents are ready or adopted; of cpu, idle."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from hive_core.cli.client import Client
from tests.bench.figures import figure, say
from tests.bench.group_start import all_idle, cpu_s
from tests.daemons import Daemon, open_daemon

CRASHES = 9
IDLE_AGENTS, IDLE_S = 20, 20.0
AGENTS = 100
FLAGS = ("--default-program=rehearsal",)
RULES = [
    {"from": "system", "match": "Welcome", "do": []},
    {"from": "operator", "match": "work", "do": [{"run": "while [ ! -e /state/go ]; do sleep 0.2; done"}]},
]
PERSONA = "A rehearsed agent.\n```rehearsal\n" + json.dumps(RULES) + "\n```\n"


def measure() -> Iterator[dict[str, Any]]:
    yield crash_to_event()
    yield reconcile_idle()
    yield from a_hundred()


def spawn(client: Client, count: int) -> list[str]:
    names = [f"agent{number}" for number in range(count)]
    for name in names:
        asked = client.call("request_spawn", agent=name, persona=PERSONA, reason="a measurement")
        digest = client.call("show", approval=asked["approval"])["digest"]
        assert client.call("approve", approval=asked["approval"], digest=digest)["state"] == "done"
    return names


def crash_to_event() -> dict[str, Any]:
    say("crash_to_event: an agent's first process is killed, until the manager's inbox has container_crash")
    times = []
    # Each crash is the first in a row: only that one is told.
    with open_daemon(*FLAGS, "--crash-loop-s=0.001", "--restart-s=0.01") as daemon:
        client = daemon.start()
        spawn(client, 1)
        all_idle(client, 2)
        for _ in range(CRASHES):
            seq = newest(client)
            begin = time.perf_counter()
            os.kill(first_inside(daemon, "agent0"), signal.SIGKILL)
            daemon.events(client, lambda e: e["kind"] == "message_sent" and e["agent"] == "hm1nd", after=seq)
            times.append(time.perf_counter() - begin)
            wait_for(client, lambda agents: all(agent["state"] == "idle" for agent in agents))
    return figure("crash_to_event", statistics.median(times), "s")


def newest(client: Client) -> int:
    """The number of the newest event."""
    return int(list(client.stream("events", limit=1))[-1]["seq"])


def first_inside(daemon: Daemon, name: str) -> int:
    lines = (daemon.state / "processes" / f"{name}.status").read_text().splitlines()
    return int(json.loads(lines[0])["child-pid"])


def wait_for(client: Client, wanted: Callable[[list[dict[str, Any]]], bool]) -> None:
    while not wanted(client.call("list")["agents"]):
        time.sleep(0.05)


def reconcile_idle() -> dict[str, Any]:
    say(f"reconcile_idle: cpu of the daemon with {IDLE_AGENTS} agents that wait, for {IDLE_S:.0f} s")
    with open_daemon(*FLAGS, "--end-agents-with-daemon") as daemon:
        client = daemon.start()
        spawn(client, IDLE_AGENTS)
        all_idle(client, IDLE_AGENTS + 1)
        time.sleep(2.0)
        before = cpu_s(daemon.process.pid)
        time.sleep(IDLE_S)
        used = cpu_s(daemon.process.pid) - before
    return figure("reconcile_idle", 100 * used / IDLE_S, "% of a cpu", digits=2)


def a_hundred() -> Iterator[dict[str, Any]]:
    say(f"ready_100, adopt_100: {AGENTS} agents from cold to hello; then those of a killed daemon, half in a turn")
    with open_daemon(*FLAGS) as daemon:
        client = daemon.start()
        names = spawn(client, AGENTS)
        all_idle(client, AGENTS + 1)
        with contextlib.suppress(Exception):
            list(client.stream("down"))
        daemon.process.wait()
        begin = time.perf_counter()
        client = daemon.start()
        wait_for(client, lambda agents: all(agent["state"] == "idle" for agent in agents))
        yield figure("ready_100", time.perf_counter() - begin, "s", digits=2)
        busy = names[::2]
        for name in busy:
            client.call("send", to=name, body="work")
        wait_for(client, lambda agents: sum(agent["state"] in ("thinking", "tool") for agent in agents) == len(busy))
        pids = {name: pid_of(daemon, name) for name in names}
        seq = newest(client)
        daemon.kill()
        begin = time.perf_counter()
        client = daemon.start()
        settled = ("idle", "thinking", "tool")
        wait_for(client, lambda agents: all(agent["state"] in settled for agent in agents))
        seconds = time.perf_counter() - begin
        for name in busy:
            (daemon.state / "agents" / name / "state" / "go").touch()
        all_idle(client, AGENTS + 1)
        assert pids == {name: pid_of(daemon, name) for name in names}, "an agent was started twice"
        after = [
            event for event in client.stream("events", after=seq) if event["kind"] in ("turn_started", "turn_ended")
        ]
        again = [event for event in after if event["kind"] == "turn_started"]
        ended = [event for event in after if event["kind"] == "turn_ended" and event["data"]["state"] == "done"]
        assert (len(again), len(ended)) == (0, len(busy)), "a message was handed out twice"
        yield figure("adopt_100", seconds, "s", digits=2)
        list(client.stream("down"))


def pid_of(daemon: Daemon, name: str) -> int:
    return int(json.loads((daemon.state / "processes" / f"{name}.json").read_text())["pid"])
