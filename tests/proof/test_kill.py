"""A real daemon under load is killed again and again: its clients ask again, and nothing they were told is undone."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sqlite3
import sys
import tempfile

import pytest
import trio

from hive_core.limits import Limits
from hive_core.protocol.refusal import Refusal
from tests.daemons import KEY, NO_CLAUDE, Daemon, open_daemon
from tests.proof.clients import AGENTS, RETRY_S, Harness, Operator, Program, Pulse, Sender, add_agents
from tests.proof.promises import Told, broken_promises

LONG = os.environ.get("HIVE_LONG") == "1"
KILLS = 300 if LONG else 18
TURNS_BETWEEN = 40  # leases and acks that are answered, at most, between a start and the kill
LOOK_EVERY = 5  # kills; what is broken early need not wait for the end
SILENCE_S = 60.0  # when we give up waiting, and look at what is there
SEED = os.environ.get("HIVE_SEED", "kill")
# Nothing is to be held or refused for its number, and what rests is due again soon.
MANY = 1_000_000
LIMITS = Limits(pair_rate_per_hour=MANY, hops=MANY, inbox_depth=MANY, tries=1000, backoff_s=0.001, provider_rest_s=0.01)
FLAGS = (
    *(NO_CLAUDE, "--default-program", "claude"),
    *(f"--{name.replace('_', '-')}={value}" for name, value in LIMITS.model_dump(exclude_unset=True).items()),
)


async def start(daemon: Daemon) -> None:
    await trio.to_thread.run_sync(daemon.start)


async def start_and_kill(daemon: Daemon, after_s: float) -> bool:
    """Kill a daemon that may not be ready yet. Whether it was not: that hangs on the machine."""

    def try_to_start() -> None:
        try:
            daemon.start()
        except Refusal:
            assert killed, "the daemon does not start"
            unready.append(killed[0])

    killed, unready = list[int](), list[int]()
    log = daemon.state / "daemon.lock"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, try_to_start)
        await trio.sleep(after_s)
        # Its number stands in the lock once it has come so far; before that there is nothing to interrupt.
        if (text := log.read_text().strip()) and text != str(daemon.process.pid):
            killed.append(int(text))
            os.kill(int(text), 9)
    if not killed:
        daemon.kill()
    return bool(unready)


def look_at(daemon: Daemon, told: Told) -> list[str]:
    """What is broken of a dead daemon's database: of a copy, because the next one has to recover it by itself."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("hive.sqlite", "hive.sqlite-wal"):
            shutil.copy(daemon.state / name, folder)
        with contextlib.closing(sqlite3.connect(f"{folder}/hive.sqlite")) as db:
            return broken_promises(db, told)


async def kill_and_start(
    daemon: Daemon, told: Told, pulse: Pulse, chance: random.Random, starts_killed: list[bool]
) -> None:
    """starts_killed gets each kill of a daemon that was just started: whether it was not ready yet."""
    for number in range(KILLS):
        with trio.move_on_after(SILENCE_S) as silence:
            await pulse.reaches(pulse.turns + chance.randint(1, TURNS_BETWEEN))
        if silence.cancelled_caught:
            pulse.halt(f"for {SILENCE_S:.0f} s before kill number {number + 1} nobody was answered enough")
        if pulse.broken:
            return
        daemon.kill()
        if number % LOOK_EVERY == 0:
            pulse.broken += [f"after kill number {number + 1}: {sentence}" for sentence in look_at(daemon, told)]
        if chance.random() < 0.2:
            starts_killed.append(await start_and_kill(daemon, chance.uniform(0.2, 0.8)))
        await start(daemon)


async def all_taken(daemon: Daemon) -> None:
    """Wait until no agent has mail that waits, for as long as that changes."""

    def watch() -> None:
        client.give_up_after(SILENCE_S)
        for shown in client.stream("watch"):
            if all(agent["queued"] == 0 for agent in shown["agents"]):
                return

    client = daemon.client()
    # What waits for ever is told by the promises.
    with trio.move_on_after(3 * SILENCE_S), contextlib.suppress(TimeoutError):
        await trio.to_thread.run_sync(watch, abandon_on_cancel=True)


async def run(daemon: Daemon, told: Told, seed: str, starts_killed: list[bool]) -> Pulse:
    pulse, chance = Pulse(), random.Random(seed)
    await add_agents(daemon.state)
    await start(daemon)
    runtime = daemon.runtime
    dirs = {name: runtime / "agents" / name for name in AGENTS}
    senders: list[Sender] = [Operator(runtime / "host.sock", told, pulse, chance)]
    senders += [Program(name, dirs[name] / "mcp.sock", told, pulse, chance) for name in AGENTS[:2]]
    harnesses = [Harness(name, dirs[name] / "harness.sock", told, pulse, chance) for name in AGENTS]
    async with trio.open_nursery() as turns:
        for harness in harnesses:
            turns.start_soon(harness.run)
        async with trio.open_nursery() as nursery:
            for sender in senders:
                nursery.start_soon(sender.run)
            await kill_and_start(daemon, told, pulse, chance, starts_killed)
            if pulse.broken:
                nursery.cancel_scope.cancel()
            for harness in harnesses:
                harness.calm = True
            for sender in senders:
                sender.stop = True
        if not pulse.broken:
            await all_taken(daemon)
        turns.cancel_scope.cancel()
    assert await trio.to_thread.run_sync(daemon.stop) == 0
    return pulse


def test_kills_at_random_moments_undo_nothing_that_was_answered(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As soon as the daemon is there again its harnesses are to be too: the next kill is meant for their turns.
    monkeypatch.setattr("hive_agent.link.RETRY_LAST_S", RETRY_S)
    monkeypatch.setattr("hive_agent.link.RETRY_FIRST_S", RETRY_S)
    told, starts_killed = Told(bodies_differ=True, limits=LIMITS), list[bool]()
    with open_daemon(*FLAGS, ANTHROPIC_API_KEY=KEY) as daemon:
        pulse = trio.run(run, daemon, told, SEED, starts_killed)
        with sqlite3.connect(daemon.state / "hive.sqlite") as db:
            broken = pulse.broken + broken_promises(db, told)
            waits = db.execute("SELECT count(*) FROM deliveries WHERE state IN ('queued', 'held')").fetchone()[0]
            dropped = db.execute("SELECT count(*) FROM deliveries WHERE state = 'dropped'").fetchone()[0]
            lost = db.execute("SELECT count(*) FROM turns WHERE state = 'lost'").fetchone()[0]
        db.close()
    taken = sum(len(leased.messages) for leased in told.leases) - len({leased.turn for leased in told.leases})
    with capsys.disabled():
        print(
            f"\n  {KILLS} kills, seed {SEED}: {pulse.sends + pulse.turns} answers ({len(told.sends)} sends, "
            f"{len(told.leases)} leases, {len(told.acks)} acks), {lost} turns of killed harnesses, "
            f"{taken} messages taken by recv; {len(starts_killed)} more kills of a daemon that had just begun, "
            f"{sum(starts_killed)} of them before it was ready",
            file=sys.stdout,
        )
    assert broken == [], "\n".join(broken[:20])
    assert waits == 0
    assert dropped == 0  # nobody asked for it
    assert min(lost, taken) > 0
    assert len(told.sends) > KILLS
