"""A database of the release before, with real rows, opened by this one: every row is there and right."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from hive_core.limits import Limits
from hive_core.protocol.words import OPERATOR, AgentName
from hive_core.services.archive import Archive, Query
from hive_core.services.leases import Turn
from hive_core.services.reminders import When
from hive_core.services.retention import Retention
from hive_core.services.schedules import parse_plan
from hive_core.store.schema import APPLICATION_ID, migrations
from tests.hives import Services, open_services

IRIS = AgentName("iris")
# What the first schema alone could hold: every state of a delivery and of a turn, threads, calls, lines, cards.
ROWS = """
    INSERT INTO agents VALUES
      ('hm1nd', 'manager', 'up', 8000, NULL, NULL, NULL, 1),
      ('iris', 'agent', 'paused', 8100, 'abc', '{"program": "rehearsal"}', 's-1', 2);
    INSERT INTO messages VALUES
      (1, 'operator', 'hé\U0001f600llo', NULL, 1000),
      (2, 'iris', 'an answer', 1, 2000),
      (3, 'operator', 'another', 2, 3000),
      (4, 'system', 'poison', NULL, 4000),
      (5, 'hm1nd', 'tried twice', NULL, 5000),
      (6, 'hm1nd', 'in a turn', NULL, 6000),
      (8, 'iris', 'to the operator', NULL, 8000);
    INSERT INTO turns VALUES
      (1, 'iris', 'a', 'done', 1001, 1009, NULL, '{"num_turns": 1}', 2),
      (2, 'iris', 'b', 'failed', 4001, 4009, 'it broke', NULL, 0),
      (3, 'iris', 'c', 'lost', 5001, 5009, 'its harness went away', NULL, 0),
      (4, 'iris', 'd', 'running', 6001, NULL, NULL, NULL, 1);
    INSERT INTO deliveries VALUES
      (1, 'iris', 'acked', 1, 1000, 1),
      (2, 'operator', 'acked', 0, 2000, NULL),
      (3, 'iris', 'acked', 1, 3000, 1),
      (4, 'iris', 'dead', 5, 4009, 2),
      (5, 'iris', 'queued', 2, 5013, 3),
      (6, 'iris', 'leased', 1, 6000, 4),
      (8, 'operator', 'queued', 0, 8000, NULL);
    INSERT INTO turn_lines VALUES
      (1, 'iris', 1, 0, 1002, 'one'), (2, 'iris', 1, 1, 1003, 'two'), (9, 'iris', 4, 0, 6002, 'three');
    INSERT INTO tool_calls VALUES
      ('iris', 'k-send', 'send', '{"message": 2}', 2000),
      ('iris', 'k-recv', 'recv', '{"messages": [], "waiting": 0}', 2001);
    INSERT INTO approvals VALUES
      (1, 'spawn', 'argus', 'hm1nd', 'two eyes', '{"persona": "You watch."}', 'd1', 'pending', NULL, 7000, NULL, NULL);
    INSERT INTO events VALUES
      (1, 1000, 'message_sent', 'operator', 'iris', '{"message": 1}'),
      (7, 6001, 'turn_started', 'iris', 'iris', '{"turn": 4, "message": 6}');
    INSERT INTO sign_ins VALUES ('cookie', 1, 2);
"""


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A state directory whose database the first migration alone has made."""
    with closing(sqlite3.connect(tmp_path / "hive.sqlite", isolation_level=None)) as connection:
        connection.executescript(migrations()[0][1])
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute("PRAGMA user_version = 1")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.executescript(ROWS)
    return tmp_path


@pytest.fixture
async def hive(old: Path) -> AsyncIterator[Services]:
    async with open_services(old) as services:
        yield services


async def rows(hive: Services, sql: str) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in await hive.store.rows(sql)]


async def test_every_message_is_there_with_its_size_its_thread_and_its_sender(hive: Services) -> None:
    columns = "id, sender, body, body_bytes, body_sha256, in_reply_to, thread_id, client_id, sent_at_ms"
    assert await rows(hive, f"SELECT {columns} FROM messages ORDER BY id") == [
        (1, "operator", "hé\U0001f600llo", 10, None, None, None, None, 1000),
        (2, "iris", "an answer", 9, None, 1, 1, "k-send", 2000),
        (3, "operator", "another", 7, None, 2, 1, None, 3000),
        (4, "system", "poison", 6, None, None, None, None, 4000),
        (5, "hm1nd", "tried twice", 11, None, None, None, None, 5000),
        (6, "hm1nd", "in a turn", 9, None, None, None, None, 6000),
        (8, "iris", "to the operator", 15, None, None, None, None, 8000),
    ]


async def test_every_message_is_caused_by_its_sender_and_begins_a_chain(hive: Services) -> None:
    causes = [("operator", 1), ("turn", 2), ("operator", 3), ("system", 4), ("turn", 5), ("turn", 6), ("turn", 8)]
    found = await rows(hive, "SELECT cause, cause_id, chain_id, hops FROM messages ORDER BY id")
    assert found == [(cause, None, number, 0) for cause, number in causes]


async def test_every_delivery_is_there_with_its_state_its_tries_and_when_it_was_settled(hive: Services) -> None:
    columns = "message_id, recipient, sender, state, attempts, failures, sent_at_ms, available_at_ms, settled_at_ms"
    assert await rows(hive, f"SELECT {columns}, turn_id FROM deliveries ORDER BY message_id") == [
        (1, "iris", "operator", "acked", 1, 0, 1000, 1000, 1000, 1),
        (2, "operator", "iris", "acked", 0, 0, 2000, 2000, 2000, None),
        (3, "iris", "operator", "acked", 1, 0, 3000, 3000, 3000, 1),
        (4, "iris", "system", "dead", 5, 5, 4000, 4009, 4009, 2),
        (5, "iris", "hm1nd", "queued", 2, 2, 5000, 5013, None, 3),
        (6, "iris", "hm1nd", "leased", 1, 0, 6000, 6000, None, 4),
        (8, "operator", "iris", "queued", 0, 0, 8000, 8000, None, None),
    ]


async def test_every_turn_is_there_with_its_lines_and_the_messages_it_had(hive: Services) -> None:
    columns = "id, agent, fence, state, message_id, chain_id, hops, started_at_ms, ended_at_ms, error, usage, lines"
    assert await rows(hive, f"SELECT {columns} FROM turns ORDER BY id") == [
        (1, "iris", "a", "done", 1, 1, 0, 1001, 1009, None, '{"num_turns": 1}', 2),
        (2, "iris", "b", "failed", 4, 4, 0, 4001, 4009, "it broke", None, 0),
        (3, "iris", "c", "lost", 5, 5, 0, 5001, 5009, "its harness went away", None, 0),
        (4, "iris", "d", "running", 6, 6, 0, 6001, None, None, None, 1),
    ]
    sql = "SELECT turn_id, message_id, attempt, at_ms FROM leases ORDER BY 1, 2"
    assert await rows(hive, sql) == [
        (1, 1, 1, 1001),
        (1, 3, 1, 1001),
        (2, 4, 5, 4001),
        (3, 5, 2, 5001),
        (4, 6, 1, 6001),
    ]
    assert [(row["id"], row["line"]) for row in await hive.turns.lines_after("iris", 0)] == [
        (1, "one"),
        (2, "two"),
        (9, "three"),
    ]
    assert await hive.value("SELECT line_bytes FROM agents WHERE name = 'iris'") == len("onetwothree")


async def test_what_the_migration_had_no_business_with_is_as_it_was(hive: Services) -> None:
    agents = await rows(
        hive, "SELECT name, wanted, page_port, deployed_sha, session, policy, refused FROM agents ORDER BY 1"
    )
    assert agents == [
        ("hm1nd", "up", 8000, None, None, "{}", 0),
        ("iris", "paused", 8100, "abc", "s-1", "{}", 0),
    ]
    assert await rows(hive, "SELECT seq, kind, message_id FROM events") == [
        (1, "message_sent", None),
        (7, "turn_started", None),
    ]
    assert [card.id for card in await hive.approvals.pending()] == [1]
    assert await hive.value("SELECT count(*) FROM sign_ins") == 1
    assert await hive.value("SELECT count(*) FROM tool_calls") == 2


async def test_nothing_refers_to_what_is_not_there_and_the_file_is_sound(hive: Services) -> None:
    assert await rows(hive, "PRAGMA foreign_key_check") == []
    assert await rows(hive, "PRAGMA integrity_check") == [("ok",)]
    assert await hive.value("PRAGMA user_version") == len(migrations())


async def test_the_hive_goes_on_where_it_was(hive: Services) -> None:
    # The harness of the turn that ran while the daemon was replaced comes back with its fence.
    assert await hive.broker.close_lost_turns(IRIS, ["d"]) == (4, [])
    acked = await hive.broker.ack(IRIS, Turn(4, "d"), "done")
    assert acked.counted
    assert await hive.states() == {1: "acked", 3: "acked", 4: "dead", 5: "queued", 6: "acked"}
    # A call of before that is sent again is the same message; a new one gets a number of its own.
    assert await hive.say("iris", "operator", "an answer", in_reply_to=1, key="k-send") == 2
    assert await hive.say("operator", "iris", "more", in_reply_to=3) == 9
    assert await hive.value("SELECT thread_id FROM messages WHERE id = 9") == 1
    await hive.agents.want(IRIS, "up", "operator")
    begun = await hive.broker.lease(IRIS)
    assert (begun.turn.id, begun.message["id"], begun.message["attempt"]) == (5, 5, 3)
    assert await hive.broker.messages.requeue(4, OPERATOR) == ["iris"]
    assert [m["id"] for m in await hive.broker.messages.inbox()] == [2, 8]


async def test_opening_it_again_changes_nothing(old: Path) -> None:
    dumps = []
    for _ in range(2):
        async with open_services(old):
            pass
        with closing(sqlite3.connect(old / "hive.sqlite")) as connection:
            dumps.append(
                [connection.execute(f"SELECT * FROM {name}").fetchall() for name in ("messages", "deliveries", "turns")]
            )
    assert dumps[0] == dumps[1]


async def test_what_is_old_is_forgotten_as_of_the_last_instant_that_the_events_know(hive: Services) -> None:
    """A clock that is wrong at the first start of this release takes nothing."""
    assert await rows(hive, "SELECT shows_ms, wall_ms FROM retention_clock") == [(6001, 6001)]
    archive = Archive(hive.store, Limits(), hive.state_dir / "bodies")
    await archive.search(Query("word"))
    assert await Retention(hive.store, Limits(), archive.index).forget_old() == 0


async def test_numbers_of_what_is_gone_are_not_given_again(tmp_path: Path) -> None:
    """Tables that were made anew count on from where the old ones were."""
    before = [step for step in migrations() if step[0] < 7]
    with closing(sqlite3.connect(tmp_path / "hive.sqlite", isolation_level=None)) as connection:
        for _, sql in before:
            connection.executescript(sql)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute("PRAGMA user_version = 6")
        connection.executescript(
            """
            INSERT INTO agents (name, role, wanted, page_port, created_at_ms) VALUES ('iris', 'agent', 'up', 8100, 1);
            INSERT INTO reminders (id, agent, body, set_at_ms, due_at_ms, hops, state) VALUES
              (41, 'iris', 'first', 1, 2, 0, 'fired'), (42, 'iris', 'last', 1, 2, 0, 'fired');
            DELETE FROM reminders WHERE id = 42;
            INSERT INTO schedules (id, agent, body, every_ms, state, created_at_ms, moved_at_ms)
            VALUES (7, 'iris', 'gone', 1000, 'removed', 1, 1);
            DELETE FROM schedules;
            """
        )
    async with open_services(tmp_path) as hive:
        assert await hive.value("SELECT body FROM reminders") == "first"
        assert (await hive.reminders.remind(IRIS, When(None, 60), "next"))["reminder"] == 43
        assert (await hive.schedules.add(parse_plan("iris", "by the clock", None, None, 60)))["schedule"] == 8
        assert await rows(hive, "PRAGMA foreign_key_check") == []
