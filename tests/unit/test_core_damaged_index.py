"""A damaged index of the search is no damaged hive: it is made anew from the messages, and mail goes on meanwhile."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from hive_core.limits import Limits
from hive_core.protocol.words import AgentName
from hive_core.services.archive import Archive, parse_query
from hive_core.services.retention import Retention
from tests.hives import PATIENCE_S, Services, open_services

DAMAGES = {
    "no structure": "DELETE FROM message_words_data WHERE id = 10",
    "an empty structure": "UPDATE message_words_data SET block = zeroblob(length(block)) WHERE id = 10",
    "more pieces than memory": "UPDATE message_words_data SET block = x'0000000001020200ffffffff0f0101' WHERE id = 10",
    "leaves of noise": "UPDATE message_words_data SET block = x'ffffffffffffffffffff' WHERE id > 10",
    "no totals": "UPDATE message_words_data SET block = x'ff' WHERE id = 1",
}
# With the others it finds less, or all the same.
SEEN_BY_A_SEARCH = ("no structure", "more pieces than memory", "leaves of noise")


def archive_of(hive: Services) -> Archive:
    return Archive(hive.store, Limits(), hive.state_dir / "bodies")


async def found(archive: Archive) -> list[int]:
    return [message["id"] for message in (await archive.search(parse_query({"text": "word"})))["messages"]]


@asynccontextmanager
async def damaged(folder: Path, damage: str) -> AsyncIterator[Services]:
    """A hive with a message that is acked and one that waits, whose index was damaged while it was closed."""
    async with open_services(folder) as hive:
        await hive.add_agents("iris")
        for body in ("word one", "word two"):
            await hive.say("operator", "iris", body)
        assert await found(archive_of(hive)) == [2, 1]
        await hive.broker.ack(AgentName("iris"), (await hive.broker.lease(AgentName("iris"))).turn, "done")
    with contextlib.closing(sqlite3.connect(folder / "hive.sqlite", isolation_level=None)) as db:
        assert db.execute(DAMAGES[damage]).rowcount
    async with open_services(folder) as hive:
        yield hive
        await hive.sql("INSERT INTO message_words (message_words) VALUES ('integrity-check')")


@pytest.mark.parametrize("damage", [*SEEN_BY_A_SEARCH, "an empty structure"])
async def test_what_comes_is_indexed_and_all_is_found_again(
    tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hive_core.services.search_index.GATHER_S", 0.0)
    async with damaged(tmp_path, damage) as hive, trio.open_nursery() as nursery:
        nursery.start_soon(archive_of(hive).index.serve)
        with trio.fail_after(PATIENCE_S):
            while await found(archive_of(hive)) != [3, 2, 1]:
                if not await hive.value("SELECT count(*) FROM messages WHERE id = 3"):
                    await hive.say("operator", "iris", "word three")
        assert await hive.states() == {1: "acked", 2: "queued", 3: "queued"}
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("damage", SEEN_BY_A_SEARCH)
async def test_a_search_alone_mends_it_too_and_the_log_says_so(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with damaged(tmp_path, damage) as hive:
        with caplog.at_level(logging.WARNING):
            assert await found(archive_of(hive)) == [2, 1]
    assert "the index of the search is damaged" in caplog.text


@pytest.mark.parametrize("damage", DAMAGES)
async def test_what_is_old_is_forgotten_all_the_same(tmp_path: Path, damage: str) -> None:
    async with damaged(tmp_path, damage) as hive:
        hive.clock.ahead_s += 3600
        archive, forgotten = archive_of(hive), 0
        retention = Retention(hive.store, Limits(kept_s=60), archive.index)
        with trio.fail_after(PATIENCE_S):
            while not forgotten:  # what is not indexed anew yet waits for that
                await found(archive)
                forgotten += await retention.forget_old()
        assert await hive.states() == {2: "queued"}
        assert await hive.say("operator", "iris", "word three") == 3


@pytest.mark.parametrize("damage", SEEN_BY_A_SEARCH)
async def test_the_messages_of_an_agent_are_told_meanwhile(tmp_path: Path, damage: str) -> None:
    async with damaged(tmp_path, damage) as hive:
        assert [message["id"] for message in await hive.broker.messages.newest(AgentName("iris"))] == [1, 2]
        assert await found(archive_of(hive)) == [2, 1]
