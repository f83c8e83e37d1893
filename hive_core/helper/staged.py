"""Puts mounts in their places, in a mount namespace of its own, and becomes a command; the places are seen by it alone.

Run by its path:

    python -I -S staged.py FOLDER FD … -- COMMAND …

Each FD is a mount that stands nowhere (see staging.py): the first is FOLDER/0 from now on, the next FOLDER/1. They go
when the command and all that it started have ended, however that was. It imports little: an agent's start waits for it.
"""

import ctypes
import os
import sys

_CLONE_NEWNS = 0x20000
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_SLAVE = 2, 4, 8, 16384, 1 << 19
_SYS_MOVE_MOUNT, _AT_FDCWD, _MOVE_MOUNT_F_EMPTY_PATH = 429, -100, 4
_libc = ctypes.CDLL(None, use_errno=True)


def _checked(done: int, what: str) -> None:
    if done < 0:
        raise SystemExit(f"hive: cannot {what}: {os.strerror(ctypes.get_errno())}")


def put_in_place(folder: str, mounts: "list[int]") -> None:
    _checked(_libc.unshare(_CLONE_NEWNS), "make a mount namespace")
    # What is mounted here stays here; what the host mounts or unmounts comes in.
    _checked(_libc.mount(None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_SLAVE), None), "keep mounts from the host")
    flags = ctypes.c_ulong(_MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    _checked(_libc.mount(b"hive", os.fsencode(folder), b"tmpfs", flags, b"mode=700,size=64k"), f"mount {folder}")
    for number, mount in enumerate(mounts):
        place = os.path.join(folder, str(number))
        os.mkdir(place, 0o700)
        done = _libc.syscall(
            ctypes.c_long(_SYS_MOVE_MOUNT), mount, b"", _AT_FDCWD, os.fsencode(place), _MOVE_MOUNT_F_EMPTY_PATH
        )
        _checked(done, f"mount {place}")
        os.close(mount)


if __name__ == "__main__":
    end = sys.argv.index("--")
    put_in_place(sys.argv[1], [int(word) for word in sys.argv[2:end]])
    command = sys.argv[end + 1 :]
    os.execv(command[0], command)
