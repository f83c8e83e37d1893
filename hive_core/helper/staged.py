"""Puts mounts in their places, in a mount namespace where they are seen.

Run by its path:

    python -I -S staged.py own FOLDER FD … -- COMMAND …
    python -I -S staged.py NAMESPACE FOLDER FD … --

Each FD is a mount that stands nowhere (see staging.py): the first is FOLDER/0 from now on, the next FOLDER/1. With
"own" a namespace is made in which the command is run, and the mounts go when it and all that it started have ended,
however that was. Otherwise they stand in a namespace that there is, in the place of those that stood there; with no FD
they are just taken away. It imports little: an agent's start waits for it.
"""

import ctypes
import os
import sys

_CLONE_NEWNS = 0x20000
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_SLAVE = 2, 4, 8, 16384, 1 << 19
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
_SYS_MOVE_MOUNT, _AT_FDCWD, _MOVE_MOUNT_F_EMPTY_PATH = 429, -100, 4
_libc = ctypes.CDLL(None, use_errno=True)


def _checked(done: int, what: str) -> None:
    if done < 0:
        raise SystemExit(f"hive: cannot {what}: {os.strerror(ctypes.get_errno())}")


def leave_the_host() -> None:
    _checked(_libc.unshare(_CLONE_NEWNS), "make a mount namespace")
    # What is mounted here stays here; what the host mounts or unmounts comes in.
    _checked(_libc.mount(None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_SLAVE), None), "keep mounts from the host")


def enter(namespace: str) -> None:
    _checked(_libc.setns(os.open(namespace, os.O_RDONLY | os.O_CLOEXEC), _CLONE_NEWNS), f"enter {namespace}")


def take_away(folder: str) -> None:
    while os.path.ismount(folder):  # all that is below it goes with it
        _checked(_libc.umount2(os.fsencode(folder), _MNT_DETACH | _UMOUNT_NOFOLLOW), f"unmount {folder}")


def put_in_place(folder: str, mounts: "list[int]") -> None:
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


def main(namespace: str, folder: str, *words: str) -> None:
    end = words.index("--")
    mounts, command = [int(word) for word in words[:end]], list(words[end + 1 :])
    if namespace == "own":
        leave_the_host()
    else:
        enter(namespace)
        take_away(folder)
    if mounts:
        put_in_place(folder, mounts)
    if command:
        os.execv(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
