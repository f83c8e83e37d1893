"""The objects of a repository that agents write, copied into one of ours and checked there before anything is taken.

No git opens theirs. Of it we read regular files alone, each through the descriptor of its directory and following no
link: loose objects, which must be what their names say, and packs, which are indexed anew. So nothing else that can
lie in a repository means anything: configuration, hooks, attributes, alternates, replacements, grafts, shallow
boundaries, promisors, worktrees, caches. What changes while we read is an object that is not what its name says.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import stat
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from hive_core.git.sterile_git import GitFailed, GitLimits, run_git
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.visible import mib
from hive_core.protocol.words import AgentName

COPY_LIMIT_BYTES = 128 * 1024**2  # of files of objects
INFLATED_LIMIT_BYTES = 256 * 1024**2  # of what is in the loose ones
OBJECT_LIMIT_BYTES = 16 * 1024**2  # of one that is loose
LOOSE_LIMIT = 20_000
PACKS_LIMIT = 100
COPY_WITHIN_S = 30.0
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_PIECE_BYTES = 1024 * 1024
_TRIES = 3  # for packs that are written anew while we read
_LOOSE = re.compile(r"[0-9a-f]{38}")
_PACK = re.compile(r"pack-[0-9a-f]{40}\.pack")


@contextmanager
def dot_git(proposed: Path, name: AgentName) -> Iterator[int]:
    """A descriptor of proposed/NAME/config/.git. Raises Refusal when a part of that path is no directory of its own."""
    folder = os.open(proposed, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in (name, "config", ".git"):
            try:
                inner = os.open(part, _FOLDER, dir_fd=folder)
            except OSError:
                where = f"/agents/{name}/config"
                raise Refusal("refused", f"cannot fetch from {where}: {part} is no directory of its own") from None
            os.close(folder)
            folder = inner
        yield folder
    finally:
        os.close(folder)


def read_small(path: str, folder: int, limit_bytes: int) -> bytes:
    """A small regular file below a directory, no link followed on the way. Raises OSError for whatever else it is."""
    *parts, last = path.split("/")
    with contextlib.ExitStack() as stack:
        for part in parts:
            folder = os.open(part, _FOLDER, dir_fd=folder)
            stack.callback(os.close, folder)
        with open(_open_regular(last, folder, limit_bytes), "rb") as file:
            return file.read(limit_bytes)


@contextmanager
def quarantine(place: Path, applied: Path, theirs: int, name: AgentName) -> Iterator[Path]:
    """A repository at `place` with their objects, and with those of `applied` beside them; removed in the end.

    theirs, name: a descriptor of their .git, and whose it is. Blocks. Raises Refusal when their objects are too many or
    too large.
    """
    shutil.rmtree(place, ignore_errors=True)
    try:
        (place / "objects" / "pack").mkdir(parents=True)
        (place / "objects" / "info").mkdir()
        (place / "refs").mkdir()
        (place / "HEAD").write_text("ref: refs/heads/main\n")
        (place / "config").write_text("[core]\n\trepositoryFormatVersion = 0\n\tbare = true\n")
        (place / "objects" / "info" / "alternates").write_text(f"{applied}/objects\n")
        with _folder("objects", theirs) as objects:
            if objects is not None:
                _Copy(place, applied, objects, name).copy()
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


class _Copy:
    def __init__(self, place: Path, applied: Path, objects: int, name: AgentName) -> None:
        self._place = place
        self._applied = applied
        self._objects = objects
        self._name = name
        self._left_bytes = COPY_LIMIT_BYTES
        self._left_inflated_bytes = INFLATED_LIMIT_BYTES
        self._left_loose = LOOSE_LIMIT
        self._ends_at = time.monotonic() + COPY_WITHIN_S

    def copy(self) -> None:
        # Whoever packs writes the pack first and removes what is in it after: in this order nothing slips through.
        for number in range(256):
            with _folder(f"{number:02x}", self._objects) as folder:
                if folder is not None:
                    self._copy_loose(f"{number:02x}", folder)
        for _ in range(_TRIES):
            with _folder("pack", self._objects) as folder:
                if folder is None or self._copy_packs(folder):
                    return

    def _copy_loose(self, start: str, folder: int) -> None:
        (target := self._place / "objects" / start).mkdir()
        known = self._applied / "objects" / start
        with os.scandir(folder) as entries:
            for entry in entries:
                self._look_at_the_clock()
                if not _LOOSE.fullmatch(entry.name) or (known / entry.name).exists():
                    continue
                if self._left_loose <= 0:
                    raise self._too_much(f"more than {LOOSE_LIMIT:,} objects in files of their own")
                self._left_loose -= 1
                data = self._read_loose(entry.name, folder)
                if data is not None and self._is(start + entry.name, data):
                    (target / entry.name).write_bytes(data)

    def _read_loose(self, name: str, folder: int) -> bytes | None:
        """None for what is no regular file of a size that an object may have."""
        try:
            file = _open_regular(name, folder, OBJECT_LIMIT_BYTES)
        except OSError:
            return None
        with open(file, "rb") as stream:
            data = stream.read(os.fstat(file).st_size)  # one that grows meanwhile is no object
        self._take(len(data))
        return data

    def _is(self, name: str, data: bytes) -> bool:
        """Whether a loose object is what its name says."""
        inflate = zlib.decompressobj()
        try:
            content = inflate.decompress(data, OBJECT_LIMIT_BYTES)
        except zlib.error:
            return False
        self._left_inflated_bytes -= len(content)
        if self._left_inflated_bytes < 0:
            raise self._too_much(f"more than {mib(INFLATED_LIMIT_BYTES)} in objects in files of their own")
        whole = inflate.eof and not inflate.unused_data
        return whole and hashlib.sha1(content, usedforsecurity=False).hexdigest() == name

    def _copy_packs(self, folder: int) -> bool:
        """False when one that was there is gone: all of them may have been packed anew."""
        names = []
        with os.scandir(folder) as entries:
            for entry in entries:
                self._look_at_the_clock()
                if _PACK.fullmatch(entry.name):
                    names.append(entry.name)
        if len(names) > PACKS_LIMIT:
            raise self._too_much(f"more than {PACKS_LIMIT:,} packs")
        for name in sorted(names):
            target = self._place / "objects" / "pack" / name
            if target.exists():
                continue
            try:
                file = _open_regular(name, folder, COPY_LIMIT_BYTES)
            except FileNotFoundError:
                return False
            except OSError:  # a link, a directory, one that may not be read: no pack
                continue
            with open(file, "rb", buffering=0) as stream:
                self._copy_file(stream, target)
            self._index(target)
        return True

    def _copy_file(self, source: IO[bytes], target: Path) -> None:
        with target.open("xb") as copy:
            while piece := source.read(_PIECE_BYTES):
                self._look_at_the_clock()
                self._take(len(piece))
                copy.write(piece)

    def _index(self, pack: Path) -> None:
        left_s = max(self._ends_at - time.monotonic(), 0.1)
        limits = GitLimits(time_s=left_s, file_bytes=COPY_LIMIT_BYTES)
        try:
            run_git(self._place, "index-pack", str(pack), limits=limits)
        except GitFailed as failed:
            if failed.over == "time":
                self._look_at_the_clock()
            # What else it is, it is no pack; who needs an object of it learns that it is not there.
            for made in pack.parent.glob(f"{pack.stem}.*"):
                made.unlink()

    def _take(self, size: int) -> None:
        self._left_bytes -= size
        if self._left_bytes < 0:
            raise self._too_much(f"more than {mib(COPY_LIMIT_BYTES)} of objects")

    def _too_much(self, what: str) -> Refusal:
        where = f"/agents/{self._name}/config"
        return Refusal("refused", f"cannot fetch from {where}: it holds {what}; run `git gc --prune=now` in it")

    def _look_at_the_clock(self) -> None:
        if time.monotonic() > self._ends_at:
            raise self._too_much(f"objects that take longer than {COPY_WITHIN_S:g} s to look at")


@contextmanager
def _folder(name: str, parent: int) -> Iterator[int | None]:
    """A descriptor of a directory; None when there is none of that name that is one by itself."""
    try:
        folder = os.open(name, _FOLDER, dir_fd=parent)
    except OSError:
        yield None
        return
    try:
        yield folder
    finally:
        os.close(folder)


def _open_regular(name: str, folder: int, limit_bytes: int) -> int:
    """A descriptor of a regular file of at most so many bytes. Raises OSError for whatever else stands there."""
    file = os.open(name, _FILE, dir_fd=folder)
    found = os.fstat(file)
    if stat.S_ISREG(found.st_mode) and found.st_size <= limit_bytes:
        return file
    os.close(file)
    raise OSError(f"{name} is no regular file of at most {limit_bytes:,} bytes")
