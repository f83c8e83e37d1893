"""What the model relay adds to a provider's stream, beside the same provider asked directly."""

from __future__ import annotations

import json
import socket
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hive_core.protocol.harness import PROTOCOL_VERSION
from tests.bench.figures import figure, say
from tests.bench.group_start import CHECKOUT, OPEN_BRAKES, cpu_s, spawn
from tests.daemons import KEY, NO_CLAUDE, Daemon, open_daemon
from tests.processes import look_until

ROUNDS = 5
FIRST = 100  # calls of a round
STREAMS = 20
EVENTS = 500  # of each, at 50 a second: ten seconds
CYCLES = 2_000  # of send, blocked lease and ack, one after the other: some five seconds
TALKERS = [f"agent{number}" for number in range(4)]  # whose streams they are: one agent may have 16
MAILER = "agent4"


def relay_figures() -> Iterator[dict[str, Any]]:
    with _provider() as port, _swarm(port) as daemon:
        for name in TALKERS:
            _begin_turn(daemon, name)
        relays = [str(daemon.runtime / "agents" / name / "model.sock") for name in TALKERS]
        yield _first_byte(relays[0], port)
        yield from _twenty(daemon, relays, port)


def _begin_turn(daemon: Daemon, name: str) -> None:
    """With its welcome: outside a turn the relay passes nothing. It runs as long as the daemon."""
    with socket.socket(socket.AF_UNIX) as harness, harness.makefile("rwb", buffering=0) as lines:
        harness.connect(str(daemon.runtime / "agents" / name / "harness.sock"))
        hello = {"op": "hello", "version": PROTOCOL_VERSION, "instance": name, "fences": []}
        for form in (hello, {"op": "lease", "fence": "f"}):
            lines.write(json.dumps({"id": 1, **form}).encode() + b"\n")
            answer = json.loads(lines.readline())
            assert answer["ok"], answer


def _first_byte(relay: str, port: str) -> dict[str, Any]:
    say(f"relay_first_byte: {ROUNDS} x {FIRST} calls, each on a connection of its own")
    ours, bare = [], []
    for _ in range(ROUNDS):
        bare += _run("first", str(FIRST), port)["first_s"]
        ours += _run("first", str(FIRST), relay)["first_s"]
    value, peer = (statistics.median(times) * 1e3 for times in (ours, bare))
    return {**figure("relay_first_byte", value, "ms", "the provider itself", peer, 3), "added": round(value - peer, 3)}


def _twenty(daemon: Daemon, relays: list[str], port: str) -> Iterator[dict[str, Any]]:
    say(f"relay_20: {STREAMS} streams of 50 events a second, and wakes of the broker beside them")
    ours, bare, wakes, alone, busy = [], [], [], [], 0.0
    _cycles(daemon)  # the first leases are of welcomes
    for _ in range(ROUNDS):
        alone += _cycles(daemon)["wakes_s"]
        bare.append(_run("read", str(STREAMS), str(EVENTS), port)["late_s"])
        begun = cpu_s(daemon.process.pid)
        reader = _start("read", str(STREAMS), str(EVENTS), *relays)
        ours.append(json.loads(reader.communicate()[0])["late_s"])
        busy += cpu_s(daemon.process.pid) - begun
        reader = _start("read", str(STREAMS), str(EVENTS), *relays)
        wakes += _cycles(daemon)["wakes_s"]
        reader.communicate()
    for name, share in (("relay_20_p50", 0.5), ("relay_20_p99", 0.99)):
        value, peer = (statistics.median(_quantile(run, share) for run in runs) * 1e3 for runs in (ours, bare))
        yield {**figure(name, value, "ms", "the provider itself", peer, 3), "added": round(value - peer, 3)}
    yield figure("relay_20_cpu", busy / (ROUNDS * EVENTS / 50) * 100, "% of a core", digits=1)
    for name, share in (("relay_20_wake_p50", 0.5), ("relay_20_wake_p99", 0.99)):
        value, peer = (_quantile(times, share) * 1e3 for times in (wakes, alone))
        yield figure(name, value, "ms", "the same broker without the streams", peer, 3)
    yield figure("relay_20_wake_max", max(wakes) * 1e3, "ms", "the same", max(alone) * 1e3, 1)


def _cycles(daemon: Daemon) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.bench.clients", "hive-cycle", str(daemon.runtime), str(CYCLES), MAILER]
    done = subprocess.run(command, cwd=CHECKOUT, check=True, stdout=subprocess.PIPE)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _start(*words: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.bench.streams", *words]
    return subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE)


def _run(*words: str) -> dict[str, Any]:
    process = _start(*words)
    told, _ = process.communicate()
    assert process.returncode == 0
    result: dict[str, Any] = json.loads(told)
    return result


def _quantile(times: list[float], share: float) -> float:
    return sorted(times)[int(len(times) * share)]


@contextmanager
def _provider() -> Iterator[str]:
    process = _start("provider")
    assert process.stdout is not None
    try:
        yield process.stdout.readline().decode().strip()
    finally:
        process.kill()
        process.wait()


@contextmanager
def _swarm(port: str) -> Iterator[Daemon]:
    """A daemon whose agents have no program: their sockets are there for a client to speak to."""
    # Their harnesses do not say that they live.
    flags = (*OPEN_BRAKES, NO_CLAUDE, "--lease-silence-s=86400", f"--provider-base-url=http://127.0.0.1:{port}")
    with open_daemon(*flags, ANTHROPIC_API_KEY=KEY) as daemon:
        names = [*TALKERS, MAILER]
        spawn(daemon.start(), len(names))
        for name in names:
            look_until(daemon.runtime.joinpath("agents", name, "model.sock").exists)
        yield daemon
