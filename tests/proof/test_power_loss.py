"""The power goes at any instant: what was answered by then is there when the database is opened again."""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio_asyncio

from hive_core.store.door import open_store
from hive_core.store.errors import StoreError
from tests.proof.disk import Disk, Keep, Operation, record
from tests.proof.promises import broken_promises
from tests.proof.small_hive import as_told

LONG = os.environ.get("HIVE_LONG") == "1"
BOUNDARIES = 1_000_000 if LONG else 60
WAYS = 200 if LONG else 6
SEED = os.environ.get("HIVE_SEED", "power")


def record_plan(plan: str, folder: Path) -> list[Operation]:
    hive, answers = folder / "hive", folder / "answers"
    hive.mkdir()
    command = [sys.executable, "-m", "tests.proof.small_hive", plan, str(hive), str(answers)]
    return record(command, folder / "strace.log", hive, answers)


async def look_at(folder: Path, hive: Path, state: dict[str, bytes], answers: list[str]) -> list[str]:
    """What is broken of a state, opened as the daemon opens it."""
    for path, contents in state.items():
        place = folder / Path(path).relative_to(hive)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(contents)
    database = folder / "hive.sqlite"
    try:
        async with open_store(database):
            pass
    except StoreError as exc:
        return [f"cannot be opened: {exc}"]
    # Not read-only: the last connection has taken the log away.
    connection = sqlite3.connect(database)
    try:
        return broken_promises(connection, as_told(answers, folder / "bodies"))
    finally:
        connection.close()


async def lose_power(operations: list[Operation], hive: Path, seed: str) -> tuple[int, list[str]]:
    """Lose the power before every sync and at the end, in many ways each. How many states that were; what is broken."""
    boundaries = [number for number, operation in enumerate(operations) if operation.kind == "sync"] + [len(operations)]
    chosen = set(random.Random(seed).sample(boundaries, min(BOUNDARIES, len(boundaries)))) | {boundaries[-1]}
    disk, answers, states, broken = Disk(str(hive)), list[str](), 0, list[str]()
    # In memory where that can be had: nothing here is to survive anything.
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    async with trio_asyncio.open_loop():
        for number, operation in enumerate([*operations, Operation("told", "")]):
            if number in chosen:
                # With everything confirmed there is one way alone.
                for way in range(WAYS if disk.unsynced else 1):
                    with tempfile.TemporaryDirectory(dir=memory) as folder:
                        found = await look_at(
                            Path(folder), hive, disk.after_power_loss(Keep(f"{seed}/{number}", way)), answers
                        )
                    states += 1
                    broken += [f"operation {number}, way {way}: {sentence}" for sentence in found]
            if operation.kind == "told" and operation.data:
                answers += operation.data.decode().splitlines()
            disk.feed(operation)
    return states, broken


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    def say(line: str) -> None:
        with capsys.disabled():
            print(f"\n  {line}")

    return say


def test_what_was_answered_survives_a_power_loss(tmp_path: Path, report: Callable[[str], None]) -> None:
    operations = record_plan("many_messages", tmp_path)
    told = sum(operation.kind == "told" for operation in operations)
    lines = b"".join(operation.data for operation in operations if operation.kind == "told").decode().splitlines()
    taken = as_told(lines)
    assert min(len(taken.sends), len(taken.leases), len(taken.acks)) > 20
    assert {ack.outcome for ack in taken.acks} == {"done", "failed", "waiting"}
    with contextlib.closing(sqlite3.connect(tmp_path / "hive/hive.sqlite")) as database:
        assert database.execute("SELECT count(*) FROM attachments").fetchone()[0] > 10
    states, broken = trio.run(lose_power, operations, tmp_path / "hive", SEED)
    report(f"power loss: {states} states of {len(operations)} operations and {told} answers, seed {SEED}")
    assert broken == [], "\n".join(broken[:20])


def test_without_a_sync_at_each_commit_a_power_loss_takes_answered_sends(tmp_path: Path) -> None:
    """If this finds nothing, the test above proves nothing."""
    operations = record_plan("many_messages_unsynced", tmp_path)
    _, broken = trio.run(lose_power, operations, tmp_path / "hive", SEED)
    assert any("every_answered_send_is_there" in sentence for sentence in broken)
