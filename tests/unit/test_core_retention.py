"""What is kept, what goes, and what must never go."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from hive_core.daemon import keep_house
from hive_core.limits import Limits
from hive_core.protocol.words import OPERATOR, AgentName, parse_body
from hive_core.services import history
from hive_core.services.archive import Archive, Query
from hive_core.services.connections import Connections
from hive_core.services.life import life_of
from hive_core.services.question_words import Answer, Ask
from hive_core.services.reminders import When
from hive_core.services.retention import Retention
from hive_core.services.schedules import parse_plan
from hive_core.services.withdrawal import withdraw_thread
from hive_core.store.writer import Transaction
from tests.hives import PATIENCE_S, Services, open_services
from tests.unit.test_core_archive import deliver, keep_file

if TYPE_CHECKING:
    from hive_core.hive import Hive

IRIS, DAMOCLES, HM1ND = AgentName("iris"), AgentName("damocles"), AgentName("hm1nd")
DAY_S = 86_400


def archive_of(hive: Services) -> Archive:
    return Archive(hive.store, Limits(), hive.state_dir / "bodies")


def retention_of(hive: Services, **limits: float) -> Retention:
    return Retention(hive.store, Limits.model_validate(limits), archive_of(hive).index)


async def age(hive: Services, days: float) -> None:
    """Make everything that many days older."""
    ms = int(days * DAY_S * 1000)
    await hive.sql("UPDATE messages SET sent_at_ms = sent_at_ms - ?", ms)
    await hive.sql("UPDATE message_blocks SET first_at_ms = first_at_ms - ?", ms)
    await hive.sql(
        "UPDATE deliveries SET sent_at_ms = sent_at_ms - ?1, settled_at_ms = settled_at_ms - ?1,"
        " available_at_ms = available_at_ms - ?1",
        ms,
    )


async def ids(hive: Services) -> list[int]:
    return [row["id"] for row in await hive.store.rows("SELECT id FROM messages ORDER BY id")]


async def forget(hive: Services, **more: Any) -> int:
    """Forget what is old, in a hive that has run all the while."""
    await hive.sql("DELETE FROM retention_clock")
    await archive_of(hive).search(Query("word"))  # what is not indexed yet is not forgotten either
    return await retention_of(hive, **more).forget_old()


async def test_what_was_acked_long_ago_goes_with_all_that_hangs_on_it(hive: Services) -> None:
    await hive.say("operator", "iris", "word old")
    await deliver(hive, IRIS)
    await archive_of(hive).search(Query("word"))
    await age(hive, 31)
    await hive.say("operator", "iris", "word new")
    await deliver(hive, IRIS)
    assert await forget(hive) == 1
    assert await ids(hive) == [2]
    for table in ("deliveries", "leases"):
        assert await hive.value(f"SELECT group_concat(message_id) FROM {table}") == "2"
    answer = await archive_of(hive).search(Query("word"))
    assert [message["id"] for message in answer["messages"]] == [2]
    (left,) = await hive.store.rows("SELECT rowid FROM message_words WHERE message_words MATCH 'word'")
    assert left["rowid"] == 2
    await hive.sql("INSERT INTO message_words (message_words) VALUES ('integrity-check')")
    assert "messages_forgotten" in await hive.kinds()
    assert await hive.value("PRAGMA foreign_key_check") is None


async def test_thirty_days_are_thirty_days(hive: Services) -> None:
    await hive.say("operator", "iris", "word")
    await deliver(hive, IRIS)
    await age(hive, 29.99)
    assert await forget(hive) == 0
    await age(hive, 0.02)
    assert await forget(hive) == 1


async def test_the_time_counts_from_the_ack_and_not_from_the_send(hive: Services) -> None:
    await hive.say("operator", "iris", "word")
    await age(hive, 100)
    await deliver(hive, IRIS)
    assert await forget(hive) == 0


async def fail_to_death(hive: Services) -> None:
    lease = await hive.broker.lease(IRIS)
    await hive.broker.ack(IRIS, lease.turn, "failed")
    await hive.sql("UPDATE deliveries SET state = 'dead', settled_at_ms = available_at_ms WHERE recipient = 'iris'")


async def hold(hive: Services) -> None:
    await hive.sql("UPDATE deliveries SET state = 'held', held = 'rate'")


async def lease(hive: Services) -> None:
    await hive.broker.lease(IRIS)


async def nothing(hive: Services) -> None:
    pass


@pytest.mark.parametrize("become", [nothing, lease, hold, fail_to_death], ids=["queued", "leased", "held", "dead"])
async def test_what_is_not_settled_stays_however_old(hive: Services, become: Callable[[Services], Any]) -> None:
    await hive.say("operator", "iris", "word")
    await become(hive)
    await age(hive, 1000)
    assert await forget(hive) == 0
    assert await ids(hive) == [1]


async def test_what_was_dropped_goes_as_what_was_acked(hive: Services) -> None:
    await hive.say("operator", "iris", "word")
    await hold(hive)
    await hive.broker.messages.drop(1, OPERATOR)
    await age(hive, 31)
    assert await forget(hive) == 1


async def test_a_message_stays_as_long_as_one_of_its_recipients_has_not_read_it(hive: Services) -> None:
    await hive.broker.send(OPERATOR, (IRIS, DAMOCLES), parse_body("word"))
    await deliver(hive, IRIS)
    await age(hive, 31)
    assert await forget(hive) == 0
    assert await hive.value("SELECT count(*) FROM deliveries") == 2
    await deliver(hive, DAMOCLES)
    assert await forget(hive) == 0
    await age(hive, 31)
    assert await forget(hive) == 1


async def test_an_answer_outlives_what_it_answers(hive: Services) -> None:
    await hive.say("operator", "iris", "word")
    await deliver(hive, IRIS)
    await age(hive, 31)
    answer = await hive.say("iris", "operator", "word back", in_reply_to=1)
    assert await forget(hive) == 1
    thread = await archive_of(hive).thread(answer)
    assert [message["id"] for message in thread["messages"]] == [answer]
    assert await hive.say("operator", "iris", "and again", in_reply_to=answer) == answer + 1
    assert len((await archive_of(hive).thread(1))["messages"]) == 2


async def test_a_large_body_leaves_the_index_whole(hive: Services) -> None:
    text = "word " * 30_000 + "needle"
    await hive.say("operator", "iris", text[:4096])
    await hive.sql("UPDATE messages SET body_sha256 = ?, body_bytes = ?, id = 1", keep_file(hive, text), len(text))
    await deliver(hive, IRIS)
    await age(hive, 31)
    assert await forget(hive) == 1
    assert await hive.store.rows("SELECT rowid FROM message_words WHERE message_words MATCH 'needle'") == []


async def test_a_large_body_whose_file_was_lost_meanwhile_goes_too(hive: Services) -> None:
    digest = keep_file(hive, "word needle")
    await hive.say("operator", "iris", "word")
    await hive.sql("UPDATE messages SET body_sha256 = ?", digest)
    await deliver(hive, IRIS)
    archive = archive_of(hive)
    assert len((await archive.search(Query("needle")))["messages"]) == 1
    Path(hive.state_dir / "bodies" / digest[:2] / digest).unlink()
    await age(hive, 31)
    assert await forget(hive) == 1
    assert (await archive.search(Query("needle")))["messages"] == []


async def test_many_go_in_small_transactions_and_the_next_time_finds_nothing(
    hive: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hive_core.services.retention.FORGET_BATCH", 10)
    for _ in range(35):
        await hive.say("operator", "operator", "word")
    await hive.broker.messages.inbox(limit=50)
    await hive.say("operator", "iris", "word that waits")
    await age(hive, 31)
    assert await forget(hive) == 35
    assert (await hive.kinds()).count("messages_forgotten") == 4
    assert await ids(hive) == [36]
    assert await forget(hive) == 0
    assert await hive.value("SELECT count(*) FROM message_blocks") == 1


async def test_a_question_stays_for_ever_with_the_message_that_put_it_and_the_one_that_answered_it(
    hive: Services,
) -> None:
    for _ in range(2):
        await hive.questions.ask(IRIS, Ask(DAMOCLES, "word?"))
    await deliver(hive, DAMOCLES)
    await hive.questions.cancel(IRIS, 1)
    answered = await hive.questions.answer(DAMOCLES, 2, Answer(text="word"))
    await withdraw_thread(hive.store, IRIS, 2)  # it was answered before any turn had it
    for _ in range(2):
        await hive.questions.ask(IRIS, Ask(DAMOCLES, "word?"))
    await hive.let_time_pass(7 * 3600)  # 3 and 4 expire
    for agent in (DAMOCLES, IRIS):
        while "queued" in (await hive.states(agent)).values():
            await deliver(hive, agent)
    questions = [dict(row) for row in await hive.store.rows("SELECT * FROM questions")]
    for _ in range(3):
        hive.clock.ahead_s += 2 * QUARTER_S
        await hive.say("operator", "operator", "word")
        await hive.broker.messages.inbox()
        await forget(hive)
    assert [dict(row) for row in await hive.store.rows("SELECT * FROM questions")] == questions
    kept = [question["message_id"] for question in questions] + [answered["message"]]
    assert (await ids(hive))[:-1] == sorted(kept)


async def test_a_question_that_reached_nobody_goes_with_its_message(tmp_path: Path) -> None:
    async with open_services(tmp_path, limits=Limits(pair_rate_per_hour=2)) as hive:
        await hive.add_agents("iris", "damocles")
        for _ in range(4):
            await hive.questions.ask(IRIS, Ask(DAMOCLES, "word?"))
        await hive.questions.cancel(IRIS, 1)  # 2 waits unread
        await hive.broker.messages.drop(3, OPERATOR)
        await hive.let_time_pass(7 * 3600)
        await hive.broker.messages.drop(4, OPERATOR)  # it expired while it was held
        hive.clock.ahead_s += 29 * DAY_S
        await forget(hive)
        assert await hive.value("SELECT count(*) FROM questions") == 4
        hive.clock.ahead_s += 2 * DAY_S
        await forget(hive)
        assert await hive.value("SELECT group_concat(id) FROM questions") == "2"
        assert [number for number in await ids(hive) if number <= 4] == [2]


# -- the history ------------------------------------------------------------------------------------------------------

QUARTER_S = 90.0 * DAY_S  # history_kept_s


def long_ago(hive: Services) -> int:
    return int((hive.clock() - QUARTER_S) * 1000)


async def test_history_stays_longer_than_messages_and_approvals_for_ever(hive: Services) -> None:
    await hive.gate.spawn.request(HM1ND, AgentName("argus"), "You watch.", "two eyes")
    for _ in range(2):
        await hive.say("operator", "iris", "word")
        await deliver(hive, IRIS)
    before = await hive.kinds()
    hive.clock.ahead_s += 89 * DAY_S
    assert await forget(hive) == 2
    assert (await hive.kinds())[: len(before)] == before
    assert await hive.value("SELECT count(*) FROM turns") == 2
    hive.clock.ahead_s += 2 * DAY_S
    assert await forget(hive) == 0
    assert await hive.kinds() == ["messages_forgotten", "history_forgotten"]
    assert json.loads(await hive.value("SELECT data FROM events ORDER BY seq DESC LIMIT 1")) == {
        "events": len(before),
        "turns": 1,
    }
    assert await hive.value("SELECT count(*) FROM approvals") == 1
    assert await hive.value("SELECT group_concat(id) FROM turns") == "2"  # an agent's last one is the cause of more
    assert await hive.value("PRAGMA foreign_key_check") is None


async def test_what_a_kept_message_can_tell_of_its_life_stays_until_it_goes(tmp_path: Path) -> None:
    async with open_services(tmp_path, limits=Limits(tries=1, pair_rate_per_hour=1)) as hive:
        await hive.add_agents("iris", "damocles")
        await hive.say("operator", "iris", "word that begins")
        lease = await hive.broker.lease(IRIS)
        await hive.say("iris", "damocles", "word one")
        dead = await hive.say("iris", "damocles", "word two")
        await hive.broker.messages.release(dead, OPERATOR)
        await hive.broker.ack(IRIS, lease.turn, "done")
        await deliver(hive, DAMOCLES)
        await hive.broker.ack(DAMOCLES, (await hive.broker.lease(DAMOCLES)).turn, "failed", "it broke")
        await deliver(hive, IRIS)  # that it is dead
        for name in (IRIS, DAMOCLES):
            await hive.say("operator", name, "word of later")
            await deliver(hive, name)
        life, turns = await life_of(hive.store, dead), "SELECT group_concat(id) FROM (SELECT id FROM turns ORDER BY id)"
        hive.clock.ahead_s += QUARTER_S + 60
        await forget(hive)
        assert await ids(hive) == [dead]
        assert await life_of(hive.store, dead) == life
        assert await hive.value(turns) == "1,3,5,6"
        about = "SELECT group_concat(DISTINCT kind) FROM events WHERE message_id = ?"
        assert await hive.value(about, dead) == "message_released,message_dead"
        await hive.broker.messages.drop(dead, OPERATOR)
        hive.clock.ahead_s += 31 * DAY_S
        await forget(hive)
        await forget(hive)
        assert await ids(hive) == []
        assert await hive.value(turns) == "5,6"
        assert await hive.value(about, dead) == "message_dropped"  # of this quarter


async def test_numbers_go_on_where_they_were_and_the_newest_event_stays(hive: Services) -> None:
    await hive.say("operator", "iris", "word")
    await deliver(hive, IRIS)
    last = await hive.store.last_seq()
    hive.clock.ahead_s += QUARTER_S + 60
    await forget(hive)
    assert await hive.store.last_seq() == last + 2
    for _ in range(3):
        hive.clock.ahead_s += QUARTER_S + 60
        await forget(hive)
        newest = await hive.store.last_seq()
        assert newest >= last + 2
        assert await hive.value("SELECT count(*) FROM events") >= 1
    await hive.agents.want(IRIS, "paused", "operator")
    assert await hive.store.last_seq() == newest + 1


async def test_a_clock_that_was_ahead_for_a_while_keeps_no_history_for_ever(hive: Services) -> None:
    await hive.agents.want(IRIS, "paused", "operator")
    await hive.sql("UPDATE events SET at_ms = at_ms * 2 WHERE kind = 'agent_wanted'")
    await hive.agents.want(IRIS, "up", "operator")
    hive.clock.ahead_s += QUARTER_S + 60
    await hive.agents.want(IRIS, "up", "operator")
    await forget(hive)
    assert await hive.kinds() == ["agent_wanted", "history_forgotten"]


async def test_settled_reminders_and_removed_schedules_go_and_others_stay(hive: Services) -> None:
    for _ in range(3):
        await hive.reminders.remind(IRIS, When(after_s=300 * DAY_S), "look")
        await hive.schedules.add(parse_plan("iris", "word", every_s=366 * DAY_S))
    for number in (1, 2):
        await hive.reminders.cancel(IRIS, number)
        await hive.schedules.run(number)
        await hive.schedules.remove(number)
    await deliver(hive, IRIS)
    await hive.sql("INSERT INTO schedule_firings (schedule_id, due_at_ms) VALUES (1, 1), (2, 1), (3, 1)")
    hive.clock.ahead_s += 89 * DAY_S
    await forget(hive)
    for table in ("reminders", "schedules"):
        assert await hive.value(f"SELECT count(*) FROM {table}") == 3
    hive.clock.ahead_s += 2 * DAY_S
    await forget(hive)
    for table in ("reminders", "schedules"):
        assert await hive.value(f"SELECT group_concat(id) FROM {table}") == "3"
    assert await hive.value("SELECT group_concat(schedule_id) FROM schedule_firings") == "3"
    forgotten = json.loads(await hive.value("SELECT data FROM events ORDER BY seq DESC LIMIT 1"))
    assert (forgotten["reminders"], forgotten["schedules"]) == (2, 2)


async def test_a_long_history_goes_in_small_transactions(hive: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "STEP", 10)
    for _ in range(35):
        await hive.say("operator", "iris", "word")
        await deliver(hive, IRIS)
    hive.clock.ahead_s += QUARTER_S + 60
    changed: list[int] = []
    write = hive.store.write

    def looked_at(function: Callable[[Transaction], Any]) -> Awaitable[Any]:
        def watched(tx: Transaction) -> Any:
            before = tx.execute("SELECT total_changes()").fetchone()[0]
            answer = function(tx)
            changed.append(tx.execute("SELECT total_changes()").fetchone()[0] - before)
            return answer

        return write(watched)

    assert await forget(hive, history_kept_s=1000 * DAY_S) == 35
    monkeypatch.setattr(hive.store, "write", looked_at)
    await history.forget_history(hive.store, long_ago(hive))
    assert max(changed) <= 11
    assert await hive.value("SELECT count(*) FROM turns") == 1


async def test_events_that_a_wrong_clock_dated_ahead_keep_no_old_ones_behind_them(hive: Services) -> None:
    def put(tx: Transaction) -> None:
        for _ in range(250):
            tx.emit("x", "iris")

    hive.clock.ahead_s = 20 * 365 * DAY_S
    await hive.store.write(put)
    hive.clock.ahead_s = 0
    for _ in range(4):
        await hive.store.write(put)
    hive.clock.ahead_s = 3 * 365 * DAY_S
    await history.forget_history(hive.store, long_ago(hive))
    assert await hive.value("SELECT count(*) FROM events") < 300


# -- a wall clock that leaps ------------------------------------------------------------------------------------------

YEAR_S = 365 * DAY_S


async def live_for_days(hive: Services, days: int, retention: Retention) -> None:
    """On each day one message that is acked, and one event; at the end of each what is old goes."""
    for _ in range(days):
        await hive.say("operator", "iris", "word")
        await deliver(hive, IRIS)
        await hive.agents.want(IRIS, "up", "operator")
        await archive_of(hive).search(Query("word"))
        hive.clock.ahead_s += DAY_S
        await retention.forget_old()


async def test_a_clock_that_is_a_year_ahead_for_an_hour_takes_one_day_and_no_more(hive: Services) -> None:
    kept = {"kept_s": 10.5 * DAY_S, "history_kept_s": 10.5 * DAY_S}
    await live_for_days(hive, 10, retention_of(hive, **kept))
    assert await ids(hive) == list(range(1, 11))
    hive.clock.ahead_s += YEAR_S
    for _ in range(3):  # a daemon that is started again each minute
        await retention_of(hive, **kept).forget_old()
        hive.clock.ahead_s += 60
    hive.clock.ahead_s -= YEAR_S
    retention = retention_of(hive, **kept)
    for _ in range(3):
        await retention.forget_old()
        hive.clock.ahead_s += 3600
    assert await ids(hive) == list(range(2, 11))
    assert (await hive.kinds()).count("agent_wanted") == 9


async def test_a_clock_that_is_a_year_ahead_takes_neither_lines_nor_the_answers_of_calls(hive: Services) -> None:
    message = await hive.say("hm1nd", "iris", "begin")
    turn = (await hive.broker.lease(IRIS)).turn.id
    await hive.turns.add_lines(IRIS, turn, 0, ["a line"])
    answer = await hive.broker.recv(IRIS, 1, 0, key="k")
    parts = {name: getattr(hive, name) for name in ("store", "turns", "turn_records", "broker", "background")}
    house = cast(
        "Hive", SimpleNamespace(**parts, connections=Connections(hive.store, Limits()), retention=retention_of(hive))
    )
    await keep_house(house)
    hive.clock.ahead_s += YEAR_S
    await keep_house(house)
    assert [line["line"] for line in await hive.turns.newest_lines("iris")] == ["a line"]
    await hive.say("hm1nd", "iris", "more")
    assert await hive.broker.recv(IRIS, 1, 0, key="k") == answer
    assert message in await ids(hive)


async def test_a_hive_that_was_off_for_two_months_has_forgotten_what_is_old_after_two_days(
    hive: Services, caplog: pytest.LogCaptureFixture
) -> None:
    retention = retention_of(hive)
    await live_for_days(hive, 1, retention)
    assert "forgotten later" not in caplog.text
    hive.clock.ahead_s += 60 * DAY_S
    assert await retention.forget_old() == 0
    gone, hours = 0, 0
    while not gone:
        hive.clock.ahead_s += 3600
        gone, hours = await retention.forget_old(), hours + 1
    assert 24 < hours < 36
    for _ in range(36):
        hive.clock.ahead_s += 3600
        await retention.forget_old()
    now_ms, shows_ms = hive.clock() * 1000, await hive.value("SELECT shows_ms FROM retention_clock")
    assert now_ms - shows_ms < PATIENCE_S * 1000
    (told,) = [record.getMessage() for record in caplog.records if "forgotten later" in record.getMessage()]
    assert "the clock leapt ahead (it was set, or the hive was off), and forgetting, 59.0 days behind it" in told


async def test_a_clock_that_begins_in_1970_and_is_set_an_hour_later_delays_forgetting_by_days_alone(
    hive: Services,
) -> None:
    retention = retention_of(hive, kept_s=9.5 * DAY_S)
    await live_for_days(hive, 10, retention)
    assert await ids(hive) == list(range(2, 11))
    now_s = hive.clock()
    hive.clock.ahead_s -= now_s
    for _ in range(2):
        assert await retention.forget_old() == 0
        hive.clock.ahead_s += 1800
    hive.clock.ahead_s += now_s + DAY_S
    gone = 0
    for _ in range(3):
        gone += await retention.forget_old()
        hive.clock.ahead_s += 3600
    assert gone == 1
    assert await ids(hive) == list(range(3, 11))


async def test_a_new_hive_that_began_in_1970_forgets_as_any_other_when_the_clock_is_set(hive: Services) -> None:
    retention, now_s = retention_of(hive, kept_s=9.5 * DAY_S), hive.clock()
    hive.clock.ahead_s -= now_s
    await hive.agents.want(IRIS, "up", "operator")
    await retention.forget_old()
    hive.clock.ahead_s += now_s
    await retention.forget_old()  # as it does each hour
    await live_for_days(hive, 9, retention)
    assert await ids(hive) == list(range(1, 10))
    await live_for_days(hive, 2, retention)
    assert await ids(hive) == list(range(3, 12))


@pytest.mark.parametrize("ahead_s", [25 * DAY_S, YEAR_S])
async def test_a_new_hive_whose_clock_leaps_ahead_in_its_first_hour_keeps_what_was_acked_before(
    hive: Services, ahead_s: float
) -> None:
    retention = retention_of(hive)
    await retention.forget_old()
    await hive.say("operator", "iris", "word")
    await deliver(hive, IRIS)
    hive.clock.ahead_s += ahead_s
    for _ in range(3):
        await archive_of(hive).search(Query("word"))
        await retention.forget_old()
        hive.clock.ahead_s += 3600
    assert await ids(hive) == [1]
    assert await hive.value("SELECT count(*) FROM events WHERE kind = 'turn_ended'") == 1
    now_ms, shows_ms = hive.clock() * 1000, await hive.value("SELECT shows_ms FROM retention_clock")
    assert now_ms - shows_ms > (ahead_s - 4 * DAY_S) * 1000


async def test_a_clock_that_was_ahead_and_is_again_takes_no_more_the_second_time(hive: Services) -> None:
    hive.clock.ahead_s = 40 * DAY_S
    retention = retention_of(hive)
    await retention.forget_old()
    hive.clock.ahead_s = 0
    await hive.say("operator", "iris", "word")
    await deliver(hive, IRIS)
    await archive_of(hive).search(Query("word"))
    for _ in range(41):
        hive.clock.ahead_s += 3600
        await retention.forget_old()
    hive.clock.ahead_s += 40 * DAY_S
    assert await retention.forget_old() == 0
    assert await ids(hive) == [1]


async def test_what_was_acked_after_a_clock_was_ahead_for_weeks_is_kept_as_long_as_ever(hive: Services) -> None:
    hive.clock.ahead_s = YEAR_S
    retention = retention_of(hive, kept_s=1.5 * DAY_S)
    await retention.forget_old()
    hive.clock.ahead_s = 0
    await live_for_days(hive, 2, retention)
    assert await ids(hive) == [2]
    await live_for_days(hive, 1, retention)
    assert await ids(hive) == [3]
