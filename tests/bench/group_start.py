"""Group `start`: how soon it is there, how fast it stores, how much it holds."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hive_core.cli.client import Client
from hive_core.protocol.refusal import Refusal
from tests.bench.figures import figure, say
from tests.bench.old_messages import fill
from tests.daemons import Daemon, open_daemon

AGENTS = 20
OLD_MESSAGES = 100_000
SENDERS = 16
ROUNDS = 5
SENDS = 8_000
# The swarm's own brakes would end a measurement that sends ten thousand messages a second.
OPEN_BRAKES = ("--inbox-depth=10000000", "--pair-rate-per-hour=100000000")
CHECKOUT = Path(__file__).resolve().parents[2]


def measure() -> Iterator[dict[str, Any]]:
    yield cli_start()
    yield daemon_ready()
    yield from durable_send()
    yield from daemon_rss()
    yield from demo_seconds()


def spawn(client: Client, count: int) -> None:
    for number in range(count):
        asked = client.call("request_spawn", agent=f"agent{number}", persona="An idle agent.", reason="a measurement")
        digest = client.call("show", approval=asked["approval"])["digest"]
        assert client.call("approve", approval=asked["approval"], digest=digest)["state"] == "done"


def seconds_of(command: list[str], environment: dict[str, str]) -> float:
    begin = time.perf_counter()
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begin


def cli_start() -> dict[str, Any]:
    say(f"cli_start: `hive list --json` with {AGENTS} agents")
    python = sys.executable
    hive = str(Path(python).with_name("hive"))
    with open_daemon() as daemon:
        spawn(daemon.start(), AGENTS)
        environment = {**os.environ, "HIVE_RUNTIME_DIR": str(daemon.runtime)}
        ours, bare = [], []
        for _ in range(40):
            bare.append(seconds_of([python, "-c", "pass"], environment))
            ours.append(seconds_of([hive, "list", "--json"], environment))
    return figure(
        "cli_start", statistics.median(ours) * 1e3, "ms", "python3 -c pass", statistics.median(bare) * 1e3, digits=2
    )


def daemon_ready() -> dict[str, Any]:
    say(f"daemon_ready: exec to the first right answers, with {OLD_MESSAGES:,} old messages")
    times = []
    with open_daemon() as daemon:
        daemon.start()
        daemon.stop()
        fill(daemon.state / "hive.sqlite", OLD_MESSAGES, 1)
        for _ in range(ROUNDS):
            times.append(_until_ready(daemon))
    return figure("daemon_ready", statistics.median(times), "s")


def _until_ready(daemon: Daemon) -> float:
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "hive_core", "serve", *daemon.flags()],
        stderr=subprocess.DEVNULL,
        pass_fds=daemon.kept_fds(),
    )
    try:
        while True:
            with contextlib.suppress(Refusal), contextlib.closing(Client(str(daemon.runtime))) as client:
                assert client.call("list")["agents"][0]["name"] == "hm1nd"
                port = int(client.call("status")["dashboard"].rpartition(":")[2])
                break
            time.sleep(0.005)
        page = http.client.HTTPConnection("127.0.0.1", port)
        page.request("GET", "/", headers={"Host": f"hive.localhost:{port}"})
        assert page.getresponse().status in (200, 401)
        return time.perf_counter() - begin
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def durable_send() -> Iterator[dict[str, Any]]:
    say(f"durable_send: {SENDERS} senders over host.sock against a plain sqlite3 loop")
    ours, plain = [], []
    with open_daemon(*OPEN_BRAKES) as daemon:
        spawn(daemon.start(), SENDERS)
        for _ in range(ROUNDS):
            plain.append(plain_loop(daemon.folder, 2_000))
            ours.append(_send(daemon, SENDS))
        syncs = _fdatasyncs(daemon)
        daemon.stop()
        with contextlib.closing(sqlite3.connect(daemon.state / "hive.sqlite")) as db:
            stored = db.execute("SELECT count(DISTINCT body) FROM messages WHERE sender = 'operator'").fetchone()[0]
    sent = ROUNDS * SENDS + (SENDS if syncs is not None else 0)
    assert stored == sent, f"{stored} rows for {sent} answered sends"
    yield figure(
        "durable_send", statistics.median(ours), "sends/s", "sqlite3, commit each", statistics.median(plain), digits=0
    )
    if syncs is not None:
        yield figure("durable_send_fdatasync", syncs / SENDS, "fdatasync/send", "sqlite3, commit each", 1.0, digits=3)


def _send(daemon: Daemon, count: int) -> float:
    names = [f"agent{number}" for number in range(SENDERS)]
    command = [sys.executable, "-m", "tests.bench.senders", str(daemon.runtime), str(count), *names]
    done = json.loads(subprocess.run(command, capture_output=True, check=True, cwd=CHECKOUT).stdout)
    assert done["sent"] == count
    return float(count / done["seconds"])


def plain_loop(folder: Path, count: int) -> float:
    with tempfile.TemporaryDirectory(dir=folder) as place:
        db = sqlite3.connect(f"{place}/plain.sqlite", isolation_level=None)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("CREATE TABLE messages (id INTEGER PRIMARY KEY, body TEXT NOT NULL) STRICT")
        begin = time.perf_counter()
        for number in range(count):
            db.execute("INSERT INTO messages (body) VALUES (?)", (f"{number} ".ljust(200, "x"),))
        seconds = time.perf_counter() - begin
        db.close()
    return count / seconds


def _fdatasyncs(daemon: Daemon) -> int | None:
    """How many times the daemon syncs for SENDS sends, counted by strace where that may attach."""
    if shutil.which("strace") is None:
        return None
    counts = daemon.folder / "strace.txt"
    tracer = subprocess.Popen(
        ["strace", "-f", "-qq", "-e", "trace=fdatasync,fsync", "-o", str(counts), "-p", str(daemon.process.pid)],
        stderr=subprocess.PIPE,
    )
    try:
        for _ in range(200):
            if tracer.poll() is not None:
                return None
            if f"TracerPid:\t{tracer.pid}" in Path(f"/proc/{daemon.process.pid}/status").read_text():
                break
            time.sleep(0.01)
        _send(daemon, SENDS)
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.wait()
    return sum("sync(" in line for line in counts.read_text().splitlines())


def daemon_rss() -> Iterator[dict[str, Any]]:
    say(f"daemon_rss: with {AGENTS} idle agents connected")
    with open_daemon("--default-program=rehearsal", "--end-agents-with-daemon") as daemon:
        client = daemon.start()
        all_idle(client, 1)
        alone = rss_mb(daemon.process.pid)
        spawn(client, AGENTS - 1)
        all_idle(client, AGENTS)
        full = rss_mb(daemon.process.pid)
    yield figure("daemon_rss", full, "MB", digits=1)
    yield figure("daemon_rss_per_agent", (full - alone) / (AGENTS - 1), "MB", digits=2)


def all_idle(client: Client, count: int) -> None:
    """Wait until so many agents have said hello and have no mail left."""
    while True:
        agents = client.call("list")["agents"]
        if len(agents) == count and all(agent["state"] == "idle" and agent["queued"] == 0 for agent in agents):
            return
        time.sleep(0.2)


def rss_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no VmRSS")


def cpu_s(pid: int) -> float:
    """What a process has used, its threads that have ended too."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def demo_seconds() -> Iterator[dict[str, Any]]:
    say("demo_seconds: fresh clone to the story's end")
    with tempfile.TemporaryDirectory(prefix="hive-b-") as folder:
        begin = time.perf_counter()
        subprocess.run(["git", "clone", "--quiet", str(CHECKOUT), f"{folder}/hive"], check=True)
        subprocess.run(["bin/setup", "run"], cwd=f"{folder}/hive", check=True, stdout=subprocess.DEVNULL)
        installed = time.perf_counter()
        done = subprocess.run(
            ["make", "-s", "demo", "ARGS=--once --json"],
            cwd=f"{folder}/hive",
            capture_output=True,
            text=True,
            check=True,
        )
        end = time.perf_counter()
        assert json.loads(done.stdout)["ok"]
    yield figure("demo_seconds", end - installed, "s", digits=2)
    yield figure("demo_seconds_with_downloads", end - begin, "s", digits=2)
