"""The lines of one turn on their way to the host: numbered, bounded, sent in batches."""

from __future__ import annotations

import json
from collections import deque

import trio

from hive_core.protocol.harness import LINES_PER_REQUEST, REQUEST_LIMIT_BYTES
from hive_core.protocol.lines import encode

KEPT_BYTES = 8 * 1024 * 1024
BATCH_BYTES = REQUEST_LIMIT_BYTES - 64 * 1024  # the rest is room for what is around the lines


def hive_line(subtype: str, **fields: object) -> str:
    """A line of the harness's own among those of the program."""
    return json.dumps({"type": "hive", "subtype": subtype, **fields})


class TurnLines:
    """`add` never waits. While the host is away at most `kept_bytes` are held: then the middle goes, and is counted."""

    def __init__(self, kept_bytes: int = KEPT_BYTES) -> None:
        self._half_bytes = kept_bytes // 2
        self._next = 0
        self._head: deque[tuple[int, str]] = deque()
        self._head_bytes = 0
        self._tail: deque[tuple[int, str]] = deque()
        self._tail_bytes = 0
        self._dropped = 0
        self._closed = False
        self._changed = trio.Event()

    def add(self, line: str) -> None:
        size = len(encode(line))
        if not self._tail and self._head_bytes + size <= self._half_bytes:
            self._head.append((size, line))
            self._head_bytes += size
        else:
            self._tail.append((size, line))
            self._tail_bytes += size
            self._bound_tail()
        self._next += 1
        self._wake()

    def close(self) -> None:
        """No more lines come: `take` hands out what is left, then None."""
        self._closed = True
        self._wake()

    async def take(self) -> tuple[int, list[str]] | None:
        """Wait for the next batch: the number of its first line, and the lines. None after the last."""
        while not self._head and not self._tail:
            if self._closed:
                return None
            self._changed = trio.Event()
            await self._changed.wait()
        if not self._head:
            self._promote_tail()
        first = self._next - len(self._tail) - self._dropped - len(self._head)
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

    def _promote_tail(self) -> None:
        """Let the tail be the head. The last line that was dropped gives its number to a line that says so."""
        self._head, self._head_bytes = self._tail, self._tail_bytes
        self._tail, self._tail_bytes = deque(), 0
        if self._dropped:
            told = hive_line("lines_dropped", count=self._dropped)
            self._head.appendleft((len(encode(told)), told))
            self._head_bytes += len(encode(told))
            self._dropped = 0

    def _wake(self) -> None:
        self._changed.set()
