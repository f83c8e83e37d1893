"""Mounts of open directories in which one user is another: open_tree(2), mount_setattr(2)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SYS_OPEN_TREE, _SYS_MOUNT_SETATTR = 428, 442  # the same for every processor
_AT_FDCWD, _AT_EMPTY_PATH, _OPEN_TREE_CLONE = -100, 0x1000, 1
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID, _MOUNT_ATTR_NODEV, _MOUNT_ATTR_IDMAP = 0x1, 0x2, 0x4, 0x100000
_libc = ctypes.CDLL(None, use_errno=True)


class _MountAttributes(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns_fd"))


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
