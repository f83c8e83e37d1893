"""Schedules and reminders: each due instant once, whatever restarts, late looks and clocks that are set do."""

from __future__ import annotations

import json
import tempfile
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from hive_core.cron import Cron, parse_cron
from hive_core.limits import Limits
from hive_core.procedures.clock import Timer, serve_clock
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName
from hive_core.services.question_words import Ask
from hive_core.services.reminders import OPEN_LIMIT, Reminders, When
from hive_core.services.schedules import LATE_MOST_MS, Due, Interval, Schedules, due_at, parse_plan
from hive_core.store.writer import Transaction
from tests.hives import Clock, Services, open_services, run_in_hive, wait_until
from tests.processes import PATIENCE_S

IRIS, DAMOCLES = AgentName("iris"), AgentName("damocles")
HOUR_MS = 3_600_000
NIGHT = datetime(2026, 3, 28, 22, 30, tzinfo=UTC)  # half past eleven in Berlin, before the clocks are set forward


def set_clock(clock: Clock, to: datetime | float) -> None:
    """Let the hive's clock say this, give or take the run of the test."""
    at = to if isinstance(to, float) else to.timestamp()
    clock.ahead_s += at - clock()


async def tick(hive: Services, *timers: Timer) -> None:
    """What the hive's clock does when it looks."""

    def fire(tx: Transaction) -> None:
        for timer in timers:
            timer.fire(tx)

    await hive.store.write(fire)


async def now_ms(hive: Services) -> int:
    return await hive.store.write(lambda tx: tx.now_ms)


async def firings(hive: Services) -> list[str]:
    """The due instants that were sent, in order."""
    sql = "SELECT due_at_ms FROM schedule_firings WHERE message_id IS NOT NULL ORDER BY id"
    return [f"{datetime.fromtimestamp(row[0] / 1000, UTC):%d %H:%M}" for row in await hive.store.rows(sql)]


async def events(hive: Services, kind: str) -> list[Any]:
    return [row[0] for row in await hive.store.rows("SELECT data FROM events WHERE kind = ? ORDER BY seq", (kind,))]


@pytest.fixture
async def hive(tmp_path: Path) -> AsyncIterator[Services]:
    async with open_services(tmp_path) as services:
        await services.add_agents("hm1nd", "iris", "damocles")
        set_clock(services.clock, NIGHT)
        yield services


@pytest.fixture
def schedules(hive: Services) -> Schedules:
    return Schedules(hive.store, hive.broker.limits)


@pytest.fixture
def reminders(hive: Services) -> Reminders:
    return Reminders(hive.store, hive.broker.limits)


# -- schedules --------------------------------------------------------------------------------------------------------


async def test_a_firing_is_a_message_of_the_operator_with_its_cause(hive: Services, schedules: Schedules) -> None:
    added = await schedules.add(parse_plan("iris", "look around", "0 7 * * *", "Europe/Berlin"))
    assert added == {"schedule": 1, "next_at_ms": datetime(2026, 3, 29, 5, 0, tzinfo=UTC).timestamp() * 1000}
    await tick(hive, schedules)
    assert await hive.states() == {}
    set_clock(hive.clock, datetime(2026, 3, 29, 5, 0, 1, tzinfo=UTC))
    await tick(hive, schedules)
    await tick(hive, schedules)
    assert await firings(hive) == ["29 05:00"]
    message = (await hive.broker.lease(IRIS)).message
    assert (message["sender"], message["body"], message["cause"], message["cause_id"]) == (
        "operator",
        "look around",
        "schedule",
        1,
    )
    assert (await schedules.all())[0]["next_at_ms"] == datetime(2026, 3, 30, 5, 0, tzinfo=UTC).timestamp() * 1000


async def test_an_interval_keeps_its_grid_however_late_it_is_looked_at(hive: Services, schedules: Schedules) -> None:
    added = await schedules.add(parse_plan("iris", "tick", every_s=3600))
    begun = added["next_at_ms"] - HOUR_MS
    for late_s in (0.5, 200, 3, 299):
        next_at_ms = (await schedules.all())[0]["next_at_ms"]
        assert (next_at_ms - begun) % HOUR_MS == 0
        set_clock(hive.clock, next_at_ms / 1000 + late_s)
        await tick(hive, schedules)
    assert len(await hive.states()) == 4
    assert await events(hive, "schedule_missed") == []


async def test_what_was_missed_is_one_event_that_says_how_many_and_no_message(
    hive: Services, schedules: Schedules
) -> None:
    await schedules.add(parse_plan("iris", "hourly", "0 * * * *"))
    await schedules.add(parse_plan("damocles", "hourly", every_s=3600))
    set_clock(hive.clock, datetime(2026, 3, 29, 3, 45, tzinfo=UTC))
    await tick(hive, schedules)
    assert await firings(hive) == []
    first, second = await events(hive, "schedule_missed")
    assert '"schedule":1,"missed":5' in first  # 23, 0, 1, 2, 3
    assert '"schedule":2,"missed":5' in second
    set_clock(hive.clock, datetime(2026, 3, 29, 4, 0, 2, tzinfo=UTC))
    await tick(hive, schedules)
    assert await firings(hive) == ["29 04:00"]


async def test_of_many_that_are_due_the_newest_is_sent_when_it_is_not_too_late(
    hive: Services, schedules: Schedules
) -> None:
    await schedules.add(parse_plan("iris", "hourly", "0 * * * *"))
    set_clock(hive.clock, datetime(2026, 3, 29, 2, 4, tzinfo=UTC))
    await tick(hive, schedules)
    assert await firings(hive) == ["29 02:00"]
    assert '"missed":3' in (await events(hive, "schedule_missed"))[0]


async def test_a_long_absence_of_a_schedule_by_the_minute_is_counted_up_to_a_thousand(
    hive: Services, schedules: Schedules
) -> None:
    await schedules.add(parse_plan("iris", "minutely", "* * * * *"))
    hive.clock.ahead_s += 30 * 24 * 3600
    await tick(hive, schedules)
    (missed,) = await events(hive, "schedule_missed")
    assert '"missed":1000' in missed
    assert '"more":true' in missed
    assert len(await hive.states()) == 1


async def test_a_restart_fires_nothing_again_and_forgets_nothing(tmp_path: Path) -> None:
    """Before each due instant and behind it the daemon goes away."""
    async with open_services(tmp_path) as hive:
        await hive.add_agents("iris")
        set_clock(hive.clock, NIGHT)
        await Schedules(hive.store).add(parse_plan("iris", "hourly", "0 * * * *"))
    for minute in (0, 1, 2, 61, 61.1, 122):
        async with open_services(tmp_path) as hive:
            set_clock(hive.clock, NIGHT.timestamp() + 1800 + minute * 60)
            await tick(hive, Schedules(hive.store))
            seen = await firings(hive)
    assert seen == ["28 23:00", "29 00:00", "29 01:00"]


async def test_a_clock_that_is_set_back_fires_nothing_again_and_goes_on_at_once(
    hive: Services, schedules: Schedules
) -> None:
    await schedules.add(parse_plan("iris", "hourly", "0 * * * *"))
    set_clock(hive.clock, datetime(2026, 3, 28, 23, 0, 1, tzinfo=UTC))
    await tick(hive, schedules)
    set_clock(hive.clock, datetime(2027, 3, 29, 12, 0, 1, tzinfo=UTC))  # a year ahead by mistake
    await tick(hive, schedules)
    for hour, minute in ((22, 50), (23, 1), (23, 30)):
        set_clock(hive.clock, datetime(2026, 3, 28, hour, minute, tzinfo=UTC))
        await tick(hive, schedules)
    set_clock(hive.clock, datetime(2026, 3, 29, 0, 0, 1, tzinfo=UTC))
    await tick(hive, schedules)
    assert await firings(hive) == ["28 23:00", "29 12:00", "29 00:00"]


async def test_a_due_instant_is_claimed_once_by_the_table_itself(hive: Services, schedules: Schedules) -> None:
    await schedules.add(parse_plan("iris", "hourly", "0 * * * *"))
    at = int(datetime(2026, 3, 28, 23, 0, tzinfo=UTC).timestamp() * 1000)
    set_clock(hive.clock, at / 1000 + 1)
    await tick(hive, schedules)
    await hive.sql("UPDATE schedules SET next_at_ms = ?", at)  # as a bug would have left it
    await tick(hive, schedules)
    assert len(await hive.states()) == 1


async def test_paused_it_rests_and_resumed_it_goes_on_without_what_was_due(
    hive: Services, schedules: Schedules
) -> None:
    await schedules.add(parse_plan("iris", "hourly", "0 * * * *"))
    for _ in range(2):
        assert await schedules.pause(1) == {"schedule": 1, "state": "paused"}
    set_clock(hive.clock, datetime(2026, 3, 29, 3, 0, 1, tzinfo=UTC))
    await tick(hive, schedules)
    for _ in range(2):
        resumed = await schedules.resume(1)
        assert resumed["next_at_ms"] == datetime(2026, 3, 29, 4, 0, tzinfo=UTC).timestamp() * 1000
    set_clock(hive.clock, datetime(2026, 3, 29, 4, 0, 1, tzinfo=UTC))
    await tick(hive, schedules)
    assert await firings(hive) == ["29 04:00"]
    assert await events(hive, "schedule_missed") == []


async def test_run_now_sends_once_for_a_key_and_leaves_the_next_where_it_is(
    hive: Services, schedules: Schedules
) -> None:
    added = await schedules.add(parse_plan("iris", "daily", "0 7 * * *"), "k0")
    assert await schedules.add(parse_plan("iris", "daily", "0 7 * * *"), "k0") == added
    first = await schedules.run(1, "k1")
    assert await schedules.run(1, "k1") == first
    await schedules.run(1)
    assert len(await hive.states()) == 2
    assert (await schedules.all())[0]["next_at_ms"] == added["next_at_ms"]
    await schedules.pause(1)
    await schedules.run(1)
    assert len(await hive.states()) == 3


async def test_a_removed_schedule_is_gone_for_all_but_its_messages(hive: Services, schedules: Schedules) -> None:
    await schedules.add(parse_plan("iris", "hourly", "0 * * * *"))
    for _ in range(2):
        assert await schedules.remove(1) == {"schedule": 1, "state": "removed"}
    hive.clock.ahead_s += 3600
    await tick(hive, schedules)
    assert (await hive.states(), await schedules.all()) == ({}, [])
    for verb in (schedules.pause, schedules.resume, schedules.run):
        with pytest.raises(Refusal, match="cannot find schedule 1") as caught:
            await verb(1)
        assert caught.value.code == "not_found"
    with pytest.raises(Refusal, match="cannot find schedule 9"):
        await schedules.remove(9)


async def test_a_full_inbox_refuses_a_firing_and_the_schedule_goes_on(tmp_path: Path) -> None:
    async with open_services(tmp_path, limits=Limits(inbox_depth=2)) as hive:
        await hive.add_agents("iris")
        schedules = Schedules(hive.store, hive.broker.limits)
        set_clock(hive.clock, NIGHT)
        await schedules.add(parse_plan("iris", "hourly", "0 * * * *"))
        for hour in range(4):
            set_clock(hive.clock, NIGHT.timestamp() + 1801 + hour * 3600)
            await tick(hive, schedules)
        assert len(await hive.states()) == 2
        assert len(await events(hive, "schedule_refused")) == 2
        assert (await hive.agents.get("iris")).refused == 2
        assert (await schedules.all())[0]["state"] == "on"


async def test_run_now_into_a_full_inbox_is_refused_and_counted(tmp_path: Path) -> None:
    async with open_services(tmp_path, limits=Limits(inbox_depth=1)) as hive:
        await hive.add_agents("iris")
        await hive.schedules.add(parse_plan("iris", "x", "0 7 * * *"))
        await hive.schedules.run(1)
        for _ in range(2):
            with pytest.raises(Refusal, match="inbox_depth"):
                await hive.schedules.run(1, "key")
        assert (await hive.agents.get("iris")).refused == 2
        await hive.broker.ack(IRIS, (await hive.broker.lease(IRIS)).turn, "done")
        assert (await hive.schedules.run(1, "key"))["message"] == 2  # what was refused used no key up


async def test_after_a_clock_was_set_back_every_schedule_is_put_right_at_once_however_many_there_are(
    hive: Services, schedules: Schedules
) -> None:
    for _ in range(35):
        await schedules.add(parse_plan("iris", "hourly", "0 * * * *"))
    await hive.sql("UPDATE schedules SET next_at_ms = next_at_ms + ?1, moved_at_ms = moved_at_ms + ?1", 10**11)
    ticks = 0
    while await hive.store.write(lambda tx: (schedules.next_after(tx) or 0) <= tx.now_ms):
        await tick(hive, schedules)
        ticks += 1
    due = datetime(2026, 3, 28, 23, 0, tzinfo=UTC).timestamp() * 1000
    assert {row["next_at_ms"] for row in await schedules.all()} == {due}
    assert ticks == 4


async def test_a_zone_that_is_known_no_more_pauses_its_schedule_and_no_other(
    hive: Services, schedules: Schedules
) -> None:
    await schedules.add(parse_plan("iris", "hourly", "0 * * * *", "Europe/Berlin"))
    await schedules.add(parse_plan("iris", "hourly", "0 * * * *", "Europe/Berlin"))
    await hive.sql("UPDATE schedules SET zone = 'Europe/Atlantis' WHERE id = 1")
    hive.clock.ahead_s += 1801
    await tick(hive, schedules)
    first, second = await schedules.all()
    assert (first["state"], second["state"]) == ("paused", "on")
    assert "Europe/Atlantis" in first["note"]
    assert len(await hive.states()) == 1


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ({"agent": "Iris"}, "as an agent's name"),
        ({"agent": "operator"}, "it is reserved"),
        ({"body": ""}, "cannot take the body: it is empty"),
        ({"body": "x" * 65_537}, "the limit is 65,536"),
        ({"cron": None}, "give one of `cron` and `every`"),
        ({"every_s": 60}, "give one of `cron` and `every`"),
        ({"cron": "0 25 * * *"}, "its hour is '25'"),
        ({"zone": "Mars"}, "cannot use 'Mars' as the time zone"),
        ({"cron": None, "every_s": 59}, "cannot schedule every 59 s: give 60 to 31622400"),
        ({"cron": None, "every_s": True}, "cannot schedule every True s"),
        ({"cron": None, "every_s": float("nan")}, "cannot schedule every nan s"),
        ({"cron": None, "every_s": 60, "zone": "UTC"}, "a time zone (tz) belongs to `cron`"),
    ],
)
def test_a_schedule_that_is_no_good_is_refused_with_its_word(words: dict[str, Any], why: str) -> None:
    with pytest.raises(Refusal) as caught:
        parse_plan(**{"agent": "iris", "body": "x", "cron": "0 7 * * *", **words})
    assert why in caught.value.message


async def test_nobody_is_scheduled_who_is_not_there(hive: Services, schedules: Schedules) -> None:
    with pytest.raises(Refusal, match="cannot schedule for nobody: no agent has that name"):
        await schedules.add(parse_plan("nobody", "x", "0 7 * * *"))


@settings(max_examples=200)
@given(st.sampled_from(["* * * * *", "*/7 * * * *", "0 * * * *", "30 2 * * *", 60, 90, 3600]), st.data())
def test_of_what_is_due_each_instant_is_fired_or_counted(rhythm_of: str | int, data: st.DataObject) -> None:
    begun = 1_774_650_000_000
    rhythm: Cron | Interval = (
        Interval(rhythm_of * 1000, begun) if isinstance(rhythm_of, int) else Cron(rhythm_of, "UTC")
    )
    first = rhythm.next_after(begun)
    assert first is not None
    now = first + data.draw(st.integers(0, 24 * HOUR_MS if rhythm_of != "* * * * *" else HOUR_MS))
    all_due, at = [], first
    while at is not None and at <= now:
        all_due, at = [*all_due, at], rhythm.next_after(at)
    fires = all_due[-1] if now - all_due[-1] <= LATE_MOST_MS else None
    assert due_at(rhythm, first, now) == Due(fires, len(all_due) - (fires is not None), False)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["*/5 * * * *", "30 2 * * *", "0 * * * *", None]),
    st.lists(
        st.tuples(
            st.sampled_from(["wait", "wait", "wait", "restart", "back", "ahead"]),
            st.floats(1, 7200),
        ),
        min_size=1,
        max_size=25,
    ),
)
def test_each_due_instant_fires_at_most_once_and_is_fired_or_missed_whatever_the_clock_does(
    cron: str | None, steps: list[tuple[str, float]]
) -> None:
    async def main() -> None:
        with tempfile.TemporaryDirectory() as folder:
            ahead_s = await begin(Path(folder))
            looks = []
            while steps_left := steps[len(looks) :]:
                async with open_services(Path(folder)) as hive:
                    hive.clock.ahead_s = ahead_s
                    for step, seconds in steps_left:
                        hive.clock.ahead_s += -seconds if step == "back" else seconds
                        await tick(hive, Schedules(hive.store))
                        looks.append(await now_ms(hive))
                        if step == "restart":
                            break
                    ahead_s = hive.clock.ahead_s
                    fired = [
                        row[0] for row in await hive.store.rows("SELECT due_at_ms FROM schedule_firings ORDER BY id")
                    ]
                    sent = await hive.value("SELECT count(*) FROM messages")
                    missed = await hive.value(
                        "SELECT coalesce(sum(data ->> 'missed'), 0) FROM events WHERE kind = 'schedule_missed'"
                    )
                    row = await hive.store.row("SELECT * FROM schedules")
            assert row is not None
            assert len(set(fired)) == len(fired) == sent
            rhythm = Cron(cron, "Europe/Berlin") if cron else Interval(600_000, row["created_at_ms"])
            assert all(rhythm.next_after(at - 1) == at for at in fired)
            assert row["next_at_ms"] > looks[-1]
            if not any(step == "back" for step, _ in steps):
                due, at = 0, rhythm.next_after(row["created_at_ms"])
                while at is not None and at <= looks[-1]:
                    due, at = due + 1, rhythm.next_after(at)
                assert len(fired) + missed == due

    async def begin(folder: Path) -> float:
        async with open_services(folder) as hive:
            await hive.add_agents("iris")
            set_clock(hive.clock, NIGHT)
            zone = "Europe/Berlin" if cron else None
            await Schedules(hive.store).add(parse_plan("iris", "x", cron, zone, None if cron else 600))
            return hive.clock.ahead_s

    trio.run(main)


# -- reminders --------------------------------------------------------------------------------------------------------


async def test_a_reminder_is_a_message_of_the_hive_at_its_instant_with_its_cause(
    hive: Services, reminders: Reminders
) -> None:
    assert (await reminders.remind(IRIS, When(after_s=90), "look\n> again"))["reminder"] == 1
    hive.clock.ahead_s += 89
    await tick(hive, reminders)
    assert await hive.states() == {}
    hive.clock.ahead_s += 1.5
    await tick(hive, reminders)
    await tick(hive, reminders)
    message = (await hive.broker.lease(IRIS)).message
    assert (message["sender"], message["cause"], message["cause_id"]) == ("system", "reminder", 1)
    assert message["body"] == (
        'reminder: reminder 1, which you set at 2026-03-28 22:30:00 UTC, is due\nreminder: 1\nbody: "look\\n> again"'
    )
    assert await reminders.open_of(IRIS) == []


async def test_a_reminder_at_an_instant_is_one_too(hive: Services, reminders: Reminders) -> None:
    answer = await reminders.remind(IRIS, When(at="2026-03-29T03:30:00+02:00"), "up")
    assert answer["at_ms"] == datetime(2026, 3, 29, 1, 30, tzinfo=UTC).timestamp() * 1000
    assert await reminders.open_of(IRIS) == [{"reminder": 1, "at_ms": answer["at_ms"], "body": "up", "due": False}]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ({}, "give one of `at` and `after_s`"),
        ({"at": "2027-01-01", "after_s": 5}, "give one of `at` and `after_s`"),
        ({"at": "tomorrow"}, "cannot use 'tomorrow' as at: give an instant"),
        ({"at": "2026-03-28T22:29:59Z"}, "cannot remind at 2026-03-28 22:29:59 UTC: it is 2026-03-28 22:30"),
        ({"at": "1960-01-01"}, "it is 2026-03-28 22:30"),
        ({"at": "2030-01-01"}, "the limit is 366 days ahead"),
        ({"at": "9999-12-31T23:59:59.999999Z"}, "cannot remind at 9999-12-31 23:59:59 UTC: the limit is 366 days"),
        ({"at": "9999-12-31T23:59:59-01:00"}, "cannot use '9999-12-31T23:59:59-01:00' as at: give an instant"),
        ({"at": "0001-01-01T00:00:00+01:00"}, "cannot use '0001-01-01T00:00:00+01:00' as at: give an instant"),
        ({"after_s": 0}, "cannot remind after 0 s: after_s is 1 to"),
        ({"after_s": "5"}, "cannot remind after '5' s"),
        ({"after_s": True}, "cannot remind after True s"),
        ({"after_s": float("nan")}, "cannot remind after nan s"),
        ({"after_s": 1e12}, "after_s is 1 to 31622400"),
    ],
)
async def test_a_time_that_is_no_good_is_refused_with_its_word(
    hive: Services, reminders: Reminders, words: dict[str, Any], why: str
) -> None:
    with pytest.raises(Refusal) as caught:
        await reminders.remind(IRIS, When(**words), "x")
    assert why in caught.value.message
    assert await reminders.open_of(IRIS) == []


async def test_a_reminder_that_was_set_while_the_clock_was_ahead_comes_when_its_time_is_over(
    hive: Services, reminders: Reminders
) -> None:
    hive.clock.ahead_s += 300 * 86_400
    await reminders.remind(IRIS, When(after_s=60), "look")
    at = datetime.fromtimestamp(hive.clock() + 60, UTC).isoformat()
    await reminders.remind(IRIS, When(at=at), "at its instant")
    hive.clock.ahead_s -= 300 * 86_400
    await tick(hive, reminders)
    hive.clock.ahead_s += 59
    await tick(hive, reminders)
    assert await hive.states() == {}
    hive.clock.ahead_s += 1.5
    await tick(hive, reminders)
    await tick(hive, reminders)
    assert [row["body"] for row in await reminders.open_of(IRIS)] == ["at its instant"]
    assert len(await hive.states()) == 1
    hive.clock.ahead_s += 300 * 86_400
    await tick(hive, reminders)
    assert len(await hive.states()) == 2


async def test_a_clock_that_begins_in_1970_at_a_start_makes_no_reminder_early(
    hive: Services, reminders: Reminders
) -> None:
    await reminders.remind(IRIS, When(after_s=600), "look")
    now_s = hive.clock()
    for _ in range(2):
        hive.clock.ahead_s -= now_s
        await tick(hive, reminders)
        hive.clock.ahead_s += now_s + 299
        await tick(hive, reminders)
    assert await hive.states() == {}
    hive.clock.ahead_s += 3
    await tick(hive, reminders)
    assert len(await hive.states()) == 1


async def test_a_reminder_set_again_with_its_key_is_one(hive: Services, reminders: Reminders) -> None:
    first = await reminders.remind(IRIS, When(after_s=5), "x", "toolu_1")
    assert await reminders.remind(IRIS, When(after_s=5), "x", "toolu_1") == first
    assert len(await reminders.open_of(IRIS)) == 1


async def test_fifty_reminders_may_wait(hive: Services, reminders: Reminders) -> None:
    for _ in range(OPEN_LIMIT):
        await reminders.remind(IRIS, When(after_s=5), "x")
    with pytest.raises(Refusal, match="50 reminders of yours wait, which is the limit; cancel some"):
        await reminders.remind(IRIS, When(after_s=5), "x")
    await reminders.remind(DAMOCLES, When(after_s=5), "x")
    await reminders.cancel(IRIS, 3)
    await reminders.remind(IRIS, When(after_s=5), "x")


async def test_a_cancelled_reminder_does_not_fire(hive: Services, reminders: Reminders) -> None:
    await reminders.remind(IRIS, When(after_s=5), "x")
    await reminders.remind(IRIS, When(after_s=5), "y")
    with pytest.raises(Refusal, match="cannot cancel reminder 1: you did not set it"):
        await reminders.cancel(DAMOCLES, 1)
    for _ in range(2):
        assert await reminders.cancel(IRIS, 1) == {"reminder": 1}
    hive.clock.ahead_s += 6
    await tick(hive, reminders)
    assert len(await hive.states()) == 1
    with pytest.raises(Refusal, match="cannot cancel reminder 2: it has fired at"):
        await reminders.cancel(IRIS, 2)


async def test_a_reminder_that_meets_a_full_inbox_stays_due_and_comes_when_there_is_room(tmp_path: Path) -> None:
    async with open_services(tmp_path, limits=Limits(inbox_depth=2)) as hive:
        await hive.add_agents("iris", "damocles")
        for body in ("a", "b", "c"):
            await hive.reminders.remind(IRIS, When(after_s=5), body)
        await hive.say("operator", "iris", "one")
        hive.clock.ahead_s += 6
        for _ in range(2):
            await tick(hive, hive.reminders)
        assert await hive.states() == {1: "queued", 2: "queued"}
        waits = await hive.reminders.open_of(IRIS)
        assert [(row["body"], row["due"]) for row in waits] == [("b", True), ("c", True)]
        assert [json.loads(data) for data in await events(hive, "reminder_waits")] == [{"reminder": 2}, {"reminder": 3}]
        assert await hive.reminders.cancel(IRIS, 3) == {"reminder": 3}
        # One that is due and waits keeps nobody else's, and no clock awake.
        await hive.reminders.remind(DAMOCLES, When(after_s=5), "d")
        hive.clock.ahead_s += 6
        await tick(hive, hive.reminders)
        assert len(await hive.states("damocles")) == 1
        assert await hive.store.write(lambda tx: (hive.reminders.next_after(tx),)) == (None,)
        await hive.broker.ack(IRIS, (await hive.broker.lease(IRIS)).turn, "done")
        await tick(hive, hive.reminders)
        assert len(await hive.states()) == 3
        assert await hive.reminders.open_of(IRIS) == []


async def test_however_many_reminders_one_turn_sets_they_fill_neither_an_inbox_nor_what_is_held(
    tmp_path: Path,
) -> None:
    limits = Limits(inbox_depth=5, held_depth=3, hops=1)
    async with open_services(tmp_path, limits=limits) as hive:
        await hive.add_agents("iris", "damocles")
        await hive.say("operator", "iris", "begin")
        lease = await hive.broker.lease(IRIS)

        async def set_many() -> None:
            for _ in range(4):
                for _ in range(4):
                    await hive.reminders.remind(IRIS, When(after_s=1), "again")
                hive.clock.ahead_s += 2
                await tick(hive, hive.reminders)

        await set_many()
        assert list((await hive.states()).values()).count("queued") == limits.inbox_depth
        assert len(await hive.reminders.open_of(IRIS)) == 11
        for row in await hive.reminders.open_of(IRIS):
            await hive.reminders.cancel(IRIS, row["reminder"])
        await hive.sql("UPDATE turns SET hops = 1 WHERE id = ?", lease.turn.id)  # as deep as a chain may be
        await hive.sql("UPDATE deliveries SET state = 'held', held = 'rate', sender = 'iris' WHERE message_id = 2")
        await set_many()
        states = list((await hive.states()).values())
        assert (states.count("queued"), states.count("held")) == (limits.inbox_depth - 1, limits.held_depth)
        assert len(await hive.reminders.open_of(IRIS)) == 14


async def test_reminders_that_are_due_and_wait_count_as_waiting(tmp_path: Path) -> None:
    async with open_services(tmp_path, limits=Limits(inbox_depth=1)) as hive:
        await hive.add_agents("iris")
        await hive.say("operator", "iris", "one")
        for _ in range(OPEN_LIMIT):
            await hive.reminders.remind(IRIS, When(after_s=5), "x")
        hive.clock.ahead_s += 6
        await tick(hive, hive.reminders)
        with pytest.raises(Refusal, match="50 reminders of yours wait, which is the limit; cancel some"):
            await hive.reminders.remind(IRIS, When(after_s=5), "x")


async def test_many_reminders_of_one_instant_all_fire_without_a_rest_of_the_clock(hive: Services) -> None:
    names = [f"agent-{number}" for number in range(5)]
    await hive.add_agents(*names)
    for name in names:
        for _ in range(OPEN_LIMIT):
            await hive.reminders.remind(AgentName(name), When(after_s=5), "x")
    hive.clock.ahead_s += 6
    ticks = 0
    while await hive.store.write(lambda tx: (hive.reminders.next_after(tx) or tx.now_ms + 1) <= tx.now_ms):
        await tick(hive, hive.reminders)
        ticks += 1
    assert (await hive.value("SELECT count(*) FROM messages"), ticks) == (250, 3)


async def test_a_reminder_of_a_time_without_the_daemon_comes_late_and_once(
    hive: Services, reminders: Reminders
) -> None:
    await reminders.remind(IRIS, When(after_s=5), "x")
    hive.clock.ahead_s += 30 * 24 * 3600
    await tick(hive, reminders)
    hive.clock.ahead_s -= 60 * 24 * 3600
    await tick(hive, reminders)
    hive.clock.ahead_s += 90 * 24 * 3600
    await tick(hive, reminders)
    assert len(await hive.states()) == 1


@pytest.mark.parametrize(("after_s", "same_chain"), [(3599.0, True), (3601.0, False)])
async def test_a_reminder_within_the_hour_is_a_hop_of_the_turn_that_set_it_and_a_later_one_begins_anew(
    hive: Services, reminders: Reminders, after_s: float, same_chain: bool
) -> None:
    first = await hive.say("operator", "iris", "begin")
    await hive.broker.lease(IRIS)
    await reminders.remind(IRIS, When(after_s=after_s), "x")
    hive.clock.ahead_s += after_s + 1
    await tick(hive, reminders)
    row = await hive.store.row("SELECT id, chain_id, hops FROM messages ORDER BY id DESC LIMIT 1")
    assert row is not None
    assert (row["chain_id"], row["hops"]) == ((first, 1) if same_chain else (row["id"], 0))


async def test_an_agent_that_reminds_itself_without_end_is_held(hive: Services, reminders: Reminders) -> None:
    await hive.say("operator", "iris", "begin")
    turns = 0
    while "queued" in (await hive.states()).values():
        lease = await hive.broker.lease(IRIS)
        turns += 1
        await reminders.remind(IRIS, When(after_s=60), "again")
        await hive.broker.ack(IRIS, lease.turn, "done")
        hive.clock.ahead_s += 61
        await tick(hive, reminders)
        assert turns <= hive.broker.limits.hops + 1
    assert turns == hive.broker.limits.hops + 1
    assert list((await hive.states()).values())[-1] == "held"


async def test_the_hives_clock_fires_what_is_set_while_it_sleeps(
    hive: Services, reminders: Reminders, schedules: Schedules
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_clock, hive.store, [reminders, schedules])
        await schedules.add(parse_plan("iris", "hourly", every_s=3600))
        hive.clock.ahead_s += 3599.9
        await reminders.remind(IRIS, When(after_s=1), "x")

        async def both() -> bool:
            return len(await hive.states()) == 2

        await wait_until(hive.store, both)
        nursery.cancel_scope.cancel()


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["set", "cancel", "pass", "back", "tick"]), st.integers(1, 300)), max_size=25)
)
def test_each_reminder_fires_once_or_was_cancelled_or_waits(steps: list[tuple[str, int]]) -> None:
    async def walk(hive: Services) -> None:
        for step, number in steps:
            reminders = Reminders(hive.store)
            match step:
                case "set":
                    await reminders.remind(IRIS, When(after_s=number), "x")
                case "cancel":
                    try:
                        await reminders.cancel(IRIS, number % 5 + 1)
                    except Refusal:
                        continue
                case "pass" | "back":
                    hive.clock.ahead_s += number if step == "pass" else -number
                case _:
                    await tick(hive, reminders)
        rows = await hive.store.rows(
            "SELECT r.state, (SELECT count(*) FROM messages WHERE cause = 'reminder' AND cause_id = r.id) AS sent"
            " FROM reminders r"
        )
        assert all(row["sent"] == (row["state"] == "fired") for row in rows)

    run_in_hive(walk, "iris")


async def test_whatever_is_set_tells_the_clock_that_sleeps(hive: Services) -> None:
    for topic, setting in (
        ("reminders", hive.reminders.remind(IRIS, When(after_s=5), "x")),
        ("schedules", hive.schedules.add(parse_plan("iris", "x", every_s=60))),
        ("questions", hive.questions.ask(IRIS, Ask(DAMOCLES, "well?"))),
    ):
        with hive.store.bus.listen(topic) as listener, trio.fail_after(PATIENCE_S):
            await setting
            await listener.wait()
    assert {hive.questions.topic, hive.reminders.topic, hive.schedules.topic} == {"questions", "reminders", "schedules"}


def test_a_cron_is_what_was_written() -> None:
    assert parse_cron("0  7 * * 1-5", "Europe/Berlin") == Cron("0 7 * * 1-5", "Europe/Berlin")


async def test_a_clock_that_goes_back_past_all_that_is_kept_of_the_firings_fires_nothing_again(
    hive: Services, schedules: Schedules, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hive_core.services.schedules.FIRINGS_KEPT", 5)
    await schedules.add(parse_plan("iris", "tick", every_s=60))
    for _ in range(12):
        hive.clock.ahead_s += 60
        await hive.store.write(schedules.fire)
    hive.clock.ahead_s -= 11 * 60
    for _ in range(13):
        await hive.store.write(schedules.fire)
        hive.clock.ahead_s += 60
    sql = "SELECT count(*) - count(DISTINCT data ->> 'due_at_ms') FROM events WHERE kind = 'schedule_fired'"
    assert await hive.value(sql) == 0
    assert await hive.value("SELECT count(*) FROM events WHERE kind = 'schedule_fired'") > 12
