"""What is kept of the connections of agents, and how it is told."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hive_core.cli.reach import _reach
from hive_core.limits import Limits
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName
from hive_core.services.connections import (
    LOST,
    OTHERS,
    SINGLE_A_MINUTE,
    SUMS_A_MINUTE,
    Connection,
    Connections,
)
from hive_core.services.costs import Span
from hive_core.services.reach import reach
from tests.hives import Services

IRIS = AgentName("iris")
MANY = 20_000
YEAR_S = 365 * 24 * 3600.0


class Desk:
    """Connections by a clock that the test sets."""

    def __init__(self, hive: Services, **limits: Any) -> None:
        self.hive = hive
        self.now_s = hive.now_ms() / 1000 // 60 * 60 + 3600  # the first second of a minute, behind all that is there
        self.kept = Connections(hive.store, Limits(**limits), lambda: self.now_s)

    def begin(self, host: str = "git.lan", port: int = 443, how: str = "tunnel") -> Connection:
        one = Connection(IRIS, 7, host, port, how, self.kept.now_ms)
        self.kept.began(one)
        return one

    def end(self, one: Connection, verdict: str = "passed", sent: int = 0, received: int = 0, reason: str = "") -> None:
        one.verdict, one.sent, one.received, one.reason = verdict, sent, received, reason or None
        one.ended_at_ms = self.kept.now_ms
        self.kept.ended(one)

    def make(self, host: str = "git.lan", verdict: str = "passed", **more: Any) -> None:
        self.end(self.begin(host), verdict, **more)

    async def rows(self) -> list[dict[str, Any]]:
        return [dict(row) for row in await self.hive.store.rows("SELECT * FROM connections ORDER BY id")]

    async def events(self) -> list[dict[str, Any]]:
        sql = "SELECT data FROM events WHERE kind = 'connection' AND agent = 'iris' ORDER BY seq"
        return [json.loads(row["data"]) for row in await self.hive.store.rows(sql)]


@pytest.fixture
async def desk(hive: Services) -> Desk:
    made = Desk(hive)
    await made.kept.load()
    return made


async def test_a_connection_is_one_row_and_one_event_with_its_turn(desk: Desk) -> None:
    desk.make(sent=10, received=2_000)
    await desk.kept.flush()
    (row,) = await desk.rows()
    (event,) = await desk.events()
    told = {"turn": 7, "host": "git.lan", "port": 443, "how": "tunnel", "verdict": "passed", "sent": 10}
    assert event == {**told, "received": 2_000, "address": None, "reason": None}
    assert (row["agent"], row["turn_id"], row["verdict"], row["count"]) == ("iris", 7, "passed", 1)


async def test_one_that_lasts_has_its_row_before_its_end_and_its_event_behind_it(desk: Desk) -> None:
    one = desk.begin()
    await desk.kept.flush()
    assert [row["verdict"] for row in await desk.rows()] == [None]
    assert await desk.events() == []
    desk.end(one, sent=5)
    await desk.kept.flush()
    assert [(row["verdict"], row["sent"]) for row in await desk.rows()] == [("passed", 5)]
    assert len(await desk.events()) == 1


async def test_one_that_was_open_when_the_daemon_died_is_cut_and_told(desk: Desk) -> None:
    desk.begin("far.lan")
    await desk.kept.flush()
    await Desk(desk.hive).kept.load()
    assert [(row["verdict"], row["reason"]) for row in await desk.rows()] == [("cut", LOST)]
    assert [(event["host"], event["verdict"]) for event in await desk.events()] == [("far.lan", "cut")]
    await Desk(desk.hive).kept.load()
    assert len(await desk.events()) == 1


async def test_what_comes_too_often_is_summed_up_by_host_and_verdict(desk: Desk) -> None:
    for _ in range(SINGLE_A_MINUTE):
        desk.make()
    for _ in range(30):
        desk.make("git.lan", sent=1, received=2)
        desk.make("no.lan", "refused", reason="not listed")
    await desk.kept.flush()
    assert len(await desk.rows()) == SINGLE_A_MINUTE  # the minute is not over
    desk.now_s += 60
    await desk.kept.flush()
    sums = [(row["host"], row["verdict"], row["count"], row["sent"]) for row in (await desk.rows())[SINGLE_A_MINUTE:]]
    assert sums == [("git.lan", "passed", 30, 30), ("no.lan", "refused", 30, 0)]
    assert [event.get("count") for event in await desk.events()][-2:] == [30, 30]
    desk.make()
    await desk.kept.flush()
    assert (await desk.rows())[-1]["count"] == 1  # a new minute


async def test_ever_other_hosts_make_no_more_rows_than_a_minute_has_room_for(desk: Desk) -> None:
    for number in range(5_000):
        desk.make(f"h{number}.lan", "refused")
    desk.now_s += 60
    await desk.kept.flush()
    rows = await desk.rows()
    assert len(rows) == SINGLE_A_MINUTE + SUMS_A_MINUTE + 1
    assert sum(row["count"] for row in rows) == 5_000
    assert rows[-1]["host"] == OTHERS


async def test_what_a_full_disk_did_not_take_is_written_when_there_is_room(desk: Desk) -> None:
    await desk.hive.store.write(lambda tx: tx.execute("PRAGMA max_page_count = 1").fetchall())  # never less than it has
    for _ in range(SINGLE_A_MINUTE - 1):
        desk.make(reason="long " * 100)
    one = desk.begin("far.lan")
    await desk.kept.flush()
    assert await desk.rows() == []
    await desk.hive.store.write(lambda tx: tx.execute("PRAGMA max_page_count = 1000000").fetchall())
    desk.end(one)
    await desk.kept.flush()
    rows = await desk.rows()
    assert len(rows) == SINGLE_A_MINUTE
    assert [(row["host"], row["verdict"]) for row in rows if row["host"] != "git.lan"] == [("far.lan", "passed")]


async def test_old_ones_and_those_beyond_the_newest_go(desk: Desk) -> None:
    desk.make("old.lan")
    desk.now_s += 10 * 24 * 3600
    for number in range(8):
        desk.make(f"h{number}.lan")
    await desk.kept.flush()
    keeper = Desk(desk.hive, history_kept_s=5 * 24 * 3600.0, connections_kept=3)
    await keeper.kept.prune(desk.kept.now_ms)
    assert [row["host"] for row in await desk.rows()] == ["h5.lan", "h6.lan", "h7.lan"]


async def test_the_bytes_of_a_day_are_known_to_the_next_daemon_and_begin_anew_with_the_next_day(desk: Desk) -> None:
    desk.make(sent=3, received=4)
    await desk.kept.flush()
    later = Desk(desk.hive)
    await later.kept.load()
    assert (desk.kept.bytes_today(IRIS), later.kept.bytes_today(IRIS)) == (7, 7)
    later.now_s += 24 * 3600
    assert later.kept.bytes_today(IRIS) == 0


async def test_reach_sums_up_hosts_by_their_bytes_and_refusals_with_their_newest_reason(desk: Desk) -> None:
    desk.make("small.lan", received=10)
    desk.make("large.lan", received=1_000)
    desk.make("large.lan", "failed", sent=1)
    desk.make("no.lan", "refused", reason="the first")
    desk.now_s += 1
    desk.make("no.lan", "refused", reason="the second")
    desk.begin("open.lan")
    await desk.kept.flush()
    found = await reach(desk.hive.store, "iris", Span(hours=24), desk.kept.now_ms, MANY, YEAR_S)
    assert [(row["host"], row["connections"], row["failed"], row["open"]) for row in found["hosts"]] == [
        ("large.lan", 2, 1, 0),
        ("small.lan", 1, 0, 0),
        ("open.lan", 1, 0, 1),
    ]
    assert [(row["host"], row["count"], row["reason"]) for row in found["refusals"]] == [("no.lan", 2, "the second")]
    total = found["total"]
    assert (total["connections"], total["received"], total["refused"], found["kept_from_ms"]) == (4, 1_010, 2, None)


async def test_reach_looks_no_further_back_than_asked_nor_at_an_agent_that_had_the_name_before(desk: Desk) -> None:
    desk.make("old.lan")
    desk.now_s += 48 * 3600
    desk.make("new.lan")
    await desk.kept.flush()
    store, now_ms = desk.hive.store, desk.kept.now_ms
    assert [row["host"] for row in (await reach(store, "iris", Span(hours=24), now_ms, MANY, YEAR_S))["hosts"]] == [
        "new.lan"
    ]
    await desk.hive.sql("UPDATE agents SET created_at_ms = ? WHERE name = 'iris'", now_ms)
    assert [row["host"] for row in (await reach(store, "iris", Span(), now_ms, MANY, YEAR_S))["hosts"]] == ["new.lan"]
    assert (await reach(store, "damocles", Span(), now_ms, MANY, YEAR_S))["hosts"] == []


async def test_reach_tells_of_a_name_that_no_agent_has_now_as_long_as_something_is_kept(desk: Desk) -> None:
    desk.make("old.lan")
    await desk.kept.flush()
    await desk.hive.sql("DELETE FROM agents WHERE name = 'iris'")
    found = await reach(desk.hive.store, "iris", Span(), desk.kept.now_ms, MANY, YEAR_S)
    assert _reach(found).startswith("iris is no agent now")
    assert [row["host"] for row in found["hosts"]] == ["old.lan"]
    await desk.hive.sql("DELETE FROM connections")
    with pytest.raises(Refusal, match="no agent has that name"):
        await reach(desk.hive.store, "iris", Span(), desk.kept.now_ms, MANY, YEAR_S)


async def test_reach_says_whose_network_it_is(desk: Desk) -> None:
    async def told() -> str:
        found = await reach(desk.hive.store, "iris", Span(), desk.kept.now_ms, MANY, YEAR_S)
        return _reach(found).partition("\n")[0]

    assert await told() == "iris may reach nothing beside its model"
    await desk.hive.sql("UPDATE agents SET policy = ? WHERE name = 'iris'", json.dumps({"network": "host"}))
    assert await told() == "iris may reach what this machine does, and nothing tells of that: it has the host's network"


async def test_reach_says_from_when_on_connections_are_kept(desk: Desk) -> None:
    desk.make()
    await desk.kept.flush()
    found = await reach(desk.hive.store, "iris", Span(), desk.kept.now_ms, 1, YEAR_S)
    assert found["kept_from_ms"] == desk.kept.now_ms
    found = await reach(desk.hive.store, "iris", Span(hours=48), desk.kept.now_ms, MANY, 24 * 3600)
    assert found["kept_from_ms"] == desk.kept.now_ms - 24 * 3600 * 1000
