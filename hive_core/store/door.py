"""The door to the database: `write` for the one writer, `rows` and `row` for readers, `search` for what may take long.

Exactly one read-write connection exists (sqlite up to 3.51.2 can corrupt a WAL that two connections write); readers
open the file read-only through aiosqlite on trio-asyncio, so this must run inside `trio_asyncio.open_loop()`.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import aiosqlite
import trio
from trio_asyncio import aio_as_trio

from hive_core.store.ballast import Ballast
from hive_core.store.bus import APPROVED, EVENTS, WANTED, Bus, mail
from hive_core.store.errors import StoreBusy, StoreError, cannot_open
from hive_core.store.schema import check_ours, migrate
from hive_core.store.writer import Transaction, Writer

log = logging.getLogger(__name__)
T = TypeVar("T")
Parameters = Sequence[Any] | Mapping[str, Any]
READERS = 2
STATEMENTS = 512  # that stay prepared: one that inserts n rows is another for each n
SEARCH_STEPS = 1000  # of sqlite's machine, between two looks at the time
BACKSTOP_S = 2.0
BUSY_REST_S = 1.0


class Searcher:
    """A reader for what may take long: one query at a time, in the order in which they were asked."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._turn = trio.Lock()

    async def search(self, sql: str, parameters: Parameters, limit_s: float) -> list[sqlite3.Row]:
        """All rows of one query, as of the last commit before it began. It keeps no other reader waiting.

        Raises TimeoutError when it ran for `limit_s`; the time in which it waited for others does not count.
        """
        async with self._turn:
            try:
                return await trio.to_thread.run_sync(self._run, sql, parameters, limit_s)
            except sqlite3.OperationalError as exc:
                if exc.sqlite_errorcode != sqlite3.SQLITE_INTERRUPT:
                    raise
                await trio.lowlevel.checkpoint_if_cancelled()
                raise TimeoutError(f"the search ran for {limit_s:g} s") from exc

    def _run(self, sql: str, parameters: Parameters, limit_s: float) -> list[sqlite3.Row]:
        ends = time.monotonic() + limit_s

        def is_over() -> bool:
            trio.from_thread.check_cancelled()  # what it raises ends the query, too
            return time.monotonic() >= ends

        self._connection.set_progress_handler(is_over, SEARCH_STEPS)
        return self._connection.execute(sql, parameters).fetchall()

    async def aclose(self) -> None:
        """Close the connection when all who asked are answered."""
        async with self._turn:
            self._connection.close()


class Store:
    def __init__(self, writer: Writer, readers: list[aiosqlite.Connection], searcher: Searcher, bus: Bus) -> None:
        self.bus = bus
        self.write = writer.write
        self.write_together = writer.write_together
        self.write_when = writer.write_when
        self.wait_failed = writer.wait_failed
        self.search = searcher.search
        self._free_send, self._free_receive = trio.open_memory_channel[aiosqlite.Connection](len(readers))
        for reader in readers:
            self._free_send.send_nowait(reader)

    async def rows(self, sql: str, parameters: Parameters = ()) -> list[sqlite3.Row]:
        """All rows of one query, as of the last commit before it began."""
        connection = await self._free_receive.receive()
        try:
            return list(await aio_as_trio(connection.execute_fetchall)(sql, parameters))
        finally:
            self._free_send.send_nowait(connection)

    async def row(self, sql: str, parameters: Parameters = ()) -> sqlite3.Row | None:
        """The first row, or None."""
        found = await self.rows(sql, parameters)
        return found[0] if found else None

    async def last_seq(self) -> int:
        """The number of the newest event."""
        row = await self.row("SELECT coalesce(max(seq), 0) AS seq FROM events")
        assert row is not None
        return int(row["seq"])

    async def insist(self, function: Callable[[Transaction], T]) -> T:
        """As `write`, for what nobody would ask again: while the disk takes nothing, wait and try again."""
        while True:
            try:
                return await self.write(function)
            except StoreBusy as busy:
                log.warning("%s", busy)
                await trio.sleep(BUSY_REST_S)

    async def serve_backstop(self, every_s: float = BACKSTOP_S) -> None:
        """Look again for everybody who waits, from time to time: a lost wake-up costs seconds, not a message."""
        seen = await self.last_seq()
        while True:
            await trio.sleep(every_s)
            if (seq := await self.insist(_wake_recipients)) != seen:
                seen = seq
                self.bus.publish([EVENTS, WANTED, APPROVED])


def _wake_recipients(tx: Transaction) -> int:
    """Wake whoever has something waiting; the number of the newest event."""
    # By agent and not by delivery: what waits unread for the operator may be long.
    sql = """
        SELECT name FROM agents WHERE errand IS NOT NULL OR EXISTS (
            SELECT 1 FROM deliveries INDEXED BY deliveries_queued WHERE recipient = name AND state = 'queued'
        )
    """
    for row in tx.execute(sql).fetchall():
        tx.wake(mail(row["name"]))
    return int(tx.execute("SELECT coalesce(max(seq), 0) FROM events").fetchone()[0])


def open_writer(path: Path) -> sqlite3.Connection:
    """The one read-write connection, on the newest schema. Raises StoreError."""
    try:
        # Made before sqlite opens it: the files of its write-ahead log take the mode of the database.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        path.chmod(0o600)
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=STATEMENTS)
    except (sqlite3.Error, OSError) as exc:
        raise cannot_open(path, exc) from exc
    try:
        connection.row_factory = sqlite3.Row
        check_ours(connection, str(path))
        (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise StoreError(f"cannot open {path}: this file system does not let sqlite use a write-ahead log")
        connection.execute("PRAGMA synchronous = FULL")
        migrate(connection, str(path))
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA busy_timeout = 0")  # the writer waits elsewhere
    except BaseException as exc:
        connection.close()
        if isinstance(exc, sqlite3.Error):
            raise cannot_open(path, exc) from exc
        raise
    return connection


def _open_searcher(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(_read_only_uri(path), uri=True, isolation_level=None, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    return connection


def _read_only_uri(path: Path) -> str:
    return f"{path.absolute().as_uri()}?mode=ro"


@asynccontextmanager
async def open_store(
    path: Path, bus: Bus | None = None, clock: Callable[[], float] = time.time, ballast: bool = False
) -> AsyncIterator[Store]:
    """Open (or make) the database at `path`. Raises StoreError with the way out when it cannot be used.

    ballast: keep a file beside it whose space is given back when the disk is full.
    """
    bus = bus or Bus()
    # Before anything is written: where a full disk stopped the daemon before, this makes the room to start again.
    reserve = await trio.to_thread.run_sync(Ballast, path.with_suffix(".ballast")) if ballast else None
    connection = await trio.to_thread.run_sync(open_writer, path)
    writer = Writer(connection, bus, clock, reserve)
    readers: list[aiosqlite.Connection] = []
    searcher: Searcher | None = None
    try:
        for _ in range(READERS):
            reader = aiosqlite.connect(_read_only_uri(path), uri=True)
            reader = await aio_as_trio(reader.__aenter__)()
            reader.row_factory = sqlite3.Row
            readers.append(reader)
        searcher = Searcher(await trio.to_thread.run_sync(_open_searcher, path))
        yield Store(writer, readers, searcher, bus)
    finally:
        with trio.CancelScope(shield=True):
            if searcher is not None:
                await searcher.aclose()
            await writer.aclose()
            for reader in readers:
                await aio_as_trio(reader.close)()
            await trio.to_thread.run_sync(connection.close)
