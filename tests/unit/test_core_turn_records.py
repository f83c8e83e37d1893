"""What is kept of a turn, and for how long."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hive_agent.replay import Recorded
from hive_core.cli import show_turns
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName
from hive_core.services import turn_records
from hive_core.services.leases import Turn
from hive_core.services.turn_records import add_record
from hive_core.services.turns import LINE_KEPT_S
from tests.hives import SETTINGS, Services, connect, serve
from tests.unit.test_core_harness_desk import HELLO, LEASE, desk_for

IRIS = AgentName("iris")
ASKED = "a" * 64


@asynccontextmanager
async def a_harness(hive: Services, folder: Path) -> AsyncIterator[Any]:
    async with serve(folder / "harness.sock", desk_for(hive).serve) as door, connect(door) as peer:
        assert (await peer.ask(HELLO))["ok"]
        yield peer


def lines_of(turn: int, *lines: str, first: int = 0, **more: Any) -> dict[str, Any]:
    return {"id": 3, "op": "lines", "turn": turn, "first": first, "lines": list(lines), **more}


async def take_turn(hive: Services, body: str = "do it", lines: tuple[str, ...] = ("one", "two")) -> int:
    """A turn with lines and its record; its number."""
    await hive.say("hm1nd", "iris", body)
    lease = await hive.broker.lease(IRIS)
    given = {"turn": lease.turn.id, "message": lease.message, "settings": lease.settings, "session": None}
    record = partial(add_record, agent="iris", given=given, asked_sha256=ASKED)
    await hive.turns.add_lines(IRIS, lease.turn.id, 0, list(lines), record)
    await hive.broker.ack(IRIS, Turn(lease.turn.id, lease.turn.fence), "done")
    return lease.turn.id


async def test_what_a_turn_was_given_is_kept_with_its_first_lines_and_once(hive: Services, tmp_path: Path) -> None:
    await hive.say("hm1nd", "iris", "do it")
    async with a_harness(hive, tmp_path) as harness:
        lease = await harness.ask(LEASE)
        turn = lease["turn"]
        assert await hive.value("SELECT count(*) FROM turn_records") == 0
        await harness.ask(lines_of(turn, "one", prompt_sha256=ASKED))
        await harness.ask(lines_of(turn, "two", first=1, prompt_sha256="b" * 64))
        await hive.say("iris", "hm1nd", "I do it")
        ack = {"id": 4, "op": "ack", "turn": turn, "fence": lease["fence"], "outcome": "failed", "error": "it broke"}
        await harness.ask(ack)
    shown = await hive.turn_records.show(turn)
    given = {key: lease[key] for key in ("turn", "fence", "message", "waiting", "settings", "session", "credential")}
    assert {key: shown["given"][key] for key in given} == given
    assert (shown["asked_sha256"], shown["missing"]) == (ASKED, [])
    assert (shown["state"], shown["error"], shown["lines"]) == ("failed", "it broke", 2)
    assert [(one["body"], one["recipients"]) for one in shown["sent"]] == [("I do it", ["hm1nd"])]
    assert [line["line"] for line in (await hive.turn_records.lines(turn))["lines"]] == ["one", "two"]


@pytest.mark.parametrize("claim", [None, 7, "", "x" * 64, "a" * 63, "A" * 64, ["a"]])
async def test_a_digest_that_is_none_is_not_kept(hive: Services, tmp_path: Path, claim: object) -> None:
    await hive.say("hm1nd", "iris", "do it")
    async with a_harness(hive, tmp_path) as harness:
        turn = (await harness.ask(LEASE))["turn"]
        assert (await harness.ask(lines_of(turn, "one", prompt_sha256=claim)))["kept"] == 1
    assert (await hive.turn_records.show(turn))["asked_sha256"] is None


async def test_a_daemon_that_began_in_the_middle_of_a_turn_keeps_what_is_left_of_what_it_was_given(
    hive: Services, tmp_path: Path
) -> None:
    await hive.say("hm1nd", "iris", "do it")
    lease = await hive.broker.lease(IRIS, "f-1")
    async with serve(tmp_path / "harness.sock", desk_for(hive).serve) as door, connect(door) as peer:
        assert (await peer.ask({**HELLO, "fences": ["f-1"]}))["ok"]
        await hive.say("hm1nd", "iris", "another")
        assert (await peer.ask(lines_of(lease.turn.id, "one", prompt_sha256=ASKED)))["kept"] == 1
    shown = await hive.turn_records.show(lease.turn.id)
    assert (shown["given"]["message"], shown["given"]["settings"]) == (lease.message, lease.settings)
    assert shown["missing"] == [turn_records._LATER]
    assert await hive.value("SELECT count(*) FROM turns") == 1


async def test_the_prompt_of_many_turns_is_kept_once_and_their_bodies_stay_with_the_messages(hive: Services) -> None:
    for number in range(3):
        await take_turn(hive, f"body number {number}")
    assert await hive.value("SELECT count(*) FROM turn_prompts") == 1
    assert await hive.value("SELECT text FROM turn_prompts") == SETTINGS["prompt"]
    kept = await hive.store.rows("SELECT given FROM turn_records")
    assert not any("body number" in row[0] or SETTINGS["prompt"] in row[0] for row in kept)


async def test_what_is_not_there_any_more_is_said(hive: Services) -> None:
    turn = await take_turn(hive)
    await hive.sql("DELETE FROM turn_lines WHERE n = 0")
    await hive.sql("UPDATE turn_records SET given = json_set(given, '$.message.id', 99)")
    shown = await hive.turn_records.show(turn)
    assert "body" not in shown["given"]["message"]
    assert shown["missing"] == [
        "the body of its message, which is forgotten",
        "1 of its 2 lines, which were too many or are too old",
    ]
    await hive.sql("DELETE FROM turn_records")
    assert (await hive.turn_records.show(turn))["missing"][0].startswith("what it was given")


async def test_a_turn_that_never_was_is_refused(hive: Services) -> None:
    with pytest.raises(Refusal, match="cannot find turn 7: there was none; `hive turns` lists them"):
        await hive.turn_records.show(7)


async def test_the_result_of_the_turn_before_comes_with_one_that_goes_on_with_its_session(hive: Services) -> None:
    result = {"type": "result", "total_cost_usd": 0.5}
    await take_turn(hive, lines=("{", json.dumps(result), "[]"))
    turn = await take_turn(hive)
    assert (await hive.turn_records.show(turn))["before"] is None
    await hive.sql("UPDATE turn_records SET given = json_set(given, '$.session', 's') WHERE turn_id = ?", turn)
    assert (await hive.turn_records.show(turn))["before"] == result


async def test_turns_are_listed_newest_first_of_all_agents_or_one(hive: Services) -> None:
    first, second = await take_turn(hive), await take_turn(hive)
    await hive.say("hm1nd", "damocles", "you too")
    other = (await hive.broker.lease(AgentName("damocles"))).turn.id
    assert [row["turn"] for row in await hive.turn_records.newest()] == [other, second, first]
    assert [row["turn"] for row in await hive.turn_records.newest("iris", 1)] == [second]


async def test_many_lines_come_in_parts(hive: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turn_records, "LINES_SHOWN", 2)
    turn = await take_turn(hive, lines=("a", "b", "c"))
    first = await hive.turn_records.lines(turn)
    rest = await hive.turn_records.lines(turn, first["next_after"])
    assert [line["line"] for line in (*first["lines"], *rest["lines"])] == ["a", "b", "c"]
    assert (first["next_after"], rest["next_after"]) == (1, None)


async def test_records_go_when_their_lines_do_and_over_each_agents_bound(
    hive: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turn_records, "RECORDS_PER_AGENT", 2)
    turns = [await take_turn(hive) for _ in range(4)]
    await hive.turn_records.prune(hive.now_ms())
    assert [row[0] for row in await hive.store.rows("SELECT turn_id FROM turn_records")] == turns[2:]
    assert await hive.value("SELECT count(*) FROM turn_prompts") == 1
    await hive.turn_records.prune(hive.now_ms() + LINE_KEPT_S * 1000 + 1000)
    assert await hive.value("SELECT count(*) FROM turn_records") == 0
    assert await hive.value("SELECT count(*) FROM turn_prompts") == 0


async def test_a_full_disk_keeps_no_record_and_counts_the_lines(hive: Services) -> None:
    await hive.say("hm1nd", "iris", "do it")
    lease = await hive.broker.lease(IRIS)
    hive.set_full(True)
    given = {"turn": lease.turn.id, "message": lease.message, "settings": lease.settings}
    record = partial(add_record, agent="iris", given=given, asked_sha256=None)
    assert await hive.turns.add_lines(IRIS, lease.turn.id, 0, ["one"], record) == 1
    assert await hive.value("SELECT count(*) FROM turn_records") == 0


async def test_nothing_that_a_harness_or_its_program_says_reaches_the_terminal_as_more_than_text(
    hive: Services,
) -> None:
    evil = "\x1b]0;owned\x07"
    dropped = json.dumps({"type": "hive", "subtype": "lines_dropped", "count": evil})
    await hive.say("hm1nd", "iris", "do it")
    lease = await hive.broker.lease(IRIS)
    given = {"turn": lease.turn.id, "message": lease.message, "settings": lease.settings, "session": evil, "waiting": 0}
    record = partial(add_record, agent="iris", given=given, asked_sha256=ASKED)
    await hive.turns.add_lines(IRIS, lease.turn.id, 0, [dropped], record)
    await hive.broker.ack(IRIS, lease.turn, "failed", error=evil)
    shown = await hive.turn_records.show(lease.turn.id)
    stream = (await hive.turn_records.lines(lease.turn.id))["lines"]
    missing = Recorded({**shown, "lines": [dropped]}).missing
    replayed = show_turns.replayed({"turn": 1, "same": True, "differences": [], "missing": missing})
    for text in (show_turns.whole({**shown, "stream": stream}), replayed):
        assert "owned" in text
        assert text.replace("\n", "").isprintable()
