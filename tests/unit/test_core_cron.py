"""Cron on the clocks of a zone: against a plain walk through every minute, and around every kind of change."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hive_core.cron import Cron, parse_cron
from hive_core.protocol.refusal import Refusal

MINUTE = timedelta(minutes=1)
# Each with a day on which its clocks change: by an hour, by half of one, at midnight, in the south, in winter.
CHANGES = [
    ("Europe/Berlin", datetime(2026, 3, 29)),
    ("Europe/Berlin", datetime(2026, 10, 25)),
    ("America/New_York", datetime(2026, 3, 8)),
    ("America/New_York", datetime(2026, 11, 1)),
    ("Australia/Lord_Howe", datetime(2026, 4, 5)),
    ("Australia/Lord_Howe", datetime(2026, 10, 4)),
    ("Africa/Cairo", datetime(2026, 4, 24)),
    ("Africa/Cairo", datetime(2026, 10, 30)),
    ("America/Santiago", datetime(2026, 4, 5)),
    ("America/Santiago", datetime(2026, 9, 6)),
    ("Asia/Kolkata", datetime(2026, 5, 1)),
    ("Pacific/Apia", datetime(2011, 12, 30)),  # a day that never was
    ("UTC", datetime(2026, 3, 29)),
]


def instants(expression: str, zone: str, first: datetime, last: datetime) -> list[datetime]:
    """What comes in [first, last), each found from the one before."""
    cron, found = parse_cron(expression, zone), []
    at = int(first.timestamp() * 1000) - 1
    while (at := cron.next_after(at) or 2**60) < last.timestamp() * 1000:
        found.append(datetime.fromtimestamp(at / 1000, UTC))
    return found


def shown(expression: str, zone: str, first: str, last: str) -> list[str]:
    """What comes between two instants, as a clock of the zone shows it, with its distance from UTC."""
    found = instants(expression, zone, datetime.fromisoformat(first), datetime.fromisoformat(last))
    return [f"{at.astimezone(ZoneInfo(zone)):%a %H:%M %z}" for at in found]


# -- the rule, in examples --------------------------------------------------------------------------------------------

SPRING = ("2026-03-27T23:00Z", "2026-03-30T22:00Z")  # in Berlin Saturday to Monday: Sunday has no 02:00 to 03:00
AUTUMN = ("2026-10-23T22:00Z", "2026-10-26T23:00Z")  # Sunday has 02:00 to 03:00 twice


def test_a_weekdays_time_moves_with_the_clocks_on_the_wall() -> None:
    week = shown("0 7 * * 1-5", "Europe/Berlin", "2026-03-26T00:00Z", "2026-03-31T00:00Z")
    assert week == ["Thu 07:00 +0100", "Fri 07:00 +0100", "Mon 07:00 +0200"]


def test_a_time_that_does_not_exist_comes_at_the_first_minute_behind_the_gap() -> None:
    assert shown("30 2 * * *", "Europe/Berlin", *SPRING) == ["Sat 02:30 +0100", "Sun 03:00 +0200", "Mon 02:30 +0200"]


def test_two_times_of_one_gap_come_once() -> None:
    assert shown("10,50 2 * * 0", "Europe/Berlin", *SPRING) == ["Sun 03:00 +0200"]


def test_a_time_that_exists_twice_comes_the_first_time() -> None:
    assert shown("30 2 * * *", "Europe/Berlin", *AUTUMN) == ["Sat 02:30 +0200", "Sun 02:30 +0200", "Mon 02:30 +0100"]


def test_between_the_two_showings_of_an_hour_the_next_is_that_of_tomorrow() -> None:
    between = "2026-10-25T01:15Z"  # 02:15 in Berlin, for the second time
    assert shown("30 2 * * *", "Europe/Berlin", between, "2026-10-26T12:00Z") == ["Mon 02:30 +0100"]


def test_what_goes_by_the_hour_leaves_out_the_gap_and_comes_in_both_hours() -> None:
    night = shown("0 * * * *", "Europe/Berlin", "2026-03-29T00:00Z", "2026-03-29T03:00Z")
    assert night == ["Sun 01:00 +0100", "Sun 03:00 +0200", "Sun 04:00 +0200"]
    night = shown("0 * * * *", "Europe/Berlin", "2026-10-25T00:00Z", "2026-10-25T03:00Z")
    assert night == ["Sun 02:00 +0200", "Sun 02:00 +0100", "Sun 03:00 +0100"]


def test_half_an_hour_that_is_shown_twice_is_not_passed_over() -> None:
    night = shown("*/15 1 * * *", "Australia/Lord_Howe", "2026-04-04T14:00Z", "2026-04-04T15:30Z")
    assert night == ["Sun 01:00 +1100", "Sun 01:15 +1100"] + [
        f"Sun 01:{minute} {zone}" for zone in ("+1100", "+1030") for minute in (30, 45)
    ]


def test_midnight_that_does_not_exist_comes_at_one() -> None:
    night = shown("0 0 * * *", "Africa/Cairo", "2026-04-23T00:00Z", "2026-04-25T12:00Z")
    assert night == ["Fri 01:00 +0300", "Sat 00:00 +0300"]


def test_the_29th_of_february_is_waited_for() -> None:
    cron = parse_cron("0 0 29 2 *", "UTC")
    found = cron.next_after(int(datetime(2026, 1, 1, tzinfo=UTC).timestamp() * 1000))
    assert found == datetime(2028, 2, 29, tzinfo=UTC).timestamp() * 1000


# -- the rule, against a walk through every minute --------------------------------------------------------------------


def field(least: int, most: int) -> st.SearchStrategy[str]:
    number = st.integers(least, most)
    return st.one_of(
        st.just("*"),
        st.integers(1, 20).map(lambda step: f"*/{step}"),
        number.map(str),
        st.lists(number, min_size=2, max_size=3).map(lambda some: ",".join(map(str, some))),
        st.tuples(number, number).map(lambda ends: f"{min(ends)}-{max(ends)}"),
    )


def numbers(text: str, least: int, most: int) -> set[int]:
    """The numbers a field stands for, as the manual says it."""
    found: set[int] = set()
    for term in text.split(","):
        span, _, step = term.partition("/")
        first, _, last = span.partition("-")
        ends = (least, most) if span == "*" else (int(first), int(last or first))
        found |= set(range(ends[0], ends[1] + 1, int(step or 1)))
    return found


def walk(minute: str, hour: str, weekday: str, zone: str, first: datetime, last: datetime) -> list[datetime]:
    """Every instant at which it comes, by looking at a clock each minute from well before."""
    tz = ZoneInfo(zone)
    minutes, hours, days = numbers(minute, 0, 59), numbers(hour, 0, 23), {n % 7 for n in numbers(weekday, 0, 7)}
    named = not minute.startswith("*") and not hour.startswith("*")
    found, at = [], first - timedelta(days=2)
    before = (at - MINUTE).astimezone(tz).replace(tzinfo=None)
    furthest = before  # what a clock has shown by now
    while at < last:
        now = at.astimezone(tz).replace(tzinfo=None)
        # A named time that was passed over comes with the first minute behind it; one shown again does not come.
        looked = [now]
        if named:
            gap = int((now - furthest) / MINUTE)
            looked = [furthest + MINUTE * n for n in range(1, gap + 1)]
        if any(it.minute in minutes and it.hour in hours and it.isoweekday() % 7 in days for it in looked):
            found.append(at)
        furthest, at = max(furthest, now), at + MINUTE
    return [it for it in found if it >= first]


@settings(max_examples=120, deadline=None)
@given(
    field(0, 59),
    field(0, 4),
    st.just("*") | field(0, 6),
    st.sampled_from(CHANGES),
    st.integers(0, 35 * 60 * 60),
)
def test_around_every_change_of_the_clocks_it_comes_when_a_walk_through_the_minutes_finds_it(
    minute: str, hour: str, weekday: str, change: tuple[str, datetime], begins_s: int
) -> None:
    zone, day = change
    first = day.replace(tzinfo=UTC) - timedelta(hours=16) + timedelta(seconds=begins_s)
    last = day.replace(tzinfo=UTC) + timedelta(hours=40)
    begin = first.replace(second=0, microsecond=0)
    expected = [at for at in walk(minute, hour, weekday, zone, begin, last) if at >= first]
    assert instants(f"{minute} {hour} * * {weekday}", zone, first, last) == expected


# -- what is no good --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "zone", "why"),
    [
        ("60 7 * * *", "UTC", "cannot use '60 7 * * *' as cron: its minute is '60'"),
        ("0 24 * * *", "UTC", "its hour is '24'"),
        ("0 7 32 * *", "UTC", "its day-of-month is '32'"),
        ("0 7 * 13 *", "UTC", "its month is '13'"),
        ("0 7 * * 8", "UTC", "its day-of-week is '8'"),
        ("0 7 * * mon-", "UTC", "its day-of-week is 'mon-'"),
        ("0 7 30 2 *", "UTC", "its day-of-month is '30'"),
        ("0 7 * *", "UTC", "it has 4 fields and needs five"),
        ("0 0 7 * * *", "UTC", "it has 6 fields and needs five"),
        ("@daily", "UTC", "it has 1 field and needs five"),
        ("", "UTC", "it has 0 fields"),
        (7, "UTC", "cannot use 7 as cron: give five fields"),
        ("* " * 200, "UTC", "give five fields"),
        ("٣ 7 * * *", "UTC", "give five fields"),
        ("0 7 * * *", "Europe/Atlantis", "cannot use 'Europe/Atlantis' as the time zone"),
        ("0 7 * * *", "../../etc/passwd", "as the time zone"),
        ("0 7 * * *", "Europe", "as the time zone"),
        ("0 7 * * *", "", "as the time zone"),
        ("0 7 * * *", ["UTC"], "as the time zone"),
        ("0 7 * * *", "Europe/Berl\0in", "as the time zone"),
    ],
)
def test_what_is_no_good_is_refused_with_its_field(expression: object, zone: object, why: str) -> None:
    with pytest.raises(Refusal) as caught:
        parse_cron(expression, zone)
    assert why in caught.value.message
    assert caught.value.code == "usage"


@settings(max_examples=300, deadline=None)
@given(st.text("0123456789*/,-L#WMONjan ", max_size=30))
def test_any_text_is_cron_that_comes_or_is_refused(text: str) -> None:
    try:
        cron = parse_cron(text, "Europe/Berlin")
    except Refusal as refusal:
        assert refusal.code == "usage"
        return
    assert (cron.next_after(0) or 0) > 0


def test_a_zone_that_a_machine_forgets_is_refused_and_not_guessed() -> None:
    with pytest.raises(Refusal, match="as the time zone"):
        Cron("0 7 * * *", "Europe/Atlantis").next_after(0)
