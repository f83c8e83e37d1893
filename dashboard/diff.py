"""A unified diff, read line by line for its colours."""

from __future__ import annotations

import difflib
import re
from typing import NamedTuple

COMPARED_LINES = 2_000
_HUNK = re.compile(r"@@ -\d+(?:,(\d+))? \+\d+(?:,(\d+))? @@")


class Line(NamedTuple):
    kind: str  # meta, hunk, add, del or same
    text: str


def read_diff(diff: str) -> list[Line]:
    """Each line with what it is.

    Inside a hunk the counts of its header decide, not the look of a line: a removed line that begins with `--` reads
    `---` and must not pass for a file's name.
    """
    lines: list[Line] = []
    old = new = 0
    for text in diff.removesuffix("\n").split("\n"):
        if old > 0 or new > 0:
            kind = {"+": "add", "-": "del", "\\": "meta"}.get(text[:1], "same")
            old -= kind in ("del", "same")
            new -= kind in ("add", "same")
        elif match := _HUNK.match(text):
            kind = "hunk"
            old, new = (1 if count is None else int(count) for count in match.groups())
        else:
            kind = "meta"
        lines.append(Line(kind, text))
    return lines


def compare(old: str, new: str) -> list[Line]:
    """An edit as lines: what goes, what comes, and three lines around. Too long to compare: all of both."""
    before, after = old.removesuffix("\n").split("\n"), new.removesuffix("\n").split("\n")
    if len(before) + len(after) > COMPARED_LINES:
        return [Line("del", f"-{text}") for text in before] + [Line("add", f"+{text}") for text in after]
    changes = list(difflib.unified_diff(before, after, lineterm="", n=3))[2:]
    return read_diff("\n".join(changes)) if changes else [Line("same", f" {text}") for text in before]
