"""What whoever approves must see as it is, on a page and in a terminal alike: hidden characters, counts, and times."""

from __future__ import annotations

import functools
import json
import re
import time

# Of emoji: what may be followed by U+FE0F, and be joined by U+200D.
_PICTURES = "\u2190-\u2bff\U0001f000-\U0001faff"
_SIGNS = rf"{_PICTURES}\xa9\xae\u203c\u2049\u2122\u2139\u3030\u303d\u3297\u3299"
_EAST_ASIAN = "\u3001-\u9fff\uac00-\ud7af\uff01-\uffef"
# Marks that a font draws at any character; those that belong to one script are left to it. Overlays, which strike
# through what stands before them, and enclosing ones are not among them.
_MARKS = "\u0300-\u0333\u0339-\u034e\u0350-\u036f\u0483-\u0487\u1ab0-\u1abd\u1abf-\u1aff\u1dc0-\u1dff\u20d0-\u20d1" + (
    "\u20d4-\u20d7\u20db-\u20dc\u20e1\u20e7-\u20e9\u20ec-\u20f0\ufe20-\ufe2f"
)
_LETTER = r"[^\W\d_]"
# What is hidden, looks like a space, or changes how others look, wherever it stands.
_ANYWHERE = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u115f\u1160\u17b4\u17b5"
    "\u180b-\u180f\u200b\u200c\u200e\u200f\u2028-\u202e\u2060-\u206f\u2800\u3164\ud800-\udfff\ue000-\uf8ff"
    "\ufe00-\ufe0e\ufeff\uffa0\ufff0-\ufffb\U000110bd\U000110cd\U00013430-\U0001345f\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff\U000f0000-\U0010ffff"
    "\xa0\u1680\u2000-\u200a\u202f\u205f"  # spaces that are not the one
    "\u0334-\u0338\u20d2\u20d3\u20d8-\u20da\u20e5\u20e6\u20ea\u20eb\u0488\u0489\u1abe\u20dd-\u20e0\u20e2\u20e4"
    "\ua670-\ua672\ufdd0-\ufdef\ufffe\uffff"
    "\u1cd4\u1ce2-\u1ce8\U00010a39\U00016af0-\U00016af4\U0001bc9e\U0001d167-\U0001d169"  # overlays of one script
)
# What no look has to be taken at: most of what is told, by commands above all that shall have said it in no time.
_PLAIN = re.compile(r"[\t\n -~]*")


@functools.cache
def hidden() -> re.Pattern[str]:
    """Control characters but tab and newline, bidi and other format characters, zero widths, blank letters, other
    spaces, selectors that can carry hidden text, tags, private use and lone surrogates (json gives us those); and
    marks: none but two at a letter. What emoji are made of stays where it makes one.
    """
    return re.compile(
        rf"[{_ANYWHERE}{_MARKS}\ufe0f\u20e3\u200d\u3000](?:"  # a candidate, then what makes it one: fast to find
        rf"(?<![{_MARKS}\ufe0f\u20e3\u200d\u3000])"
        rf"|(?<![\ufe0f\u20e3\u200d\u3000])(?<!{_LETTER}.)(?<!{_LETTER}[{_MARKS}].)"
        rf"|(?<=\ufe0f)(?<![{_SIGNS}].)(?!(?<=[0-9#*].)\u20e3)"
        r"|(?<=\u20e3)(?<![0-9#*].)(?<![0-9#*]\ufe0f.)"
        rf"|(?<=\u200d)(?:(?<![{_PICTURES}].)(?<![{_PICTURES}]\ufe0f.)|(?![{_PICTURES}]))"
        rf"|(?<=\u3000)(?<![{_EAST_ASIAN}].)"
        ")",
        re.DOTALL,
    )


# Words of a script that is written from right to left. What stands between two of them, as the arrow of a change does,
# is shown from right to left with them, where they are not kept apart from it.
_RIGHT_TO_LEFT = "[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc\U00010800-\U00010fff\U0001e800-\U0001efff]"
RIGHT_TO_LEFT = re.compile(rf"{_RIGHT_TO_LEFT}+(?: {_RIGHT_TO_LEFT}+)*")


def hides(text: str) -> bool:
    """Whether there is a hidden character in it."""
    return _PLAIN.fullmatch(text) is None and hidden().search(text) is not None


def named(text: str) -> str:
    """The text with each hidden character written as ⟨U+202E⟩."""
    return hidden().sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text) if hides(text) else text


def named_apart(text: str) -> str:
    """The same for a terminal, where nothing is shown in another place than it stands, whatever the direction of its
    script: words from right to left are between U+2068 and U+2069."""
    return RIGHT_TO_LEFT.sub("\u2068\\g<0>\u2069", named(text))


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
