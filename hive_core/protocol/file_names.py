"""The names of files that come with a message, parsed at the door."""

from __future__ import annotations

import re

from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import NewType

    FileName = NewType("FileName", str)
else:
    FileName = str

FILE_NAME_LIMIT_BYTES = 120
FILES_MOST = 100  # of one request, as many as files_per_message can be
TOO_MANY = f"a request takes {FILES_MOST}; send fewer, or one archive"
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def parse_file_name(raw: object) -> FileName:
    """The name of a file without its folder: 1 to 120 bytes of UTF-8, no control character, not `.` or `..`.

    A character that nobody sees, or takes for another, becomes `_`: who reads the name can type it. Raises
    Refusal("usage").
    """
    from hive_core.protocol.visible import hidden

    if not isinstance(raw, str) or not raw.strip():
        raise _cannot_use(raw, "give the file a name")
    if "/" in raw or raw in (".", ".."):
        raise _cannot_use(raw, "give its name without the folder")
    if _CONTROL.search(raw):
        raise _cannot_use(raw, "it has a control character; rename the file")
    name = hidden().sub("_", raw)
    if (size := len(name.encode())) > FILE_NAME_LIMIT_BYTES:
        raise _cannot_use(raw, f"it has {size} bytes and the limit is {FILE_NAME_LIMIT_BYTES}; rename the file")
    return FileName(name)


def _cannot_use(raw: object, why: str) -> Refusal:
    return Refusal("usage", f"cannot use {shown(raw)} as the name of a file: {why}")


def numbered(names: Iterable[FileName]) -> list[FileName]:
    """The names, each once: one that was there before gets a number, `shot-2.png` behind `shot.png`."""
    taken: dict[FileName, None] = {}
    for name in names:
        number, free = 1, name
        while free in taken:
            number += 1
            free = _with_number(name, number)
        taken[free] = None
    return list(taken)


def _with_number(name: FileName, number: int) -> FileName:
    stem, dot, ending = name.rpartition(".")
    if not stem:  # no ending, or a name that begins with its only dot
        stem, dot, ending = name, "", ""
    ending = f"-{number}{dot}{ending}"
    if (room := FILE_NAME_LIMIT_BYTES - len(ending.encode())) < 1:
        return _with_number(FileName(name.replace(".", "_")), number)  # what looked like its ending is most of it
    return FileName(stem.encode()[:room].decode("utf-8", "ignore") + ending)
