"""What the command line prints, and the streams that it has for it."""

from __future__ import annotations

import json
import os
import sys

from hive_core.protocol.refusal import EXIT_CODES, Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from typing import Any


def emit(arguments: Namespace, result: Any, text: str) -> None:
    """Print the result of a verb: as JSON where that was asked for, else the text."""
    print(as_json(result) if arguments.json else text)


def confirmed(question: str) -> bool:
    """Whether whoever is at the terminal says yes."""
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def given_text(what: str, limit_bytes: int) -> str:
    """Text from standard input. Raises Refusal("usage") where that is not UTF-8, or more than so many bytes."""
    from hive_core.protocol.words import too_large

    given = sys.stdin.buffer.read(limit_bytes + 1)  # whatever comes in may have no end
    if len(given) > limit_bytes:
        raise too_large(what, f"{len(given):,} bytes or more", limit_bytes)
    try:
        return given.decode()
    except UnicodeDecodeError as exc:
        raise Refusal("usage", f"cannot take the {what}: byte {exc.start} is not UTF-8; give it as UTF-8") from None


def as_json(value: Any) -> str:
    """JSON of one line, in which what a terminal would obey, or hide, is spelled by its number."""
    from hive_core.protocol.visible import hidden, hides

    said = json.dumps(value, ensure_ascii=False)
    # Outside of strings JSON has no such character.
    return hidden().sub(lambda match: json.dumps(match[0])[1:-1], said) if hides(said) else said


def refuse(refusal: Refusal, in_json: bool) -> int:
    """Say why a verb was refused; returns the exit code."""
    from hive_core.protocol.visible import named

    if in_json:
        print(as_json({"ok": False, "error": refusal.to_wire()}))
    print(f"hive: {named(refusal.message)}", file=sys.stderr)
    return EXIT_CODES.get(refusal.code, 1)


def prepare_streams() -> None:
    """Have all three, and let none of them refuse a character that its encoding lacks."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - it stays open as long as we run
        elif mode == "w" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def drop_output() -> None:
    """Let what is printed from now on, or was not written yet, go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
