"""Directories of the daemon's, made safe to mount: opened without following anything, and cloned by descriptor.

What the daemon's user can write is hostile here. Between a look at a path and its use somebody may put a link, a pipe
or another directory there; so each path is walked once, and what was found is used by its descriptor from then on. A
clone of it (open_tree(2)) is a mount that stands nowhere yet, in which the daemon's user is the agent's root
(mount_setattr(2)); staged.py puts it in its place, in a mount namespace that only the agent's wrapper has, or on the
host while its unit begins.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import trio

from hive_core.containers.idmapped import clone_mount
from hive_core.containers.mounts import AgentDirs, Mount
from hive_core.helper import staged as staged_file
from hive_core.protocol.refusal import Refusal

_WALK = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def open_folder(path: Path, owner: int) -> int:
    """A descriptor (O_PATH) of a directory that belongs to a user, no part of whose path is a link.

    Raises Refusal that says what is there instead.
    """
    descriptor = os.open("/", _WALK)
    try:
        for part in path.parts[1:]:
            inner = os.open(part, _WALK, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
        found = os.fstat(descriptor)
        if found.st_uid != owner:
            why = f"it belongs to uid {found.st_uid}, and has to belong to uid {owner}; `chown` it"
            raise Refusal("refused", f"cannot use {path}: {why}")
    except OSError as exc:
        os.close(descriptor)
        why = f"{exc.filename} is not a directory there ({exc.strerror}); make it one, and no link"
        raise Refusal("refused", f"cannot use {path}: {why}") from None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@asynccontextmanager
async def opened(dirs: AgentDirs, owner: int) -> AsyncIterator[AgentDirs]:
    """The same directories, each by a path that leads to an open descriptor and stays what it is. Raises Refusal.

    One may be on a disk that hangs: whoever waits for that holds up nobody else.
    """
    with contextlib.ExitStack() as stack:

        def open_all() -> Iterator[Mount]:
            for mount in dirs.mounts:
                descriptor = open_folder(mount.source, owner)
                stack.callback(os.close, descriptor)
                yield Mount(Path(f"/proc/self/fd/{descriptor}"), mount.target, mount.read_only)

        mounts = await trio.to_thread.run_sync(lambda: tuple(open_all()), limiter=trio.CapacityLimiter(1))
        yield replace(dirs, mounts=mounts, opened=True)


def clones(dirs: AgentDirs, base: int, folder: Path, opened: contextlib.ExitStack) -> tuple[list[int], AgentDirs]:
    """Mounts of an agent's directories in which their owner is its root: (descriptors, where they are going to stand).

    `opened` closes them. Raises OSError.
    """
    mounts, staged = [], []
    for number, mount in enumerate(dirs.mounts):
        mounts.append(clone_mount(mount.source, read_only=mount.read_only, base=base))
        opened.callback(os.close, mounts[-1])
        staged.append(Mount(folder / str(number), mount.target, mount.read_only, mapped=True))
    return mounts, replace(dirs, mounts=tuple(staged), opened=True)


def staging_command(namespace: str, folder: Path, mounts: Sequence[int], command: Sequence[str] = ()) -> list[str]:
    """What puts such mounts in their places; staged.py tells what each word says."""
    own = [sys.executable, "-I", "-S", str(staged_file.__file__)]
    return [*own, namespace, str(folder), *map(str, mounts), "--", *command]
