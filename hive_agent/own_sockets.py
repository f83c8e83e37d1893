"""Keeps a harness whose container shares the host's network, and all that it starts, from the host's abstract sockets.

Whoever listens on one may trust the uid of who connects, and under bubblewrap an agent's is the daemon's. From Linux
6.12 on Landlock (landlock(7)) tells them apart.
"""

from __future__ import annotations

import ctypes
import os

# The same numbers on every processor.
_CREATE_RULESET, _RESTRICT_SELF, _PR_SET_NO_NEW_PRIVS = 444, 446, 38
_ASK_VERSION, _SCOPES_SINCE, _ABSTRACT_SOCKETS = 1, 6, 1


class _Ruleset(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("ports", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


def leave_foreign_sockets() -> bool:
    """From now on no abstract socket can be connected to but those made from now on by this process, which has one
    thread, and by what it starts. False where the kernel cannot do that."""
    libc = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    if libc.syscall(_CREATE_RULESET, None, zero, _ASK_VERSION) < _SCOPES_SINCE:
        return False
    wanted = _Ruleset(0, 0, _ABSTRACT_SOCKETS)
    ruleset = libc.syscall(_CREATE_RULESET, ctypes.byref(wanted), ctypes.c_ulong(ctypes.sizeof(wanted)), 0)
    if ruleset < 0:
        return False
    try:
        libc.prctl(_PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), zero, zero, zero)
        return bool(libc.syscall(_RESTRICT_SELF, ruleset, 0) == 0)
    finally:
        os.close(ruleset)
