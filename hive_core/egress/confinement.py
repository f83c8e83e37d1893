"""The proxy's process gives up what it does not need, before it has read a byte of an agent's."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import struct
from pathlib import Path

from hive_core.containers.seccomp import filter_program

FILES_WANTED = 65_536
# Of <linux/prctl.h>, <linux/seccomp.h> and <linux/capability.h>.
_SET_NO_NEW_PRIVS, _SET_SECCOMP, _FILTER = 38, 22, 2
_CAPBSET_DROP, _LAST_CAPABILITY = 24, 63
_CAPABILITY_VERSION_3 = 0x20080522


class Unconfined(Exception):
    """The kernel did not take what this process would be confined by."""


def confine() -> None:
    """No capabilities, none to be had by a program, and the filter of system calls that agents have too. For good, and
    for all threads that come: to be called before any.

    Raises Unconfined.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    _call(libc, "prctl", _SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for capability in range(_LAST_CAPABILITY + 1):
        libc.prctl(_CAPBSET_DROP, capability, 0, 0, 0)  # only where it may, and of those that there are
    header = ctypes.create_string_buffer(struct.pack("=Ii", _CAPABILITY_VERSION_3, 0), 8)
    if libc.capset(header, ctypes.create_string_buffer(24)) != 0 and _has_capabilities():
        raise Unconfined("cannot confine the proxy: capset is not permitted, and it has capabilities")
    program = filter_program()
    if program is not None:  # none for this processor: it is said where agents start
        steps = ctypes.create_string_buffer(program, len(program))
        given = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(steps))
        _call(libc, "prctl", _SET_SECCOMP, _FILTER, ctypes.create_string_buffer(given, len(given)), 0, 0)


def _has_capabilities() -> bool:
    """A unit that lets nobody change them has taken them itself."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return any(line.startswith(("CapPrm:", "CapEff:")) and int(line.split()[1], 16) for line in lines)


def _call(libc: ctypes.CDLL, name: str, *arguments: object) -> None:
    if getattr(libc, name)(*arguments) != 0:
        raise Unconfined(f"cannot confine the proxy: {name}: {os.strerror(ctypes.get_errno())}")


def raise_file_limit() -> None:
    """So that agents' limits are what bounds their connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES_WANTED if hard == resource.RLIM_INFINITY else min(FILES_WANTED, hard)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def outlive_signals() -> None:
    """It ends with the daemon's socket: a ^C, and a service manager's word, are for the daemon, which ends in order."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
