"""What whoever approves must see as it is, on a page and in a terminal alike: hidden characters, counts, and times."""

from __future__ import annotations

import json
import re
import time

# Control characters but tab and newline, bidi and other format characters, zero widths, blank letters, selectors that
# can carry hidden text, tags, private use and lone surrogates (json gives us those). U+FE0F stays: emoji end with it.
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u115f\u1160\u17b4\u17b5"
    "\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f\u2800\u3164\ud800-\udfff\ue000-\uf8ff\ufe00-\ufe0e\ufeff"
    "\uffa0\ufff0-\ufffb\U000110bd\U000110cd\U00013430-\U0001345f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    "\U000e0000-\U000e0fff\U000f0000-\U0010ffff]"
)


def named(text: str) -> str:
    """The text with each hidden character written as ⟨U+202E⟩."""
    return HIDDEN.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text)


def quoted(text: str) -> str:
    """The text as one line in quotation marks, which nothing in it can end: for somebody's words within ours."""
    return json.dumps(named(text), ensure_ascii=False)


def mib(size: int) -> str:
    """A number of bytes: "12.5 MiB"."""
    return f"{size / 2**20:,.1f} MiB"


def counted(number: int, one: str, many: str = "") -> str:
    """So many of something: "1 message", "1,000 messages"."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def instant(at_ms: int) -> str:
    """An instant: "2026-01-31 09:30:00 UTC"."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at_ms / 1000))


def lasting(seconds: float) -> str:
    """So long: "7 days", "90 s"."""
    return f"{seconds:,.10g} s" if seconds % 86_400 else counted(int(seconds // 86_400), "day")
