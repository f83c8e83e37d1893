"""A queue of lines in a file without a name: what does not fit into memory while the host is away.

Nobody else can open it, and with the process that holds it it is gone, however that ends.
"""

from __future__ import annotations

import errno
import json
import os
import secrets

from hive_core.protocol.lines import encode

READ_BYTES = 256 * 1024


class Spill:
    """Lines go in behind and come out in front. The file is there while it holds some.

    count   lines that are in it
    """

    def __init__(self, folder: str, limit_bytes: int) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._descriptor: int | None = None
        self._begin = self._end = 0  # of what is in the file and was not read yet
        self.count = 0

    def add(self, line: str) -> bool:
        """Put a line in. False when it would pass the limit, or the disk does not take it: then it is not in."""
        data = encode(line)
        if self._end + len(data) > self._limit_bytes:
            return False
        try:
            if self._descriptor is None:
                self._descriptor = open_nameless(self._folder)
            if os.pwrite(self._descriptor, data, self._end) != len(data):
                return False  # the next line is written over what came of it
        except OSError:
            if self.count == 0:
                self.close()
            return False
        self._end += len(data)
        self.count += 1
        return True

    def take(self) -> list[str]:
        """Take the first lines out, some hundred KiB of them. Raises ValueError when they are not there any more."""
        data, size = b"", READ_BYTES
        while b"\n" not in data:
            data = self._read(min(size, self._end - self._begin))
            size *= 2  # one line is longer than that
        data = data[: data.rindex(b"\n") + 1]
        lines = [json.loads(line) for line in data.splitlines()]
        if len(lines) > self.count or not all(isinstance(line, str) for line in lines):
            raise ValueError("somebody has changed the file")
        self._begin += len(data)
        self.count -= len(lines)
        if self.count == 0:
            self.close()
        return lines

    def _read(self, size: int) -> bytes:
        try:
            data = os.pread(self._descriptor or -1, size, self._begin)
        except OSError as exc:
            raise ValueError(f"the disk does not give it back: {exc.strerror}") from None
        if len(data) != size or size == 0 or (self._begin + size == self._end and not data.endswith(b"\n")):
            raise ValueError("somebody has changed the file")
        return data

    def close(self) -> None:
        """Give the file back, with all that is in it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = None
        self._begin = self._end = self.count = 0


def open_nameless(folder: str) -> int:
    """A file that no directory names, for this process alone. Raises OSError."""
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        return os.open(folder, flags | os.O_TMPFILE, 0o600)
    except OSError as exc:
        if exc.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
    path = os.path.join(folder, f".hive-{secrets.token_hex(8)}")  # a file system that cannot do it otherwise
    descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    os.unlink(path)
    return descriptor
