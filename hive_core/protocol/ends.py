"""How a process ended, in words."""

from __future__ import annotations

import signal


def how_ended(code: int | None) -> str:
    """ "ended with code 1", "was killed by signal 9 (SIGKILL)": of a code as a shell gives it (137), or Python (-9)."""
    if code is None:
        return "was ended from outside"
    number = -code if code < 0 else code - 128
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"ended with code {code}"
    return f"was killed by signal {number} ({name})"
