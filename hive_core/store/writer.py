"""The one writer: a thread of its own with the standard library's sqlite3, and group commit.

All that is queued when the thread looks goes into one transaction, without a timer: a lone write commits at once, and
under load one fdatasync serves many. Each caller is answered only after the commit that holds its rows. Standard
library's sqlite3 because the hand-over of an async wrapper costs more than the write.
"""

from __future__ import annotations

import json
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import outcome
import trio

from hive_core.store.bus import EVENTS, Bus
from hive_core.store.schema import StoreError

T = TypeVar("T")
BATCH_LIMIT = 512
_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class Transaction:
    """What a write function gets: the connection, and the ways to tell of the change.

    A function that raises leaves nothing behind, neither rows nor events, and disturbs no other in its batch.
    """

    def __init__(self, connection: sqlite3.Connection, now_ms: int) -> None:
        self.now_ms = now_ms
        self.execute = connection.execute
        self.executemany = connection.executemany
        self.topics: set[str] = set()
        self.events: list[tuple[int, str, str, str | None, str]] = []

    def emit(self, kind: str, actor: str, agent: str | None = None, **data: Any) -> None:
        """Add to the event log: stored with the rest of the batch in one statement, broadcast after the commit."""
        self.topics.add(EVENTS)
        self.events.append((self.now_ms, kind, actor, agent, _to_json(data)))

    def wake(self, topic: str) -> None:
        """Publish `topic` after the commit."""
        self.topics.add(topic)


class _Job:
    __slots__ = ("function", "result", "task", "topics")

    def __init__(self, function: Callable[[Transaction], Any], task: trio.lowlevel.Task) -> None:
        self.function = function
        self.task: trio.lowlevel.Task | None = task  # None when the caller was cancelled
        self.result: outcome.Outcome[Any]
        self.topics: set[str] = set()


class _Raised(Exception):
    """A function of a batch raised; the batch is rolled back and runs again."""


class Writer:
    def __init__(self, connection: sqlite3.Connection, bus: Bus, clock: Callable[[], float] = time.time) -> None:
        self._connection = connection
        self._bus = bus
        self._clock = clock
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._token = trio.lowlevel.current_trio_token()
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
        self._finished = trio.Event()
        self._failure: BaseException | None = None
        self._failed = trio.Event()
        self._thread.start()

    async def write(self, function: Callable[[Transaction], T]) -> T:
        """Run `function` on the writer's thread inside a transaction; return after its commit.

        What the function raises is raised here, and then nothing of it is stored. It may run twice (the first time
        is rolled back), so it must have no effect but on the database. When this call is cancelled the
        function may or may not have been committed, whole. Raises StoreError once a commit has failed: after a
        failed fsync nothing that the file says can be trusted until it is opened anew.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._failure is not None or self._finished.is_set():
            raise StoreError("cannot write: the store is closed") from self._failure
        job = _Job(function, trio.lowlevel.current_task())
        self._queue.put(job)

        def abort(_: object) -> trio.lowlevel.Abort:
            job.task = None
            return trio.lowlevel.Abort.SUCCEEDED

        result: T = await trio.lowlevel.wait_task_rescheduled(abort)
        return result

    async def wait_failed(self) -> None:
        """Return never, or raise StoreError when the disk has refused a commit."""
        await self._failed.wait()
        raise StoreError(f"cannot go on: the disk refused a commit ({self._failure})") from self._failure

    async def aclose(self) -> None:
        """Commit what is queued and end the thread."""
        with trio.CancelScope(shield=True):
            if not self._finished.is_set():
                self._queue.put(None)
                await self._finished.wait()

    def _run(self) -> None:
        last = False
        while not last:
            batch: list[_Job] = []
            item = self._queue.get()
            while True:
                if item is None:
                    last = True
                    break
                batch.append(item)
                if len(batch) == BATCH_LIMIT:
                    break
                try:
                    item = self._queue.get_nowait()
                except queue.Empty:
                    break
            if batch:
                self._commit(batch)
                self._token.run_sync_soon(self._deliver, batch)
        self._token.run_sync_soon(self._finished.set)

    def _commit(self, batch: list[_Job]) -> None:
        try:
            if self._failure is not None:
                raise StoreError("cannot write: the store is closed") from self._failure
            now_ms = int(self._clock() * 1000)
            try:
                self._run_together(batch, now_ms)
            except _Raised:
                self._run_apart(batch, now_ms)
        except Exception as exc:
            self._failure = self._failure or exc
            for job in batch:
                job.topics = set()
                job.result = outcome.Error(exc if isinstance(exc, StoreError) else StoreError(f"cannot write: {exc}"))

    def _run_together(self, batch: list[_Job], now_ms: int) -> None:
        """The usual case: nobody raises, and savepoints would be a third of the statements."""
        events: list[tuple[Any, ...]] = []
        self._connection.execute("BEGIN IMMEDIATE")
        for job in batch:
            transaction = Transaction(self._connection, now_ms)
            try:
                job.result = outcome.Value(job.function(transaction))
            except Exception as exc:
                self._connection.execute("ROLLBACK")
                raise _Raised from exc
            job.topics = transaction.topics
            events += transaction.events
        self._commit_with(events)

    def _run_apart(self, batch: list[_Job], now_ms: int) -> None:
        """Once more, each behind a savepoint, so that the one that raises takes back its own rows alone."""
        events: list[tuple[Any, ...]] = []
        execute = self._connection.execute
        execute("BEGIN IMMEDIATE")
        for job in batch:
            execute("SAVEPOINT job")
            transaction = Transaction(self._connection, now_ms)
            try:
                job.result = outcome.Value(job.function(transaction))
                job.topics = transaction.topics
                events += transaction.events
            except Exception as exc:
                execute("ROLLBACK TO job")
                job.result, job.topics = outcome.Error(exc), set()
            execute("RELEASE job")
        self._commit_with(events)

    def _commit_with(self, events: list[tuple[Any, ...]]) -> None:
        if events:
            self._connection.executemany(
                "INSERT INTO events (at_ms, kind, actor, agent, data) VALUES (?, ?, ?, ?, ?)", events
            )
        self._connection.execute("COMMIT")

    def _deliver(self, batch: list[_Job]) -> None:
        if self._failure is not None:
            self._failed.set()
        self._bus.publish(set().union(*(job.topics for job in batch)))
        for job in batch:
            if job.task is not None:
                trio.lowlevel.reschedule(job.task, job.result)
