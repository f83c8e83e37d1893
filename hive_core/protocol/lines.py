"""JSON lines: bytes to objects and back, with no loop and no socket in sight.

One line is one JSON object in UTF-8, ended by a newline. A line that is too long, is not UTF-8, is not JSON or is
not an object costs only itself: the splitter reports it and goes on with the next.
"""

from __future__ import annotations

import json
import sys

from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import BODY_LIMIT_BYTES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

# A body within its own limit must pass: JSON may spell each byte of it with six (\u0041), and what is around the body,
# a thousand recipients at most, has its room besides.
LINE_LIMIT_BYTES = 6 * BODY_LIMIT_BYTES + 64 * 1024
_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class LineSplitter:
    """Feed it bytes as they come; take whole lines (without the newline), or a Refusal for one that is too long.

    Holds at most `limit_bytes` of an unfinished line: the rest of an over-long line is dropped as it arrives.
    """

    __slots__ = ("_dropping", "_rest", "_taken", "limit_bytes")

    def __init__(self, limit_bytes: int = LINE_LIMIT_BYTES) -> None:
        self.limit_bytes = limit_bytes
        self._rest = bytearray()
        self._dropping = False
        self._taken = 0  # bytes of the unfinished line, those that were dropped included

    def feed(self, data: bytes) -> Iterator[bytes | Refusal]:
        start = 0
        while (end := data.find(b"\n", start)) >= 0:
            self._keep(data[start:end])
            start = end + 1
            if self._dropping:
                self._dropping = False
                yield self._too_long()
            else:
                yield bytes(self._rest)
            self._rest.clear()
            self._taken = 0
        self._keep(data[start:])

    @property
    def unfinished(self) -> bool:
        """Whether a hang-up now would cut a line in half."""
        return self._dropping or bool(self._rest)

    def end(self) -> Refusal | None:
        """Call it at a hang-up: the Refusal of a line that it cut in half, once."""
        if not self.unfinished:
            return None
        refusal = Refusal(
            "usage",
            f"cannot read the line: its newline is missing after {self._taken:,} bytes; end each line with a newline",
        )
        self._rest.clear()
        self._dropping, self._taken = False, 0
        return refusal

    def _keep(self, piece: bytes) -> None:
        self._taken += len(piece)
        if self._dropping or len(self._rest) + len(piece) > self.limit_bytes:
            self._dropping = True
            self._rest.clear()
        else:
            self._rest += piece

    def _too_long(self) -> Refusal:
        limit = f"{self.limit_bytes:,} bytes"
        return Refusal("usage", f"cannot read the line: it is longer than the limit of {limit}; send less in one line")


def encode(obj: object) -> bytes:
    """One object as a line, newline included."""
    return _to_json(obj).encode("utf-8", "replace") + b"\n"


def _refuse_constant(word: str) -> None:
    raise Refusal("usage", f"cannot read the line: it is not JSON, which has no {word}; give a finite number, or null")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def decode(line: bytes) -> dict[str, Any]:
    """The object a line holds. Raises Refusal("usage") that says what is wrong with it."""
    try:
        # json.loads on bytes would guess UTF-16 and let halves of surrogate pairs through.
        obj = _DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError as exc:
        raise Refusal("usage", f"cannot read the line: byte {exc.start} is not UTF-8; send UTF-8") from None
    except RecursionError:
        raise Refusal("usage", "cannot read the line: it is nested too deep; send it flatter") from None
    except json.JSONDecodeError as exc:
        raise Refusal(
            "usage", f"cannot read the line: it is not JSON ({exc}); send one object of JSON a line"
        ) from None
    except ValueError:  # Python's own limit of a whole number, and its words are for programmers
        most = f"{sys.get_int_max_str_digits():,} digits"
        raise Refusal(
            "usage", f"cannot read the line: a number in it has more than {most}; give a shorter one"
        ) from None
    if not isinstance(obj, dict):
        raise Refusal("usage", f"cannot read the line: it holds a {type(obj).__name__}, and an object is needed")
    return obj
