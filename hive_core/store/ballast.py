"""A file that takes up space until the disk is full, and then gives it back, so that acks and deletes still work.

sqlite needs room to write a log even for a DELETE. So when a commit finds the disk full, the ballast goes, and until
there is room for it again the store is `short`: whoever would only fill the disk further is refused.
"""

from __future__ import annotations

import os
from pathlib import Path

BALLAST_BYTES = 16 * 1024 * 1024
# It comes back when this much is free besides: without that the store would go to and fro at the edge.
ROOM_BYTES = 16 * 1024 * 1024


class Ballast:
    """The file at `path`. Its calls block; what the disk says to them is never an error."""

    def __init__(self, path: Path, size_bytes: int = BALLAST_BYTES, room_bytes: int = ROOM_BYTES) -> None:
        self._path = path
        self._size_bytes = size_bytes
        self._room_bytes = room_bytes
        self._whole = False
        self.check()

    @property
    def short(self) -> bool:
        """Whether the disk has no room for it."""
        return not self._whole

    def check(self) -> None:
        """Put it back where it is missing and there is room."""
        if self._whole:
            return
        try:
            if self._path.lstat().st_size == self._size_bytes:
                self._whole = self._free_bytes() >= self._room_bytes or not self.free()
                return
        except OSError:
            pass
        try:
            if self._free_bytes() >= self._size_bytes + self._room_bytes:
                self._make()
                self._whole = True
        except OSError:
            self.free()

    def free(self) -> bool:
        """Give its space back. False when it had none to give."""
        self._whole = False
        try:
            self._path.unlink()
        except OSError:
            return False
        return True

    def _make(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(self._path, flags, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, self._size_bytes)
        finally:
            os.close(descriptor)

    def _free_bytes(self) -> int:
        found = os.statvfs(self._path.parent)
        return found.f_bavail * found.f_frsize
