from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import outcome
import pytest
import trio
import trio.testing
import trio_asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName
from hive_core.services.events import PAGE, events_after, follow_events, newest_events
from hive_core.store import schema
from hive_core.store.bus import EVENTS, Bus, mail
from hive_core.store.door import Store, open_store
from hive_core.store.errors import StoreError
from hive_core.store.writer import Transaction
from tests.hives import PATIENCE_S, Services, held_writer, run_in_hive, second_look, wait_until
from tests.needs import ROOT

MESSAGE = "sender, body, body_bytes, cause, chain_id, hops, sent_at_ms"
DELIVERY = "message_id, recipient, sender, state, sent_at_ms, available_at_ms"


@asynccontextmanager
async def opened(path: Path, bus: Bus | None = None) -> AsyncIterator[Store]:
    async with trio_asyncio.open_loop(), open_store(path, bus) as store:
        yield store


async def refusal_to_open(path: Path) -> str:
    """The sentence with which opening this database is refused."""
    async with trio_asyncio.open_loop():
        with pytest.raises(StoreError) as caught:
            async with open_store(path):
                pass
    return str(caught.value)


def note(kind: str) -> Callable[[Transaction], None]:
    return lambda tx: tx.emit(kind, "system")


def kinds_on_disk(path: Path) -> list[str]:
    with second_look(path) as connection:
        return [kind for (kind,) in connection.execute("SELECT kind FROM events ORDER BY seq")]


async def test_what_was_answered_is_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "hive.sqlite"
    async with opened(path) as store:
        for number in range(5):
            await store.write(note(f"n{number}"))
            assert kinds_on_disk(path)[-1] == f"n{number}"


WRITES_FOR_EVER = """
import sys, trio, trio_asyncio
from pathlib import Path
from hive_core.store.door import open_store

async def write(store, who):
    for n in range(100_000):
        kind = f"{who}-{n}"
        await store.write(lambda tx: tx.emit(kind, "system"))
        print(kind, flush=True)

async def main():
    async with trio_asyncio.open_loop(), open_store(Path(sys.argv[1])) as store, trio.open_nursery() as nursery:
        for who in range(8):
            nursery.start_soon(write, store, who)

trio.run(main)
"""


def python(program: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize("answers", [1, 40, 400])
def test_what_was_answered_survives_a_daemon_that_is_killed(tmp_path: Path, answers: int) -> None:
    path = tmp_path / "hive.sqlite"
    with python(WRITES_FOR_EVER, str(path)) as child:
        assert child.stdout is not None
        told = [child.stdout.readline().strip() for _ in range(answers)]
        child.send_signal(signal.SIGKILL)
        told += [line.strip() for line in child.stdout if line.endswith("\n")]
    assert child.returncode == -signal.SIGKILL
    assert set(told) <= set(kinds_on_disk(path))
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


async def test_every_commit_is_synced_whatever_the_build_of_sqlite_thinks_best(tmp_path: Path) -> None:
    async with opened(tmp_path / "hive.sqlite") as store:
        found = await store.write(lambda tx: [tx.execute(f"PRAGMA {name}").fetchone()[0] for name in _PRAGMAS])
        assert dict(zip(_PRAGMAS, found, strict=True)) == {"synchronous": 2, "journal_mode": "wal", "foreign_keys": 1}


_PRAGMAS = ("synchronous", "journal_mode", "foreign_keys")


async def test_a_function_that_raises_leaves_nothing_and_disturbs_no_other_in_its_batch(tmp_path: Path) -> None:
    path = tmp_path / "hive.sqlite"
    failures: list[str] = []

    def stumbles(tx: Transaction) -> None:
        tx.emit("half done", "system")
        tx.execute("CREATE TABLE half_done (a)")
        raise Refusal("refused", "cannot go on")

    async def refused(store: Store) -> None:
        with pytest.raises(Refusal, match="cannot go on") as caught:
            await store.write(stumbles)
        failures.append(caught.value.message)

    async def breaks(store: Store) -> None:
        with pytest.raises(sqlite3.IntegrityError):
            await store.write(lambda tx: (tx.emit("half done", "system"), tx.execute("INSERT INTO events VALUES (1)")))
        failures.append("broken")

    async with opened(path) as store, trio.open_nursery() as nursery:
        await store.write(note("first"))
        async with held_writer(store, nursery):
            for number in range(3):
                nursery.start_soon(store.write, note(f"before {number}"))
                nursery.start_soon(refused, store)
                nursery.start_soon(store.write, note(f"after {number}"))
            await trio.testing.wait_all_tasks_blocked()
    told = kinds_on_disk(path)
    assert sorted(told[1:]) == sorted(f"{when} {number}" for when in ("before", "after") for number in range(3))
    assert len(failures) == 3
    with second_look(path) as connection:
        assert connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'half_done'").fetchone() is None


async def test_an_error_of_sqlite_inside_a_function_is_its_callers_alone(tmp_path: Path) -> None:
    async with opened(tmp_path / "hive.sqlite") as store:
        with pytest.raises(sqlite3.OperationalError):
            await store.write(lambda tx: (tx.emit("half done", "system"), tx.execute("SELECT nonsense")))
        await store.write(note("next"))
        assert [event["kind"] for event in await events_after(store, 0)] == ["next"]


async def test_many_writes_that_wait_together_share_one_commit(tmp_path: Path) -> None:
    path = tmp_path / "hive.sqlite"
    seen: list[int] = []

    class CountingBus(Bus):
        def publish(self, topics: Iterable[str]) -> None:
            seen.append(len(kinds_on_disk(path)))
            super().publish(topics)

    async with opened(path, CountingBus()) as store, trio.open_nursery() as nursery, held_writer(store, nursery):
        for number in range(100):
            nursery.start_soon(store.write, note(str(number)))
        await trio.testing.wait_all_tasks_blocked()
    assert (len(seen), seen[-1]) == (2, 100)  # the first may be told of when the second is on disk already


async def test_the_broadcast_follows_the_commit(tmp_path: Path) -> None:
    path = tmp_path / "hive.sqlite"
    seen: list[list[str]] = []

    class LookingBus(Bus):
        def publish(self, topics: Iterable[str]) -> None:
            topics = list(topics)
            if EVENTS in topics:
                seen.append(kinds_on_disk(path))
            super().publish(topics)

    async with opened(path, LookingBus()) as store:
        await store.write(note("a"))
        await store.write(note("b"))
    assert seen == [["a"], ["a", "b"]]


async def test_a_write_that_is_refused_wakes_nobody(tmp_path: Path) -> None:
    def stumbles(tx: Transaction) -> None:
        tx.emit("half done", "system")
        tx.wake(mail("iris"))
        raise Refusal("refused", "no")

    published: list[str] = []

    class NotingBus(Bus):
        def publish(self, topics: Iterable[str]) -> None:
            published.extend(topics)

    async with opened(tmp_path / "hive.sqlite", NotingBus()) as store:
        with pytest.raises(Refusal):
            await store.write(stumbles)
    assert published == []


async def test_a_cancelled_write_is_whole_or_nothing_and_holds_nobody_up(tmp_path: Path) -> None:
    path = tmp_path / "hive.sqlite"

    def two_rows(tx: Transaction) -> None:
        tx.emit("one", "system")
        tx.emit("two", "system")

    async with opened(path) as store, trio.open_nursery() as nursery:
        async with held_writer(store, nursery):
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as inner:
                    inner.start_soon(store.write, two_rows)
                    await trio.testing.wait_all_tasks_blocked()
                    scope.cancel()
            assert scope.cancelled_caught
        await store.write(note("next"))
        assert kinds_on_disk(path) in (["next"], ["one", "two", "next"])


async def test_a_write_under_a_cancelled_scope_is_not_begun(tmp_path: Path) -> None:
    path = tmp_path / "hive.sqlite"
    async with opened(path) as store:
        with trio.CancelScope() as scope:
            scope.cancel()
            await store.write(note("never"))
        await store.write(note("next"))
    assert kinds_on_disk(path) == ["next"]


async def test_what_is_queued_when_the_store_closes_is_stored_and_answered(tmp_path: Path) -> None:
    path, answered = tmp_path / "hive.sqlite", []

    async def write(store: Store) -> None:
        await store.write(note("last"))
        answered.append("last")

    async with (
        trio_asyncio.open_loop(),
        trio.open_nursery() as nursery,
        open_store(path) as store,
        held_writer(store, nursery),
    ):
        nursery.start_soon(write, store)
        await trio.testing.wait_all_tasks_blocked()
    assert answered == kinds_on_disk(path) == ["last"]
    with pytest.raises(StoreError, match="closed"):
        await store.write(note("too late"))


async def test_readers_cannot_write(tmp_path: Path) -> None:
    async with opened(tmp_path / "hive.sqlite") as store:
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            await store.rows("INSERT INTO events (at_ms, kind, actor, data) VALUES (1, 'a', 'b', '{}')")
        assert await store.row("SELECT 1 WHERE 0") is None


async def test_a_cancelled_read_gives_its_connection_back(tmp_path: Path) -> None:
    async with opened(tmp_path / "hive.sqlite") as store:
        for _ in range(10):
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(store.rows, "SELECT 1")
                    scope.cancel()
        with trio.fail_after(PATIENCE_S):
            assert (await store.rows("SELECT 7"))[0][0] == 7


ENDLESS = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"


async def test_nothing_that_is_read_waits_behind_searches_however_many_run(tmp_path: Path) -> None:
    async with opened(tmp_path / "hive.sqlite") as store:
        with trio.fail_after(PATIENCE_S):
            async with trio.open_nursery() as nursery:
                for _ in range(8):
                    nursery.start_soon(store.search, ENDLESS, (), math.inf)
                await trio.testing.wait_all_tasks_blocked()
                for number in range(20):
                    assert (await store.rows("SELECT ?", (number,)))[0][0] == number
                nursery.cancel_scope.cancel()
            assert (await store.search("SELECT 7", (), math.inf))[0][0] == 7  # who left is not searched for


async def test_searches_run_one_at_a_time_in_the_order_in_which_they_were_asked(tmp_path: Path) -> None:
    answered = []

    async def search(number: int) -> None:
        answered.append((await store.search("SELECT ?", (number,), math.inf))[0][0])

    async with opened(tmp_path / "hive.sqlite") as store, trio.open_nursery() as nursery:
        with trio.fail_after(PATIENCE_S), trio.CancelScope() as first:
            async with trio.open_nursery() as inner:
                inner.start_soon(store.search, ENDLESS, (), math.inf)
                await trio.testing.wait_all_tasks_blocked()
                for number in range(5):
                    nursery.start_soon(search, number)
                    await trio.testing.wait_all_tasks_blocked()
                assert answered == []
                first.cancel()
    assert answered == [0, 1, 2, 3, 4]


async def test_a_search_that_ran_for_its_time_is_ended_and_the_next_one_is_answered(tmp_path: Path) -> None:
    async with opened(tmp_path / "hive.sqlite") as store:
        with trio.fail_after(PATIENCE_S):
            for _ in range(3):
                with pytest.raises(TimeoutError):
                    await store.search(ENDLESS, (), 0.0)
                assert (await store.search("SELECT ?", (7,), math.inf))[0][0] == 7
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            await store.search("DELETE FROM events", (), math.inf)


async def test_the_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        async with opened(tmp_path / "hive.sqlite") as store:
            await store.write(note("a"))
            modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    finally:
        os.umask(before)
    assert modes == {"hive.sqlite": 0o600, "hive.sqlite-wal": 0o600, "hive.sqlite-shm": 0o600}


@pytest.mark.parametrize("folder", ["plain", "a b", "what?", "100%", "%41", "a#b", "é"])
async def test_any_state_directory_will_do(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir()
    async with opened(tmp_path / folder / "hive.sqlite") as store:
        await store.write(note("a"))
        assert await store.last_seq() == 1


# -- schema -----------------------------------------------------------------------------------------------------------


def make_database(path: Path, *statements: str) -> bytes:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()
    return path.read_bytes()


async def test_a_database_of_a_newer_version_is_refused_by_name_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "hive.sqlite"
    async with opened(path):
        pass
    before = make_database(path, "PRAGMA user_version = 99")
    assert re.search(r"newer hyperhive wrote it \(schema 99.*run that version again", await refusal_to_open(path))
    assert path.read_bytes() == before


@pytest.mark.parametrize("change", ["DROP TABLE retention_clock", "ALTER TABLE agents ADD COLUMN mood TEXT"])
async def test_a_database_whose_tables_are_of_no_release_is_refused_with_the_way_out(
    tmp_path: Path, change: str
) -> None:
    path = tmp_path / "hive.sqlite"
    async with opened(path):
        pass
    before = make_database(path, change)
    assert re.search(r"between two releases made it.*move it away with its -wal and -shm", await refusal_to_open(path))
    assert path.read_bytes() == before


async def test_what_sqlite_keeps_for_itself_does_not_make_a_database_another(tmp_path: Path) -> None:
    path = tmp_path / "hive.sqlite"
    async with opened(path):
        pass
    make_database(path, "ANALYZE")
    async with opened(path):
        pass


@pytest.mark.parametrize(
    "statements",
    [
        ["PRAGMA application_id = 1234"],
        ["PRAGMA application_id = 1234", "CREATE TABLE precious (a)"],
        ["CREATE TABLE precious (a)"],  # most programs set no application id
        ["PRAGMA user_version = 1"],
    ],
)
async def test_a_database_of_another_program_is_refused_and_left_alone(tmp_path: Path, statements: list[str]) -> None:
    path = tmp_path / "hive.sqlite"
    before = make_database(path, *statements)
    assert re.search("another program; move it away or change state_dir", await refusal_to_open(path))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["hive.sqlite"]


async def test_a_file_that_is_no_database_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "hive.sqlite"
    path.write_text("no database at all\n" * 100)
    assert re.search(r"cannot open .*hive\.sqlite", await refusal_to_open(path))


async def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    assert re.search(r"cannot open .*nowhere", await refusal_to_open(tmp_path / "nowhere" / "hive.sqlite"))


async def test_a_migration_is_applied_once_and_keeps_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "hive.sqlite"
    async with opened(path) as store:
        await store.write(note("old"))
    known = schema.migrations()
    more = "CREATE TABLE counted (a) STRICT; INSERT INTO counted VALUES (1); -- the end"
    monkeypatch.setattr(schema, "migrations", lambda: (*known, (len(known) + 1, more.replace("(a)", "(a INTEGER)"))))
    for _ in range(3):
        async with opened(path) as store:
            assert [row["kind"] for row in await store.rows("SELECT kind FROM events")] == ["old"]
            assert len(await store.rows("SELECT * FROM counted")) == 1


async def test_a_migration_that_fails_leaves_the_database_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "hive.sqlite"
    async with opened(path):
        pass
    known = schema.migrations()
    broken = (len(known) + 1, "CREATE TABLE half (a INTEGER) STRICT; INSERT INTO nowhere VALUES (1);")
    with monkeypatch.context() as patch:
        patch.setattr(schema, "migrations", lambda: (*known, broken))
        assert re.search("nowhere", await refusal_to_open(path))
    async with opened(path) as store:
        assert await store.row("SELECT 1 FROM sqlite_master WHERE name = 'half'") is None
        await store.write(note("goes on"))


async def test_each_new_database_has_a_timeline_of_its_own(tmp_path: Path) -> None:
    """Also of one process, which runs the migrations once."""
    found = set()
    for number in range(2):
        async with opened(tmp_path / f"{number}.sqlite") as store:
            found |= {row["id"] for row in await store.rows("SELECT id FROM timeline")}
    assert len(found) == 2


def test_a_new_database_that_another_program_has_locked_is_not_waited_for(tmp_path: Path) -> None:
    with (
        contextlib.closing(sqlite3.connect(tmp_path / "new", isolation_level=None)) as other,
        contextlib.closing(sqlite3.connect(tmp_path / "new", isolation_level=None, timeout=0)) as ours,
    ):
        other.execute("PRAGMA journal_mode = WAL")
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            schema.migrate(ours, "new")
        other.execute("ROLLBACK")
        schema.migrate(ours, "new")


def test_the_migrations_are_numbered_and_every_table_is_strict() -> None:
    known = schema.migrations()
    assert [number for number, _ in known] == list(range(1, len(known) + 1))
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        schema.migrate(connection, "memory")
        sql = "SELECT name, strict FROM pragma_table_list WHERE type = 'table' AND name NOT LIKE 'sqlite%'"
        tables = dict(connection.execute(sql))
    assert "messages" in tables
    assert tables == dict.fromkeys(tables, 1)


# -- a disk that refuses ----------------------------------------------------------------------------------------------


async def test_a_failed_commit_fails_everybody_who_waits_and_the_store_with_them(tmp_path: Path) -> None:
    path, told, published = tmp_path / "hive.sqlite", [], []

    class NotingBus(Bus):
        def publish(self, topics: Iterable[str]) -> None:
            published.extend(topics)

    def dangles(tx: Transaction) -> None:
        # Checked at the commit alone: the nearest thing to a disk that refuses, without one.
        tx.execute("PRAGMA defer_foreign_keys = ON")
        tx.execute(f"INSERT INTO deliveries ({DELIVERY}) VALUES (77, 'iris', 'hm1nd', 'queued', 0, 0)")

    async def fails(store: Store, function: Callable[[Transaction], object]) -> None:
        with pytest.raises(StoreError, match="cannot write") as caught:
            await store.write(function)
        told.append(caught.value)

    async def hears(store: Store) -> None:
        with pytest.raises(StoreError, match="disk refused a commit") as caught:
            await store.wait_failed()
        assert caught.value.__cause__ is not None
        told.append(caught.value)

    async with opened(path, NotingBus()) as store:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hears, store)
            async with held_writer(store, nursery):
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(fails, store, note("a"))
                nursery.start_soon(fails, store, dangles)
                nursery.start_soon(fails, store, note("b"))
                await trio.testing.wait_all_tasks_blocked()
        assert len(told) == 4
        await fails(store, note("afterwards"))
    assert published == []
    assert kinds_on_disk(path) == []


FILLS_THE_DISK = """
import json, resource, signal, sys, trio, trio_asyncio
from pathlib import Path
from hive_core.store.door import open_store
from hive_core.store.errors import StoreBusy

async def main():
    answered = []
    async with trio_asyncio.open_loop(), open_store(Path(sys.argv[1])) as store:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (800_000, hard))
        refused = []
        for n in range(200):
            try:
                await store.write(lambda tx: tx.emit("x" * 5000, "system", n=n))
                answered.append(n)
            except StoreBusy as exc:
                refused.append(str(exc))
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        await store.write(lambda tx: tx.emit("later", "system", n=1000))
        answered.append(1000)
    print(json.dumps([answered, refused]))

trio.run(main)
"""


def test_a_disk_without_room_is_told_to_each_caller_loses_nothing_and_the_store_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "hive.sqlite"
    with python(FILLS_THE_DISK, str(path)) as child:
        assert child.stdout is not None
        answered, refused = json.loads(child.stdout.read())
    assert child.returncode == 0
    assert 1 < len(answered) < 200
    assert len(answered) + len(refused) == 201
    assert all(why.startswith("cannot write now: ") and "nothing of this was stored" in why for why in refused)
    with second_look(path) as connection:
        assert [json.loads(data)["n"] for (data,) in connection.execute("SELECT data FROM events")] == answered
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


# -- the bus, the events, the backstop --------------------------------------------------------------------------------


async def test_a_listener_wakes_once_for_many_publications_and_loses_none() -> None:
    bus = Bus()
    with bus.listen("a", "b") as listener:
        bus.publish(["a"])
        bus.publish(["b", "a"])
        await listener.wait()
        with trio.CancelScope() as scope:
            scope.cancel()
            await listener.wait()
        bus.publish(["b"])
        await listener.wait()


async def test_a_cancelled_wait_loses_no_publication() -> None:
    bus = Bus()
    with bus.listen("a") as listener:
        bus.publish(["a"])
        with trio.CancelScope() as scope:
            scope.cancel()
            await listener.wait()
        assert scope.cancelled_caught
        with trio.fail_after(PATIENCE_S):
            await listener.wait()


async def test_nobody_is_listed_who_has_left() -> None:
    bus = Bus()
    with bus.listen("a"), bus.listen("a", "b"):
        assert sorted(bus.topics()) == ["a", "b"]
    assert bus.topics() == []


async def test_followers_get_every_event_once_and_in_order_across_pages(hive: Services) -> None:
    begin = await hive.store.last_seq()
    await hive.store.write(lambda tx: [tx.emit("many", "system", n=n) for n in range(PAGE + 10)])
    got: list[int] = []
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:

            async def follow() -> None:
                async for event in follow_events(hive.store, begin):
                    got.append(event["data"]["n"])
                    if len(got) == PAGE + 13:
                        nursery.cancel_scope.cancel()

            nursery.start_soon(follow)
            await wait_until(hive.store, lambda: _enough(got, PAGE), "events")
            for n in range(3):
                await hive.store.write(lambda tx, n=n: tx.emit("more", "system", n=PAGE + 10 + n))
    assert got == list(range(PAGE + 13))


async def _enough(got: list[int], count: int) -> bool:
    await trio.lowlevel.checkpoint()
    while len(got) < count:
        await trio.testing.wait_all_tasks_blocked()
    return True


async def test_the_newest_events_come_oldest_first(hive: Services) -> None:
    await hive.store.write(lambda tx: [tx.emit("n", "system", n=n) for n in range(5)])
    assert [event["data"] for event in await newest_events(hive.store, 2)] == [{"n": 3}, {"n": 4}]


async def test_a_lost_wake_up_costs_a_message_only_time(hive: Services) -> None:
    leased: list[int] = []

    async def lease() -> None:
        leased.append((await hive.broker.lease(AgentName("iris"))).message["id"])
        nursery.cancel_scope.cancel()

    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lease)
            await trio.testing.wait_all_tasks_blocked()
            # Written without the wake-up that put_message gives.
            await hive.sql(f"INSERT INTO messages ({MESSAGE}) VALUES ('hm1nd', 'hi', 2, 'system', 1, 0, 1)")
            await hive.sql(f"INSERT INTO deliveries ({DELIVERY}) VALUES (1, 'iris', 'hm1nd', 'queued', 0, 0)")
            await trio.testing.wait_all_tasks_blocked()
            assert leased == []
            nursery.start_soon(hive.store.serve_backstop, 0.01)
    assert leased == [1]


async def test_a_lost_wake_up_costs_an_event_only_time(hive: Services) -> None:
    with trio.fail_after(PATIENCE_S), hive.store.bus.listen(EVENTS) as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hive.store.serve_backstop, 0.01)
            woken = False
            while not woken:
                # The first may be there before the backstop has looked for the first time.
                await hive.sql("INSERT INTO events (at_ms, kind, actor, data) VALUES (1, 'quiet', 'system', '{}')")
                with trio.move_on_after(0.2):
                    await listener.wait()
                    woken = True
            nursery.cancel_scope.cancel()


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 3)), min_size=1, max_size=12))
def test_rows_and_events_are_stored_together_or_not_at_all(writes: list[tuple[bool, int]]) -> None:
    async def check(hive: Services) -> None:
        async def write(number: int, succeeds: bool, rows: int) -> None:
            def function(tx: Transaction) -> None:
                for _ in range(rows):
                    tx.execute(
                        f"INSERT INTO messages ({MESSAGE}) VALUES (?, 'b', 1, 'system', 1, 0, 1)", (str(number),)
                    )
                    tx.emit("stored", str(number))
                if not succeeds:
                    raise Refusal("refused", "no")

            with contextlib.suppress(Refusal):
                await hive.store.write(function)

        async with trio.open_nursery() as nursery:
            for number, (succeeds, rows) in enumerate(writes):
                nursery.start_soon(write, number, succeeds, rows)
        wanted = sorted(str(number) for number, (succeeds, rows) in enumerate(writes) if succeeds for _ in range(rows))
        senders = await hive.store.rows("SELECT sender FROM messages")
        actors = await hive.store.rows("SELECT actor FROM events WHERE kind = 'stored'")
        assert sorted(row[0] for row in senders) == sorted(row[0] for row in actors) == wanted

    run_in_hive(check)


async def test_one_item_that_makes_a_function_of_many_raise_fails_no_other(tmp_path: Path) -> None:
    def many(tx: Transaction, items: list[int]) -> list[outcome.Outcome[int]]:
        if 3 in items:
            raise ValueError("three")
        return [outcome.Value(item) for item in items]

    results: dict[int, object] = {}

    async def one(store: Store, item: int) -> None:
        try:
            results[item] = await store.write_together(many, item)
        except ValueError as exc:
            results[item] = str(exc)

    async with (
        opened(tmp_path / "hive.sqlite") as store,
        trio.open_nursery() as nursery,
        held_writer(store, nursery),
    ):
        for item in range(5):
            nursery.start_soon(one, store, item)
        await trio.testing.wait_all_tasks_blocked()
    assert results == {0: 0, 1: 1, 2: 2, 3: "three", 4: 4}
