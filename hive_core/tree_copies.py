"""Copies of a directory that an agent fills: nothing in it is followed, and nothing of it is linked to.

A copy holds plain files, directories and links, which are kept as words. What did not change since the copy before is
a hard link to that copy's file; whatever changed is read once, or shared by the file system where that can (reflink).
The agent's own files are never linked: it could write through.

`Entries` say what stands in a directory, by name: ["f", mode, size, mtime, ctime, inode] is a file, ["d", mode,
entries] a directory, ["l", target] a link. ctime is what an agent cannot set: with it a file counts as the same.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hive_core.protocol.visible import mib
from hive_core.trees import open_folder

Entries = dict[str, list[Any]]
FILES_MOST = 100_000  # files, directories and links of one tree
WORDS_BYTES_MOST = 16 << 20  # of their names and of what links say, all of which is held in memory
DEPTH_MOST = 100  # each level of it takes three descriptors
PIECE_BYTES = 1 << 20
_FICLONE = 0x40049409
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_MAKE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class TooMuch(Exception):
    """A tree is larger than what may be copied; its text says what it has too much of."""


@dataclass
class Tally:
    """What was seen or copied, and what may be.

    left_out  what is neither file, directory nor link, is too deep, or cannot be read
    changed   files that were written to while they were copied
    """

    bytes_most: int
    deadline: float = float("inf")  # by time.monotonic
    files: int = 0  # directories and links count, too
    bytes: int = 0  # of the disk
    left_out: int = 0
    changed: int = 0
    written: int = 0
    words: int = 0

    def see(self, names: Sequence[str]) -> None:
        """Count what stands in one more directory, before any of it is looked at. Raises TooMuch."""
        self.files += len(names)
        if self.files > FILES_MOST:
            raise TooMuch(f"it holds more than {FILES_MOST:,} files")
        self.hear(*names)

    def hear(self, *words: str) -> None:
        """Count what has to be written down. Raises TooMuch."""
        self.words += sum(len(os.fsencode(word)) for word in words)
        if self.words > WORDS_BYTES_MOST:
            raise TooMuch(f"the names and links in it take more than {mib(WORDS_BYTES_MOST)}")

    def take(self, size: int) -> None:
        """Count what one more takes. Raises TooMuch."""
        self.bytes += size
        if self.bytes > self.bytes_most:
            raise TooMuch(f"it takes more than {mib(self.bytes_most)} (snapshots_bytes)")
        self.check_time()

    def write(self, size: int) -> None:
        """Count bytes that are about to be written: not every file system tells holes from data. Raises TooMuch."""
        self.written += size
        if self.written > self.bytes_most:
            raise TooMuch(f"a copy of it takes more than {mib(self.bytes_most)} (snapshots_bytes)")
        self.check_time()

    def check_time(self) -> None:
        if time.monotonic() > self.deadline:
            raise TooMuch("to copy it takes too long")


def scan(folder: int, tally: Tally, depth: int = 0) -> Entries:
    """What stands in a directory now, of which nothing is read. Raises TooMuch, OSError."""
    entries: Entries = {}
    for name in _names(folder, tally):
        try:
            found = os.stat(name, dir_fd=folder, follow_symlinks=False)
            tally.take(found.st_blocks * 512)
            if stat.S_ISDIR(found.st_mode) and depth < DEPTH_MOST:
                with contextlib.ExitStack() as opened:
                    below = scan(_open(name, folder, opened), tally, depth + 1)
                entries[name] = ["d", found.st_mode & 0o777, below]
            elif stat.S_ISLNK(found.st_mode):
                link = os.readlink(name, dir_fd=folder)
                tally.hear(link)
                entries[name] = ["l", link]
            elif stat.S_ISREG(found.st_mode):
                entries[name] = _of_file(found)
            else:
                tally.left_out += 1
        except FileNotFoundError:
            continue
        except OSError as exc:
            _pass_over(exc, tally)
    return entries


def _names(folder: int, tally: Tally) -> list[str]:
    """What stands in a directory; no more of it is listed than would be too much anyway. Raises TooMuch."""
    with os.scandir(folder) as listed:
        names = [one.name for one in itertools.islice(listed, FILES_MOST + 1 - tally.files)]
    tally.see(names)
    return names


def copy_changed(source: int, target: int, tally: Tally, before: Entries, earlier: int | None) -> Entries:
    """Copy one directory into another, which is empty; what there is then. Raises TooMuch, OSError.

    before, earlier  what the copy before holds, and its directory: a file that is still the same is linked from there

    In the copy every file and directory is its owner's alone; their modes are in the entries.
    """
    return _copy(source, target, tally, before, earlier, 0)


def _copy(source: int, target: int, tally: Tally, before: Entries, earlier: int | None, depth: int) -> Entries:
    entries: Entries = {}
    for name in _names(source, tally):
        try:
            found = os.stat(name, dir_fd=source, follow_symlinks=False)
            tally.take(found.st_blocks * 512)
            if stat.S_ISDIR(found.st_mode) and depth < DEPTH_MOST:
                entries[name] = _copy_folder(source, target, name, found, tally, before, earlier, depth)
            elif stat.S_ISLNK(found.st_mode):
                link = os.readlink(name, dir_fd=source)
                tally.hear(link)
                os.symlink(link, name, dir_fd=target)
                entries[name] = ["l", link]
            elif not stat.S_ISREG(found.st_mode):
                tally.left_out += 1
            elif earlier is not None and before.get(name) == _of_file(found) and _link(earlier, target, name):
                entries[name] = before[name]
            else:
                entries[name] = _copy_new(source, target, name, tally)
        except FileNotFoundError:
            tally.changed += 1
        except OSError as exc:
            _pass_over(exc, tally)
    return entries


def _copy_folder(
    source: int,
    target: int,
    name: str,
    found: os.stat_result,
    tally: Tally,
    before: Entries,
    earlier: int | None,
    depth: int,
) -> list[Any]:
    with contextlib.ExitStack() as opened:
        inner = _open(name, source, opened)
        os.mkdir(name, 0o700, dir_fd=target)
        known = before.get(name, [""])
        inner_before, inner_earlier = {}, None
        if earlier is not None and known[0] == "d":
            with contextlib.suppress(OSError):
                inner_before, inner_earlier = known[2], _open(name, earlier, opened)
        made = _open(name, target, opened)
        below = _copy(inner, made, tally, inner_before, inner_earlier, depth + 1)
        return ["d", found.st_mode & 0o777, below]


def _open(name: str, folder: int, opened: contextlib.ExitStack) -> int:
    descriptor = open_folder(name, folder)
    opened.callback(os.close, descriptor)
    return descriptor


def _link(earlier: int, target: int, name: str) -> bool:
    """Share a file with the copy before; False where that cannot be, as with too many links."""
    try:
        os.link(name, name, src_dir_fd=earlier, dst_dir_fd=target, follow_symlinks=False)
    except OSError:
        return False
    return True


def _copy_new(source: int, target: int, name: str, tally: Tally) -> list[Any]:
    with contextlib.ExitStack() as opened:
        file = os.open(name, _READ, dir_fd=source)
        opened.callback(os.close, file)
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            raise FileNotFoundError(errno.ENOENT, "it is another file now")
        made = os.open(name, _MAKE, 0o600, dir_fd=target)
        opened.callback(os.close, made)
        _fill(file, made, found.st_size, tally)
        os.utime(made, ns=(found.st_mtime_ns, found.st_mtime_ns))
        if _of_file(os.fstat(file)) != _of_file(found):
            tally.changed += 1  # the copy may hold a mixture; the next one sees that it is another
        return _of_file(found)


def lay_out(source: int, entries: Entries, target: int, tally: Tally) -> None:
    """Copy what `entries` say of a copy into a directory, which is empty, with the modes that it had.

    Raises TooMuch, OSError.
    """
    for name, entry in entries.items():
        tally.take(0)
        try:
            if entry[0] == "d":
                with contextlib.ExitStack() as opened:
                    inner = _open(name, source, opened)
                    os.mkdir(name, 0o700, dir_fd=target)
                    made = _open(name, target, opened)
                    lay_out(inner, entry[2], made, tally)
                    os.fchmod(made, entry[1])
            elif entry[0] == "l":
                os.symlink(entry[1], name, dir_fd=target)
            else:
                _copy_new(source, target, name, tally)
                os.chmod(name, entry[1], dir_fd=target)
        except FileNotFoundError:
            tally.left_out += 1
        except OSError as exc:
            _pass_over(exc, tally)


def _fill(file: int, made: int, size: int, tally: Tally) -> None:
    """Let `made` hold the first `size` bytes of a file; holes stay holes."""
    with contextlib.suppress(OSError):
        fcntl.ioctl(made, _FICLONE, file)
        os.ftruncate(made, size)  # it may have grown since
        return
    at = 0
    while at < size:
        try:
            begin = os.lseek(file, at, os.SEEK_DATA)
        except OSError:  # only a hole is left
            break
        at = min(os.lseek(file, begin, os.SEEK_HOLE), size)
        while begin < at:
            piece = os.pread(file, min(PIECE_BYTES, at - begin), begin)
            if not piece:
                break
            tally.write(len(piece))
            view = memoryview(piece)
            while view:
                written = os.pwrite(made, view, begin)
                begin, view = begin + written, view[written:]
    os.ftruncate(made, size)


def _of_file(found: os.stat_result) -> list[Any]:
    return ["f", found.st_mode & 0o777, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _pass_over(exc: OSError, tally: Tally) -> None:
    """What an agent made so that it cannot be read costs it that file alone; a disk that is full is another matter."""
    if exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE):
        raise exc
    tally.left_out += 1
