"""The one writer: group commit over the standard library's sqlite3.

All that is queued when it looks goes into one transaction, without a timer: a lone write commits at once, and under
load one fdatasync serves many. Each caller is answered only after the commit that holds its rows.

The statements of a batch run in trio's own thread: handed to another one, each would wait for the interpreter's lock.
What waits for the disk, or for another program's lock, goes to a thread: above all the commit, with its writing,
syncing and checkpoints, while the next batch gathers.

Two kinds of write go further. `write_together` gives one function all that a batch brings for it, so that what many
do alike costs the statements of one. `write_when` waits inside: it is run again by the transaction that wakes its
topic, and so shares that one's commit.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections import ChainMap
from collections.abc import Callable, Generator, Hashable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

import outcome
import trio

from hive_core.store.ballast import Ballast
from hive_core.store.bus import EVENTS, Bus
from hive_core.store.errors import StoreBusy, StoreError, is_full, of_the_disk, passes, why_not_now
from hive_core.store.worker import Worker

T = TypeVar("T")
I = TypeVar("I")  # noqa: E741
BATCH_LIMIT = 512  # of weights: whatever runs in one go keeps all else waiting
LOCKED_MS = 5_000  # how long another program may have the database locked before a write is refused
PARAMETERS_LIMIT = 30_000  # sqlite takes 32,766 in one statement
_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
Memo = dict[Hashable, Any]
# What may wait is yielded, to be called wherever that does no harm; its error is thrown in.
Work = Generator[Callable[[], object], object, T]
_EVENT = ("at_ms", "kind", "actor", "agent", "message_id", "data")


class Transaction:
    """What a write function gets: the connection, and the ways to tell of the change.

    A function that raises leaves nothing behind, neither rows nor events, and disturbs no other in its batch.

    short   the disk is full, and what is written now lives on the last reserve: refuse what only fills it further
    memo    what is dear to count and is known already. Its values never change in place. It goes with the rows: what
            is rolled back is not in it; what is set to None is forgotten
    """

    def __init__(
        self, connection: sqlite3.Connection, now_ms: int, memo: ChainMap[Hashable, Any], short: bool = False
    ) -> None:
        self.now_ms = now_ms
        self.memo = memo
        self.short = short
        self.execute = connection.execute
        self.executemany = connection.executemany
        self.topics: set[str] = set()
        self.events: list[tuple[int, str, str, str | None, int | None, str]] = []

    def insert(self, table: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Insert many rows by one statement: each one that runs hands the interpreter's lock over and back."""
        rows = list(rows)
        most = PARAMETERS_LIMIT // len(columns)
        for some in (rows[at : at + most] for at in range(0, len(rows), most)):
            values = ", ".join([f"({', '.join('?' * len(columns))})"] * len(some))
            self.execute(
                f"INSERT INTO {table} ({', '.join(columns)}) VALUES {values}", [value for row in some for value in row]
            )

    def emit(self, kind: str, actor: str, agent: str | None = None, about: int | None = None, **data: Any) -> None:
        """Add to the event log: stored with the rest of the batch in one statement, broadcast after the commit.

        about: the message whose life this belongs to, for what its row and its leases do not tell.
        """
        self.topics.add(EVENTS)
        self.events.append((self.now_ms, kind, actor, agent, about, _to_json(data)))

    def wake(self, topic: str) -> None:
        """Publish `topic` after the commit, and run who waits for it inside this transaction."""
        self.topics.add(topic)


_NOTHING: outcome.Outcome[Any] = outcome.Value(None)


class Job:
    """One caller's write. Its `item` is what it brings for a function of many, as much work as `weight` plain ones."""

    __slots__ = ("function", "item", "result", "task", "topic", "weight")

    def __init__(
        self,
        function: Callable[..., Any],
        task: trio.lowlevel.Task,
        item: Any = None,
        topic: str | None = None,
        weight: int = 1,
    ) -> None:
        self.function = function
        self.task: trio.lowlevel.Task | None = task  # None when the caller was cancelled
        self.item = item
        self.weight = weight
        self.topic = topic  # what it waits for while it has no result
        self.result: outcome.Outcome[Any] = _NOTHING

    @property
    def waits(self) -> bool:
        """Whether it has to run again when its topic is woken."""
        return self.topic is not None and isinstance(self.result, outcome.Value) and self.result.value is None


class _Raised(Exception):
    """A function of a batch raised; the batch is rolled back and runs again."""


class Batches:
    """Commits one batch of jobs after another, on a connection of its own. It knows of no thread and never waits."""

    def __init__(
        self, connection: sqlite3.Connection, clock: Callable[[], float], ballast: Ballast | None = None
    ) -> None:
        self._connection = connection
        self._ballast = ballast
        self._clock = clock
        self._memo: Memo = {}  # as of the last commit
        self._parked: dict[str, list[Job]] = {}  # jobs that wait, by topic
        self.failure: BaseException | None = None  # why nothing can be written any more

    def commit(self, batch: list[Job]) -> Work[tuple[list[Job], set[str]]]:
        """Commit a batch; who can be answered now, and what to publish."""
        batch = [job for job in batch if job.task is not None]  # who left while it was queued asks for nothing
        for job in batch:
            if job.topic is not None:
                self._parked.setdefault(job.topic, []).append(job)
        try:
            if self.failure is not None:
                raise StoreError("cannot write: the store is closed") from self.failure
            now_ms = int(self._clock() * 1000)
            try:
                run, topics = yield from self._run_together(batch, now_ms)
            except sqlite3.Error as exc:
                if not is_full(exc) or self._ballast is None or not self._ballast.free():
                    raise
                self._roll_back()
                run, topics = yield from self._run_together(batch, now_ms)
        except Exception as exc:
            self._roll_back()
            run, topics = batch, set()
            error: Exception
            if isinstance(exc, StoreBusy):
                error = exc
            elif passes(exc):
                error = StoreBusy(f"cannot write now: {why_not_now(exc)}; nothing of this was stored, try again")
            else:
                self.failure = self.failure or exc
                run = list({*batch, *(job for jobs in self._parked.values() for job in jobs)})
                error = exc if isinstance(exc, StoreError) else StoreError(f"cannot write: {exc}")
            for job in run:
                job.result = outcome.Error(error)
        self._forget_answered(run)
        return [job for job in run if not job.waits], topics

    def _begin(self) -> Work[None]:
        try:
            self._connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as exc:
            if exc.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                raise
            yield self._begin_after_others

    def _begin_after_others(self) -> None:
        self._connection.execute(f"PRAGMA busy_timeout = {LOCKED_MS}")
        try:
            self._connection.execute("BEGIN IMMEDIATE")
        finally:
            self._connection.execute("PRAGMA busy_timeout = 0")

    def _roll_back(self) -> None:
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")

    def _run_together(self, batch: list[Job], now_ms: int) -> Work[tuple[list[Job], set[str]]]:
        if self._ballast is not None and self._ballast.short:
            yield self._ballast.check
        try:
            return (yield from self._run_batch(batch, now_ms, apart=False))
        except _Raised:
            # Once more, each behind a savepoint, so that the one that raises takes back its own rows alone.
            return (yield from self._run_batch(batch, now_ms, apart=True))

    def _transaction(self, now_ms: int, fresh: Memo) -> Transaction:
        memo = ChainMap({}, fresh, self._memo)
        return Transaction(self._connection, now_ms, memo, self._ballast is not None and self._ballast.short)

    def _forget_answered(self, run: list[Job]) -> None:
        """Of the topics that were looked at, keep who still waits and has not left."""
        for topic in {job.topic for job in run if job.topic is not None}:
            waiting = [job for job in self._parked.pop(topic, []) if job.waits and job.task is not None]
            if waiting:
                self._parked[topic] = waiting

    def _run_batch(self, batch: list[Job], now_ms: int, apart: bool) -> Work[tuple[list[Job], set[str]]]:
        """Run and commit a batch and whom it wakes. All that ran, each once, and every topic.

        Together is the usual case: nobody raises, and savepoints would be a third of the statements.
        """
        events: list[tuple[Any, ...]] = []
        topics: set[str] = set()
        run: dict[Job, None] = {}
        fresh: Memo = {}
        # A function of many that raises would fail all its items: apart, each is alone.
        steps = [[job] for job in batch] if apart else _steps(batch)
        yield from self._begin()
        changes = self._connection.total_changes
        try:
            while steps:
                woken: set[str] = set()
                for step in steps:
                    transaction = self._run_step(step, now_ms, fresh, apart)
                    events += transaction.events
                    woken |= transaction.topics
                    run.update(dict.fromkeys(step))
                topics |= woken
                steps = [[job] for topic in sorted(woken & self._parked.keys()) for job in self._waiting(topic)]
            if events:
                self._transaction(now_ms, fresh).insert("events", _EVENT, events)
            if self._connection.total_changes == changes:
                self._connection.execute("COMMIT")  # nothing to write, and nothing to wait for
            else:
                yield partial(self._connection.execute, "COMMIT")
        except BaseException:
            # Nothing of it happened: who waits for a topic waits on.
            for job in run:
                job.result = _NOTHING
            raise
        self._remember(fresh)
        return list(run), topics

    def _remember(self, fresh: Memo) -> None:
        for key, value in fresh.items():
            if value is None:
                self._memo.pop(key, None)
            else:
                self._memo[key] = value

    def _waiting(self, topic: str) -> list[Job]:
        return [job for job in self._parked[topic] if job.waits and job.task is not None]

    def _run_step(self, step: list[Job], now_ms: int, fresh: Memo, apart: bool) -> Transaction:
        """Run one function for its jobs; what it told is empty if it raised."""
        execute = self._connection.execute
        if apart:
            execute("SAVEPOINT job")
        transaction = self._transaction(now_ms, fresh)
        try:
            results = _call(step, transaction)
        except Exception as exc:
            if of_the_disk(exc):
                raise
            if not apart:
                self._roll_back()
                raise _Raised from exc
            if not self._connection.in_transaction:  # sqlite undid it all by itself, the others' rows too
                raise StoreBusy(f"cannot write now: {exc}; nothing of this was stored, try again") from exc
            execute("ROLLBACK TO job")
            transaction = self._transaction(now_ms, fresh)
            results = [outcome.Error(exc) for _ in step]
        if apart:
            execute("RELEASE job")
        fresh.update(transaction.memo.maps[0])
        for job, result in zip(step, results, strict=True):
            job.result = result
        return transaction


class Writes:
    """The three ways to write, for whatever it is that takes jobs, commits them and hands the answers back."""

    def __init__(self, batches: Batches, bus: Bus) -> None:
        self._batches = batches
        self._bus = bus
        self._finished = trio.Event()
        self._failed = trio.Event()

    def _take(self, job: Job) -> None:
        """Queue a job for the next batch. Its task sleeps until `_deliver`."""
        raise NotImplementedError

    async def write(self, function: Callable[[Transaction], T]) -> T:
        """Run `function` inside a transaction; return after its commit.

        What the function raises is raised here, and then nothing of it is stored. It may run twice (the first time
        is rolled back), so it must have no effect but on the database. When this call is cancelled the
        function may or may not have been committed, whole. Raises StoreBusy when the disk is full or lets nobody
        write just now: nothing is stored, and a later write may succeed. Raises StoreError once a sync has failed:
        after that nothing that the file says can be trusted until it is opened anew.
        """
        result: T = await self._result_of(Job(function, trio.lowlevel.current_task()))
        return result

    async def write_together(
        self, function: Callable[[Transaction, list[I]], Sequence[outcome.Outcome[T]]], item: I, weight: int = 1
    ) -> T:
        """As `write`, but `function` runs once for all the items of a batch and says what becomes of each.

        weight: how many plain items this one is as much work as. A batch takes no more than BATCH_LIMIT of it, or one.
        """
        result: T = await self._result_of(Job(function, trio.lowlevel.current_task(), item, weight=weight))
        return result

    async def write_when(self, topic: str, function: Callable[[Transaction], T | None]) -> T:
        """As `write`; while `function` returns None it runs again in each transaction that wakes `topic`.

        It sees the rows of that transaction and is committed with it. A call that is cancelled runs no more.
        """
        result: T = await self._result_of(Job(function, trio.lowlevel.current_task(), topic=topic))
        return result

    async def _result_of(self, job: Job) -> Any:
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._batches.failure is not None or self._finished.is_set():
            raise StoreError("cannot write: the store is closed") from self._batches.failure
        self._take(job)

        def abort(_: object) -> trio.lowlevel.Abort:
            job.task = None
            return trio.lowlevel.Abort.SUCCEEDED

        return await trio.lowlevel.wait_task_rescheduled(abort)

    async def wait_failed(self) -> None:
        """Return never, or raise StoreError when the disk has refused a commit."""
        await self._failed.wait()
        raise StoreError(
            f"cannot go on: the disk refused a commit ({self._batches.failure})"
        ) from self._batches.failure

    def _deliver(self, answered: list[Job], topics: set[str]) -> None:
        if self._batches.failure is not None:
            self._failed.set()
        self._bus.publish(topics)
        for job in answered:
            if job.task is not None:
                task, job.task = job.task, None
                trio.lowlevel.reschedule(task, job.result)


class Writer(Writes):
    """The writer of the daemon: statements in trio's thread, and what may wait in another."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        bus: Bus,
        clock: Callable[[], float] = time.time,
        ballast: Ballast | None = None,
    ) -> None:
        super().__init__(Batches(connection, clock, ballast), bus)
        self._queued: list[Job] = []
        self._closing = False
        self._idle: trio.lowlevel.Task | None = None
        self._worker = Worker()
        trio.lowlevel.spawn_system_task(self._serve)

    def _take(self, job: Job) -> None:
        self._queued.append(job)
        self._rouse()

    async def aclose(self) -> None:
        """Commit what is queued and end the task."""
        with trio.CancelScope(shield=True):
            self._closing = True
            self._rouse()
            await self._finished.wait()

    def _rouse(self) -> None:
        if self._idle is not None:
            task, self._idle = self._idle, None
            trio.lowlevel.reschedule(task)

    async def _serve(self) -> None:
        with trio.CancelScope(shield=True):
            while self._queued or not self._closing:
                if not self._queued:
                    self._idle = trio.lowlevel.current_task()
                    await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)
                    continue
                batch, self._queued = next_batch(self._queued)
                self._deliver(*await self._commit(batch))
                if self._queued:
                    # Who was answered goes first: it asks again while the next batch runs.
                    await trio.lowlevel.checkpoint()
                    await trio.lowlevel.checkpoint()
            self._finished.set()
            self._worker.close()

    async def _commit(self, batch: list[Job]) -> tuple[list[Job], set[str]]:
        """Whatever goes wrong, somebody hears of it: a writer that ends in silence leaves all waiting."""
        try:
            return await self._finish(self._batches.commit(batch))
        except BaseException as exc:
            self._batches.failure = self._batches.failure or exc
            for job in batch:
                job.result = outcome.Error(StoreError(f"cannot write: {type(exc).__name__}: {exc}"))
            return batch, set()

    async def _finish(self, work: Work[T]) -> T:
        result: outcome.Outcome[Any] = outcome.Value(None)
        try:
            while True:
                may_wait = result.send(work)
                result = await self._worker.run(may_wait)
        except StopIteration as done:
            value: T = done.value
            return value


def next_batch(queued: list[Job]) -> tuple[list[Job], list[Job]]:
    """The jobs of the next batch, which are the first one and what fits beside it, and the others."""
    weight = 0
    for count, job in enumerate(queued):
        weight += job.weight
        if count and weight > BATCH_LIMIT:
            return queued[:count], queued[count:]
    return queued, []


def _steps(batch: list[Job]) -> list[list[Job]]:
    """The batch in its order, but the jobs of one function of many stand together."""
    steps: list[list[Job]] = []
    together: dict[Callable[..., Any], list[Job]] = {}
    for job in batch:
        if job.item is None:
            steps.append([job])
        elif job.function in together:
            together[job.function].append(job)
        else:
            steps.append(together.setdefault(job.function, [job]))
    return steps


def _call(step: list[Job], transaction: Transaction) -> Sequence[outcome.Outcome[Any]]:
    if step[0].item is None:
        return [outcome.Value(step[0].function(transaction))]
    return step[0].function(transaction, [job.item for job in step])  # type: ignore[no-any-return]
