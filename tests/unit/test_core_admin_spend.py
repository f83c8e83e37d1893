"""What the operator sees of spend and sets of budgets: `hive` itself, against the real door."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName
from hive_core.services.costs import Span, parse_since
from hive_core.sockets.admin import AdminDesk
from hive_core.usage import Call
from tests.dashboards import hive_of
from tests.hives import Services, run_hive, serve

Command = Callable[..., Awaitable[str]]
HAIKU, OPUS = "claude-haiku-4-5", "claude-opus-4-6"
DAY_S = 24 * 3600.0


class Failed(Exception):
    pass


@pytest.fixture
async def command(hive: Services, tmp_path: Path) -> AsyncIterator[Command]:
    """`hive WORD …` as a process; what it prints. Raises Failed."""

    async def run(*words: str) -> str:
        done = await run_hive(tmp_path, *words)
        if done.returncode:
            raise Failed(done.stderr.decode().strip())
        return done.stdout.decode().rstrip("\n")

    async with serve(tmp_path / "host.sock", AdminDesk(hive_of(hive)).serve):
        yield run


def spend(hive: Services, agent: str, model: str, input_tokens: int | None, output_tokens: int = 0) -> None:
    ledger = hive.broker.ledger
    call = Call(AgentName(agent), "/v1/messages", 3_000, "default", reached=True)
    assert ledger.call_begins(call) is None
    if input_tokens is not None:
        usage = {"input_tokens": input_tokens, "output_tokens": output_tokens}
        call.reader.feed(json.dumps({"model": model, "usage": usage}).encode() + b"\n")
    ledger.call_ended(call)


async def test_the_list_tells_whole_why_agents_are_stopped_and_who_lets_them_go_on(
    hive: Services, command: Command
) -> None:
    await command("budget", "set", "hive", "--day", "0.01")
    spend(hive, "iris", HAIKU, 20_000)
    for name in ("hm1nd", "iris", "damocles"):
        hive.agents.observe_rest(name)
    closed = hive.agents.access.closed(AgentName("iris"))
    assert closed is not None
    assert closed.sentence.endswith("the operator can raise it: `hive budget set hive --day USD`")
    assert f"hm1nd, damocles, iris: {closed.sentence}" in (await command("list")).splitlines()


async def test_hive_alone_tells_whom_a_spent_budget_stops_and_what_lets_them_go_on(
    hive: Services, command: Command
) -> None:
    assert (await command()).splitlines()[-1] == "nothing waits for you"
    await command("budget", "set", "iris", "--total", "0.01")
    spend(hive, "iris", HAIKU, 20_000)
    closed = hive.agents.access.closed(AgentName("iris"))
    assert closed is not None
    assert (await command()).splitlines()[1:] == [f"! iris over_budget: {closed.sentence}"]
    (row,) = json.loads(await command("--json"))["stopped"]
    assert row == {"agents": ["iris"], "state": "over_budget", "why": closed.sentence, "until_ms": None}


async def test_a_turn_whose_cost_is_estimated_says_so(hive: Services, command: Command) -> None:
    for tokens in (None, 10_000):
        await hive.say("operator", "iris", "work")
        turn = (await hive.broker.lease(AgentName("iris"))).turn
        spend(hive, "iris", HAIKU, tokens)
        await hive.broker.ack(AgentName("iris"), turn, "cancelled")
    await hive.broker.ledger.flush()
    told, estimated = (await command("turns")).splitlines()
    assert told.endswith("  $0.0100")
    assert estimated.endswith("  ~$0.1800")
    assert (await command("turn", "show", "1")).splitlines()[0] == estimated
    found = json.loads(await command("turns", "--json"))["turns"]
    assert [(one["unknown_calls"], one["estimated_micro_usd"]) for one in found] == [(0, 0), (1, 180_000)]


async def test_costs_are_summed_up_by_agent_model_cause_and_day(hive: Services, command: Command) -> None:
    spend(hive, "iris", HAIKU, 1_000_000)
    hive.clock.ahead_s += DAY_S
    await hive.say("operator", "iris", "work")
    await hive.broker.lease(AgentName("iris"))
    spend(hive, "iris", OPUS, 200_000, 40_000)
    spend(hive, "damocles", HAIKU, 500_000)

    async def keys(*words: str) -> dict[str, int]:
        result = json.loads(await command("costs", *words, "--json"))
        assert result["total"]["cost_micro_usd"] == sum(row["cost_micro_usd"] for row in result["rows"])
        return {row["key"]: row["cost_micro_usd"] for row in result["rows"]}

    assert list((await keys()).items()) == [("iris", 3_000_000), ("damocles", 500_000)]
    assert await keys("--by", "model") == {OPUS: 2_000_000, HAIKU: 1_500_000}
    assert await keys("--by", "cause") == {"operator": 2_000_000, "no turn": 1_500_000}
    by_day = await keys("--by", "day")
    assert list(by_day.values()) == [2_500_000, 1_000_000]
    today = next(iter(by_day))
    for since in ("1d", today, "23h"):
        assert await keys("--since", since) == {"iris": 2_000_000, "damocles": 500_000}
    for since in ("2d", "25h", "2000-01-01"):
        assert await keys("--since", since) == {"iris": 3_000_000, "damocles": 500_000}
    assert await keys("--since", "2999-01-01") == {}


async def test_what_is_unknown_is_shown_as_unknown_and_what_is_estimated_as_an_estimate(
    hive: Services, command: Command
) -> None:
    spend(hive, "iris", HAIKU, 1_000_000, 1_000)
    spend(hive, "iris", HAIKU, None)
    spend(hive, "damocles", HAIKU, None)
    shown = [line.split("  ") for line in (await command("costs")).splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in shown]
    assert cells[1] == ["iris", "2", "1,000,000 + ?", "1,000 + ?", "?", "?", "?", "~1.011 USD"]
    assert cells[2] == ["damocles", "1", "?", "?", "?", "?", "?", "~0.18 USD"]
    assert cells[3][0] == "together"
    text = await command("costs")
    assert "?: the tokens of 2 calls are not known" in text
    assert "prices: the provider's public price list" in text


async def test_a_hive_that_spent_nothing_says_so(command: Command) -> None:
    assert "together  0" in await command("costs")


async def test_budgets_are_set_listed_and_removed(hive: Services, command: Command) -> None:
    assert await command("budget") == "there is no budget: agents may spend what they take"
    await command("budget", "set", "hive", "--total", "20", "--window-5h", "50")
    await command("budget", "set", "--day", "0.5", "iris", "--warn", "50")
    spend(hive, "iris", HAIKU, 500_000)
    shown = await command("budget")
    assert [" ".join(line.split()) for line in shown.splitlines()] == [
        "whose budget used of",
        "the hive total 0.50 USD 20.00 USD warns at 80 %",
        "the hive window-5h unknown 50 % warns at 80 %",
        "iris day 0.50 USD 0.50 USD spent",
    ]
    assert await command("budget", "remove", "hive", "window-5h") == "removed of hive: window-5h"
    assert await command("budget", "remove", "iris") == "removed of iris: day"
    (left,) = json.loads(await command("budget", "--json"))["budgets"]
    assert left == {
        "scope": "*",
        "kind": "total",
        "unit": "micro_usd",
        "amount": 20_000_000,
        "used": 500_000,
        "spent": False,
        "warn_percent": 80,
    }


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["budget", "set", "iris"], "cannot set a budget without an amount"),
        (["budget", "set"], "cannot run `hive budget set`: it takes hive or an agent"),
        (["budget", "iris"], "invalid choice"),
        (["budget", "set", "iris", "--day", "1e3"], "give an amount of USD above 0"),
        (["budget", "set", "iris", "--day", "-1"], "cannot use '-1' as the budget day"),
        (["budget", "set", "nobody", "--day", "1"], "no agent has that name"),
        (["budget", "remove", "iris"], "iris has no such budget; `hive budget` shows them"),
        (["budget", "remove", "iris", "week"], "cannot use ['week'] as kinds of budgets"),
        (["budget", "remove", "iris", "--day", "1"], "cannot run `hive budget remove`"),
        (["costs", "--by", "moon"], "invalid choice"),
        (["costs", "--since", "yesterday"], "give hours (24h), days (7d) or a date"),
        (
            ["costs", "--since", "2026-13-01"],
            "cannot use '2026-13-01' as --since: give hours (24h), days (7d) or a date",
        ),
        (["costs", "--since", "9999h"], "calls are kept one by one for 2160 hours (history_kept_s)"),
    ],
)
async def test_what_makes_no_sense_is_refused(command: Command, words: list[str], why: str) -> None:
    with pytest.raises(Failed) as failed:
        await command(*words)
    assert why in str(failed.value)


async def test_the_door_refuses_amounts_that_are_no_text(hive: Services) -> None:
    for args in ({"scope": "iris", "day": 1.5}, {"scope": "iris", "total": ["1"]}, {"scope": 7, "day": "1"}):
        verb, _ = AdminDesk(hive_of(hive))._verbs["budget_set"]
        with pytest.raises(Refusal):
            await verb(args)
    assert hive.broker.ledger.budgets.all() == []


@pytest.mark.parametrize(
    ("raw", "span"),
    [
        (None, Span()),
        ("24h", Span(hours=24)),
        ("1d", Span(first_day=20_000)),
        ("7d", Span(first_day=19_994)),
        ("1970-01-03", Span(first_day=2)),
    ],
)
def test_a_span_is_read_in_hours_days_or_from_a_date(raw: Any, span: Span) -> None:
    assert parse_since(raw, 20_000 * 86_400_000 + 5) == span
