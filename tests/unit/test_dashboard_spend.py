"""What the pages show of spend, and the forms that set budgets."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio

from hive_core.protocol.words import AgentName
from hive_core.usage import Call
from tests.dashboards import OURS, browse, hive_of, served
from tests.hives import Services

IRIS = AgentName("iris")
SCRIPT = {**OURS, "Accept": "application/json"}


def spend(hive: Services, input_tokens: int | None, agent: AgentName = IRIS) -> None:
    ledger, call = hive.broker.ledger, Call(agent, "/v1/messages", 3_000, "default", reached=True)
    assert ledger.call_begins(call) is None
    if input_tokens is not None:
        usage = {"input_tokens": input_tokens, "output_tokens": 0}
        call.reader.feed(json.dumps({"model": "claude-haiku-4-5", "usage": usage}).encode() + b"\n")
    ledger.call_ended(call)


def section(page: str) -> str:
    """What is spent, as one line of words."""
    return " ".join(page[page.index('id="spend-now"') : page.index('id="budget-form"')].split())


async def set_budget(hive: Services, **form: str) -> tuple[int, Any]:
    async with browse(hive_of(hive)) as client:
        answer = await client.post("/budgets", headers=SCRIPT, data=form)
        return answer.status_code, answer.json()


async def test_the_dashboard_shows_today_each_agent_and_every_budget_with_a_bar(hive: Services) -> None:
    await set_budget(hive, scope="hive", kind="total", amount="2.50")
    await set_budget(hive, scope="iris", kind="window_5h", amount="50")
    spend(hive, 1_000_000)
    spend(hive, None, AgentName("damocles"))
    await hive.broker.ledger.flush()
    async with browse(hive_of(hive)) as client:
        page = (await client.get("/")).text
    shown = section(page)
    assert "today <b>1.18 USD</b>" in shown
    one, none = '<td><span title="1">1</span></td>', '<span title="0">0</span>'
    million = '<td><span title="1,000,000">1.0M</span></td>'
    assert f'<th scope="row">iris</th>{one}{million}<td>{none}</td><td>1.00 USD</td>' in shown
    assert f'<th scope="row">damocles</th>{one}<td>{none} + ?</td><td>{none} + ?</td><td>~0.18 USD</td>' in shown
    assert "<b>the hive</b> in total" in shown
    assert 'value="47" aria-label="how much of it is used">47 %</meter>' in shown
    assert "1.18 USD of 2.50 USD" in shown
    assert "unknown of 50 %" in shown
    for name in ("hm1nd", "damocles", "iris"):
        assert f'<option id="budget-of-{name}" value="{name}">' in page


async def test_a_turn_that_was_cut_in_a_call_shows_an_estimate_and_no_count_that_is_not_known(hive: Services) -> None:
    await hive.say("operator", "iris", "work")
    turn = (await hive.broker.lease(IRIS)).turn
    spend(hive, None)
    nothing = {"input_tokens": 0, "output_tokens": 0, "models": {}}
    await hive.broker.ack(IRIS, turn, "failed", "cut", usage=nothing)
    await hive.broker.ledger.flush()
    async with browse(hive_of(hive)) as client:
        page = " ".join((await client.get("/agents/iris")).text.split())
    assert "? in / ? out" in page
    assert "0 in / 0 out" not in page
    assert 'as the relay counted them; some of it is estimated">~0.18 USD</span>' in page


async def test_an_agents_page_shows_its_day_and_its_turns_and_no_other_agent(hive: Services) -> None:
    await set_budget(hive, scope="damocles", kind="day", amount="1")
    await set_budget(hive, scope="iris", kind="day", amount="0.3")
    await hive.say("operator", "iris", "work")
    await hive.broker.lease(IRIS)
    spend(hive, 300_000)
    spend(hive, 100_000, AgentName("damocles"))
    await hive.broker.ledger.flush()
    async with browse(hive_of(hive)) as client:
        page = (await client.get("/agents/iris")).text
    shown = section(page)
    assert "today <b>0.30 USD</b>" in shown
    assert '<span class="chip dead">spent</span>' in shown
    assert "damocles" not in shown
    assert '<input type="hidden" name="scope" value="iris">' in page
    head = page[page.index('id="turn-1-head"') :]
    assert "0.30 USD</span>" in head[: head.index("</h3>")]


async def test_a_page_of_a_hive_that_spent_nothing_says_that_there_is_no_budget(hive: Services) -> None:
    async with browse(hive_of(hive)) as client:
        shown = section((await client.get("/")).text)
    assert "today <b>0.00 USD</b>" in shown
    assert "<table>" not in shown
    assert "no budget: agents may spend what they take" in shown


async def test_a_budget_is_set_and_removed_by_a_form(hive: Services) -> None:
    said = {"ok": True, "said": "the budget of iris (a day) is set"}
    assert await set_budget(hive, scope="iris", kind="day", amount=" 2.50 ", back="/agents/iris") == (200, said)
    (budget,) = hive.broker.ledger.budgets.all()
    assert (budget.scope, budget.kind, budget.amount, budget.warn_percent) == ("iris", "day", 2_500_000, 80)
    async with browse(hive_of(hive)) as client:
        gone = {"scope": "iris", "kind": "day"}
        answer = await client.post("/budgets/remove", headers=SCRIPT, data=gone)
        assert answer.json() == {"ok": True, "said": "the budget of iris (a day) is removed"}
        assert (await client.post("/budgets/remove", headers=SCRIPT, data=gone)).status_code == 404
        plain = await client.post("/budgets", headers=OURS, data={**gone, "amount": "1", "back": "/agents/iris"})
        assert (plain.status_code, plain.headers["location"]) == (303, "/agents/iris")


@pytest.mark.parametrize(
    ("form", "why"),
    [
        ({"scope": "iris", "kind": "day", "amount": "much"}, "give an amount of USD"),
        ({"scope": "iris", "kind": "day"}, "give an amount of USD"),
        ({"scope": "iris", "kind": "window_5h", "amount": "0"}, "from 1 to 100"),
        ({"scope": "iris", "kind": "week", "amount": "1"}, "choose a day, the total or a window"),
        ({"scope": "<b>", "kind": "day", "amount": "1"}, "as an agent's name"),
        ({"kind": "day", "amount": "1"}, "as an agent's name"),
    ],
)
async def test_a_form_that_makes_no_sense_sets_nothing(hive: Services, form: dict[str, str], why: str) -> None:
    status, answer = await set_budget(hive, **form)
    assert status == 400
    assert why in answer["error"]["message"]
    assert hive.broker.ledger.budgets.all() == []


async def test_the_forms_have_the_guards_of_every_other_form(hive: Services) -> None:
    for path in ("/budgets", "/budgets/remove"):
        async with browse(hive_of(hive)) as client:
            for headers in ({"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site"}, {}):
                answer = await client.post(path, headers=headers, data={"scope": "iris", "kind": "day", "amount": "1"})
                assert answer.status_code == 403
            assert (await client.get(path)).status_code == 405
        async with browse(hive_of(hive), headers={}) as stranger:
            assert (await stranger.post(path, headers=SCRIPT, data={"scope": "iris"})).status_code == 401
    assert hive.broker.ledger.budgets.all() == []


async def test_what_is_spent_is_told_live_and_only_when_it_changed(hive: Services) -> None:
    after = await hive.store.last_seq()
    async with served(hive_of(hive)) as browser, browser.stream(f"/live?after={hive.at(after)}") as answer:
        await answer.until("spend-now")
        await hive.say("operator", "iris", "nothing of money")
        assert [frame.target for frame in await answer.until("message-1")] == ["agent-iris", "message-1"]
        spend(hive, 70_000)
        (frame,) = await answer.until("spend-now")
        assert "0.07 USD" in frame.data["html"]


async def test_the_head_of_a_turn_shows_its_cost_when_it_is_settled(hive: Services) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hive.broker.ledger.serve)
        await hive.say("operator", "iris", "work")
        lease = await hive.broker.lease(IRIS)
        spend(hive, 70_000)
        after = await hive.store.last_seq()
        async with (
            served(hive_of(hive)) as browser,
            browser.stream(f"/agents/iris/live?after={hive.at(after, 0)}") as answer,
        ):
            await hive.broker.ack(IRIS, lease.turn, "done", usage={"input_tokens": 70_000, "output_tokens": 0})
            heads: list[str] = []
            while not heads or "0.07 USD" not in heads[-1]:
                heads.append((await answer.until("turn-1-head"))[-1].data["html"])
        nursery.cancel_scope.cancel()
