"""Secrets that the operator gives: in a file, on standard input, or typed at a terminal, which does not show them."""

from __future__ import annotations

from hive_core.protocol.paths import explain
from hive_core.protocol.refusal import Refusal

LIMIT_BYTES = 64 * 1024


def read_secret(what: str, file: str = "-", *, one_line: bool = True) -> str:
    """The secret that a file holds, or standard input for `-`. Raises Refusal. one_line: a terminal asks for it."""
    import sys

    try:
        if file != "-":
            with open(file, "rb") as opened:
                given = opened.read(LIMIT_BYTES)
        elif one_line and sys.stdin.isatty():
            from getpass import getpass

            return getpass(f"{what}: ")
        else:
            given = sys.stdin.buffer.read(LIMIT_BYTES)
    except EOFError:
        raise Refusal("usage", f"cannot use the {what}: none was given") from None
    except OSError as exc:
        raise Refusal("usage", f"cannot read the {what}: {explain(exc)}") from None
    return given.decode(errors="replace")  # no secret has what takes the place of junk
