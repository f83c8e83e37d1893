"""What a change does, beside what it says: lines that are stored with its card, and that a click is bound to.

A line is a thing, what it was before and what it is after. What could not be found out is said as well, with the
reason: a card never passes over it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hive_core.git.commit_contents import Entry
from hive_core.protocol.effect import PLAIN, WIDE
from hive_core.protocol.visible import counted

LISTED = 12  # names in one line
TEXT_LIMIT = 400  # characters of one; a card's diff has them all
BEFORE_DIFFERENCE = 40  # of them at each end of what two have in common


@dataclass(frozen=True, slots=True)
class Line:
    """
    what           as agent.toml, or a command, calls it
    before, after  as whoever approves reads it; None: it was not there, or is no more
    wide           whether the change widens what somebody may do
    amounts        what the policy's rules may bound, by the name of the measure: see MEASURES in policy_rules.py
    """

    what: str
    before: str | None
    after: str | None
    wide: bool = False
    amounts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Effect:
    """
    unknown     what could not be told, and why: "packages: agent.nix is not built in this sandbox"
    inputs      a mark of what both sides were built from besides, where they are built
    derivation  what would be built of the change, to its last byte: the store path of nix's instructions for it
    former      the same of what there is now, where that is known
    """

    lines: Sequence[Line] = ()
    unknown: Sequence[str] = ()
    inputs: str = ""
    derivation: str = ""
    former: str = ""

    def to_wire(self) -> dict[str, Any]:
        """As it is stored: what widens comes first."""
        ordered = sorted(self.lines, key=lambda line: not line.wide)
        told = {"lines": [_wire(line) for line in ordered], "unknown": list(self.unknown)}
        marks = {"inputs": self.inputs, "derivation": self.derivation, "former": self.former}
        return told | {key: mark for key, mark in marks.items() if mark}


def derivation_of(effect: Mapping[str, Any] | None) -> str:
    """What a stored effect was told of; empty where nothing is built, and of one from before that was kept."""
    return str((effect or {}).get("derivation", ""))


def says_the_same(one: dict[str, Any] | None, other: dict[str, Any] | None) -> bool:
    """Whether two stored effects tell the same, of what is the same to build as far as both know it; whatever they
    were found from."""
    if one is None or other is None:
        return one is other
    derivations = {derivation_of(one), derivation_of(other)} - {""}
    return (one["lines"], one["unknown"]) == (other["lines"], other["unknown"]) and len(derivations) < 2


def _wire(line: Line) -> dict[str, Any]:
    weight = WIDE if line.wide else PLAIN
    before, after = _from_difference(line.before, line.after)
    told = {"what": line.what, "before": _cut(before), "after": _cut(after), "weight": weight}
    return {**told, "amounts": dict(line.amounts)} if line.amounts else told


def _from_difference(before: str | None, after: str | None) -> tuple[str | None, str | None]:
    """How the two begin, and from where they differ, if that is so far back that the same would be told of both."""
    if before is None or after is None or before == after or before[:TEXT_LIMIT] != after[:TEXT_LIMIT]:
        return before, after
    places = (at for at, (one, other) in enumerate(zip(before, after, strict=False)) if one != other)
    differ = next(places, min(len(before), len(after))) - BEFORE_DIFFERENCE
    begins = f"{before[:BEFORE_DIFFERENCE]}… {counted(differ - BEFORE_DIFFERENCE, 'character')} …"
    return begins + before[differ:], begins + after[differ:]


def _cut(text: str | None) -> str | None:
    if text is None or len(text) <= TEXT_LIMIT:
        return text
    return f"{text[:TEXT_LIMIT]}… and {counted(len(text) - TEXT_LIMIT, 'more character')}"


def changed(what: str, before: str | None, after: str | None, wide: bool = False) -> list[Line]:
    """A line where the two differ."""
    return [] if before == after else [Line(what, before, after, wide)]


def listed(what: str, before: Collection[str], after: Collection[str], *, widens: bool = False) -> list[Line]:
    """What is added to a list of names, and what is taken out of it. widens: adding to it does."""
    added, removed = [one for one in after if one not in before], [one for one in before if one not in after]
    lines = [Line(what, None, some(added), widens)] if added else []
    return lines + ([Line(what, some(removed), None)] if removed else [])


def some(names: Collection[str]) -> str:
    """Names as one text, the first of them where they are many."""
    first, more = list(names)[:LISTED], len(names) - LISTED
    return ", ".join(first) + (f" and {more:,} more" if more > 0 else "")


def prompt_lines(before: str | None, after: str) -> list[Line]:
    """How a prompt changes: its size, and how many of its lines come and go."""
    # A bound counts every end of a line that there can be.
    amounts = {"prompt_lines": len(after.splitlines()), "prompt_bytes": len(after.encode())}
    return [replace(line, amounts=amounts) for line in text_lines("prompt", before, after)]


def text_lines(what: str, before: str | None, after: str | None) -> list[Line]:
    """A text that comes, goes or changes: its size, and how many lines come and go."""
    if before == after:
        return []
    if before is None or after is None:
        was, is_now = (None if text is None else _size(text) for text in (before, after))
        return [Line(what, was, is_now)]
    old, new = Counter(lines_of(before)), Counter(lines_of(after))
    added, removed = (new - old).total(), (old - new).total()
    moved = "" if added or removed else "; the same lines in another order"
    how = f" (+{added:,} −{removed:,} lines{moved})"
    return [Line(what, _size(before), _size(after) + how)]


def lines_of(text: str) -> list[str]:
    """As git counts them: other characters that some take for the end of a line are none."""
    return text.removesuffix("\n").split("\n") if text else []


def _size(text: str) -> str:
    return f"{counted(len(lines_of(text)), 'line')}, {counted(len(text.encode()), 'byte')}"


def file_lines(before: Mapping[str, Entry], after: Mapping[str, Entry], besides: Iterable[str] = ()) -> list[Line]:
    """Files that come, go and change, by their paths. besides: those whose change is told otherwise."""
    told = set(besides)
    other = [path for path in after if path in before and _differs(before[path], after[path]) and path not in told]
    came = [path for path in after if path not in before and path not in told]
    went = [path for path in before if path not in after and path not in told]
    lines = [Line("files", None, _files(came))] if came else []
    lines += [Line("files", _files(went), None)] if went else []
    lines += [Line("files", _files(other), "changed")] if other else []
    can_run, could_run = ([path for path, entry in one.items() if entry.executable] for one in (after, before))
    return lines + listed("executable files", could_run, can_run)


def _differs(before: Entry, after: Entry) -> bool:
    return before.object_id != after.object_id


def _files(paths: Sequence[str]) -> str:
    return some(paths) if len(paths) <= LISTED else f"{len(paths):,}: {some(paths)}"
