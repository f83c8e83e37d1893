"""Text that an agent wrote, made safe to show: escaped, capped, and with nothing in it that hides."""

from __future__ import annotations

import re

from markupsafe import Markup, escape

from hive_core.protocol.visible import RIGHT_TO_LEFT, counted, hidden, named

SHOWN_CHARACTERS = 20_000


def visible(text: object, limit: int | None = SHOWN_CHARACTERS) -> Markup:
    """`text` as markup that shows every character for what it is, where it is: a hidden one as a marked ⟨U+202E⟩, and
    words from right to left apart from what is around them.

    At most `limit` characters are shown, and how many are not is said. None shows all.
    """
    whole = str(text)
    shown = whole if limit is None else whole[:limit]
    # The parts between the hidden characters are escaped; the marks are ours.
    marked = Markup("").join(
        _mark(part) if index % 2 else _apart(part)
        for index, part in enumerate(re.split(f"({hidden().pattern})", shown))
    )
    if len(shown) < len(whole):
        marked += Markup('<span class="more">… {}</span>').format(counted(len(whole) - len(shown), "more character"))
    return marked


def _apart(text: str) -> Markup:
    parts = re.split(f"({RIGHT_TO_LEFT.pattern})", text)
    return Markup("").join(
        Markup("<bdi>{}</bdi>").format(part) if index % 2 else escape(part) for index, part in enumerate(parts)
    )


def _mark(character: str) -> Markup:
    return Markup('<span class="mark">⟨U+{:04X}⟩</span>').format(ord(character))


def plain(value: object) -> object:
    """A value as it may stand anywhere in a page, in an attribute too: text names its hidden characters, unmarked."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return named(value)
