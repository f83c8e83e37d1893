"""A stream's pieces between who reads and who passes them on: those that come together go on as one."""

from __future__ import annotations

import trio

HELD_BYTES = 256 * 1024  # the reader waits while so much was not passed on


class Pieces:
    """One task adds, another one takes."""

    def __init__(self) -> None:
        self._held: list[bytes] = []
        self._size = 0
        self._closed = False
        self._changed = trio.lowlevel.ParkingLot()

    async def add(self, piece: bytes) -> None:
        """Hand a piece on; waits only while too much is held."""
        self._held.append(piece)
        self._size += len(piece)
        self._changed.unpark_all()
        while self._size > HELD_BYTES:
            await self._changed.park()

    def close(self) -> None:
        """No more come: `take` hands out what is left, then nothing."""
        self._closed = True
        self._changed.unpark_all()

    async def take(self) -> bytes:
        """All that came, as soon as there is some; empty behind the last. Cancelled, it loses nothing."""
        while not self._held and not self._closed:
            await self._changed.park()
        together = b"".join(self._held)
        self._held, self._size = [], 0
        self._changed.unpark_all()
        return together
