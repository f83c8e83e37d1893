"""The lines of one turn on their way to the host: numbered, bounded, sent in batches.

    head ── spill ── (what was dropped) ── tail

Lines come out in that order. The head is in memory, where a quiet turn's lines are but for a moment; while the host is
away it is full, and lines go to the spill, which is on disk; when that is full too, or the disk, to the tail.
"""

from __future__ import annotations

import json
from collections import deque

import trio

from hive_agent.spill import Spill
from hive_core.protocol.harness import LINES_PER_REQUEST, REQUEST_LIMIT_BYTES
from hive_core.protocol.lines import encode

MEMORY_BYTES = 4 * 1024 * 1024
DISK_BYTES = 64 * 1024 * 1024
GATHER_S = 0.05  # that a batch waits for more lines: each costs a commit on the host
BATCH_BYTES = REQUEST_LIMIT_BYTES - 64 * 1024  # the rest is room for what is around the lines


def hive_line(subtype: str, **fields: object) -> str:
    """A line of the harness's own among those of the program."""
    return json.dumps({"type": "hive", "subtype": subtype, **fields})


class TurnLines:
    """`add` never waits. What passes the bounds while the host is away goes from the middle, and is counted.

    folder   where the file of what does not fit into memory is; None: there is none
    """

    def __init__(
        self, folder: str | None = None, *, memory_bytes: int = MEMORY_BYTES, disk_bytes: int = DISK_BYTES
    ) -> None:
        self._half_bytes = memory_bytes // 2
        self._next = 0
        self._head: deque[tuple[int, str]] = deque()
        self._head_bytes = 0
        self._spill = Spill(folder or "", disk_bytes if folder else 0)
        self._tail: deque[tuple[int, str]] = deque()
        self._tail_bytes = 0
        self._dropped = 0
        self._closed = False
        self._changed = trio.Event()

    def add(self, line: str) -> None:
        size = len(encode(line))
        if not self._tail and not self._spill.count and self._head_bytes + size <= self._half_bytes:
            self._head.append((size, line))
            self._head_bytes += size
        elif self._tail or not self._spill.add(line):
            self._tail.append((size, line))
            self._tail_bytes += size
            self._bound_tail()
        self._next += 1
        self._wake()

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """No more lines come: `take` hands out what is left, then None."""
        self._closed = True
        self._wake()

    async def take(self) -> tuple[int, list[str]] | None:
        """Wait for the next batch: the number of its first line, and the lines. None after the last.

        It goes when it is full, the lines are closed, or it has waited for GATHER_S. Cancelled, it loses none.
        """
        while not self._head and not self._spill.count and not self._tail:
            if self._closed:
                return None
            await self._wait_changed()
        with trio.move_on_after(GATHER_S):
            while not self._closed and len(self._head) < LINES_PER_REQUEST and not (self._spill.count or self._tail):
                await self._wait_changed()
        if not self._head:
            self._fill_head()
        first = self._next - len(self._tail) - self._dropped - self._spill.count - len(self._head)
        batch: list[str] = []
        total = 0
        while self._head and len(batch) < LINES_PER_REQUEST and (not batch or total + self._head[0][0] <= BATCH_BYTES):
            size, line = self._head.popleft()
            self._head_bytes -= size
            total += size
            batch.append(line)
        return first, batch

    def _bound_tail(self) -> None:
        while self._tail_bytes > self._half_bytes and len(self._tail) > 1:
            size, _ = self._tail.popleft()
            self._tail_bytes -= size
            self._dropped += 1

    def _fill_head(self) -> None:
        if self._spill.count:
            try:
                self._head = deque((len(encode(line)), line) for line in self._spill.take())
                self._head_bytes = sum(size for size, _ in self._head)
                return
            except ValueError:  # the disk lost them
                self._dropped += self._spill.count
                self._spill.close()
        self._promote_tail()

    def _promote_tail(self) -> None:
        """Let the tail be the head. The last line that was dropped gives its number to a line that says so."""
        self._head, self._head_bytes = self._tail, self._tail_bytes
        self._tail, self._tail_bytes = deque(), 0
        if self._dropped:
            told = hive_line("lines_dropped", count=self._dropped)
            self._head.appendleft((len(encode(told)), told))
            self._head_bytes += len(encode(told))
            self._dropped = 0

    async def _wait_changed(self) -> None:
        self._changed = trio.Event()
        await self._changed.wait()

    def _wake(self) -> None:
        self._changed.set()
