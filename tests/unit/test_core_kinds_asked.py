"""What hm1nd asks for besides commits: a schedule, a higher budget, the end of an agent."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from hive_core.hive import Hive
from hive_core.procedures.together import Click
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import MANAGER, OPERATOR, AgentName
from hive_core.services.approvals import Approval
from hive_core.services.budgets import parse_change
from hive_core.services.tombstones import TOMBSTONES
from hive_core.store.bus import EVENTS
from tests.dashboards import browse, hive_of
from tests.hives import PATIENCE_S, Services, wait_until
from tests.notices import read_notice
from tests.tools import program_of

IRIS = AgentName("iris")
DAILY = {"agent": "iris", "body": "Look at the <inbox>.", "cron": "0 7 * * 1-5", "zone": "Europe/Berlin", "reason": "r"}
MORE = {"scope": "iris", "day": "5", "reason": "it is worth it"}

Ask = Callable[[Hive], Awaitable[dict[str, Any]]]


@asynccontextmanager
async def serving(whole: Hive) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(whole.gate.serve)
        nursery.start_soon(whole.destruction.serve)
        with trio.fail_after(PATIENCE_S):
            yield
        nursery.cancel_scope.cancel()


async def approve(whole: Hive, number: int) -> Approval:
    card = await whole.approvals.get(number)
    return await whole.gate.approve(number, card.digest, OPERATOR)


def lines_of(card: Approval) -> list[str]:
    assert card.effect is not None
    return [f"{line['what']}: {line['before']} -> {line['after']} ({line['weight']})" for line in card.effect["lines"]]


async def ask_for_schedule(whole: Hive) -> dict[str, Any]:
    return await whole.schedule_prompt.request(MANAGER, DAILY)


async def ask_for_budget(whole: Hive) -> dict[str, Any]:
    await whole.ledger.set_budget(parse_change({"scope": "iris", "day": "1", "warn_percent": 70}, 80), OPERATOR)
    return await whole.raise_budget.request(MANAGER, MORE)


async def ask_for_end(whole: Hive) -> dict[str, Any]:
    (whole.config.state_dir / "agents" / "iris" / "state").mkdir(parents=True)
    return await whole.destroy.request(MANAGER, IRIS, "it has nothing to do")


async def is_kept(whole: Hive) -> bool:
    return [one.state for one in await whole.tombstones.all()] == ["kept"]


async def approved(whole: Hive, number: int) -> Approval | None:
    card = await whole.approvals.get(number)
    return card if card.state == "approved" else None


async def test_the_card_of_a_schedule_shows_its_next_five_instants_in_its_zone(hive: Services) -> None:
    whole = hive_of(hive)
    hive.clock.ahead_s += 1_800_000_000 - hive.clock()  # Friday 2027-01-15 08:00 UTC
    number = (await ask_for_schedule(whole))["approval"]
    card = await hive.approvals.get(number)
    assert lines_of(card) == [
        "schedule: None -> 0 7 * * 1-5 (Europe/Berlin) (wide)",
        "instant 1: None -> Mon 2027-01-18 07:00 CET (plain)",
        "instant 2: None -> Tue 2027-01-19 07:00 CET (plain)",
        "instant 3: None -> Wed 2027-01-20 07:00 CET (plain)",
        "instant 4: None -> Thu 2027-01-21 07:00 CET (plain)",
        "instant 5: None -> Fri 2027-01-22 07:00 CET (plain)",
    ]
    async with browse(whole) as client:
        page = (await client.get("/")).text
    assert "Look at the &lt;inbox&gt;." in page
    async with serving(whole):
        await hive.let_time_pass(3 * 86_400)
        with pytest.raises(Refusal, match="it would do something else than you were shown"):
            await approve(whole, number)
        assert (await approve(whole, number)).state == "done"
    (schedule,) = await hive.schedules.all()
    assert (schedule["agent"], schedule["body"], schedule["cron"], schedule["zone"]) == (
        "iris",
        "Look at the <inbox>.",
        "0 7 * * 1-5",
        "Europe/Berlin",
    )
    kind, _, fields = read_notice((await hive.broker.messages.newest("hm1nd"))[-1]["body"])
    assert (kind, fields["what"], fields["state"]) == ("approval_resolved", "schedule_prompt", "approved")


async def test_an_interval_is_shown_as_one(hive: Services) -> None:
    whole = hive_of(hive)
    given = {"agent": "iris", "body": "b", "every_s": 3600, "reason": "r"}
    number = (await whole.schedule_prompt.request(MANAGER, given))["approval"]
    assert lines_of(await hive.approvals.get(number)) == ["schedule: None -> every 3600 s, from the approval on (wide)"]
    async with serving(whole):
        await hive.let_time_pass(86_400)
        assert (await approve(whole, number)).state == "done"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"agent": "argus"}, "no agent has that name"),
        ({"cron": "x"}, "cannot"),
        ({"cron": "0 0 30 2 *"}, "its day-of-month is '30'"),
        ({"zone": "Nowhere/No"}, "zone"),
        ({"every_s": 60}, "give one of"),
        ({"body": ""}, "empty"),
        ({"reason": " "}, "empty"),
    ],
)
async def test_a_schedule_that_is_none_leaves_no_card(hive: Services, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(Refusal, match=why):
        await hive_of(hive).schedule_prompt.request(MANAGER, {**DAILY, **changes})
    assert await hive.approvals.pending() == []


async def test_a_budget_is_raised_and_warns_as_before(hive: Services) -> None:
    whole = hive_of(hive)
    number = (await ask_for_budget(whole))["approval"]
    assert lines_of(await hive.approvals.get(number)) == ["the budget of iris for a day: 1.00 USD -> 5.00 USD (wide)"]
    async with serving(whole):
        assert (await approve(whole, number)).state == "done"
    (row,) = await hive.store.rows("SELECT scope, kind, amount, warn_percent FROM budgets")
    assert tuple(row) == ("iris", "day", 5_000_000, 70)


async def test_of_two_raises_that_are_approved_together_the_lower_one_takes_nothing_back(hive: Services) -> None:
    whole = hive_of(hive)
    await ask_for_budget(whole)
    await whole.raise_budget.request(MANAGER, {**MORE, "day": "3"})
    clicks = [Click(card.id, card.digest) for card in await hive.approvals.pending()]
    outcomes = await whole.together.approve(clicks, OPERATOR, patience_s=0)
    assert [outcome.approval is not None for outcome in outcomes] == [True, True]
    async with serving(whole):
        assert [(await hive.approvals.wait_settled(click.approval_id)).state for click in clicks] == ["done", "done"]
    assert [budget.amount for budget in whole.ledger.budgets.all()] == [5_000_000]


async def test_the_hives_own_budget_can_be_raised_too(hive: Services) -> None:
    whole = hive_of(hive)
    await whole.ledger.set_budget(parse_change({"scope": "hive", "total": "10"}, 80), OPERATOR)
    asked = await whole.raise_budget.request(MANAGER, {"scope": "hive", "total": "20", "reason": "r"})
    async with serving(whole):
        assert (await approve(whole, asked["approval"])).state == "done"
    assert [budget.amount for budget in whole.ledger.budgets.all()] == [20_000_000]


async def test_a_budget_that_would_not_be_raised_is_refused_also_at_the_click(hive: Services) -> None:
    whole = hive_of(hive)
    number = (await ask_for_budget(whole))["approval"]
    for day, why in (("1", "it is 1.00 USD already"), ("0.5", "it is 1.00 USD already")):
        with pytest.raises(Refusal, match=why):
            await whole.raise_budget.request(MANAGER, {**MORE, "day": day})
    with pytest.raises(Refusal, match="damocles has no budget day"):
        await whole.raise_budget.request(MANAGER, {**MORE, "scope": "damocles"})
    async with serving(whole):
        await whole.ledger.set_budget(parse_change({"scope": "iris", "day": "3"}, 80), OPERATOR)
        with pytest.raises(Refusal, match="it would do something else"):
            await approve(whole, number)
        assert lines_of(await hive.approvals.get(number))[0].startswith("the budget of iris for a day: 3.00 USD ->")
        await whole.ledger.set_budget(parse_change({"scope": "iris", "day": "6"}, 80), OPERATOR)
        with pytest.raises(Refusal, match=r"cannot approve 1 any more: .*it is 6\.00 USD already"):
            await approve(whole, number)
    assert (await hive.approvals.get(number)).state == "failed"


async def test_an_agent_that_hm1nd_wants_ended_is_a_tombstone_after_the_click(hive: Services) -> None:
    whole = hive_of(hive)
    number = (await ask_for_end(whole))["approval"]
    card = await hive.approvals.get(number)
    assert lines_of(card)[0] == "agent: iris -> None (plain)"
    assert "`hive revive iris` makes it an agent again" in lines_of(card)[-1]
    assert (await hive.agents.get("iris")).wanted == "up"
    async with serving(whole):
        assert (await approve(whole, number)).state == "done"
        await wait_until(hive.store, lambda: is_kept(whole), EVENTS, TOMBSTONES)
    assert [agent.name for agent in await hive.agents.all()] == ["hm1nd", "damocles"]


async def test_the_end_of_hm1nd_of_nobody_and_of_who_is_gone_is_refused(hive: Services) -> None:
    whole = hive_of(hive)
    with pytest.raises(Refusal, match="a hive has one manager"):
        await whole.destroy.request(MANAGER, MANAGER, "r")
    with pytest.raises(Refusal, match="no agent has that name"):
        await whole.destroy.request(MANAGER, AgentName("argus"), "r")
    assert await hive.approvals.pending() == []


@pytest.mark.parametrize("ask", [ask_for_schedule, ask_for_budget, ask_for_end])
async def test_a_daemon_that_dies_while_it_carries_it_out_is_followed_by_one_that_does_it_once(
    hive: Services, ask: Ask
) -> None:
    whole = hive_of(hive)
    number = (await ask(whole))["approval"]

    async def step(_: str) -> None:
        pass

    async with trio.open_nursery() as nursery:
        nursery.start_soon(approve, whole, number)
        card = await wait_until(hive.store, lambda: approved(whole, number))
        await whole.gate.kinds[card.kind].carry_out(card, step)  # and nothing of it is written down
        nursery.cancel_scope.cancel()
    assert await hive.schedules.all() == []
    assert await whole.tombstones.all() == []
    again = hive_of(hive)
    await again.ledger.load()
    async with serving(again):
        assert (await hive.approvals.wait_settled(number)).state == "done"
    assert (await hive.kinds()).count("approval_done") == 1
    assert len(await hive.schedules.all()) + len(await whole.tombstones.all()) + (ask is ask_for_budget) == 1


async def test_each_is_asked_for_by_a_tool_of_hm1nd_and_counts_once(hive: Services, tmp_path: Path) -> None:
    await hive.broker.ledger.set_budget(parse_change({"scope": "iris", "day": "1"}, 80), OPERATOR)
    async with program_of(hive, "hm1nd", tmp_path) as client:
        for tool, given in (
            ("request_schedule_prompt", DAILY),
            ("request_raise_budget", MORE),
            ("request_destroy", {"agent": "iris", "reason": "r"}),
        ):
            answers = [await client.call(tool, f"use-{tool}", **given) for _ in range(2)]
            assert answers[0] == answers[1]
    assert [card.kind for card in await hive.approvals.pending()] == ["schedule_prompt", "raise_budget", "destroy"]
    assert {card.requested_by for card in await hive.approvals.pending()} == {"hm1nd"}
