"""The hive's store with sqlite in the caller's own task: no thread stands outside the clock, so virtual time can jump.

Everything that decides is the shipped code (`Batches`, `Store`); this replaces the thread and the readers, and can be
slow or lose wake-ups by a seeded chance.
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import outcome
import trio

from hive_core.store.bus import Bus
from hive_core.store.door import Parameters, Store
from hive_core.store.schema import migrate
from hive_core.store.writer import Batches, Job, Work, Writes, next_batch

T = TypeVar("T")
SLOWEST_COMMIT_S = 0.05


def open_memory() -> sqlite3.Connection:
    """An empty database with the schema of today, which lives as long as its connection."""
    connection = sqlite3.connect(":memory:", isolation_level=None, cached_statements=512)
    connection.row_factory = sqlite3.Row
    migrate(connection, "memory")
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


def run_now(work: Work[T]) -> T:
    """Do what may wait where it comes up."""
    result: outcome.Outcome[Any] = outcome.Value(None)
    try:
        while True:
            result = outcome.capture(result.send(work))
    except StopIteration as done:
        value: T = done.value
        return value


class Losses:
    """Which wake-ups get lost: each by chance, but never two of one topic in a row.

    So the look that the backstop takes is lost at most once, and what it owes can be said in seconds.
    """

    def __init__(self, chance: random.Random, share: float) -> None:
        self._chance = chance
        self._share = share
        self._last: set[str] = set()

    def take(self, topic: str) -> bool:
        if topic not in self._last and self._chance.random() < self._share:
            self._last.add(topic)
            return True
        self._last.discard(topic)
        return False


class LossyBus(Bus):
    def __init__(self, losses: Losses) -> None:
        super().__init__()
        self._losses = losses

    def publish(self, topics: Iterable[str]) -> None:
        super().publish([topic for topic in sorted(topics) if not self._losses.take(topic)])


class LossyBatches(Batches):
    def __init__(self, connection: sqlite3.Connection, clock: Callable[[], float], losses: Losses) -> None:
        super().__init__(connection, clock)
        self._losses = losses

    def _waiting(self, topic: str) -> list[Job]:
        jobs = super()._waiting(topic)
        return [] if jobs and self._losses.take(topic) else jobs


class DaemonDied(Exception):
    """Raised in whoever waits for a commit when the daemon dies, and cannot be cancelled."""


class InlineWriter(Writes):
    """Commits in the task of `serve`. A slow disk is a sleep before a commit, or between it and its answers."""

    def __init__(self, batches: Batches, bus: Bus, chance: random.Random, slow_share: float) -> None:
        super().__init__(batches, bus)
        self._queued: list[Job] = []
        self._batch: list[Job] = []
        self._died = False
        self._some = trio.Event()
        self._chance = chance
        self._slow_share = slow_share

    def _take(self, job: Job) -> None:
        if self._died:
            trio.lowlevel.current_trio_token().run_sync_soon(self._fail, [job])
            return
        self._queued.append(job)
        self._some.set()

    async def serve(self) -> None:
        """Commit what is asked for. Cancelled it is a crash: what is queued is gone, what is stored stays."""
        try:
            await self._commit_all()
        finally:
            self._died = True
            self._fail([*self._batch, *self._queued])

    async def _commit_all(self) -> None:
        while True:
            await self._some.wait()
            self._some = trio.Event()
            while self._queued:
                await self._be_slow()
                self._batch, self._queued = next_batch(self._queued)
                answered, topics = run_now(self._batches.commit(self._batch))
                self._batch = answered  # those that wait on do so where they are cancelled
                await self._be_slow()
                self._deliver(answered, topics)
                self._batch = []

    def _fail(self, jobs: list[Job]) -> None:
        for job in jobs:
            if job.task is not None:
                task, job.task = job.task, None
                trio.lowlevel.reschedule(task, outcome.Error(DaemonDied()))

    async def _be_slow(self) -> None:
        if self._chance.random() < self._slow_share:
            await trio.sleep(self._chance.random() * SLOWEST_COMMIT_S)


class InlineStore(Store):
    def __init__(self, writer: InlineWriter, connection: sqlite3.Connection, bus: Bus) -> None:
        self.bus = bus
        self.write = writer.write
        self.write_together = writer.write_together
        self.write_when = writer.write_when
        self.wait_failed = writer.wait_failed
        self.search = self._search
        self._connection = connection

    async def rows(self, sql: str, parameters: Parameters = ()) -> list[Any]:
        await trio.lowlevel.checkpoint()
        return self._connection.execute(sql, parameters).fetchall()

    async def _search(self, sql: str, parameters: Parameters, limit_s: float) -> list[Any]:
        return await self.rows(sql, parameters)  # virtual time does not pass in a query
