"""`hive-agent tape FILE`: a stand-in for a program that prints what one printed in a recorded turn.

FILE holds JSON: {"lines": [[STREAM, TEXT], …], "code"}, where STREAM is 1 for stdout, 2 for stderr, and 0 for the end
of a process. Each prompt on stdin gets the lines up to the next result; behind a result stands what is printed when
stdin has ended, up to the next `init` or such an end. A program that was started several times goes on where it
stopped: FILE.n counts the lines. Behind the last one it ends with `code`, negative for a signal, or with its stdin
where that is null. FILE.told keeps what it was told.
Standard library alone.
"""

from __future__ import annotations

import json
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Tape:
    def __init__(self, path: str) -> None:
        self._path = path
        with open(path) as file:
            tape = json.load(file)
        self._lines: list[tuple[int, str]] = tape["lines"]
        self._code: int | None = tape["code"]
        try:
            with open(f"{path}.n") as file:
                self._at = int(file.read())
        except FileNotFoundError:
            self._at = 0

    def play(self) -> int:
        while self._next_prompt():
            if self._at == len(self._lines) and self._lines:
                print("the record has no more prompts", file=sys.stderr)
                return 1
            while self._at < len(self._lines) and not self._print():
                pass
            if self._at == len(self._lines) and self._code is not None:
                return self._end(self._code)
        while self._at < len(self._lines) and not _is(self._lines[self._at][1], "init"):
            stream, _ = self._lines[self._at]
            self._print()
            if stream == 0:
                break
        return 0

    def _next_prompt(self) -> bool:
        """Wait for one. False at the end of stdin."""
        for line in iter(sys.stdin.readline, ""):
            with open(f"{self._path}.told", "a") as told:
                told.write(line)
            if json.loads(line).get("type") == "user":
                return True
        return False

    def _print(self) -> bool:
        """Print the next line. Whether it was a result."""
        stream, text = self._lines[self._at]
        self._at += 1
        with open(f"{self._path}.n", "w") as file:
            file.write(str(self._at))
        data = text.encode("utf-8", "replace") + b"\n" if stream else b""
        while data:
            data = data[os.write(stream, data) :]
        return stream == 1 and _is(text, "result")

    def _end(self, code: int) -> int:
        if code < 0:
            os.kill(os.getpid(), -code)
        return code


def _is(text: str, word: str) -> bool:
    """Whether a line is an event of that type or subtype."""
    try:
        event: Any = json.loads(text)
        return word in (event.get("type"), event.get("subtype"))
    except (ValueError, AttributeError, RecursionError):
        return False


def main(path: str) -> int:
    return Tape(path).play()
