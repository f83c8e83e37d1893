"""Search, threads, and what is found of whom."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import re
import sqlite3
import string
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from hive_core.cli import show
from hive_core.limits import Limits
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import OPERATOR, AgentName, parse_body
from hive_core.services.archive import Archive, Query, parse_query
from tests.hives import Services, held_writer, run_in_hive
from tests.processes import PATIENCE_S
from tests.tools import desk_for

IRIS, DAMOCLES, HM1ND = AgentName("iris"), AgentName("damocles"), AgentName("hm1nd")


def archive_of(hive: Services) -> Archive:
    return Archive(hive.store, Limits(), hive.state_dir / "bodies")


async def found(hive: Services, text: str = "", reader: AgentName | None = None, **more: Any) -> list[int]:
    answer = await archive_of(hive).search(parse_query({"text": text, **more}), reader)
    return [message["id"] for message in answer["messages"]]


async def deliver(hive: Services, agent: AgentName) -> None:
    """Let one turn of an agent take what waits first, and end well."""
    lease = await hive.broker.lease(agent)
    await hive.broker.ack(agent, lease.turn, "done")


async def test_a_message_is_found_by_its_words_newest_first_as_soon_as_it_is_sent(hive: Services) -> None:
    await hive.say("operator", "iris", "The login module leaks a token.")
    await hive.say("iris", "damocles", "Token of the LOGIN page: naïve, résumé later")
    assert await found(hive, "login token") == [2, 1]
    assert await found(hive, "resume") == [2]  # an accent is no reason to miss it
    assert await found(hive, "log*") == [2, 1]
    assert await found(hive, "log") == []
    assert await found(hive, '"login module"') == [1]
    assert await found(hive, '"module login"') == []
    assert await found(hive, "login nowhere") == []


async def test_an_answer_tells_who_to_whom_when_and_where_in_the_text(hive: Services) -> None:
    await hive.say("operator", "iris", "word " * 200 + "needle " + "word " * 200)
    await hive.broker.send(IRIS, (OPERATOR, DAMOCLES), parse_body("an answer"), 1)
    (needle,) = (await archive_of(hive).search(Query("needle")))["messages"]
    assert needle["sender"] == "operator"
    assert needle["recipients"] == ["iris"]
    assert needle["thread"] == 1
    assert needle["sent_at_ms"] == await hive.value("SELECT sent_at_ms FROM messages WHERE id = 1")
    assert "needle" in needle["snippet"]
    assert len(needle["snippet"]) < 400
    (answer,) = (await archive_of(hive).search(Query("answer")))["messages"]
    assert (answer["recipients"], answer["thread"]) == (["damocles", "operator"], 1)


async def test_filters_narrow_by_sender_thread_and_time(hive: Services) -> None:
    for n, sender in enumerate(("operator", "damocles", "hm1nd"), 1):
        await hive.say(sender, "iris", f"word {n}")
    await hive.say("operator", "iris", "word again", in_reply_to=1)
    for n in range(1, 5):
        await hive.sql("UPDATE messages SET sent_at_ms = ? WHERE id = ?", n * 86_400_000, n)
    assert await found(hive, "word", sender="damocles") == [2]
    assert await found(hive, sender="operator") == [4, 1]
    assert await found(hive, "word", thread=1) == await found(hive, "word", thread=4) == [4, 1]
    assert await found(hive, "word", after="1970-01-03") == [4, 3, 2]
    assert await found(hive, "word", before="1970-01-03T01:00:00+01:00") == [1]
    assert await found(hive, after="1970-01-03", before="1970-01-04") == [2]
    assert await found(hive) == [4, 3, 2, 1]


async def test_a_stretch_of_time_is_right_though_the_clock_was_set_back(hive: Services) -> None:
    archive = archive_of(hive)
    for number, second in enumerate((1, 2, 0, 1), 1):
        await hive.say("operator", "iris", "word")
        await hive.sql("UPDATE messages SET sent_at_ms = ? WHERE id = ?", second * 1000, number)
        await archive.search(Query("word"))  # each in a batch of its own
    for after, before, expected in ((2000, None, [2]), (None, 1000, [3]), (1000, 2000, [4, 1]), (3000, None, [])):
        answer = await archive.search(Query("word", after_at_ms=after, before_at_ms=before))
        assert [message["id"] for message in answer["messages"]] == expected


async def test_pages_follow_each_other_without_a_gap(hive: Services) -> None:
    for _ in range(7):
        await hive.say("operator", "iris", "word")
    archive, seen, cursor = archive_of(hive), [], None
    while True:
        answer = await archive.search(Query("word", limit=3, cursor=cursor))
        seen += [message["id"] for message in answer["messages"]]
        if (cursor := answer["next_cursor"]) is None:
            break
    assert seen == [7, 6, 5, 4, 3, 2, 1]


async def test_an_agent_finds_only_what_it_sent_or_was_handed(hive: Services) -> None:
    await hive.say("operator", "iris", "secret one")
    await hive.say("operator", "damocles", "secret two")
    await hive.say("iris", "damocles", "secret three")
    assert await found(hive, "secret", IRIS) == [3]  # the first waits: it is mail, and mail comes with a turn
    await deliver(hive, IRIS)
    assert await found(hive, "secret", IRIS) == [3, 1]
    assert await found(hive, "", IRIS) == [3, 1]
    assert await found(hive, "secret", HM1ND) == []
    assert await found(hive, "secret", IRIS, sender="operator") == [1]
    assert await found(hive, "secret", IRIS, thread=2) == []
    assert await found(hive, "secret") == [3, 2, 1]


async def test_what_is_held_is_not_found_by_whom_it_is_held_from(hive: Services) -> None:
    await hive.say("iris", "damocles", "runaway")
    await hive.sql("UPDATE deliveries SET state = 'held', held = 'hops'")
    assert await found(hive, "runaway", DAMOCLES) == []
    await hive.broker.messages.drop(1, OPERATOR)
    assert await found(hive, "runaway", DAMOCLES) == []
    assert await found(hive, "runaway", IRIS) == [1]


async def test_names_that_begin_alike_are_not_taken_for_each_other(hive: Services) -> None:
    await hive.add_agents("iris-two", "two")
    await hive.say("iris-two", "hm1nd", "word")
    await hive.say("two", "hm1nd", "word")
    assert await found(hive, "word", sender="iris") == []
    assert await found(hive, "word", sender="iris-two") == [1]
    assert await found(hive, "word", AgentName("two")) == [2]
    assert await found(hive, "iris") == []  # names are no words of the body


def keep_file(hive: Services, text: str) -> str:
    digest = hashlib.sha256(text.encode()).hexdigest()
    folder = hive.state_dir / "bodies" / digest[:2]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / digest).write_text(text)
    return digest


async def test_a_large_body_is_searched_whole(hive: Services) -> None:
    text = "beginning " + "word " * 40_000 + "the needle at the end"
    await hive.say("operator", "iris", text[:4096])
    sql = "UPDATE messages SET body_sha256 = ?, body_bytes = ? WHERE id = 1"
    await hive.sql(sql, keep_file(hive, text), len(text))
    answer = await archive_of(hive).search(Query("needle"))
    assert [message["id"] for message in answer["messages"]] == [1]
    assert "the needle at the end" in answer["messages"][0]["snippet"]


async def test_a_body_whose_file_is_lost_stops_no_other(hive: Services, caplog: pytest.LogCaptureFixture) -> None:
    await hive.say("operator", "iris", "lost")
    await hive.sql("UPDATE messages SET body_sha256 = ? WHERE id = 1", "a" * 64)
    await hive.say("operator", "iris", "kept")
    with caplog.at_level(logging.WARNING):
        assert await found(hive, "kept") == [2]
    assert "cannot read the body of message 1" in caplog.text


async def test_a_second_archive_on_the_same_store_indexes_nothing_twice(hive: Services) -> None:
    for _ in range(40):
        await hive.say("operator", "iris", "word")
    async with trio.open_nursery() as nursery:
        for _ in range(6):
            nursery.start_soon(archive_of(hive).search, Query("word"))
    assert await found(hive, "word", limit=50) == list(range(40, 0, -1))
    await hive.sql("INSERT INTO message_words (message_words) VALUES ('integrity-check')")


async def test_the_index_holds_what_the_messages_say_and_nothing_else(
    hive: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hive_core.services.search_index.BATCH", 10)
    for n in range(8):
        await hive.broker.send(IRIS, (DAMOCLES, HM1ND, OPERATOR), parse_body(f"word {n}"))
        thread = await hive.say("operator", "iris", "one word and another")
        await hive.say("iris", "operator", "Wörter, 漢字", in_reply_to=thread)
    assert len(await found(hive, "word", sender="iris")) == 8
    check = "INSERT INTO message_words (message_words, rank) VALUES ('integrity-check', 1)"  # 1: against the messages
    await hive.sql(check)
    await hive.sql("UPDATE messages SET sender = 'hm1nd' WHERE id = 1")
    with pytest.raises(sqlite3.DatabaseError, match="malformed"):
        await hive.sql(check)


async def test_one_transaction_indexes_no_more_than_its_bytes_but_one_message_always(
    hive: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hive_core.services.search_index.BATCH_BYTES", 1000)
    for size in (400, 600, 1, 5000, 10):
        await hive.say("operator", "iris", "x" * size)
    index, marks, more = archive_of(hive).index, [], True
    while more:
        more = await index._index_some()
        marks.append(await hive.value("SELECT message_id FROM search_mark"))
    assert marks == [2, 3, 4, 5]


async def test_the_index_follows_by_itself(hive: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hive_core.services.search_index.GATHER_S", 0.0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(archive_of(hive).index.serve)
        await hive.say("operator", "iris", "word")
        with trio.fail_after(PATIENCE_S):
            while await hive.value("SELECT message_id FROM search_mark") != 1:
                await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()


async def test_between_two_batches_the_index_rests_four_times_as_long_as_one_took(
    hive: Services, monkeypatch: pytest.MonkeyPatch, mock_clock: trio.testing.MockClock
) -> None:
    monkeypatch.setattr("hive_core.services.search_index.BATCH", 1)
    for _ in range(2):
        await hive.say("operator", "iris", "word")

    async def mark() -> int:
        return int(await hive.value("SELECT message_id FROM search_mark"))

    async with trio.open_nursery() as nursery:
        async with held_writer(hive.store, nursery):
            nursery.start_soon(archive_of(hive).index.serve)
            await trio.testing.wait_all_tasks_blocked()
            mock_clock.jump(1)
        while await mark() < 1:
            await trio.lowlevel.checkpoint()
        for jump_s in (0, 3.9):
            mock_clock.jump(jump_s)
            for _ in range(20):  # looks and writes in which another batch would have been indexed
                await hive.store.write(lambda tx: None)
                assert await mark() == 1
        mock_clock.jump(0.2)
        while await mark() < 2:
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()


async def test_on_a_full_disk_the_index_waits_and_says_so_and_goes_on_by_itself(
    hive: Services, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("hive_core.services.search_index.BUSY_REST_S", 0.0)
    await hive.say("operator", "iris", "word")
    hive.set_full(True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(archive_of(hive).index.serve)
        assert await archive_of(hive).search(Query("word")) == {"messages": [], "next_cursor": None, "unindexed": 1}
        with trio.fail_after(PATIENCE_S):
            while "the search is late: no space is left" not in caplog.text:
                await trio.lowlevel.checkpoint()
            hive.set_full(False)
            while await hive.value("SELECT message_id FROM search_mark") != 1:
                await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()


async def test_a_search_that_cannot_catch_up_says_what_it_has_not_seen(
    hive: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hive_core.services.search_index.CATCH_UP_S", 0.0)
    for _ in range(3):
        await hive.say("operator", "iris", "word")
    answer = await archive_of(hive).search(Query("word"))
    assert answer == {"messages": [], "next_cursor": None, "unindexed": 3}


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ({"text": "a" * 1001}, "1,001 bytes and the limit is 1,000"),
        ({"text": 7}, "must be a string"),
        ({"text": " ".join(f"w{n}" for n in range(17))}, "17 different words and phrases, and the limit is 16"),
        ({"text": "fine a*"}, r"'a\*': .* needs 2 characters"),
        ({"text": "path/x*"}, r"'path/x\*': .* needs 2 characters"),
        ({"text": '"two words b*"'}, "needs 2 characters"),
        ({"text": "e\u0301*"}, "needs 2 characters"),
        ({"text": "\U0001f600"}, "no letter and no digit"),
        ({"text": "- * ***"}, "no letter and no digit"),
        ({"text": '""'}, "no letter and no digit"),
        ({"limit": 51}, "give 1 to 50"),
        ({"limit": True}, "give 1 to 50"),
        ({"sender": "No One"}, "agent's name"),
        ({"after": "yesterday"}, "as `after`: give an instant such as"),
        ({"before": "9999-99-99"}, "as `before`"),
        ({"thread": 0}, "positive whole number"),
    ],
)
def test_a_search_that_makes_no_sense_is_told_why(args: dict[str, Any], why: str) -> None:
    with pytest.raises(Refusal, match=why) as caught:
        parse_query(args)
    assert caught.value.code == "usage"


async def test_signs_beside_words_are_passed_over_and_a_word_that_is_said_again_counts_once(hive: Services) -> None:
    await hive.say("operator", "iris", "C++ is fun, under_score")
    for text in ("c++", "fun -", "- \U0001f600 fun", "fun * is", "is fun " * 40, "un*", "under_sc*", "_ fun"):
        assert await found(hive, text) == [1]
    assert await found(hive, " ".join(["fun"] + ["-"] * 40)) == [1]


@pytest.mark.parametrize("reader", [None, IRIS])
async def test_a_search_that_takes_too_long_is_ended_and_says_what_to_do(
    hive: Services, reader: AgentName | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("hive_core.store.door.SEARCH_STEPS", 1)
    await hive.say("iris", "operator", "word")
    for text in ("word", ""):
        with monkeypatch.context() as patch:
            patch.setattr("hive_core.services.archive.SEARCH_S", 0.0)
            with pytest.raises(Refusal, match=r"ran for 0 s.* fewer or longer words.* sender, thread") as caught:
                await found(hive, text, reader)
        assert caught.value.code == "refused"
        assert await found(hive, text, reader) == [1]
    assert caplog.text == ""  # the index is not taken for a damaged one


async def test_wherever_a_search_is_ended_the_index_is_not_taken_for_a_damaged_one(
    hive: Services, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for n in range(6):
        await hive.say("iris", "operator", f"word {n} wonder world {'more ' * n}")
        await found(hive, "word")
    monkeypatch.setattr("hive_core.store.door.SEARCH_STEPS", 1)
    looks = SimpleNamespace(monotonic=itertools.count().__next__)  # each of them one second later
    monkeypatch.setattr("hive_core.store.door.time", looks)
    answers = []
    for limit_s in range(1, 2000, 5):
        monkeypatch.setattr("hive_core.services.archive.SEARCH_S", limit_s)
        with contextlib.suppress(Refusal):
            answers.append((limit_s, await found(hive, 'wo* "word 5"', IRIS)))
            break
    ((limit_s, answer),) = answers
    assert answer == [6]
    assert limit_s > 100
    assert caplog.text == ""


PIECES = st.one_of(
    st.sampled_from(
        ['"', "*", "^", ":", "(", ")", "{", "}", "-", "+", "AND", "OR", "NOT", "NEAR(", "body:", "marks", "'"]
    ),
    st.text(alphabet=string.printable + "äßİ漢\u200d\u0301\0\ud800", max_size=12),
)


@given(st.lists(st.tuples(PIECES, st.sampled_from(["", " "])), max_size=12))
@settings(max_examples=60, deadline=None)
def test_any_input_is_a_search(pieces: list[tuple[str, str]]) -> None:
    text = "".join(piece + gap for piece, gap in pieces)

    async def test(hive: Services) -> None:
        await hive.say("operator", "iris", "one body AND another NOT near marks")
        await hive.say("iris", "hm1nd", "what iris alone may see")
        await deliver(hive, IRIS)
        try:
            query = parse_query({"text": text})
        except Refusal as refusal:
            assert re.search("no letter and no digit|needs 2 characters", refusal.message)
            return
        for reader in (None, IRIS, DAMOCLES):
            answer = await archive_of(hive).search(query, reader)
            assert reader != DAMOCLES or answer["messages"] == []

    run_in_hive(test, "hm1nd", "iris", "damocles")


@given(st.text(min_size=1, max_size=60).filter(lambda text: text.strip() and "\0" not in text))
@settings(max_examples=60, deadline=None)
def test_a_body_of_words_is_found_by_each_of_its_words(text: str) -> None:
    words = [word for word in text.split() if word.isascii() and word.isalnum()]

    async def test(hive: Services) -> None:
        await hive.say("operator", "iris", text)
        for word in words:
            assert await found(hive, word) == [1]
            assert await found(hive, f'"{word}"', sender="operator") == [1]

    try:
        text.encode()
    except UnicodeEncodeError:
        return
    run_in_hive(test, "iris")


async def test_the_tool_is_the_agents_own_and_reads_only(hive: Services) -> None:
    desk = desk_for(hive, IRIS)
    await hive.say("iris", "hm1nd", "mine")
    await hive.say("operator", "damocles", "not mine")
    answer = await desk.call("search_messages", {"text": "mine"}, None)
    assert [message["id"] for message in answer["messages"]] == [1]
    annotations = desk.tools["search_messages"].to_mcp().annotations
    assert annotations is not None
    assert annotations.read_only_hint
    with pytest.raises(Refusal, match="limit"):
        await desk.call("search_messages", {"limit": 1000}, None)


async def test_a_thread_is_whole_and_in_order_whichever_message_is_named(hive: Services) -> None:
    await hive.say("operator", "iris", "one")
    await hive.say("operator", "damocles", "of another thread")
    await hive.broker.send(IRIS, (OPERATOR, DAMOCLES), parse_body("two"), 1)
    await hive.say("damocles", "iris", "three", in_reply_to=3)
    archive = archive_of(hive)
    for number in (1, 3, 4):
        thread = await archive.thread(number)
        assert thread["thread"] == 1
        assert [message["body"] for message in thread["messages"]] == ["one", "two", "three"]
    recipients = thread["messages"][1]["recipients"]
    assert [(one["recipient"], one["state"]) for one in recipients] == [("damocles", "queued"), ("operator", "queued")]
    assert (await archive.thread(2))["thread"] == 2
    with pytest.raises(Refusal, match=r"cannot find message 9: .* 30 days \(kept_s\)"):
        await archive.thread(9)


async def test_a_long_thread_comes_in_pieces(hive: Services) -> None:
    first = await hive.say("operator", "iris", "0")
    for n in range(1, 6):
        await hive.say("operator", "iris", str(n), in_reply_to=first)
    archive, seen, after = archive_of(hive), "", 0
    while after is not None:
        piece = await archive.thread(first, after, 2)
        seen, after = seen + "".join(message["body"] for message in piece["messages"]), piece["next_after"]
    assert seen == "012345"


async def test_what_was_found_is_text_in_the_terminal_and_nothing_more(hive: Services) -> None:
    await hive.say("operator", "iris", "word \x1b[2J \u202e hidden")
    found_line = show.found((await archive_of(hive).search(Query("word")))["messages"][0])
    thread = show.thread(await archive_of(hive).thread(1, 0, 1))
    for text in (found_line, thread):
        assert "word" in text
        assert "iris" in text
        assert "\x1b" not in text
        assert "\u202e" not in text
    await hive.say("iris", "operator", "more", in_reply_to=1)
    assert "it goes on: `hive thread 1 --after 1`" in show.thread(await archive_of(hive).thread(1, 0, 1))


def test_the_bodies_lie_where_the_daemon_keeps_them(tmp_path: Path) -> None:
    from hive_core.config import Config

    assert Config(state_dir=tmp_path, runtime_dir=tmp_path).bodies_dir == tmp_path / "bodies"
