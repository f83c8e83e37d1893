"""What the pages show of a message's life, and what the operator does to it there."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from dashboard.live import FLOW_LIMIT
from dashboard.rows import Rows
from hive_core.limits import Limits
from hive_core.protocol.held import WHY_HELD
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName, parse_body
from hive_core.services.flow import messages_aside, newest_messages
from hive_core.services.history import forget_history
from tests.dashboards import OURS, Frame, browse, hive_of, served
from tests.hives import Services, open_services

IRIS, DAMOCLES, HM1ND, OPERATOR = map(AgentName, ("iris", "damocles", "hm1nd", "operator"))
SCRIPT = {**OURS, "Accept": "application/json"}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}  # a form without a field says so too
LIMITS = Limits(tries=1, pair_rate_per_hour=2, inbox_depth=3)


@pytest.fixture
async def hive(tmp_path: Path) -> AsyncIterator[Services]:
    """One failed turn is death, two messages of a pair are the limit, three fill an inbox."""
    async with open_services(tmp_path, limits=LIMITS) as services:
        await services.add_agents("hm1nd", "iris", "damocles")
        yield services


async def send(hive: Services, sender: str, recipients: list[str], body: str = "hi") -> int:
    sent = await hive.broker.send(AgentName(sender), [AgentName(name) for name in recipients], parse_body(body))
    return int(sent["message"])


async def make_dead(hive: Services) -> int:
    message = await hive.say("operator", "iris", "work")
    await hive.broker.ack(IRIS, (await hive.broker.lease(IRIS)).turn, "failed", "it <b>broke</b>")
    return message


async def make_held(hive: Services) -> int:
    for _ in range(LIMITS.pair_rate_per_hour):
        await hive.say("iris", "damocles", "fine")
    return await hive.say("iris", "damocles", "one too many")


async def row(hive: Services, message: int, agent: str | None = None) -> str:
    (found,) = [one for one in await newest_messages(hive.store, agent, 100) if one["id"] == message]
    return str(Rows(hive_of(hive)).message(found))


async def post(client: httpx2.AsyncClient, path: str) -> Any:
    answer = await client.post(path, headers={**SCRIPT, **FORM}, content=b"")
    return answer.status_code, answer.json()


def by_target(frames: list[Frame]) -> dict[str, Any]:
    return {frame.target: frame.data for frame in frames}


# -- rows -------------------------------------------------------------------------------------------------------------


async def test_a_message_to_many_is_one_row_with_the_state_of_every_recipient(hive: Services) -> None:
    message = await send(hive, "operator", ["iris", "damocles", "hm1nd"])
    await hive.broker.ack(IRIS, (await hive.broker.lease(IRIS)).turn, "done")
    await hive.broker.lease(DAMOCLES)
    async with browse(hive_of(hive)) as client:
        page = (await client.get("/")).text
    assert page.count(f'id="message-{message}"') == 1
    assert 'data-to="damocles hm1nd iris" data-delivery="mixed"' in page
    for name, state in (("iris", "acked"), ("damocles", "leased"), ("hm1nd", "queued")):
        assert f'data-recipient="{name}" data-delivery="{state}"' in page
    assert "1 acked · 1 in turn · 1 queued" in page


async def test_a_message_to_everyone_folds_its_recipients_away(hive: Services) -> None:
    await hive.add_agents(*(f"a-{n}" for n in range(20)))
    html = await row(hive, await send(hive, "operator", ["*"]))
    assert '<details class="recipients">' in html
    assert "23 queued" in html
    assert "<span>23 recipients</span>" in html


async def test_the_page_shows_as_many_messages_however_many_recipients_they_have(hive: Services) -> None:
    for _ in range(3):
        await send(hive, "operator", ["*"])
    assert [one["id"] for one in await newest_messages(hive.store, None, 2)] == [2, 3]
    assert [one["id"] for one in await newest_messages(hive.store, "iris", 2)] == [2, 3]


async def test_an_agents_page_shows_what_it_sent_and_got_and_nothing_else(hive: Services) -> None:
    sent = await send(hive, "iris", ["damocles", "hm1nd"])
    await send(hive, "operator", ["damocles", "hm1nd"])
    got = await send(hive, "hm1nd", ["iris", "operator"])
    assert [one["id"] for one in await newest_messages(hive.store, "iris", 9)] == [sent, got]
    assert 'data-recipient="hm1nd"' in await row(hive, sent, "iris")


async def test_a_row_names_the_turn_that_set_it_off_and_leads_there(hive: Services) -> None:
    first = await hive.say("operator", "iris", "work")
    turn = (await hive.broker.lease(IRIS)).turn
    html = await row(hive, await hive.say("iris", "damocles", "done"))
    ours = hive_of(hive)
    assert f'<a href="{ours.page_url("iris")}#turn-{turn.id}">turn {turn.id}</a>' in html
    assert f"1 turn lies between it and message {first}" in html
    assert "cause" not in await row(hive, first)


async def test_a_redelivered_message_says_how_often_it_was_handed_out(hive: Services) -> None:
    message = await hive.say("operator", "iris", "work")
    assert "try" not in await row(hive, message)
    for _ in range(3):
        await hive.broker.ack(IRIS, (await hive.broker.lease(IRIS)).turn, "waiting")
        await hive.let_time_pass()
    await hive.broker.lease(IRIS)
    assert ">try 4<" in await row(hive, message)


async def test_a_large_message_says_how_much_more_there_is_and_how_to_read_it(hive: Services) -> None:
    html = await row(hive, await hive.say("operator", "iris", "é" * 100_000))
    assert "195,904 more bytes: hive read 1" in html
    assert "more bytes" not in await row(hive, await hive.say("operator", "iris", "é" * 100))


# -- held and dead ----------------------------------------------------------------------------------------------------


async def test_held_and_dead_messages_wait_in_the_attention_column_with_why_and_what_to_do(hive: Services) -> None:
    dead, held = await make_dead(hive), await make_held(hive)
    async with browse(hive_of(hive)) as client:
        page = (await client.get("/")).text
    assert "<title>(2) hyperhive</title>" in page
    assert 'data-counts="pending aside" data-title>2<' in page
    first, second = (page.index(f'id="aside-{number}"') for number in (dead, held))
    dead_card, held_card = page[first:second], page[second : page.index("recent decisions")]
    assert "iris, after 1 failed turn: it &lt;b&gt;broke&lt;/b&gt;" in dead_card
    assert WHY_HELD["rate"] in held_card
    assert [f"/{verb}" in dead_card for verb in ("requeue", "drop", "release")] == [True, True, False]
    assert [f"/{verb}" in held_card for verb in ("requeue", "drop", "release")] == [False, True, True]


async def test_a_message_that_is_held_from_some_is_one_card(hive: Services) -> None:
    await make_held(hive)
    for _ in range(LIMITS.pair_rate_per_hour):
        await hive.say("iris", "operator", "fine")
    message = await send(hive, "iris", ["damocles", "hm1nd", "operator"])
    card = Rows(hive_of(hive)).aside((await messages_aside(hive.store))[-1])
    assert f'id="aside-{message}"' in card
    assert "iris → damocles, operator</b>" in card


@pytest.mark.parametrize(
    ("make", "verb", "said", "state"),
    [
        (make_held, "release", "message 3 is on its way to damocles", "queued"),
        (make_held, "drop", "message 3 is dropped: damocles will not get it", "dropped"),
        (make_dead, "requeue", "message 1 goes to iris again", "queued"),
        (make_dead, "drop", "message 1 is dropped: iris will not get it", "dropped"),
    ],
)
async def test_a_button_moves_the_message_once(hive: Services, make: Any, verb: str, said: str, state: str) -> None:
    message = await make(hive)
    async with browse(hive_of(hive)) as client:
        assert await post(client, f"/messages/{message}/{verb}") == (200, {"ok": True, "said": said})
        assert await hive.value("SELECT state FROM deliveries WHERE message_id = ?", message) == state
        status, answer = await post(client, f"/messages/{message}/{verb}")
        assert (status, answer["error"]["code"]) == (404, "not_found")
        page = (await client.get("/")).text
    assert f'id="aside-{message}"' not in page


@pytest.mark.parametrize("verb", ["release", "requeue", "drop"])
async def test_the_buttons_have_the_guards_of_every_other_form(hive: Services, verb: str) -> None:
    message = await make_held(hive) if verb == "release" else await make_dead(hive)
    path = f"/messages/{message}/{verb}"
    async with browse(hive_of(hive)) as client:
        for headers in (
            {"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site"},
            {"Origin": "http://hive.localhost:8100", "Sec-Fetch-Site": "same-site"},
            {"Host": "evil.example"},
        ):
            answer = await client.post(path, headers={**SCRIPT, **FORM, **headers}, content=b"")
            assert answer.status_code in (400, 403, 421), headers
        assert (await client.get(path)).status_code == 405
        plain = await client.post(path, headers={**OURS, "Content-Type": "text/plain"}, content=b"x")
        assert plain.status_code == 415
    async with browse(hive_of(hive), headers={}) as stranger:
        assert (await post(stranger, path))[0] == 401
    assert len(await messages_aside(hive.store)) == 1


async def test_a_number_that_is_none_is_refused(hive: Services) -> None:
    async with browse(hive_of(hive)) as client:
        for number in ("0", "x", "9" * 30):
            assert (await post(client, f"/messages/{number}/drop"))[0] == 400
        assert (await post(client, "/messages/7/drop"))[0] == 404


async def test_an_agents_row_shows_what_its_full_inbox_did_not_take(hive: Services) -> None:
    for _ in range(LIMITS.inbox_depth):
        await hive.say("operator", "iris", "fill")
    rows = Rows(hive_of(hive))
    assert "refused" not in rows.agent(await hive.agents.get("iris"))
    with pytest.raises(Refusal):
        await hive.say("operator", "iris", "one more")
    assert "inbox full · 1 refused" in rows.agent(await hive.agents.get("iris"))
    await hive.broker.lease(IRIS)
    shown = rows.agent(await hive.agents.get("iris"))
    assert ("1 refused" in shown, "inbox full" in shown) == (True, False)


# -- live -------------------------------------------------------------------------------------------------------------


async def test_every_step_of_a_held_message_is_told_as_it_happens(hive: Services) -> None:
    async with served(hive_of(hive)) as browser, browser.stream(f"/live?after={hive.at(0)}") as stream:
        held = await make_held(hive)
        told = by_target(await stream.until(f"aside-{held}"))
        assert 'data-delivery="held"' in told[f"message-{held}"]["html"]
        assert told[f"aside-{held}"]["list"] == "aside"
        assert "/release" in told[f"aside-{held}"]["html"]
        await hive.broker.messages.release(held, OPERATOR)
        told = by_target(await stream.until(f"aside-{held}"))
        assert told[f"aside-{held}"]["html"] == ""
        assert 'data-delivery="queued"' in told[f"message-{held}"]["html"]
        assert told[f"message-{held}"]["list"] is None


async def test_every_step_of_a_dead_message_is_told_as_it_happens(hive: Services) -> None:
    async with served(hive_of(hive)) as browser, browser.stream(f"/live?after={hive.at(0)}") as stream:
        dead = await make_dead(hive)
        told = by_target(await stream.until(f"aside-{dead}"))
        assert "1 dead" in told["agent-iris"]["html"]
        assert "/requeue" in told[f"aside-{dead}"]["html"]
        await hive.broker.messages.requeue(dead, OPERATOR)
        assert (await stream.until(f"aside-{dead}"))[-1].data["html"] == ""
        await hive.broker.ack(IRIS, (await hive.broker.lease(IRIS)).turn, "failed", "again")
        told = by_target(await stream.until(f"aside-{dead}"))
        assert "again" in told[f"aside-{dead}"]["html"]
        await hive.broker.messages.drop(dead, OPERATOR)
        told = by_target(await stream.until(f"aside-{dead}"))
        assert told[f"aside-{dead}"]["html"] == ""
        assert 'data-delivery="dropped"' in told[f"message-{dead}"]["html"]


async def test_a_full_inbox_is_told_at_its_agent(hive: Services) -> None:
    for _ in range(LIMITS.inbox_depth):
        await hive.say("operator", "iris", "fill")
    async with served(hive_of(hive)) as browser, browser.stream(f"/live?after={hive.at(0)}") as stream:
        assert "refused" not in (await stream.until("agent-iris"))[-1].data["html"]
        with pytest.raises(Refusal):
            await hive.say("operator", "iris", "one more")
        assert "inbox full · 1 refused" in (await stream.until("agent-iris"))[-1].data["html"]


async def test_each_recipients_step_of_one_message_is_told_in_its_one_row(hive: Services) -> None:
    async with served(hive_of(hive)) as browser, browser.stream(f"/live?after={hive.at(0)}") as stream:
        message = await send(hive, "operator", ["iris", "damocles"])
        await stream.until(f"message-{message}")
        turn = (await hive.broker.lease(DAMOCLES)).turn
        html = (await stream.until(f"message-{message}"))[-1].data["html"]
        assert 'data-recipient="damocles" data-delivery="leased"' in html
        assert 'data-recipient="iris" data-delivery="queued"' in html
        await hive.broker.ack(DAMOCLES, turn, "done")
        html = (await stream.until(f"message-{message}"))[-1].data["html"]
        assert 'data-recipient="damocles" data-delivery="acked"' in html


async def test_a_flood_of_wide_messages_hides_none_of_the_newest(hive: Services) -> None:
    """More deliveries than a page holds messages: the rows count messages."""
    await hive.add_agents(*(f"a-{n}" for n in range(100)))
    async with served(hive_of(hive)) as browser:
        after = await hive.store.last_seq()
        numbers = [await send(hive, "operator", ["*"]) for _ in range(3)]
        assert FLOW_LIMIT < 3 * 103
        told = await browser.told(f"/live?after={hive.at(after)}", f"message-{numbers[-1]}")
    assert {f"message-{number}" for number in numbers} <= {frame.target for frame in told}


# -- what is not kept any more ----------------------------------------------------------------------------------------


async def test_a_page_that_has_missed_events_which_are_gone_loads_itself_again(hive: Services) -> None:
    for number in range(5):
        await hive.say("operator", "iris", f"message {number}") if number < 3 else await hive.agents.want(
            IRIS, "up", "operator"
        )
    last = await hive.store.last_seq()
    # Of an old message an event is kept, and fills no gap.
    await hive.sql("UPDATE events SET message_id = 1 WHERE seq = 2")
    await hive.sql("UPDATE events SET at_ms = 0 WHERE seq < ?", last - 1)
    await forget_history(hive.store, 1)
    await hive.sql("DELETE FROM events WHERE kind = 'history_forgotten'")
    assert await hive.value("SELECT min(seq) FROM events") == 2
    async with served(hive_of(hive)) as browser:
        for seen in (0, 1, last - 3):
            for headers in ({"Last-Event-ID": hive.at(seen)}, {}):
                told = await browser.told(f"/live?after={hive.at(seen)}", "reset", **headers)
                assert [frame.event for frame in told] == ["reset"]
        for seen in (last - 2, last - 1, last):
            told = await browser.told(f"/live?after={hive.at(0)}", "agent-iris", **{"Last-Event-ID": hive.at(seen)})
            assert "reset" not in [frame.event for frame in told]
        await hive.sql("UPDATE events SET at_ms = 0")
        await forget_history(hive.store, 1)
        told = await browser.told(f"/live?after={hive.at(last - 2)}", "reset")
        assert [frame.event for frame in told] == ["reset"]
        async with browse(hive_of(hive)) as client:
            page, seq = (await client.get("/")).text, await hive.store.last_seq()
        assert f'data-after="{hive.at(seq)}"' in page
        assert (await browser.told(f"/live?after={hive.at(seq)}", "agent-iris"))[-1].event == "message"


async def test_an_event_of_a_question_that_is_gone_ends_no_stream(hive: Services) -> None:
    async with served(hive_of(hive)) as browser:
        after = await hive.store.last_seq()
        await hive.store.write(lambda tx: tx.emit("question_expired", "system", "iris", question=9))
        assert (await browser.told(f"/live?after={hive.at(after)}", "agent-iris"))[-1].event == "message"


async def test_an_agents_page_that_has_missed_lines_which_are_gone_loads_itself_again(tmp_path: Path) -> None:
    async with open_services(tmp_path, lines_per_turn=3) as hive:
        await hive.add_agents("iris", "damocles")
        await hive.say("operator", "iris", "work")
        turn = (await hive.broker.lease(IRIS)).turn
        await hive.turns.add_lines(IRIS, turn.id, 0, ["one", "two"])
        seq = await hive.store.last_seq()
        async with served(hive_of(hive)) as browser:
            path = f"/agents/iris/live?after={hive.at(seq, 1)}"
            told = await browser.told(path, "line-2")
            # They are told on each connection.
            first = ["agent-iris", "choice-model", "choice-effort", "spend-now", "snapshots-now", "reach-now"]
            assert [frame.target for frame in told] == [*first, "line-2"]
            await hive.turns.add_lines(IRIS, turn.id, 2, ["three", "four", "five"])
            told = await browser.told(path, "reset", **{"Last-Event-ID": hive.at(seq, 1)})
            assert [frame.event for frame in told] == ["reset"]
            # Line 2 was the last to go: who has seen it has a whole picture.
            told = await browser.told(path, "line-5", **{"Last-Event-ID": hive.at(seq, 2)})
            assert [frame.target for frame in told] == [*first, "line-3", "line-4", "line-5"]


async def test_an_agents_page_without_any_line_left_does_not_load_itself_for_ever(hive: Services) -> None:
    await hive.say("operator", "iris", "work")
    turn = (await hive.broker.lease(IRIS)).turn
    await hive.turns.add_lines(IRIS, turn.id, 0, ["one", "two"])
    hive.clock.ahead_s = 30 * 24 * 3600.0
    await hive.turns.prune(hive.now_ms())
    async with browse(hive_of(hive)) as client:
        page, seq = (await client.get("/agents/iris")).text, await hive.store.last_seq()
    assert f'data-after="{hive.at(seq, 2)}"' in page
    async with served(hive_of(hive)) as browser:
        assert (await browser.told(f"/agents/iris/live?after={hive.at(seq, 2)}", "agent-iris"))[-1].event == "message"
        assert (await browser.told(f"/agents/iris/live?after={hive.at(seq, 1)}", "reset"))[-1].event == "reset"
