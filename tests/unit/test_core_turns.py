from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from hive_core.protocol.words import AgentName
from hive_core.services import turns
from hive_core.store.bus import stream
from tests.hives import PATIENCE_S, Services, open_services, run_in_hive

IRIS = AgentName("iris")
PER_TURN, PER_AGENT = 10, 15


@pytest.fixture
async def hive(tmp_path: Path) -> AsyncIterator[Services]:
    async with open_services(tmp_path, lines_per_turn=PER_TURN, lines_per_agent=PER_AGENT) as services:
        await services.add_agents("iris", "damocles")
        yield services


async def begin(hive: Services, agent: str = "iris") -> int:
    await hive.say("operator", agent, "go")
    return (await hive.broker.lease(AgentName(agent)))[0].id


async def kept(hive: Services, agent: str = "iris") -> list[str]:
    return [row["line"] for row in await hive.turns.lines_after(agent, 0)]


async def test_lines_are_kept_in_order_and_who_watches_is_woken(hive: Services) -> None:
    turn = await begin(hive)
    with hive.store.bus.listen(stream("iris")) as listener:
        assert await hive.turns.add_lines(IRIS, turn, 0, ["a", "b"]) == 2
        with trio.fail_after(PATIENCE_S):
            await listener.wait()
    assert await hive.turns.add_lines(IRIS, turn, 2, ["c"]) == 3
    rows = await hive.turns.lines_after("iris", 0)
    assert [(row["turn"], row["n"], row["line"]) for row in rows] == [(turn, 0, "a"), (turn, 1, "b"), (turn, 2, "c")]
    assert [row["line"] for row in await hive.turns.lines_after("iris", rows[0]["id"])] == ["b", "c"]
    assert [row["line"] for row in await hive.turns.newest_lines("iris", 2)] == ["b", "c"]


async def test_lines_sent_again_are_left_alone(hive: Services) -> None:
    turn = await begin(hive)
    await hive.turns.add_lines(IRIS, turn, 0, ["a", "b"])
    assert await hive.turns.add_lines(IRIS, turn, 0, ["a", "forged"]) == 2
    assert await hive.turns.add_lines(IRIS, turn, 1, ["forged", "c"]) == 3
    assert await kept(hive) == ["a", "b", "c"]


async def test_a_turn_that_is_anothers_or_has_ended_or_never_was_takes_no_line(hive: Services) -> None:
    turn, other = await begin(hive), await begin(hive, "damocles")
    assert await hive.turns.add_lines(IRIS, other, 0, ["forged"]) == 0
    assert await hive.turns.add_lines(IRIS, 99, 0, ["forged"]) == 0
    await hive.broker.close_lost_turns(IRIS)
    assert await hive.turns.add_lines(IRIS, turn, 0, ["late"]) == 0
    assert await kept(hive) == []
    assert await kept(hive, "damocles") == []


async def test_of_a_turn_the_newest_lines_are_kept_and_all_are_counted(hive: Services) -> None:
    turn = await begin(hive)
    for n in range(PER_TURN + 5):
        assert await hive.turns.add_lines(IRIS, turn, n, [str(n)]) == n + 1
    assert await kept(hive) == [str(n) for n in range(5, PER_TURN + 5)]
    assert (await hive.turns.recent("iris"))[0]["lines"] == PER_TURN + 5


async def test_of_an_agent_the_newest_lines_are_kept_and_another_agents_are_left_alone(hive: Services) -> None:
    for number in range(3):
        turn = await begin(hive)
        await hive.turns.add_lines(IRIS, turn, 0, [f"{number}.{n}" for n in range(PER_TURN)])
        await hive.broker.close_lost_turns(IRIS)
    other = await begin(hive, "damocles")
    await hive.turns.add_lines(AgentName("damocles"), other, 0, ["mine"])
    await hive.turns.prune(hive.now_ms())
    assert await kept(hive) == [f"1.{n}" for n in range(5, 10)] + [f"2.{n}" for n in range(10)]
    assert await kept(hive, "damocles") == ["mine"]


async def test_an_agent_that_prints_on_keeps_its_bound_without_any_pruning(hive: Services) -> None:
    for number in range(4):
        turn = await begin(hive)
        await hive.turns.add_lines(IRIS, turn, 0, [f"{number}.{n}" for n in range(PER_TURN)])
        await hive.broker.close_lost_turns(IRIS)
    assert await kept(hive) == [f"2.{n}" for n in range(5, 10)] + [f"3.{n}" for n in range(10)]


async def test_of_an_agent_so_many_bytes_are_kept_as_they_come_and_the_gap_is_noted(tmp_path: Path) -> None:
    async with open_services(tmp_path, line_quota_bytes=100) as hive:
        await hive.add_agents("iris", "damocles")
        other = await begin(hive, "damocles")
        await hive.turns.add_lines(AgentName("damocles"), other, 0, ["x" * 90])
        turn = await begin(hive)
        for n in range(12):
            await hive.turns.add_lines(IRIS, turn, n, [f"{n:02}" + "é" * 9])  # 20 bytes
            assert [line[:2] for line in await kept(hive)] == [f"{k:02}" for k in range(max(0, n - 4), n + 1)]
        assert await hive.turns.lines_gone("iris") == (await hive.turns.lines_after("iris", 0))[0]["id"] - 1
        assert (await hive.turns.recent("iris"))[0]["lines"] == 12
        assert [len(line) for line in await kept(hive, "damocles")] == [90]
        await hive.turns.add_lines(IRIS, turn, 12, ["y" * 101, "small"])  # the first alone is over it
        assert await kept(hive) == ["small"]


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 9), st.lists(st.text(st.characters(codec="utf-8"), max_size=30), max_size=6))))
def test_what_is_known_of_an_agents_bytes_is_what_is_kept(sent: list[tuple[int, list[str]]]) -> None:
    async def check(hive: Services) -> None:
        for position, (skipped, lines) in enumerate(sent):
            turn = await begin(hive)
            await hive.turns.add_lines(IRIS, turn, skipped, lines)
            await hive.turns.add_lines(IRIS, turn, skipped, [*lines, "one more"])
            if position % 3 == 2:
                await hive.sql("UPDATE turn_lines SET at_ms = 0 WHERE n % 2")
                await hive.turns.prune(hive.now_ms())
            bytes_kept = sum(len(line.encode()) for line in await kept(hive))
            assert await hive.value("SELECT line_bytes FROM agents WHERE name = 'iris'") == bytes_kept <= 200
            await hive.broker.close_lost_turns(IRIS)

    run_in_hive(check, "iris", lines_per_turn=4, line_quota_bytes=200)


async def test_an_agent_whose_turns_begin_with_a_later_line_keeps_its_bound_too(hive: Services) -> None:
    for number in range(4):
        turn = await begin(hive)
        await hive.turns.add_lines(IRIS, turn, 1, [f"{number}.{n}" for n in range(PER_TURN)])
        await hive.broker.close_lost_turns(IRIS)
    assert len(await kept(hive)) == PER_AGENT


async def test_old_lines_are_dropped_whoever_printed_them(hive: Services) -> None:
    turn = await begin(hive)
    await hive.turns.add_lines(IRIS, turn, 0, ["old", "new"])
    await hive.sql("UPDATE turn_lines SET at_ms = 0 WHERE line = 'old'")
    await hive.turns.prune(hive.now_ms())
    assert await kept(hive) == ["new"]


async def test_recent_turns_tell_how_they_ended(hive: Services) -> None:
    await begin(hive)
    await hive.broker.close_lost_turns(IRIS)
    await begin(hive)
    newest, before = await hive.turns.recent("iris")
    assert (newest["state"], newest["ended_at_ms"]) == ("running", None)
    assert (before["state"], before["error"]) == ("lost", "its harness went away")


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 12)), max_size=12))
def test_however_lines_arrive_no_bound_is_passed_and_no_number_is_kept_twice(sent: list[tuple[int, int]]) -> None:
    async def check(hive: Services) -> None:
        turn = await begin(hive)
        before = 0
        for first, count in sent:
            arrived = await hive.turns.add_lines(IRIS, turn, first, [f"{first + n}" for n in range(count)])
            assert arrived >= before
            before = arrived
            numbers = [row["n"] for row in await hive.turns.lines_after("iris", 0)]
            assert numbers == sorted(set(numbers))
            assert len(numbers) <= PER_TURN
            assert all(arrived - PER_TURN <= number < arrived for number in numbers)

    run_in_hive(check, "iris", lines_per_turn=PER_TURN)


async def test_calls_outside_any_turn_are_told_once_in_a_while(hive: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(3):
        await hive.turns.note_unleased_call(IRIS)
    await hive.turns.note_unleased_call(AgentName("damocles"))
    assert (await hive.kinds()).count("unleased_call") == 2
    monkeypatch.setattr(turns, "UNLEASED_EVERY_S", 0.0)
    await hive.turns.note_unleased_call(IRIS)
    assert (await hive.kinds()).count("unleased_call") == 3
