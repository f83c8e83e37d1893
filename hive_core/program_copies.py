"""Copies of the agent program, which stay as they are whatever becomes of what they were made of. All of it blocks."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import stat
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from hive_core.protocol.paths import sync_folder

PLACE = "programs"
_CHUNK_BYTES = 1024**2
_CLONE = 0x40049409  # FICLONE of <linux/fs.h>: both have the same blocks until one is written


class Seen(NamedTuple):
    """By what a file that was looked at is known again without reading it."""

    size_bytes: int
    mtime_ns: int


class Copied(NamedTuple):
    path: Path
    sha256: str
    size_bytes: int


def look_at(path: Path) -> Seen:
    """Raises OSError."""
    found = path.stat()
    return Seen(found.st_size, found.st_mtime_ns)


def is_whole(path: Path) -> bool:
    """Whether a program is one file, which can be run from anywhere: a script may need what lies beside it."""
    try:
        # A pipe would keep whoever opens it waiting.
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        with path.open("rb") as opened:
            return opened.read(4) == b"\x7fELF"
    except OSError:
        return False


def digest_of(path: Path) -> str:
    """The sha256 of a file. Raises OSError."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


class ProgramCopies:
    """state_dir: the hive's own."""

    def __init__(self, state_dir: Path) -> None:
        self._folder = state_dir / PLACE

    def path_of(self, version: str, sha256: str) -> Path:
        # Processes are called as the file is.
        return self._folder / f"claude-{version}-{sha256[:12]}" / "claude"

    def copy(self, source: Path) -> Copied:
        """A copy under a name for the moment, on disk and measured as it is there. Raises OSError."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._folder / f".new.{os.urandom(6).hex()}" / "claude"
        path.parent.mkdir(mode=0o755)
        try:
            with source.open("rb") as theirs, path.open("xb") as ours:
                try:
                    fcntl.ioctl(ours.fileno(), _CLONE, theirs.fileno())
                except OSError:  # another file system, or one that cannot
                    while chunk := theirs.read(_CHUNK_BYTES):
                        ours.write(chunk)
                ours.flush()
                os.fchmod(ours.fileno(), 0o555)
                os.fsync(ours.fileno())
            return Copied(path, digest_of(path), path.stat().st_size)
        except BaseException:
            shutil.rmtree(path.parent, ignore_errors=True)
            raise

    def keep(self, copied: Copied, version: str) -> Path:
        """Give a copy the name that it keeps; where the same lies there already it is that. Raises OSError."""
        path = self.path_of(version, copied.sha256)
        if path.exists():
            self.drop(copied)
            return path
        sync_folder(copied.path.parent)
        os.rename(copied.path.parent, path.parent)
        sync_folder(self._folder)
        return path

    def drop(self, copied: Copied) -> None:
        shutil.rmtree(copied.path.parent, ignore_errors=True)

    def clear(self, needed: Collection[Path]) -> None:
        """Remove all but these: no program runs on others."""
        keep = {path.parent for path in needed}
        with contextlib.suppress(FileNotFoundError):
            for folder in self._folder.iterdir():
                if folder not in keep:
                    shutil.rmtree(folder)
