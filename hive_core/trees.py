"""Directories that agents filled: moved, measured and removed without following anything that they planted there."""

from __future__ import annotations

import contextlib
import os
import stat
import time

_LIST = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
ROUNDS = 1_000_000  # directories that are looked into; who goes on making new ones does not keep us for ever


def open_folder(name: str | os.PathLike[str], folder: int | None = None) -> int:
    """A descriptor of a directory; raises OSError for whatever else stands there, a link too."""
    return os.open(name, _LIST, dir_fd=folder)


def remove_tree(name: str, folder: int) -> None:
    """Remove what stands under a name, following no link. However deep it is, it takes three descriptors.

    Directories below are first moved up to the top, so no path is walked. Raises OSError when something cannot be
    removed; what has gone by then stays away.
    """
    if not stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
        os.unlink(name, dir_fd=folder)
        return
    os.chmod(name, 0o700, dir_fd=folder)
    top = open_folder(name, folder)
    try:
        _empty(top, top, 0)
        moved = 0
        while entries := os.listdir(top):
            for entry in entries:
                moved = _remove_moved(entry, top, moved)
                if moved > ROUNDS:
                    raise OSError(f"{name} does not become empty: something goes on making directories in it")
    finally:
        os.close(top)
    os.rmdir(name, dir_fd=folder)


def _remove_moved(entry: str, top: int, moved: int) -> int:
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISDIR(os.stat(entry, dir_fd=top, follow_symlinks=False).st_mode):
            os.unlink(entry, dir_fd=top)
            return moved
        os.chmod(entry, 0o700, dir_fd=top)
        inner = open_folder(entry, top)
        try:
            moved = _empty(inner, top, moved)
        finally:
            os.close(inner)
        with contextlib.suppress(OSError):  # somebody has put something there meanwhile: it comes again
            os.rmdir(entry, dir_fd=top)
    return moved + 1


def _empty(inner: int, top: int, moved: int) -> int:
    """Remove the files of a directory, and move the directories in it to the top, under numbers."""
    for entry in os.listdir(inner):
        if not stat.S_ISDIR(os.stat(entry, dir_fd=inner, follow_symlinks=False).st_mode):
            os.unlink(entry, dir_fd=inner)
        elif inner != top:
            moved += 1
            os.chmod(entry, 0o700, dir_fd=inner)  # to move a directory one has to be allowed to write to it
            os.rename(entry, f".{moved}.{os.urandom(6).hex()}", src_dir_fd=inner, dst_dir_fd=top)
    return moved


def measure_tree(name: str, folder: int, deadline: float) -> tuple[int, bool]:
    """How many bytes of a disk a tree takes, and whether that is all of it: at `deadline` (monotonic) it stops."""
    try:
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return 0, True
    size, linked = found.st_blocks * 512, set[tuple[int, int]]()
    if not stat.S_ISDIR(found.st_mode):
        return size, True
    try:
        for _, folders, files, here in os.fwalk(name, dir_fd=folder, follow_symlinks=False):
            for entry in (*folders, *files):
                if time.monotonic() > deadline:
                    return size, False
                with contextlib.suppress(OSError):  # gone meanwhile
                    one = os.stat(entry, dir_fd=here, follow_symlinks=False)
                    if one.st_nlink > 1 and not stat.S_ISDIR(one.st_mode):
                        if (one.st_dev, one.st_ino) in linked:
                            continue
                        linked.add((one.st_dev, one.st_ino))
                    size += one.st_blocks * 512
    except (OSError, RecursionError):  # deeper than any sane tree, and than there are descriptors
        return size, False
    return size, True
