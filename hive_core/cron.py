"""Five-field cron on the clocks of a time zone: which instant comes next. Nothing here reads a clock.

Where clocks are set forward or back, the rule is Debian cron's. A time that is named (neither the minute nor the hour
begins with a star, such as `30 2 * * *`) comes once on each of its days: at the first minute behind the gap when clocks
skip it, and the first time only when they show it twice. What goes by the hour or the minute (`*/15 * * * *`,
`0 * * * *`) comes whenever a clock on the wall shows it: not in an hour that is skipped, twice in one shown twice.
"""

from __future__ import annotations

import zoneinfo
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo

from cronsim import CronSim, CronSimError

from hive_core.protocol.refusal import Refusal
from hive_core.protocol.visible import counted
from hive_core.protocol.words import shown

CRON_LIMIT = 200
FIELDS = "minute hour day-of-month month day-of-week"
_DAY = timedelta(days=1)
_SECOND = timedelta(seconds=1)
_BEGIN = datetime(2000, 1, 1)


@dataclass(frozen=True, slots=True)
class Cron:
    """An expression that was found to come again, and a zone that is known here."""

    expression: str
    zone: str

    def next_after(self, at_ms: int) -> int | None:
        """The first instant after `at_ms`, in ms since 1970. None: there is none for fifty years.

        Raises Refusal when this machine does not know the zone any more.
        """
        at = datetime.fromtimestamp(at_ms // 1000, UTC)
        found = _next(self.expression, find_zone(self.zone), at)
        return None if found is None else int(found.timestamp()) * 1000


def parse_cron(expression: object, zone: object) -> Cron:
    """Raises Refusal("usage") naming the field that is no good."""
    if not isinstance(expression, str) or not expression.isascii() or len(expression) > CRON_LIMIT:
        raise Refusal("usage", f"cannot use {shown(expression)} as cron: give five fields, {FIELDS}")
    fields = expression.split()
    if len(fields) != 5:
        raise Refusal(
            "usage",
            f"cannot use {shown(expression)} as cron: it has {counted(len(fields), 'field')} and needs five, {FIELDS}",
        )
    try:
        comes = next(CronSim(" ".join(fields), _BEGIN), None)
    except CronSimError as exc:
        name = str(exc).removeprefix("Bad ")
        said = dict(zip(FIELDS.split(), fields, strict=True)).get(name, expression)
        raise Refusal("usage", f"cannot use {shown(expression)} as cron: its {name} is {shown(said)}") from None
    if comes is None:
        raise Refusal("usage", f"cannot use {shown(expression)} as cron: such a day never comes")
    find_zone(zone)
    return Cron(" ".join(fields), str(zone))


def find_zone(name: object) -> tzinfo:
    """The time zone of that name. Raises Refusal("usage")."""
    if name == "UTC":
        return UTC  # there on every machine, with or without a database of zones
    try:
        if isinstance(name, str) and name.isascii() and len(name) <= 80:
            return zoneinfo.ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        pass
    raise Refusal("usage", f"cannot use {shown(name)} as the time zone: give one such as Europe/Berlin, or UTC")


def _next(expression: str, zone: tzinfo, at: datetime) -> datetime | None:
    minute, hour, *_ = expression.split()
    named = not minute.startswith("*") and not hour.startswith("*")
    return _next_named(expression, zone, at) if named else _next_shown(expression, zone, at)


def _next_named(expression: str, zone: tzinfo, at: datetime) -> datetime | None:
    # Within an hour that is shown twice the next of the named times may lie before `at`: it was the first showing.
    for found in CronSim(expression, at.astimezone(zone)):
        if (instant := found.astimezone(UTC)) > at:
            return instant
    return None


def _next_shown(expression: str, zone: tzinfo, at: datetime) -> datetime | None:
    """Look ahead on a clock without changes, as far as the next change; from there again."""
    offset = _offset(zone, at)
    wall = (at + offset).replace(tzinfo=None)
    while (found := next(CronSim(expression, wall), None)) is not None:
        instant = (found - offset).replace(tzinfo=UTC)
        change = _change(zone, at, instant)
        if change is None:
            return instant
        at, offset = change, _offset(zone, change)
        wall = (change + offset).replace(tzinfo=None) - _SECOND  # what the clock shows at the change counts, too
    return None


def _offset(zone: tzinfo, at: datetime) -> timedelta:
    offset = at.astimezone(zone).utcoffset()
    assert offset is not None
    return offset


def _change(zone: tzinfo, after: datetime, until: datetime) -> datetime | None:
    """The first instant, in whole seconds, after `after` and up to `until` from which clocks differ otherwise."""
    offset = _offset(zone, after)
    while after < until:
        end = min(after + _DAY, until)
        if _offset(zone, end) != offset:
            while end - after > _SECOND:
                middle = after + timedelta(seconds=(end - after) // _SECOND // 2)
                after, end = (middle, end) if _offset(zone, middle) == offset else (after, middle)
            return end
        after = end
    return None
