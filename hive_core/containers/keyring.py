"""The kernel's session keyring: what a login session's programs share, and an agent must not."""

from __future__ import annotations

import ctypes
import errno
import os

_KEYCTL = {"x86_64": 250, "aarch64": 219}
_JOIN_SESSION_KEYRING = 1


def leave_session_keyring() -> None:
    """Give the calling thread, and what it starts from now on, a new session keyring without a name.

    A thread has a keyring of its own: the others of this process keep theirs. Raises OSError when the kernel has keys
    and gives no new keyring; where it has none, or refuses keyctl(2) altogether, no agent can use one either.
    """
    number = _KEYCTL.get(os.uname().machine)
    if number is None:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(ctypes.c_long(number), ctypes.c_long(_JOIN_SESSION_KEYRING), None) < 0:
        reason = ctypes.get_errno()
        if reason not in (errno.ENOSYS, errno.EPERM):
            raise OSError(reason, f"no new session keyring: {os.strerror(reason)}")
