"""A unified diff, read line by line for its colours."""

from __future__ import annotations

import difflib
import re
from itertools import groupby
from typing import NamedTuple

COMPARED_LINES = 2_000
_FILE = "diff --git "
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


class Run(NamedTuple):
    """Lines of one kind that follow each other."""

    kind: str
    text: str


class FileDiff(NamedTuple):
    """What a diff says of one file. path: empty for what comes before the first."""

    path: str
    added: int
    removed: int
    runs: list[Run]


def diff_files(diff: str) -> list[FileDiff]:
    """A diff as git writes it, file by file. Few runs stand for many lines, which is what a browser can hold."""
    files: list[tuple[str, list[Line]]] = []
    for line in read_diff(diff):
        if line.kind == "meta" and line.text.startswith(_FILE):
            files.append((_path(line.text), []))
        elif not files:
            files.append(("", []))
        files[-1][1].append(line)
    return [_of_file(path, lines) for path, lines in files]


def _path(head: str) -> str:
    """From `diff --git a/PATH b/PATH`: the two are one, since renames are not looked for."""
    both = head.removeprefix(_FILE)
    return both[2 : len(both) // 2]


def _of_file(path: str, lines: list[Line]) -> FileDiff:
    grouped = [(kind, [line.text for line in group]) for kind, group in groupby(lines, key=lambda line: line.kind)]
    counts = {kind: sum(len(texts) for one, texts in grouped if one == kind) for kind in ("add", "del")}
    return FileDiff(path, counts["add"], counts["del"], [Run(kind, "\n".join(texts)) for kind, texts in grouped])


def compare(old: str, new: str) -> list[Line]:
    """An edit as lines: what goes, what comes, and three lines around. Too long to compare: all of both."""
    before, after = old.removesuffix("\n").split("\n"), new.removesuffix("\n").split("\n")
    if len(before) + len(after) > COMPARED_LINES:
        return [Line("del", f"-{text}") for text in before] + [Line("add", f"+{text}") for text in after]
    changes = list(difflib.unified_diff(before, after, lineterm="", n=3))[2:]
    return read_diff("\n".join(changes)) if changes else [Line("same", f" {text}") for text in before]
