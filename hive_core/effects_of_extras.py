"""What a change of an agent's skills and plugins does: what comes with them, and what of it runs."""

from __future__ import annotations

from collections.abc import Mapping

from hive_core.effects import LISTED, Line
from hive_core.extras import Extra, Extras
from hive_core.protocol.visible import counted

SKILL_FILES, PLUGIN_FILES = "skill files", "plugin files"


def extras_lines(before: Extras, after: Extras) -> list[Line]:
    """A line for each that comes, goes or changes, and one for each thing in it that runs."""
    return _lines(SKILL_FILES, before.skills, after.skills) + _lines(PLUGIN_FILES, before.plugins, after.plugins)


def _lines(what: str, before: Mapping[str, Extra], after: Mapping[str, Extra]) -> list[Line]:
    lines: list[Line] = []
    for name in sorted({*before, *after}):
        old, new = before.get(name), after.get(name)
        if new is None:
            assert old is not None
            lines.append(Line(what, _said(name, old), None))
        elif old is None or old.files != new.files:
            was, is_now = None if old is None else _said(name, old), _said(name, new)
            is_now = is_now if was != is_now else "the same size with other files or another text"
            # A plugin is part of the program itself, and what a skill has of programs may be what has changed.
            lines.append(Line(what, was, is_now, wide=what == PLUGIN_FILES or bool(new.powers)))
            lines += _power_lines(what, name, new)
    return lines


def _said(name: str, extra: Extra) -> str:
    return f"{name}: {counted(len(extra.files), 'file')}, {counted(extra.size_bytes, 'byte')}"


def _power_lines(what: str, name: str, extra: Extra) -> list[Line]:
    """As it is after the change, whatever it was: what runs is read anew."""
    first, more = extra.powers[:LISTED], len(extra.powers) - LISTED
    lines = [Line(what, None, f"{name}: {power}", wide=True) for power in first]
    return lines + ([Line(what, None, f"{name}: {more:,} more of these", wide=True)] if more > 0 else [])
