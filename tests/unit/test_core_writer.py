"""The writer's further promises: functions of many, writes that wait inside, and a disk that refuses for a while."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from pathlib import Path
from typing import Any

import outcome
import pytest
import trio
import trio.testing
import trio_asyncio

from hive_core.protocol.refusal import Refusal
from hive_core.store.bus import Bus
from hive_core.store.door import Store, open_store
from hive_core.store.errors import StoreBusy, StoreError
from hive_core.store.worker import Worker
from hive_core.store.writer import BATCH_LIMIT, PARAMETERS_LIMIT, Transaction
from tests.hives import PATIENCE_S, held_writer, second_look

Call = Callable[[], Awaitable[Any]]
COLUMNS = ("digest", "created_at_ms", "expires_at_ms")  # of sign_ins, which here is a table that things lie on


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "hive.sqlite"


@pytest.fixture
async def store(path: Path) -> AsyncIterator[Store]:
    async with trio_asyncio.open_loop(), open_store(path) as store:
        yield store


def note(kind: str) -> Callable[[Transaction], str]:
    def write(tx: Transaction) -> str:
        tx.emit(kind, "system")
        return kind

    return write


def put(*things: str, wake: str = "table") -> Callable[[Transaction], str]:
    """Lay things on the table, and wake who waits for some."""

    def write(tx: Transaction) -> str:
        tx.insert("sign_ins", COLUMNS, [(thing, 0, 0) for thing in things])
        tx.wake(wake)
        return "put"

    return write


def take(tx: Transaction) -> str | None:
    """Take the first thing from the table."""
    row = tx.execute("SELECT min(digest) FROM sign_ins").fetchone()
    tx.execute("DELETE FROM sign_ins WHERE digest = ?", (row[0],))
    thing: str | None = row[0]
    return thing


def stumbles(tx: Transaction) -> None:
    tx.emit("half done", "system")
    tx.wake("table")
    raise ValueError("no")


def kinds_on_disk(path: Path) -> list[str]:
    with second_look(path) as connection:
        return [kind for (kind,) in connection.execute("SELECT kind FROM events ORDER BY seq")]


async def table(store: Store) -> list[str]:
    return [row[0] for row in await store.rows("SELECT digest FROM sign_ins ORDER BY 1")]


class Waiting:
    """Calls in the background, each with how it came out."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self.results: dict[int, Any] = {}
        self.scopes: list[trio.CancelScope] = []

    async def begin(self, *calls: Call) -> None:
        """Begin these one after the other; return when all of them wait."""
        for call in calls:
            self.scopes.append(trio.CancelScope())
            self._nursery.start_soon(self._run, len(self.scopes) - 1, call)
            await trio.testing.wait_all_tasks_blocked()

    async def _run(self, number: int, call: Call) -> None:
        with self.scopes[number]:
            try:
                self.results[number] = await call()
            except (Refusal, StoreError, ValueError) as exc:
                self.results[number] = exc


async def in_one_batch(store: Store, *calls: Call) -> list[Any]:
    """What comes of calls that the writer finds all together."""
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery, held_writer(store, nursery):
            await (waiting := Waiting(nursery)).begin(*calls)
    return [waiting.results[number] for number in range(len(calls))]


# -- many by one ------------------------------------------------------------------------------------------------------


async def test_rows_beyond_what_one_statement_takes_are_all_inserted(store: Store) -> None:
    rows = [(f"{n:06}", n, n) for n in range(PARAMETERS_LIMIT // len(COLUMNS) + 5)]
    await store.write(lambda tx: tx.insert("sign_ins", COLUMNS, iter(rows)))
    await store.write(lambda tx: tx.insert("sign_ins", COLUMNS, []))
    assert [tuple(row) for row in await store.rows("SELECT * FROM sign_ins ORDER BY digest")] == rows


async def test_a_write_that_makes_sqlite_undo_the_whole_batch_ends_with_it_and_not_with_the_store(store: Store) -> None:
    await store.write(put("a"))

    def undoes(tx: Transaction) -> None:
        tx.execute("INSERT OR ROLLBACK INTO sign_ins VALUES ('a', 0, 0)")

    first, second = await in_one_batch(store, lambda: store.write(note("neighbour")), lambda: store.write(undoes))
    assert (type(first), type(second)) == (StoreBusy, StoreBusy)
    with pytest.raises(StoreBusy, match="nothing of this was stored"):
        await store.write(undoes)
    await store.write(put("b"))
    assert await store.rows("SELECT count(*) FROM sign_ins")


async def test_what_a_write_that_raises_has_remembered_is_forgotten_with_its_rows(store: Store) -> None:
    """Also where it is not alone: its neighbour's memory stays."""

    def remember(key: str, ends: bool = True) -> Callable[[Transaction], None]:
        def write(tx: Transaction) -> None:
            assert ends or tx.memo.get("neighbour")  # what those before it have set is there
            tx.memo[key] = 1
            if not ends:
                raise ValueError("no")

        return write

    calls = [lambda: store.write(remember("neighbour")), lambda: store.write(remember("raised", ends=False))]
    first, second = await in_one_batch(store, *calls)
    assert (first, str(second)) == (None, "no")
    assert await store.write(lambda tx: (tx.memo.get("neighbour"), tx.memo.get("raised"))) == (1, None)


async def test_a_commit_that_has_rows_waits_in_a_thread_and_one_without_does_not(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk may take seconds, and the sockets are served by the thread of the statements."""
    done: list[object] = []
    run = Worker.run

    async def note_run(self: Worker, function: Callable[[], object]) -> Any:
        done.append(getattr(function, "args", None))
        return await run(self, function)

    monkeypatch.setattr(Worker, "run", note_run)
    await store.write(lambda tx: tx.execute("SELECT 1").fetchone())
    assert done == []
    await store.write(put("a"))
    assert done == [("COMMIT",)]


async def test_what_is_as_much_work_as_many_does_not_keep_all_others_waiting_in_one_batch(store: Store) -> None:
    runs: list[list[int]] = []

    def many(tx: Transaction, items: list[int]) -> list[outcome.Outcome[int]]:
        runs.append(items)
        return [outcome.Value(item) for item in items]

    def ask(item: int, weight: int) -> Call:
        return lambda: store.write_together(many, item, weight)

    half = BATCH_LIMIT // 2
    calls = [ask(item, weight) for item, weight in enumerate([half, half, half, 1, 2 * BATCH_LIMIT, 1])]
    assert await in_one_batch(store, lambda: store.write(note("first")), *calls) == ["first", *range(6)]
    assert runs == [[0], [1, 2], [3], [4], [5]]


async def test_a_function_of_many_runs_once_for_a_batch_and_answers_each_in_its_place(store: Store, path: Path) -> None:
    runs: list[list[int]] = []

    def double(tx: Transaction, items: list[int]) -> list[outcome.Outcome[int]]:
        runs.append(items)
        for item in items:
            tx.emit(str(item), "system")
        return [outcome.Error(ValueError(item)) if item == 2 else outcome.Value(2 * item) for item in items]

    def ask(item: int) -> Call:
        return lambda: store.write_together(double, item)

    first, between, *more = await in_one_batch(store, ask(1), lambda: store.write(note("between")), ask(2), ask(3))
    assert (first, between, str(more[0]), more[1]) == (2, "between", "2", 6)
    assert runs == [[1, 2, 3]]
    # All stand where the first of them stood. An Error in the answer takes nothing back: it is the function's word.
    assert kinds_on_disk(path) == ["1", "2", "3", "between"]


async def test_two_functions_of_many_do_not_mix(store: Store) -> None:
    def tell(name: str) -> Callable[[Transaction, list[int]], list[outcome.Outcome[str]]]:
        return lambda tx, items: [outcome.Value(f"{name}{item} of {len(items)}") for item in items]

    first, second = tell("a"), tell("b")
    calls = [lambda f=f, n=n: store.write_together(f, n) for n, f in enumerate([first, second, first])]
    assert await in_one_batch(store, *calls) == ["a0 of 2", "b1 of 1", "a2 of 2"]


async def test_a_function_of_many_that_raises_fails_its_own_callers_alone_and_leaves_nothing(
    store: Store, path: Path
) -> None:
    def breaks(tx: Transaction, items: list[int]) -> list[outcome.Outcome[int]]:
        return stumbles(tx)  # type: ignore[return-value]

    def holds(tx: Transaction, items: list[int]) -> list[outcome.Outcome[int]]:
        tx.emit(f"of {len(items)}", "system")
        return [outcome.Value(item) for item in items]

    results = await in_one_batch(
        store,
        lambda: store.write_together(breaks, 1),
        lambda: store.write_together(holds, 2),
        lambda: store.write(note("neighbour")),
        lambda: store.write_together(breaks, 3),
        lambda: store.write_together(holds, 4),
    )
    assert [str(result) for result in results] == ["no", "2", "neighbour", "no", "4"]
    assert kinds_on_disk(path) == ["of 1", "neighbour", "of 1"]


# -- writes that wait inside ------------------------------------------------------------------------------------------


async def test_a_write_that_finds_what_it_wants_waits_for_nobody(store: Store) -> None:
    await store.write(put("a"))
    with trio.fail_after(PATIENCE_S):
        assert await store.write_when("table", take) == "a"


async def test_who_waits_is_run_by_the_transaction_that_wakes_it_and_shares_its_commit(path: Path) -> None:
    seen: list[list[str]] = []

    class LookingBus(Bus):
        def publish(self, topics: Iterable[str]) -> None:
            seen.append(kinds_on_disk(path))
            super().publish(topics)

    def take_and_tell(tx: Transaction) -> str | None:
        if (thing := take(tx)) is not None:
            tx.emit(f"took {thing}", "system")
        return thing

    def put_and_tell(tx: Transaction) -> str:
        tx.emit("put a", "system")
        return put("a")(tx)

    async with trio_asyncio.open_loop(), open_store(path, LookingBus()) as store, trio.open_nursery() as nursery:
        waiting = Waiting(nursery)
        await waiting.begin(lambda: store.write_when("table", take_and_tell))
        await store.write(note("of no interest"))
        assert waiting.results == {}
        assert await store.write(put_and_tell) == "put"
        await trio.testing.wait_all_tasks_blocked()
        assert waiting.results == {0: "a"}
    assert [kinds for kinds in seen if "put a" in kinds] == [["of no interest", "put a", "took a"]]


async def test_of_two_that_wait_on_one_topic_the_first_is_served_first_and_the_other_waits_on(store: Store) -> None:
    async with trio.open_nursery() as nursery:
        waiting = Waiting(nursery)
        await waiting.begin(*[lambda: store.write_when("table", take)] * 3)
        await store.write(put("a"))
        await trio.testing.wait_all_tasks_blocked()
        assert waiting.results == {0: "a"}
        await store.write(put("b", "c", "d"))
        await trio.testing.wait_all_tasks_blocked()
        assert waiting.results == {0: "a", 1: "b", 2: "c"}
    assert await table(store) == ["d"]


async def test_who_waits_for_another_topic_is_not_run(store: Store) -> None:
    runs: list[str] = []

    def look(tx: Transaction) -> str | None:
        runs.append("looked")
        return take(tx)

    async with trio.open_nursery() as nursery:
        await Waiting(nursery).begin(lambda: store.write_when("elsewhere", look))
        await store.write(put("a"))
        assert (runs, await table(store)) == (["looked"], ["a"])
        await store.write(put("b", wake="elsewhere"))
    assert (runs, await table(store)) == (["looked", "looked"], ["b"])


async def test_who_is_woken_can_wake_others_within_the_same_commit(path: Path) -> None:
    commits: list[set[str]] = []

    class NotingBus(Bus):
        def publish(self, topics: Iterable[str]) -> None:
            commits.append(set(topics))

    def pass_on(tx: Transaction) -> str | None:
        if (thing := take(tx)) is not None:
            put(f"{thing}{thing}", wake="second")(tx)
        return thing

    async with trio_asyncio.open_loop(), open_store(path, NotingBus()) as store, trio.open_nursery() as nursery:
        waiting = Waiting(nursery)
        await waiting.begin(lambda: store.write_when("second", take), lambda: store.write_when("table", pass_on))
        await store.write(put("a"))
        await trio.testing.wait_all_tasks_blocked()
        assert waiting.results == {0: "aa", 1: "a"}
    assert [topics for topics in commits if topics] == [{"table", "second"}]


async def test_a_call_that_waits_and_is_cancelled_runs_no_more(store: Store) -> None:
    async with trio.open_nursery() as nursery:
        waiting = Waiting(nursery)
        await waiting.begin(*[lambda: store.write_when("table", take)] * 2)
        await store.write(note("both are parked"))
        waiting.scopes[0].cancel()
        await trio.testing.wait_all_tasks_blocked()
        await store.write(put("a", "b"))
        await trio.testing.wait_all_tasks_blocked()
        assert waiting.results == {1: "a"}
    assert await table(store) == ["b"]


async def test_a_neighbour_that_raises_disturbs_nobody_who_waits(store: Store, path: Path) -> None:
    async with trio.open_nursery() as nursery:
        waiting = Waiting(nursery)
        await waiting.begin(lambda: store.write_when("table", take))
        # What raises has woken nobody, and takes nothing of the others with it.
        said = await in_one_batch(store, lambda: store.write(stumbles), lambda: store.write(note("neighbour")))
        assert (str(said[0]), said[1], waiting.results) == ("no", "neighbour", {})
        said = await in_one_batch(
            store,
            lambda: store.write(put("a")),
            lambda: store.write(stumbles),
            lambda: store.write_when("table", take),
            lambda: store.write(put("b")),
        )
        assert (said[0], str(said[1]), said[3]) == ("put", "no", "put")
        assert {said[2], waiting.results[0]} == {"a", "b"}
    assert (await table(store), kinds_on_disk(path)) == ([], ["neighbour"])


async def test_who_waits_and_raises_when_it_is_woken_is_told_and_the_one_who_woke_it_is_not_harmed(
    store: Store, path: Path
) -> None:
    def picky(tx: Transaction) -> str | None:
        tx.emit("half done", "system")
        if take(tx) == "a":
            raise ValueError("not that")
        tx.events.clear()
        return None

    async with trio.open_nursery() as nursery:
        waiting = Waiting(nursery)
        await waiting.begin(lambda: store.write_when("table", picky), lambda: store.write_when("table", take))
        assert await store.write(put("a")) == "put"
        await trio.testing.wait_all_tasks_blocked()
        assert (str(waiting.results[0]), waiting.results[1]) == ("not that", "a")
        await store.write(put("b"))  # and it is run no more
    assert (await table(store), kinds_on_disk(path)) == (["b"], [])


async def test_a_store_that_fails_answers_everybody_who_waits(store: Store) -> None:
    def dangles(tx: Transaction) -> None:
        # Checked at the commit alone: the nearest thing to a disk that refuses, without one.
        tx.execute("PRAGMA defer_foreign_keys = ON")
        tx.execute("INSERT INTO leases VALUES (77, 1, 1, 1)")

    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            waiting = Waiting(nursery)
            topics = ("table", "table", "elsewhere")
            await waiting.begin(*[lambda topic=topic: store.write_when(topic, take) for topic in topics])
            await store.write(note("all are parked"))
            await waiting.begin(lambda: store.write(dangles))
        assert [type(result) for result in waiting.results.values()] == [StoreError] * 4
        for late in (lambda: store.write(note("late")), lambda: store.write_when("table", take)):
            with pytest.raises(StoreError, match="cannot write: the store is closed"):
                await late()


# -- a disk that refuses for a while ----------------------------------------------------------------------------------


def pragma(text: str) -> Callable[[Transaction], None]:
    return lambda tx: tx.execute(f"PRAGMA {text}").fetchall() and None


@asynccontextmanager
async def locked(store: Store, path: Path) -> AsyncIterator[None]:
    """Another program writes, and does not end."""
    await store.write(pragma("busy_timeout = 20"))
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


@asynccontextmanager
async def full(store: Store, _: Path) -> AsyncIterator[None]:
    await store.write(pragma("max_page_count = 1"))  # never less than it has
    yield
    await store.write(pragma("max_page_count = 1000000"))


@pytest.mark.parametrize(("fault", "cause"), [(locked, "locked"), (full, "no space")])
async def test_a_disk_that_refuses_for_a_while_is_told_to_who_writes_and_the_store_goes_on_afterwards(
    store: Store, path: Path, fault: Callable[[Store, Path], AbstractAsyncContextManager[None]], cause: str
) -> None:
    def much(tx: Transaction) -> str:
        tx.emit("x" * 100_000, "system")
        return put("a")(tx)

    async with trio.open_nursery() as nursery:
        waiting = Waiting(nursery)
        await waiting.begin(lambda: store.write_when("table", take))
        async with fault(store, path):
            async with trio.open_nursery() as writers:
                writing = Waiting(writers)
                await writing.begin(lambda: store.write(much), lambda: store.write(note("x" * 100_000)))
            assert len(writing.results) == 2
            for result in writing.results.values():
                assert isinstance(result, StoreBusy)
                assert result.code == "unavailable"
                assert result.message.startswith("cannot write now: ")
                assert cause in result.message
                assert "; nothing of" in result.message
            assert [row["kind"] for row in await store.rows("SELECT kind FROM events")] == []
        assert await store.write(note("afterwards")) == "afterwards"
        # Who waited then is not told of a trouble that was not its own, and is served when there is something.
        assert waiting.results == {}
        await store.write(put("b"))
        await trio.testing.wait_all_tasks_blocked()
        assert waiting.results == {0: "b"}
    assert kinds_on_disk(path) == ["afterwards"]


async def test_what_nobody_expected_in_the_writers_thread_is_told_and_ends_the_store(store: Store) -> None:
    def leave(_: Transaction) -> None:
        raise SystemExit("out of here")

    with trio.fail_after(PATIENCE_S):
        with pytest.raises(StoreError, match="cannot write: SystemExit: out of here"):
            await store.write(leave)
        with pytest.raises(StoreError, match="cannot go on"):
            await store.wait_failed()
        with pytest.raises(StoreError, match="the store is closed"):
            await store.write(note("later"))
