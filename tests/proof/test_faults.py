"""The disk, the clock and the peers misbehave: errors are true, nothing answered is undone, and service resumes."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from hive_core.cli.client import Client
from hive_core.limits import Limits
from hive_core.protocol.harness import PROTOCOL_VERSION
from hive_core.protocol.lines import encode
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName
from tests.daemons import KEY, NO_CLAUDE, WITHIN_S, Daemon, open_daemon
from tests.hives import Peer, connect, open_services
from tests.processes import look_until
from tests.proof import clients
from tests.proof.clients import AGENTS, INITIALIZE, add_agents
from tests.proof.promises import Acked, Leased, Sent, Told, broken_promises
from tests.small_disks import small_disk, small_disks

FLAGS = (NO_CLAUDE, "--default-program", "claude", "--pair-rate-per-hour", "1000000", "--inbox-depth", "1000000")
MIB = 1024 * 1024
SENDS_WHILE_QUIET = 200


def send(client: Client, told: Told, body: str, to: str = "bob") -> None:
    try:
        answer = client.call("send", to=to, body=body)
    except Refusal as refusal:
        if refusal.code != "not_running":  # nobody said no
            told.refused.append(("operator", body))
        raise
    told.sends.append(Sent(answer["message"], "operator", (to,), body))


def start(daemon: Daemon) -> Client:
    """A daemon of agents whose sockets are there."""
    trio.run(add_agents, daemon.state)
    client = daemon.start()
    client.give_up_after(60)  # no answer at all is the worst of errors
    for name in AGENTS:
        daemon.wait_live(lambda agent, name=name: agent["name"] == name and agent["state"] == "down")  # type: ignore[misc]
    return client


def hello(instance: str) -> dict[str, object]:
    return {"id": 1, "op": "hello", "version": PROTOCOL_VERSION, "instance": instance, "fences": []}


def check(daemon: Daemon, told: Told) -> None:
    db = sqlite3.connect(daemon.state / "hive.sqlite")
    try:
        assert broken_promises(db, told) == []
    finally:
        db.close()


@contextlib.contextmanager
def injected(daemon: Daemon, call: str, error: str) -> Iterator[None]:
    """Let every such call of a running daemon fail, for as long as the block runs."""
    inject = ["-e", f"trace={call}", "-e", f"inject={call}:error={error}"]
    # Quiet but for the one line that says that it is attached to each thread.
    strace = subprocess.Popen(
        ["strace", "-f", *inject, "-o", os.devnull, "-p", str(daemon.process.pid)], stderr=subprocess.PIPE, text=True
    )
    assert strace.stderr is not None
    assert "attached" in strace.stderr.readline()
    try:
        yield
    finally:
        strace.terminate()
        strace.communicate(timeout=WITHIN_S)


def fill(path: Path) -> None:
    """Take every byte that is left."""
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(64 * 1024))
    with open(path, "ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1))


def test_after_a_failed_sync_nothing_is_answered_and_the_daemon_ends_and_starts_clean() -> None:
    told = Told(bodies_differ=True)
    with open_daemon(*FLAGS, ANTHROPIC_API_KEY=KEY) as daemon:
        client = start(daemon)
        send(client, told, "before")
        with injected(daemon, "fdatasync", "EIO"):
            with pytest.raises(Refusal) as refused:
                send(client, told, "meanwhile")
            assert daemon.process.wait(WITHIN_S) == 1
        assert refused.value.code == "not_running", refused.value
        assert "hive-core: cannot go on: the disk refused a commit (disk I/O error)" in daemon.log.read_text()
        send(daemon.start(), told, "after")
        assert daemon.stop() == 0
        check(daemon, told)


def test_a_disk_that_takes_no_writes_refuses_with_a_true_error_and_resumes_when_it_does() -> None:
    """Who waits for mail waits on, though the send that was refused had found mail for him."""
    told = Told(bodies_differ=True)
    with open_daemon(*FLAGS, ANTHROPIC_API_KEY=KEY) as daemon:
        client = start(daemon)

        async def main() -> None:
            async with connect(daemon.runtime / "agents" / "bob" / "harness.sock") as bob:
                await bob.ask(hello("h"))
                await bob.send({"id": 2, "op": "lease", "fence": "f"})
                send(client, told, "to ada", to="ada")
                with injected(daemon, "pwrite64", "EROFS"):
                    with pytest.raises(Refusal, match=r"takes no writes .* read-only") as refused:
                        send(client, told, "meanwhile")
                    assert refused.value.code == "unavailable"
                send(client, told, "after")
                assert (await bob.read())["message"]["body"] == "after"

        trio.run(main)
        assert daemon.stop() == 0
        check(daemon, told)


@small_disks
def test_on_a_full_disk_sends_are_refused_and_acks_and_drops_work_and_with_room_it_goes_on() -> None:
    told = Told(bodies_differ=True, limits=Limits(tries=1))
    with open_daemon(*FLAGS, "--tries", "1", ANTHROPIC_API_KEY=KEY) as daemon, small_disk(daemon.state, "80m"):
        client = start(daemon)
        for number in range(20):
            send(client, told, f"before {number}")
        harness = daemon.runtime / "agents" / "bob" / "harness.sock"
        filler = daemon.state / "filler"
        trio.run(fill_up_and_ack, harness, client, told, filler)
        assert not (daemon.state / "hive.ballast").exists()
        filler.unlink()
        send(client, told, "after")
        assert (daemon.state / "hive.ballast").stat().st_size == 16 * MIB
        assert daemon.stop() == 0
        check(daemon, told)


async def fill_up_and_ack(harness: Path, client: Client, told: Told, filler: Path) -> None:
    async with connect(harness) as peer:
        assert (await peer.ask(hello("h")))["ok"]
        lease = await peer.ask({"id": 2, "op": "lease", "fence": "f0"})
        lost = lease["message"]["id"]
        lease = await next_lease(peer, await peer.ask(ack_form(lease, "failed", "f1")), "f1")
        fill(filler)
        refused = 0
        for number in range(200):
            try:
                send(client, told, f"onto the full disk {number}")
            except Refusal as no:
                assert no.code == "unavailable", no
                assert "no space is left" in no.message, no
                assert "make room" in no.message, no
                refused += 1
        assert refused > 0, "the disk was not full"
        assert client.call("drop", message=lost)["recipients"] == ["bob"]
        for number in range(2, 20):
            told.leases.append(Leased(lease["turn"], "bob", lease["fence"], (lease["message"]["id"],)))
            answer = await peer.ask(ack_form(lease, "done", f"f{number}"))
            assert answer["ok"], answer
            assert answer["counted"], answer
            told.acks.append(Acked(lease["turn"], "bob", "done"))
            lease = await next_lease(peer, answer, f"f{number}")


async def next_lease(peer: Peer, answer: dict[str, Any], fence: str) -> dict[str, Any]:
    """What the ack of a turn brings, or what is asked for then: none begins while the agent has a snapshot taken."""
    return answer.get("lease") or await peer.ask({"id": 4, "op": "lease", "fence": fence})


def ack_form(lease: dict[str, Any], outcome: str, following: str) -> dict[str, Any]:
    form = {"turn": lease["turn"], "fence": lease["fence"], "outcome": outcome, "next": following}
    return {"id": 3, "op": "ack", **form}


@small_disks
def test_a_daemon_starts_on_a_disk_that_is_full_by_giving_its_ballast_up() -> None:
    told = Told(bodies_differ=True)
    with open_daemon(*FLAGS, ANTHROPIC_API_KEY=KEY) as daemon, small_disk(daemon.state, "80m"):
        trio.run(add_agents, daemon.state)
        send(daemon.start(), told, "before")
        daemon.kill()
        fill(daemon.state / "filler")
        client = daemon.start()
        assert not (daemon.state / "hive.ballast").exists()
        with pytest.raises(Refusal, match="no space is left"):
            send(client, told, "meanwhile")
        (daemon.state / "filler").unlink()
        send(client, told, "after")
        assert daemon.stop() == 0
        check(daemon, told)


@small_disks
def test_a_start_on_a_read_only_disk_says_so() -> None:
    told = Told(bodies_differ=True)
    with open_daemon(*FLAGS, ANTHROPIC_API_KEY=KEY) as daemon, small_disk(daemon.state, "80m"):
        trio.run(add_agents, daemon.state)
        send(daemon.start(), told, "before")
        daemon.kill()
        subprocess.run(["mount", "-o", "remount,ro", daemon.state], check=True)
        with pytest.raises(Refusal) as refused:
            daemon.start()
        why = "the file system is read-only; make it writable, or set state_dir or runtime_dir to another"
        assert refused.value.message == f"cannot use {daemon.state}: {why}"
        subprocess.run(["mount", "-o", "remount,rw", daemon.state], check=True)
        send(daemon.start(), told, "after")
        assert daemon.stop() == 0
        check(daemon, told)


def test_a_database_that_another_program_locks_refuses_and_resumes() -> None:
    told = Told(bodies_differ=True)
    with open_daemon(*FLAGS, ANTHROPIC_API_KEY=KEY) as daemon:
        client = start(daemon)
        client.give_up_after(60)
        send(client, told, "before")
        trio.run(remind_soon, daemon.runtime / "agents" / "ada" / "mcp.sock")
        other = sqlite3.connect(daemon.state / "hive.sqlite", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(Refusal, match="another program has the hive's database locked") as refused:
            send(client, told, "meanwhile")
        assert refused.value.code == "unavailable"
        # Until the daemon has met the lock with what it does on its own, which must not give up. Reads need no lock.
        said = "cannot write now: another program"
        look_until(lambda: client.call("messages") and said in daemon.log.read_text())
        other.execute("COMMIT")
        other.close()
        send(client, told, "after")
        assert daemon.process.poll() is None
        assert daemon.stop() == 0
        check(daemon, told)


async def remind_soon(mcp: Path) -> None:
    """Give the daemon something to write on its own in a second, so that nobody waits for what it does now and then."""
    async with clients.connect(mcp) as lines:
        await clients.greet(lines)
        await clients.call_tool(lines, "remind", {"body": "look", "after_s": 1}, "remind")


def test_a_harness_that_is_killed_in_its_turn_gives_its_message_back() -> None:
    told = Told(bodies_differ=True)
    with open_daemon(*FLAGS, ANTHROPIC_API_KEY=KEY) as daemon:
        client = start(daemon)
        send(client, told, "work")

        async def main() -> None:
            path = daemon.runtime / "agents" / "bob" / "harness.sock"
            async with connect(path) as peer:
                await peer.ask(hello("h1"))
                first = await peer.ask({"id": 2, "op": "lease", "fence": "f1"})
            async with connect(path) as peer:
                while not (await peer.ask(hello("h2")))["ok"]:
                    pass  # the first one's hang-up is not seen yet
                again = await peer.ask({"id": 2, "op": "lease", "fence": "f2"})
                late = await peer.ask({"id": 3, "op": "ack", "turn": first["turn"], "fence": "f1", "outcome": "done"})
                stolen = await peer.ask(
                    {"id": 4, "op": "ack", "turn": again.get("turn", 1), "fence": "f1", "outcome": "done"}
                )
            assert again["ok"], again
            assert again["message"]["id"] == first["message"]["id"]
            assert again["message"]["attempt"] == 2
            assert late["counted"] is False
            assert stolen["counted"] is False, "a fence that is not the turn's own ended it"

        trio.run(main)
        assert daemon.stop() == 0
        check(daemon, told)


def test_readers_that_never_read_hold_up_nobody_else() -> None:
    told = Told(bodies_differ=True)
    with open_daemon(*FLAGS, ANTHROPIC_API_KEY=KEY) as daemon:
        client = start(daemon)
        client.give_up_after(60)

        async def main() -> None:
            ada = daemon.runtime / "agents" / "ada"
            async with (
                connect(daemon.runtime / "host.sock") as host,
                connect(ada / "harness.sock") as harness,
                connect(ada / "mcp.sock") as mcp,
            ):
                floods = {
                    "host": Flood(host, {"v": 1, "verb": "messages", "args": {}}, padding=8000),
                    "harness": Flood(harness, {"id": 1, "op": "nonsense" * 100}),
                    "mcp": Flood(mcp, {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}, padding=8000),
                }
                await mcp.send(INITIALIZE)
                async with trio.open_nursery() as nursery:
                    for flood in floods.values():
                        nursery.start_soon(flood.run)
                    await send_beside(list(floods.values()), client, told)
                    async with connect(daemon.runtime / "agents" / "bob" / "harness.sock") as peer:
                        await peer.ask(hello("h"))
                        lease = await peer.ask({"id": 2, "op": "lease", "fence": "f"})
                        assert lease["message"]["body"] == "beside 0"
                    nursery.cancel_scope.cancel()
                # What was taken from each is what stands unanswered in the daemon.
                assert {name: flood.taken_bytes // MIB for name, flood in floods.items()} == dict.fromkeys(floods, 0)

        trio.run(main)
        assert daemon.stop() == 0
        check(daemon, told)


async def send_beside(floods: list[Flood], client: Client, told: Told) -> None:
    """Send until the daemon takes no more from any flood, or has taken more than any bound of its own explains."""
    taken, quiet = [-1], 0
    while quiet < SENDS_WHILE_QUIET and max(taken) < MIB:
        await trio.to_thread.run_sync(send, client, told, f"beside {len(told.sends)}")
        before, taken = taken, [flood.taken_bytes for flood in floods]
        quiet = quiet + 1 if taken == before else 0


class Flood:
    """Asks the same without end and never reads. padding: spaces that make each request so much larger."""

    def __init__(self, peer: Peer, request: object, padding: int = 0) -> None:
        self._socket = peer.stream.socket
        self._line = encode(request).replace(b"\n", b" " * padding + b"\n")
        self.taken_bytes = 0

    async def run(self) -> None:
        rest = b""
        while True:
            rest = rest or self._line
            try:
                sent = os.write(self._socket.fileno(), rest)
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._socket)
                continue
            self.taken_bytes += sent
            rest = rest[sent:]
            await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("jump_s", [24 * 3600, -24 * 3600])
async def test_a_clock_that_jumps_a_day_loses_nothing_and_holds_nothing_for_ever(tmp_path: Path, jump_s: int) -> None:
    told = Told()
    async with open_services(tmp_path) as services:
        await services.add_agents("ada", "bob")
        bob = AgentName("bob")
        for body in ("before", "at rest"):
            told.sends.append(Sent(await services.say("ada", "bob", body), "ada", ("bob",), body))
        turn = (await services.broker.lease(bob, "f1")).turn
        await services.broker.ack(bob, turn, "waiting")
        services.clock.ahead_s += jump_s
        told.sends.append(Sent(await services.say("ada", "bob", "after"), "ada", ("bob",), "after"))
        bodies = set()
        with trio.fail_after(WITHIN_S):
            for _ in range(3):
                lease = await services.broker.lease(bob)
                bodies.add(lease.message["body"])
                await services.broker.ack(bob, lease.turn, "done")
                told.acks.append(Acked(lease.turn.id, "bob", "done"))
        assert bodies == {"before", "at rest", "after"}
    db = sqlite3.connect(tmp_path / "hive.sqlite")
    try:
        assert broken_promises(db, told) == []
    finally:
        db.close()
