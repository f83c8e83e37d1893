"""Text that an agent wrote, made safe to show: escaped, capped, and with nothing in it that hides."""

from __future__ import annotations

import re

from markupsafe import Markup, escape

SHOWN_CHARACTERS = 20_000

# Control characters but tab and newline, bidi and other format characters, zero widths, blank letters, selectors that
# can carry hidden text, tags, private use and lone surrogates (json gives us those). U+FE0F stays: emoji end with it.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u115f\u1160\u17b4\u17b5"
    "\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f\u2800\u3164\ud800-\udfff\ue000-\uf8ff\ufe00-\ufe0e\ufeff"
    "\uffa0\ufff0-\ufffb\U000110bd\U000110cd\U00013430-\U0001345f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    "\U000e0000-\U000e0fff\U000f0000-\U0010ffff]"
)


def visible(text: object, limit: int | None = SHOWN_CHARACTERS) -> Markup:
    """`text` as markup that shows every character for what it is: a hidden one as a marked ⟨U+202E⟩.

    At most `limit` characters are shown, and how many are not is said. None shows all.
    """
    whole = str(text)
    shown = whole if limit is None else whole[:limit]
    # The parts between the hidden characters are escaped; the marks are ours.
    marked = Markup("").join(
        _mark(part) if index % 2 else escape(part) for index, part in enumerate(re.split(f"({_HIDDEN.pattern})", shown))
    )
    if len(shown) < len(whole):
        marked += Markup('<span class="more">… {:,} more characters</span>').format(len(whole) - len(shown))
    return marked


def _mark(character: str) -> Markup:
    return Markup('<span class="mark">⟨U+{:04X}⟩</span>').format(ord(character))


def plain(value: object) -> object:
    """A value as it may stand anywhere in a page, in an attribute too: text names its hidden characters, unmarked."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return _HIDDEN.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", value)
