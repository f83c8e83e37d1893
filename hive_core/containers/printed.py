"""Keeps what an agent prints: its end, in a file that never holds more than LOG_LIMIT_BYTES.

Run by its path as a process of its own, one an agent, outside of the sandbox: it reads a socket (descriptor 0) and
writes a file (1). A socket cannot be opened again through /proc, and whoever has it can empty no file. It ends when
nobody can print any more, so it outlives a daemon as its agent does. It imports nothing but os: it has to be small.
"""

import os

LOG_LIMIT_BYTES = 1 << 20
_KEPT_BYTES = 256 << 10
_PIECE_BYTES = 64 << 10


def keep_printed(source: int, file: int) -> None:
    """Append to the file what comes from the source, until that ends."""
    while piece := os.read(source, _PIECE_BYTES):
        try:
            end = os.lseek(file, 0, os.SEEK_END)
            if end + len(piece) > LOG_LIMIT_BYTES:
                end = _shorten(file, end)
            os.pwrite(file, piece, end)
        except OSError:
            continue  # a full disk: it is lost, and the agent is not held up


def _shorten(file: int, end: int) -> int:
    """Leave only the last of it; returns how long it is now."""
    kept = os.pread(file, _KEPT_BYTES, max(0, end - _KEPT_BYTES))
    os.ftruncate(file, 0)
    os.pwrite(file, kept, 0)
    return len(kept)


if __name__ == "__main__":
    keep_printed(0, 1)
