"""Group `broker`: what a message costs, side by side with a plain loop, with Redis and with an empty tool."""

from __future__ import annotations

import contextlib
import json
import os
import random
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from hive_core.cli.client import Client
from tests.bench.figures import figure, say
from tests.bench.group_start import CHECKOUT, OPEN_BRAKES, cpu_s, plain_loop, rss_mb, spawn
from tests.bench.old_messages import WORDS, fill
from tests.bench.redis_peer import open_redis, redis_server
from tests.daemons import KEY, NO_CLAUDE, Daemon, open_daemon
from tests.processes import look_until

ROUNDS = 5
AGENTS = 32
MANY = int(os.environ.get("HIVE_BENCH_MESSAGES", "10000000"))
FEW = 10_000
SEARCHED = min(MANY, 1_000_000)
IDLE_AGENTS = int(os.environ.get("HIVE_BENCH_AGENTS", "1000"))
IDLE_S = 30


def measure() -> Iterator[dict[str, Any]]:
    with ExitStack() as stack:
        daemon = stack.enter_context(open_swarm(AGENTS))
        redis = None
        if redis_server() is not None:
            (daemon.folder / "redis").mkdir()
            redis = stack.enter_context(open_redis(daemon.folder / "redis"))
        else:
            say("redis-server is not installed: its figures have no peer")
        yield from cycles(daemon, redis)
        yield mcp_send(daemon)
        yield from sends(daemon, redis)
    yield from send_10m()
    yield from idle_1000()
    yield search_1m()


@contextmanager
def open_swarm(count: int) -> Iterator[Daemon]:
    """A daemon with agent0, agent1 … that have no program: their sockets are there for a client to speak to."""
    with open_daemon(*OPEN_BRAKES, NO_CLAUDE, ANTHROPIC_API_KEY=KEY) as daemon:
        spawn(daemon.start(), count)
        for name in names(count):
            look_until(daemon.runtime.joinpath("agents", name, "harness.sock").exists)
        yield daemon


def names(count: int, prefix: str = "agent") -> list[str]:
    return [f"{prefix}{number}" for number in range(count)]


def clients(kind: str, address: str, count: int, who: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.bench.clients", kind, address, str(count), *who]
    done = subprocess.run(command, cwd=CHECKOUT, check=True, stdout=subprocess.PIPE)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def per_second(result: dict[str, Any]) -> float:
    return float(result["done"] / result["seconds"])


def sends(daemon: Daemon, redis: str | None) -> Iterator[dict[str, Any]]:
    say("send_32: 32 senders over host.sock")
    ours, plain, theirs = [], [], []
    before = _stored(daemon)
    for number in range(ROUNDS):
        plain.append(plain_loop(daemon.folder, 2_000))
        ours.append(per_second(clients("hive-send", str(daemon.runtime), 10_000, names(AGENTS))))
        if redis is not None:
            theirs.append(per_second(clients("redis-send", redis, 10_000, names(AGENTS, f"sent-{number}-"))))
    stored = _stored(daemon) - before
    assert stored == ROUNDS * 10_000, f"{stored} rows for {ROUNDS * 10_000} answered sends"
    value, loop = statistics.median(ours), statistics.median(plain)
    yield figure("send_32_sqlite", value, "sends/s", "sqlite3, commit each", loop, digits=0)
    if redis is not None:
        peer = statistics.median(theirs)
        yield figure("send_32_redis", value, "sends/s", "XADD, appendfsync always", peer, digits=0)


def _stored(daemon: Daemon) -> int:
    with contextlib.closing(sqlite3.connect(daemon.state / "hive.sqlite")) as db:
        (count,) = db.execute("SELECT count(DISTINCT body) FROM messages WHERE sender = 'operator'").fetchone()
    return int(count)


def cycles(daemon: Daemon, redis: str | None) -> Iterator[dict[str, Any]]:
    for pairs, count in ((1, 1_000), (16, 6_000)):
        say(f"cycle_{pairs}: send, blocked lease, ack")
        ours, theirs = [], []
        for number in range(ROUNDS):
            ours.append(clients("hive-cycle", str(daemon.runtime), count, names(pairs)))
            if redis is not None:
                theirs.append(clients("redis-cycle", redis, count, names(pairs, f"cycle-{pairs}-{number}-")))
        peer = statistics.median(map(per_second, theirs)) if theirs else None
        value = statistics.median(map(per_second, ours))
        yield figure(f"cycle_{pairs}_redis", value, "cycles/s", "XADD, XREADGROUP, XACK", peer, digits=0)
        if pairs == 1:
            for name, share in (("wake_p50", 0.5), ("wake_p99", 0.99)):
                peer = statistics.median(_quantile(run, share) for run in theirs) if theirs else None
                value = statistics.median(_quantile(run, share) for run in ours)
                yield figure(name, value, "ms", "blocked XREADGROUP", peer, digits=3)


def _quantile(run: dict[str, Any], share: float) -> float:
    times = sorted(run["wakes_s"])
    return float(times[int(len(times) * share)] * 1e3)


def mcp_send(daemon: Daemon) -> dict[str, Any]:
    say("mcp_send: 16 clients call the tool `send`, against the same server with an empty tool")
    ours, empty = [], []
    address = f"{daemon.runtime}/agents/NAME/mcp.sock"
    with tempfile.TemporaryDirectory(prefix="hive-b-") as folder:
        path = f"{folder}/empty.sock"
        server = subprocess.Popen([sys.executable, "-m", "tests.bench.empty_tool", path], cwd=CHECKOUT)
        try:
            while not Path(path).exists():
                assert server.poll() is None, "the peer has ended"
                time.sleep(0.05)
            for _ in range(ROUNDS):
                ours.append(per_second(clients("mcp", address, 4_000, names(16))))
                empty.append(per_second(clients("mcp", path, 4_000, names(16))))
        finally:
            server.terminate()
            server.wait()
    peer = statistics.median(empty)
    return figure("mcp_send", statistics.median(ours), "calls/s", "the same server, an empty tool", peer, digits=0)


def send_10m() -> Iterator[dict[str, Any]]:
    say(f"send_10m: one sender, with {MANY:,} old messages and with {FEW:,} (filling takes minutes)")
    with ExitStack() as stack:
        daemons = []
        for count in (MANY, FEW):
            daemon = stack.enter_context(open_swarm(8))
            daemon.stop()
            fill(daemon.state / "hive.sqlite", count, 8)
            daemon.start()
            daemons.append(daemon)
        times: list[list[float]] = [[], []]
        for _ in range(ROUNDS * 2):
            for found, daemon in zip(times, daemons, strict=True):
                result = clients("hive-send", str(daemon.runtime), 1_000, names(1))
                found.append(result["seconds"] / result["done"] * 1e3)
        many, few = (statistics.median(found) for found in times)
    yield figure("send_10m", many, "ms", f"with {FEW:,} old messages", few, digits=3)


def idle_1000() -> Iterator[dict[str, Any]]:
    say(f"idle_1000: {IDLE_AGENTS:,} agents wait in `lease` for {IDLE_S} s")
    with open_daemon(*OPEN_BRAKES, NO_CLAUDE, ANTHROPIC_API_KEY=KEY) as daemon:
        daemon.start()
        before_mb = rss_mb(daemon.process.pid)
        daemon.stop()
        with contextlib.closing(sqlite3.connect(daemon.state / "hive.sqlite")) as db, db:
            (settings,) = db.execute("SELECT settings FROM agents").fetchone()
            db.executemany(
                "INSERT INTO agents (name, role, wanted, page_port, deployed_sha, settings, created_at_ms)"
                " VALUES (?, 'agent', 'up', ?, '0', ?, 0)",
                [(f"agent{number}", 10_000 + number, settings) for number in range(IDLE_AGENTS)],
            )
        daemon.start()
        waiting = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.idle", str(daemon.runtime), str(IDLE_AGENTS)],
            cwd=CHECKOUT,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert waiting.stdout is not None
            assert waiting.stdout.readline() == "all wait\n"
            time.sleep(2)
            begun = cpu_s(daemon.process.pid)
            time.sleep(IDLE_S)
            used = cpu_s(daemon.process.pid) - begun
            full_mb = rss_mb(daemon.process.pid)
        finally:
            waiting.kill()
            waiting.wait()
    yield figure("idle_1000_cpu", used / IDLE_S * 100, "% of a core", digits=2)
    yield figure("idle_1000_memory", (full_mb - before_mb) * 1024 / IDLE_AGENTS, "KiB per agent", digits=1)


def search_1m() -> dict[str, Any]:
    say(f"search_1m: one and two words in {SEARCHED:,} messages")
    chance = random.Random(1)
    times = []
    with open_swarm(1) as daemon:
        daemon.stop()
        fill(daemon.state / "hive.sqlite", SEARCHED, 8)
        daemon.start()
        with contextlib.closing(Client(str(daemon.runtime))) as client:
            for number in range(300):
                text = " ".join(f"w{chance.randrange(WORDS)}" for _ in range(1 + number % 2))
                begun = time.perf_counter()
                client.call("search", text=text)
                times.append(time.perf_counter() - begun)
    return figure("search_1m_p95", sorted(times)[int(len(times) * 0.95)] * 1e3, "ms", digits=2)
