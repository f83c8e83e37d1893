"""Directories of the daemon's, made safe to mount: opened without following anything, and cloned by descriptor.

What the daemon's user can write is hostile here. Between a look at a path and its use somebody may put a link, a pipe
or another directory there; so each path is walked once, and what was found is used by its descriptor from then on. A
clone of it (open_tree(2)) is a mount that stands nowhere yet, in which the daemon's user is the agent's root
(mount_setattr(2)); staged.py puts it in its place, in a mount namespace that only the agent's wrapper has.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import trio

from hive_core.containers.mounts import AgentDirs, Mount
from hive_core.helper import staged as staged_file
from hive_core.protocol.refusal import Refusal

_SYS_OPEN_TREE, _SYS_MOUNT_SETATTR = 428, 442  # the same for every processor
_AT_FDCWD, _AT_EMPTY_PATH, _OPEN_TREE_CLONE = -100, 0x1000, 1
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID, _MOUNT_ATTR_NODEV, _MOUNT_ATTR_IDMAP = 0x1, 0x2, 0x4, 0x100000
_WALK = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_libc = ctypes.CDLL(None, use_errno=True)


class _MountAttributes(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns_fd"))


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
        yield AgentDirs(mounts, opened=True)


def clone_mount(source: Path, *, read_only: bool, base: int | None) -> int:
    """A mount of a directory that stands nowhere yet. Raises OSError.

    base: the uid, and gid, which the directory's owner has in it and who has that on the directory; None: its own.
    """
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC
    mount = _call(_SYS_OPEN_TREE, _AT_FDCWD, os.fsencode(source), ctypes.c_uint(flags))
    try:
        attributes = _MountAttributes(_MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV | (_MOUNT_ATTR_RDONLY if read_only else 0))
        with contextlib.ExitStack() as stack:
            if base is not None:
                found = os.fstat(mount)
                attributes.set |= _MOUNT_ATTR_IDMAP
                attributes.userns_fd = stack.enter_context(_user_namespace(found.st_uid, found.st_gid, base))
            _call(
                _SYS_MOUNT_SETATTR,
                mount,
                b"",
                ctypes.c_uint(_AT_EMPTY_PATH),
                ctypes.byref(attributes),
                ctypes.c_size_t(ctypes.sizeof(attributes)),
            )
    except BaseException:
        os.close(mount)
        raise
    return mount


def clones(dirs: AgentDirs, base: int, folder: Path, opened: contextlib.ExitStack) -> tuple[list[int], AgentDirs]:
    """Mounts of an agent's directories in which their owner is its root: (descriptors, where they are going to stand).

    `opened` closes them. Raises OSError.
    """
    mounts, staged = [], []
    for number, mount in enumerate(dirs.mounts):
        mounts.append(clone_mount(mount.source, read_only=mount.read_only, base=base))
        opened.callback(os.close, mounts[-1])
        staged.append(Mount(folder / str(number), mount.target, mount.read_only, mapped=True))
    return mounts, AgentDirs(tuple(staged), opened=True)


def staging_command(namespace: str, folder: Path, mounts: Sequence[int], command: Sequence[str] = ()) -> list[str]:
    """What puts such mounts in their places; staged.py tells what each word says."""
    own = [sys.executable, "-I", "-S", str(staged_file.__file__)]
    return [*own, namespace, str(folder), *map(str, mounts), "--", *command]


@contextmanager
def _user_namespace(uid: int, gid: int, base: int) -> Iterator[int]:
    """A namespace in which one user is another: there is no way to have one without a process for a moment."""
    program = shutil.which("unshare") or "unshare"
    with subprocess.Popen(
        [program, "--user", "--", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={}, cwd="/", bufsize=0
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b".")
        if process.stdout.read(1) != b".":
            raise OSError(f"{program} made no user namespace")
        for kind, number in (("uid", uid), ("gid", gid)):
            Path(f"/proc/{process.pid}/{kind}_map").write_text(f"{number} {base} 1\n")
        descriptor = os.open(f"/proc/{process.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        process.stdin.close()
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _call(number: int, *arguments: object) -> int:
    done = int(_libc.syscall(ctypes.c_long(number), *arguments))
    if done < 0:
        reason = ctypes.get_errno()
        raise OSError(reason, os.strerror(reason))
    return done
