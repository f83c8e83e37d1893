"""What calls cost, how it is kept, and what a budget lets through."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from hive_core.limits import Limits
from hive_core.prices import KINDS, load_prices
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import OPERATOR, AgentName
from hive_core.services.access import Closed
from hive_core.services.budgets import parse_change, parse_kinds, parse_scope
from hive_core.services.charges import DAY_MS, Tokens, read_tokens
from hive_core.services.history import forget_history
from hive_core.services.leases import Lease, begin_turn
from hive_core.services.ledger import Ledger
from hive_core.services.reminders import When
from hive_core.services.schedules import parse_plan
from hive_core.services.usage_compared import compare
from hive_core.store.bus import EVENTS, TURN_ENDS
from hive_core.usage import Call
from tests.hives import Services, run_in_hive, wait_until
from tests.processes import PATIENCE_S

IRIS, DAMOCLES, HM1ND = AgentName("iris"), AgentName("damocles"), AgentName("hm1nd")
HAIKU = "claude-haiku-4-5"  # a micro-USD a token of input, five for output
COSTS = "cost_micro_usd, estimated, complete"


def begin(ledger: Ledger, agent: AgentName = IRIS, request_bytes: int = 3_000, path: str = "/v1/messages") -> Call:
    call = Call(agent, path, request_bytes, "key")
    assert ledger.call_begins(call) is None
    return call


def answer(call: Call, usage: dict[str, Any] | None, model: str | None = HAIKU, status: int = 200) -> None:
    """What the relay notes while the provider answers."""
    call.reached, call.status = True, status
    if usage is not None:
        call.reader.feed(json.dumps({"model": model, "usage": usage}).encode() + b"\n")


def spend(ledger: Ledger, input_tokens: int, agent: AgentName = IRIS, **more: Any) -> None:
    """A whole call that costs so many micro-USD."""
    call = begin(ledger, agent)
    answer(call, {"input_tokens": input_tokens, "output_tokens": 0, **more})
    call.complete = True
    ledger.call_ended(call)


async def set_budget(hive: Services, scope: str = "iris", **amounts: Any) -> None:
    await hive.broker.ledger.set_budget(parse_change({"scope": scope, **amounts}, 80), OPERATOR)


async def rows(hive: Services, sql: str) -> list[tuple[Any, ...]]:
    await hive.broker.ledger.flush()
    return [tuple(row) for row in await hive.store.rows(sql)]


@asynccontextmanager
async def served(ledger: Ledger) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ledger.serve)
        yield
        nursery.cancel_scope.cancel()


async def take_turn(hive: Services, agent: AgentName = IRIS) -> Lease:
    await hive.say("operator", agent, "work")
    return await hive.broker.lease(agent)


async def reopened(hive: Services, **more: Any) -> Ledger:
    """The ledger as another daemon would open it on the same database."""
    ledger = Ledger(hive.store, hive.agents.access, load_prices(), clock=hive.clock, **more)
    await ledger.load()
    return ledger


# -- what a call costs ------------------------------------------------------------------------------------------------


async def test_a_call_is_charged_by_every_kind_of_its_tokens(hive: Services) -> None:
    ledger, call = hive.broker.ledger, begin(hive.broker.ledger)
    written = {"ephemeral_5m_input_tokens": 100, "ephemeral_1h_input_tokens": 200}
    counts = {"input_tokens": 10, "output_tokens": 20, "cache_read_input_tokens": 1000}
    answer(call, {**counts, "cache_creation_input_tokens": 300, "cache_creation": written})
    call.complete = True
    ledger.call_ended(call)
    kinds = ", ".join(f"{kind}_tokens" for kind in KINDS)
    assert await rows(hive, f"SELECT agent, credential, model, status, {kinds}, {COSTS} FROM charges") == [
        ("iris", "key", HAIKU, 200, 10, 20, 100, 200, 1000, 10 + 100 + 125 + 400 + 100, 0, 1)
    ]
    assert ledger.spent("iris", "total") == ledger.spent("*", "day") == 735


def test_what_is_written_to_a_cache_and_not_said_for_how_long_counts_at_the_dearer() -> None:
    span = "cache_creation.ephemeral_5m_input_tokens"
    told = read_tokens({"input_tokens": 1, "cache_creation_input_tokens": 9, span: 5})
    assert (told["cache_write_5m"], told["cache_write_1h"]) == (5, 4)
    told = read_tokens({"input_tokens": 1, "cache_creation_input_tokens": 9})
    assert (told["cache_write_5m"], told["cache_write_1h"]) == (9, 0), "five minutes is what is meant by nothing"
    assert read_tokens({})["cache_write_1h"] is None


async def test_charges_of_one_day_agent_model_and_cause_are_one_sum(hive: Services) -> None:
    for cost in (1, 2, 3):
        spend(hive.broker.ledger, cost)
        await hive.broker.ledger.flush()
    sql = "SELECT agent, model, root, calls, input_tokens, cost_micro_usd FROM spend_days"
    assert await rows(hive, sql) == [("iris", HAIKU, "no turn", 3, 6, 6)]


async def test_a_call_that_was_cut_before_its_first_count_is_estimated_and_its_counts_stay_unknown(
    hive: Services,
) -> None:
    ledger, call = hive.broker.ledger, begin(hive.broker.ledger, request_bytes=30_000)
    call.reached = True
    ledger.call_ended(call)
    found = await rows(hive, f"SELECT model, input_tokens, output_tokens, cache_read_tokens, {COSTS} FROM charges")
    dearest = 30 * 10_000 + 150 * 1_000
    assert found == [(None, None, None, None, dearest, 1, 0)]
    days = "SELECT calls, unknown_calls, input_tokens, cost_micro_usd, estimated_micro_usd FROM spend_days"
    assert await rows(hive, days) == [(1, 1, 0, dearest, dearest)]


async def test_an_answer_that_was_read_before_its_count_is_estimated_by_its_size(hive: Services) -> None:
    ledger, call = hive.broker.ledger, begin(hive.broker.ledger, request_bytes=0)
    answer(call, None)
    text = json.dumps({"model": HAIKU, "content": [{"type": "text", "text": "x" * 300_000}], "usage": {}}).encode()
    for at in range(0, 300_000, 10_000):
        call.reader.feed(text[at : at + 10_000])  # and then the agent hangs up
    ledger.call_ended(call)
    ((tokens, cost),) = await rows(hive, "SELECT output_tokens, cost_micro_usd FROM charges")
    assert (tokens, cost) == (None, 100_000 * 150), "the dearest model's output"


async def test_a_call_that_was_cut_counts_what_was_told_and_estimates_its_output(hive: Services) -> None:
    ledger, call = hive.broker.ledger, begin(hive.broker.ledger)
    call.reached, call.status = True, 200
    begins = {"type": "message_start", "message": {"model": HAIKU, "usage": {"input_tokens": 7, "output_tokens": 1}}}
    call.reader.feed(b"data: " + json.dumps(begins).encode() + b"\n")
    delta = {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "x" * 3000}}
    call.reader.feed(b"data: " + json.dumps(delta).encode() + b"\n")
    ledger.call_ended(call)
    ((cost, *found),) = await rows(hive, "SELECT cost_micro_usd, input_tokens, output_tokens, estimated FROM charges")
    assert found == [7, None, 1]
    assert 7 + 5 * 1000 <= cost <= 7 + 5 * 1100


async def test_counts_that_no_call_has_do_not_overflow_the_sums(hive: Services) -> None:
    for _ in range(1_000):
        spend(hive.broker.ledger, 2**40, server_tool_use={"web_search_requests": 2**40})
    ((calls, cost),) = await rows(hive, "SELECT calls, cost_micro_usd FROM spend_days")
    assert calls == 1_000
    assert cost == hive.broker.ledger.spent("*", "day") > 0


async def test_a_model_of_unknown_price_is_marked(hive: Services) -> None:
    ledger, call = hive.broker.ledger, begin(hive.broker.ledger)
    answer(call, {"input_tokens": 1, "output_tokens": 1}, "claude-haiku-99")
    ledger.call_ended(call)
    assert await rows(hive, f"SELECT model, {COSTS} FROM charges") == [("claude-haiku-99", 6, 1, 0)]


@pytest.mark.parametrize(("path", "status"), [("/v1/messages", 429), ("/v1/messages/count_tokens", 200)])
async def test_an_error_and_a_count_of_tokens_cost_nothing(hive: Services, path: str, status: int) -> None:
    ledger, call = hive.broker.ledger, begin(hive.broker.ledger, path=path)
    answer(call, None, status=status)
    ledger.call_ended(call)
    assert await rows(hive, "SELECT status, input_tokens, cost_micro_usd, estimated FROM charges") == [
        (status, 0, 0, 0)
    ]


async def test_a_call_that_never_reached_the_provider_is_none(hive: Services) -> None:
    ledger = hive.broker.ledger
    await set_budget(hive, total="0.000010")
    ledger.call_ended(begin(ledger))
    assert await rows(hive, "SELECT * FROM charges") == []
    assert ledger.spent("iris", "total") == 0


# -- whose it is ------------------------------------------------------------------------------------------------------


async def test_a_charge_knows_its_turn_what_set_that_off_and_who_began_the_chain(hive: Services) -> None:
    ledger = hive.broker.ledger
    turn = (await take_turn(hive)).turn
    spend(ledger, 5)
    await hive.say("iris", "damocles", "go on")
    other = await hive.broker.lease(DAMOCLES)
    spend(ledger, 6, DAMOCLES)
    spend(ledger, 7, HM1ND)
    sql = "SELECT cost_micro_usd, turn_id, cause, cause_id, chain_id, root FROM charges ORDER BY id"
    assert await rows(hive, sql) == [
        (5, turn.id, "operator", None, 1, "operator"),
        (6, other.turn.id, "turn", turn.id, 1, "operator"),
        (7, None, None, None, None, "no turn"),
    ]


async def test_the_root_of_a_chain_may_be_a_schedule_an_agent_or_the_hive(hive: Services) -> None:
    ledger = hive.broker.ledger
    await hive.say("iris", "damocles", "of my own accord")
    await hive.broker.lease(DAMOCLES)
    spend(ledger, 1, DAMOCLES)
    added = await hive.schedules.add(parse_plan("iris", "tick", None, None, 60), None)
    await hive.schedules.run(added["schedule"], None)
    await hive.broker.lease(IRIS)
    spend(ledger, 2)
    await hive.say("system", "hm1nd", "a notice")
    lease = await hive.broker.lease(HM1ND)
    spend(ledger, 3, HM1ND)
    await hive.broker.ack(HM1ND, lease.turn, "done")
    await hive.reminders.remind(HM1ND, When(after_s=24 * 3600), "look")
    await hive.let_time_pass()
    await hive.broker.lease(HM1ND)
    spend(ledger, 4, HM1ND)
    assert await rows(hive, "SELECT root FROM charges ORDER BY id") == [
        ("agent iris",),
        (f"schedule {added['schedule']}",),
        ("system",),
        ("agent hm1nd",),
    ]


async def test_an_errand_is_set_off_by_whoever_set_it(hive: Services) -> None:
    await hive.sql("UPDATE agents SET errand = 'compact', errand_by = 'operator' WHERE name = 'iris'")
    lease = await hive.broker.lease(IRIS)
    spend(hive.broker.ledger, 1)
    sql = "SELECT turn_id, cause, cause_id, chain_id, root FROM charges"
    assert await rows(hive, sql) == [(lease.turn.id, "operator", None, None, "operator")]


async def test_a_turn_shows_what_its_calls_cost_so_far(hive: Services) -> None:
    ledger = hive.broker.ledger
    turn = (await take_turn(hive)).turn
    assert await rows(hive, "SELECT cost_micro_usd FROM turns") == [(None,)]
    spend(ledger, 5)
    assert await rows(hive, "SELECT cost_micro_usd FROM turns") == [(5,)]
    spend(ledger, 6)
    spend(ledger, 7)
    assert await rows(hive, "SELECT id, cost_micro_usd FROM turns") == [(turn.id, 18)]


# -- budgets ----------------------------------------------------------------------------------------------------------


async def test_an_empty_budget_closes_the_way_names_itself_and_who_can_raise_it(hive: Services) -> None:
    ledger, closed = hive.broker.ledger, hive.agents.access.closed
    await set_budget(hive, day="1")
    await take_turn(hive)
    spend(ledger, 999_999)
    assert closed(IRIS) is None
    spend(ledger, 1)
    found = closed(IRIS)
    assert found is not None
    assert (found.state, found.status) == ("over_budget", 503)
    assert found.sentence == (
        "the budget of iris for a day, 1.00 USD, is spent (1.00 USD); it goes on at midnight UTC, or the operator can "
        "raise it: `hive budget set iris --day USD`"
    )
    assert found.until_ms == (hive.now_ms() // DAY_MS + 1) * DAY_MS
    assert closed(DAMOCLES) is None
    await set_budget(hive, day="2")
    assert closed(IRIS) is None


async def test_the_budget_of_the_hive_holds_for_every_agent(hive: Services) -> None:
    await set_budget(hive, "hive", total="1")
    spend(hive.broker.ledger, 1_200_000, DAMOCLES)
    for name in (IRIS, DAMOCLES, HM1ND):
        found = hive.agents.access.closed(name)
        assert found is not None
        assert "the budget of the hive in total, 1.00 USD, is spent (1.20 USD); the operator can" in found.sentence
        assert found.until_ms is None


async def test_a_new_day_opens_by_itself_and_whoever_waits_goes_on(hive: Services, nursery: trio.Nursery) -> None:
    ledger, access = hive.broker.ledger, hive.agents.access
    await set_budget(hive, day="1")
    spend(ledger, 1_000_000)
    assert access.closed(IRIS) is not None
    leases: list[Lease] = []

    async def lease() -> None:
        leases.append(await hive.broker.lease(IRIS))

    await hive.say("operator", "iris", "work")
    nursery.start_soon(access.serve, hive.store)
    nursery.start_soon(lease)
    await trio.testing.wait_all_tasks_blocked(0.05)
    assert not leases
    hive.clock.ahead_s += 24 * 3600
    ledger.look()
    await wait_until(hive.store, lambda: _given(leases), EVENTS)


async def test_a_clock_that_leaps_ahead_and_back_makes_no_new_day(hive: Services) -> None:
    ledger, access = hive.broker.ledger, hive.agents.access
    await set_budget(hive, day="1")
    spend(ledger, 1_000_000)
    async with served(ledger):
        for leap_s in (0, 40 * 86_400, -40 * 86_400):
            hive.clock.ahead_s += leap_s
            ledger._moved()
            await trio.testing.wait_all_tasks_blocked(0.05)
    assert access.closed(IRIS) is not None
    assert ledger.spent("iris", "day") == 1_000_000


async def test_midnight_opens_what_a_day_has_closed(hive: Services) -> None:
    ledger, access = hive.broker.ledger, hive.agents.access
    hive.clock.ahead_s += DAY_MS / 1000 - hive.clock() % (DAY_MS / 1000) - 1
    await set_budget(hive, day="1")
    spend(ledger, 1_000_000)
    closed = access.closed(IRIS)
    assert closed is not None
    assert closed.until_ms is not None
    assert 0 < closed.until_ms - hive.now_ms() <= 1_000

    async def opened() -> bool:
        await trio.lowlevel.checkpoint()
        return access.closed(IRIS) is None

    async with served(ledger):
        await wait_until(hive.store, opened, "access")


async def _given(leases: list[Lease]) -> bool:
    await trio.lowlevel.checkpoint()
    return bool(leases)


async def test_a_turn_begins_only_when_a_budget_holds_what_it_may_cost(hive: Services) -> None:
    ledger, limits = hive.broker.ledger, hive.broker.limits
    await set_budget(hive, "hive", total="0.025")
    await take_turn(hive)
    sql = "SELECT agent, reserved_micro_usd FROM turns ORDER BY id"
    assert await rows(hive, sql) == [("iris", limits.reserve_least_micro_usd)]
    await take_turn(hive, DAMOCLES)
    await hive.say("operator", "hm1nd", "work")
    with trio.move_on_after(0.05) as waits:
        await hive.broker.lease(HM1ND)
    assert waits.cancelled_caught
    found = hive.agents.access.closed(HM1ND)
    assert found is not None
    assert found.sentence.startswith(
        "the budget of the hive in total, 0.025 USD, has 0.005 USD left beside 0.02 USD for turns that run, and "
        "hm1nd's next turn may take 0.01 USD; the operator can raise it"
    )
    assert hive.agents.access.closed(IRIS) is None, "a turn that runs goes on until all is spent"
    spend(ledger, 15_000, IRIS)
    assert hive.agents.access.closed(IRIS) is None


async def test_what_was_reserved_and_not_spent_is_free_again_when_the_turn_ends(
    hive: Services, nursery: trio.Nursery
) -> None:
    await set_budget(hive, "hive", total="0.015")
    assert hive.agents.access.closed(DAMOCLES) is None, "before anything is reserved"
    first = await take_turn(hive)
    leases: list[Lease] = []

    async def lease() -> None:
        leases.append(await hive.broker.lease(DAMOCLES))

    async with served(hive.broker.ledger):
        nursery.start_soon(hive.agents.access.serve, hive.store)
        await hive.say("operator", "damocles", "work")
        nursery.start_soon(lease)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert not leases
        spend(hive.broker.ledger, 5_000)
        await hive.broker.ack(IRIS, first.turn, "done")
        await wait_until(hive.store, lambda: _given(leases), EVENTS)


async def test_whoever_was_told_no_is_woken_although_nobody_else_was_told_of_it(hive: Services) -> None:
    access = hive.agents.access
    await set_budget(hive, "hive", total="0.015")
    assert access.closed(DAMOCLES) is None
    lease = await take_turn(hive)
    assert access.closed(DAMOCLES) is not None
    with hive.store.bus.listen("access") as listener, trio.fail_after(PATIENCE_S):
        await hive.broker.ack(IRIS, lease.turn, "done")
        await listener.wait()
    assert access.closed(DAMOCLES) is None


async def test_an_ack_does_not_begin_the_next_turn_when_the_budget_does_not_hold_it(hive: Services) -> None:
    await set_budget(hive, total="0.02")
    lease = await take_turn(hive)
    await hive.say("operator", "iris", "more")
    spend(hive.broker.ledger, 15_000)
    acked = await hive.broker.ack(IRIS, lease.turn, "done", next_fence="next")
    assert acked.counted
    assert acked.lease is None


async def test_the_next_turn_is_expected_to_cost_as_the_dearest_of_the_last_ones_within_bounds(hive: Services) -> None:
    ledger = hive.broker.ledger
    reserved = []
    async with served(ledger):
        for cost in (0, 30_000, 9_000_000, 0, 0, 0, 0, 0, 0):
            lease = await take_turn(hive)
            reserved.append(await hive.value("SELECT reserved_micro_usd FROM turns WHERE state = 'running'"))
            spend(ledger, cost)
            await hive.broker.ack(IRIS, lease.turn, "done")
            await wait_until(hive.store, lambda id_=lease.turn.id: _settled(ledger, id_), EVENTS, TURN_ENDS, "spent")  # type: ignore[misc]
    least, most = Limits().reserve_least_micro_usd, Limits().reserve_most_micro_usd
    assert reserved == [least, least, 30_000, most, most, most, most, most, least]
    assert (await reopened(hive)).turns.next_cost("iris") == least


async def _settled(ledger: Ledger, turn: int) -> bool:
    await trio.lowlevel.checkpoint()
    return turn not in ledger.turns._turns


async def test_calls_side_by_side_cannot_all_slip_under_the_limit(hive: Services) -> None:
    ledger = hive.broker.ledger
    await set_budget(hive, day="1")
    spend(ledger, 900_000)
    calls, refused = [], []
    for _ in range(16):
        call = Call(IRIS, "/v1/messages", 200_000)
        closed = ledger.call_begins(call)
        (refused if closed else calls).append(closed or call)
    assert len(calls) == 2, "each may cost 0.07 USD"
    assert all(isinstance(one, Closed) and one.status == 429 and "try again" in one.sentence for one in refused)
    assert hive.agents.access.closed(IRIS) is None, "what only may be spent cuts nobody"
    for call in calls:
        assert isinstance(call, Call)
        answer(call, {"input_tokens": 10, "output_tokens": 1})
        ledger.call_ended(call)
    begin(ledger, request_bytes=200_000)


async def test_what_a_call_under_way_is_known_to_cost_counts_at_once_and_cuts_it(hive: Services) -> None:
    ledger = hive.broker.ledger
    await set_budget(hive, day="1")
    assert hive.agents.access.closed(IRIS) is None
    call = begin(ledger)
    with hive.store.bus.listen("access") as listener:
        answer(call, {"input_tokens": 1_000_000, "output_tokens": 1})
        ledger.call_moved(call)
        with trio.fail_after(PATIENCE_S):
            await listener.wait()
    assert hive.agents.access.closed(IRIS) is not None
    ledger.call_ended(call)
    assert ledger.spent("iris", "day") == 1_000_005


async def test_a_budget_in_percent_of_the_accounts_window_closes_at_it(hive: Services) -> None:
    windows = {"iris": {"5h": 0.42}}
    ledger = await reopened(hive, windows=lambda agent: windows.get(agent))
    await ledger.set_budget(parse_change({"scope": "iris", "window_5h": "50"}, 80), OPERATOR)
    assert ledger.reason(IRIS) is None
    windows["iris"]["5h"] = 0.5
    closed = ledger.reason(IRIS)
    assert closed is not None
    assert "the account's 5h window is used to 50 % and the budget of iris of the 5h window ends at 50 %" in (
        closed.sentence
    )
    del windows["iris"]
    assert ledger.reason(IRIS) is None, "unknown is not full"


async def test_of_several_budgets_the_one_that_opens_last_is_told(hive: Services) -> None:
    await set_budget(hive, day="1", total="2")
    await set_budget(hive, "hive", day="1")
    spend(hive.broker.ledger, 2_000_000)
    closed = hive.agents.access.closed(IRIS)
    assert closed is not None
    assert "of iris in total" in closed.sentence


async def test_a_warning_comes_once_for_each_budget_and_day_and_then_that_it_is_spent(hive: Services) -> None:
    ledger = hive.broker.ledger
    await set_budget(hive, day="1")
    for cost in (799_999, 1, 1, 1, 199_997, 1):
        spend(ledger, cost)
        await ledger.flush()
    told = [kind for kind in await hive.kinds() if kind.startswith("budget_")]
    assert told == ["budget_set", "budget_warned", "budget_spent"]
    warned, spent = [message["body"] for message in await hive.broker.messages.newest("hm1nd")]
    assert warned == (
        "budget_warning: of the budget of iris for a day 0.80 USD of 1.00 USD is used; whom it holds for is stopped "
        "when all is\nagent: iris"
    )
    assert spent.startswith("budget_spent: the budget of iris for a day is spent (1.00 USD of 1.00 USD); the operator")
    again = await reopened(hive)
    await again.flush()
    assert len(await hive.broker.messages.newest("hm1nd")) == 2, "a daemon that starts again says nothing twice"
    hive.clock.ahead_s += 24 * 3600
    spend(again, 800_000)
    await again.flush()
    assert len(await hive.broker.messages.newest("hm1nd")) == 3
    await set_budget(hive, day="0.5")
    await ledger.flush()


async def test_a_budget_that_stays_spent_is_told_again_on_the_next_day_and_not_before(hive: Services) -> None:
    await set_budget(hive, total="1")
    spend(hive.broker.ledger, 1_000_000)
    hive.clock.ahead_s += DAY_MS / 1000 - hive.clock() % (DAY_MS / 1000) + 1  # a second after midnight
    for hours, told in ((0, 1), (23, 1), (2, 2), (20, 2)):
        hive.clock.ahead_s += hours * 3600
        await hive.broker.ledger.flush()
        assert (await hive.kinds()).count("budget_spent") == told
    assert "budget_warned" not in await hive.kinds()


async def test_budgets_are_removed_one_by_one_or_all(hive: Services) -> None:
    ledger = hive.broker.ledger
    await set_budget(hive, day="1", total="2", window_7d=50)
    await set_budget(hive, "hive", day="9", warn_percent=50)
    shown = [(one.scope, one.kind, one.amount, one.warn_percent) for one in ledger.budgets.all()]
    assert shown == [
        ("*", "day", 9_000_000, 50),
        ("iris", "day", 1_000_000, 80),
        ("iris", "total", 2_000_000, 80),
        ("iris", "window_7d", 50, 80),
    ]
    assert await ledger.remove_budget(IRIS, parse_kinds(["total"]), OPERATOR) == ["total"]
    assert await ledger.remove_budget(IRIS, parse_kinds(None), OPERATOR) == ["day", "window_7d"]
    with pytest.raises(Refusal, match="cannot remove it: iris has no such budget"):
        await ledger.remove_budget(IRIS, parse_kinds(None), OPERATOR)
    assert [one.scope for one in (await reopened(hive)).budgets.all()] == ["*"]


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ({"scope": "iris"}, "cannot set a budget without an amount"),
        ({"scope": "iris", "day": "0"}, "as the budget day: give an amount of USD"),
        ({"scope": "iris", "day": 5}, "as the budget day: give an amount of USD"),
        ({"scope": "iris", "window_5h": "101"}, "as the budget window-5h: give a whole number of percent"),
        ({"scope": "iris", "window_5h": True}, "as the budget window-5h: give a whole number of percent"),
        ({"scope": "iris", "day": "1", "warn_percent": 0}, "as --warn: give a whole number of percent"),
        ({"scope": "No", "day": "1"}, "as an agent's name"),
        ({"day": "1"}, "as an agent's name"),
    ],
)
def test_a_budget_that_is_none_is_refused(args: dict[str, Any], why: str) -> None:
    with pytest.raises(Refusal) as refused:
        parse_change(args, 80)
    assert why in refused.value.message


async def test_a_budget_for_nobody_is_refused_and_changes_nothing(hive: Services) -> None:
    with pytest.raises(Refusal, match="no agent has that name"):
        await set_budget(hive, "nobody", day="1")
    assert hive.broker.ledger.budgets.all() == []
    assert parse_scope("hive") == "*"


# -- what is kept -----------------------------------------------------------------------------------------------------


async def test_a_daemon_that_starts_again_counts_on(hive: Services) -> None:
    lease = await take_turn(hive)
    await set_budget(hive, day="1")
    spend(hive.broker.ledger, 400_000)
    await hive.broker.ledger.flush()
    again = await reopened(hive)
    assert again.spent("iris", "day") == again.spent("*", "total") == 400_000
    spend(again, 600_000)
    assert again.reason(IRIS) is not None
    await again.flush()
    assert await hive.value("SELECT cost_micro_usd FROM turns WHERE id = ?", lease.turn.id) == 1_000_000


async def test_a_turn_that_goes_on_under_another_daemon_is_charged_there_and_not_compared(hive: Services) -> None:
    lease = await take_turn(hive)
    spend(hive.broker.ledger, 5)
    await hive.broker.ledger.flush()
    again = await reopened(hive)
    assert again.running(IRIS) == lease.turn.id
    spend(again, 7)
    async with served(again):
        await hive.broker.ack(IRIS, lease.turn, "done", usage={"input_tokens": 0, "output_tokens": 0})
        await wait_until(hive.store, lambda: _settled(again, lease.turn.id), TURN_ENDS, "spent", EVENTS)
    settled = await hive.value("SELECT data FROM events WHERE kind = 'turn_settled'")
    assert json.loads(settled)["cost_micro_usd"] == 12
    assert "usage_differs" not in await hive.kinds(), "what was under way when the daemon died nobody counted"


async def test_what_was_not_written_when_the_daemon_was_killed_is_all_that_is_lost(hive: Services) -> None:
    ledger = hive.broker.ledger
    spend(ledger, 1)
    await ledger.flush()
    spend(ledger, 2)  # in memory alone, when it is killed
    assert ledger.spent("*", "total") == 3
    assert (await reopened(hive)).spent("*", "total") == 1


async def test_a_stop_writes_what_is_left_and_a_disk_that_takes_nothing_is_tried_again(
    hive: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = hive.broker.ledger
    spend(ledger, 1)
    with trio.CancelScope() as scope:
        scope.cancel()
        await ledger.aclose()
    assert (await reopened(hive)).spent("*", "total") == 1


async def test_totals_stay_right_when_old_charges_are_forgotten(hive: Services) -> None:
    ledger = hive.broker.ledger
    spend(ledger, 5)
    hive.clock.ahead_s += 100 * 24 * 3600
    spend(ledger, 7)
    await ledger.flush()
    await forget_history(hive.store, hive.now_ms() - 90 * DAY_MS)
    assert await rows(hive, "SELECT cost_micro_usd FROM charges") == [(7,)]
    again = await reopened(hive)
    assert (again.spent("iris", "total"), again.spent("iris", "day")) == (12, 7)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["iris", "damocles"]),
            st.sampled_from([HAIKU, "claude-opus-4-6", "new"]),
            st.integers(0, 10**7),
            st.sampled_from(["whole", "cut", "error", "unreached"]),
            st.integers(0, 3),
            st.booleans(),
        ),
        max_size=30,
    )
)
def test_every_sum_is_that_of_the_charges(calls: list[tuple[str, str, int, str, int, bool]]) -> None:
    async def check(hive: Services) -> None:
        ledger = hive.broker.ledger
        for agent, model, tokens, end, days, flushes in calls:
            hive.clock.ahead_s += days * 24 * 3600
            call = begin(ledger, AgentName(agent), tokens)
            if end == "whole":
                answer(call, {"input_tokens": tokens, "output_tokens": 3}, model)
            call.reached = end != "unreached"
            call.status = 500 if end == "error" else call.status
            ledger.call_ended(call)
            if flushes:
                await ledger.flush()
        charges = await rows(hive, "SELECT agent, cost_micro_usd, at_ms FROM charges")
        assert len(charges) == sum(end != "unreached" for *_, end, _, _ in calls)
        again = await reopened(hive)
        today = hive.now_ms() // DAY_MS
        for scope in ("*", "iris", "damocles"):
            mine = [(cost, at_ms) for agent, cost, at_ms in charges if scope in ("*", agent)]
            of_today = sum(cost for cost, at_ms in mine if at_ms // DAY_MS == today)
            for one in (ledger, again):
                assert one.spent(scope, "total") == sum(cost for cost, _ in mine)
                assert one.spent(scope, "day") == of_today
        ((sums,),) = await rows(hive, "SELECT coalesce(sum(cost_micro_usd), 0) FROM spend_days")
        assert sums == ledger.spent("*", "total")

    run_in_hive(check, "iris", "damocles")


async def test_a_turn_that_its_harness_comes_back_for_is_known_at_once(hive: Services) -> None:
    await hive.say("operator", "iris", "work")
    begun = await hive.store.write(lambda tx: begin_turn(tx, IRIS, "f", Limits()))
    assert begun is not None, "whoever asked for it hung up before the answer"
    assert hive.broker.ledger.running(IRIS) is None
    await hive.broker.close_lost_turns(IRIS, ["f"])
    assert hive.broker.ledger.running(IRIS) == begun.turn.id
    await hive.broker.cancel_turn(IRIS, OPERATOR)
    assert hive.broker.ledger.running(IRIS) is None


# -- two counts -------------------------------------------------------------------------------------------------------

SEEN = {"input": 10, "output": 2, "cache_read": 0, "cache_write": 0}


@pytest.mark.parametrize(
    ("told", "differs"),
    [
        ({"input_tokens": 10, "output_tokens": 2, "cache_read_input_tokens": 0}, False),
        ({"input_tokens": 10}, False),
        ({"input_tokens": 0, "output_tokens": 0}, True),
        ({"input_tokens": 10, "output_tokens": 3}, True),
        # What the program did on its own account stands with its models alone.
        ({"input_tokens": 1, "models": {"a": {"inputTokens": 4, "outputTokens": 2}, "b": {"inputTokens": 6}}}, False),
        ({"input_tokens": 10, "output_tokens": 2, "models": {"a": {"inputTokens": 4}}}, True),
        ({"models": [1], "input_tokens": "x"}, False),
        (None, True),
    ],
)
async def test_a_turn_that_tells_of_other_tokens_than_the_relay_saw_is_an_event(
    hive: Services, told: dict[str, Any] | None, differs: bool
) -> None:
    ledger = hive.broker.ledger
    async with served(ledger):
        lease = await take_turn(hive)
        call = begin(ledger)
        answer(call, {"input_tokens": 10, "output_tokens": 2})
        call.complete = True
        await hive.broker.ack(IRIS, lease.turn, "done", usage=told)
        await wait_until(hive.store, lambda: _ended(ledger, lease.turn.id), TURN_ENDS, "spent", EVENTS)
        assert "usage_differs" not in await hive.kinds(), "not before the turn's last call has ended"
        ledger.call_ended(call)
        await wait_until(hive.store, lambda: _settled(ledger, lease.turn.id), "spent", EVENTS)
    found = await rows(hive, "SELECT actor, agent, data FROM events WHERE kind = 'usage_differs'")
    assert len(found) == differs
    for actor, agent, data in found:
        assert (actor, agent) == ("system", "iris")
        assert json.loads(data)["turn"] == lease.turn.id
        assert json.loads(data)["seen"] == SEEN


async def _ended(ledger: Ledger, turn: int) -> bool:
    await trio.lowlevel.checkpoint()
    return ledger.turns._turns[turn].ended


@pytest.mark.parametrize(
    ("input_told", "output_told", "differs"),
    [(10, 2, False), (17, 2, False), (14, 900, False), (9, 2, True), (18, 2, True), (10, 1, True)],
)
def test_a_call_that_was_cut_may_be_counted_by_the_program_or_not(
    input_told: int, output_told: int, differs: bool
) -> None:
    none: Tokens = dict.fromkeys(KINDS)
    whole, cut = [{**none, "input": 10, "output": 2}], [{**none, "input": 7}]
    told = {"input_tokens": input_told, "output_tokens": output_told}
    assert (compare(told, whole, cut, True) is not None) == differs
    assert compare({"input_tokens": 5}, [], [none], True) is None, "nothing is known of it"


async def test_a_turn_that_did_not_end_well_owes_no_count(hive: Services) -> None:
    ledger = hive.broker.ledger
    async with served(ledger):
        lease = await take_turn(hive)
        spend(ledger, 10)
        await hive.broker.ack(IRIS, lease.turn, "failed")
        await wait_until(hive.store, lambda: _settled(ledger, lease.turn.id), TURN_ENDS, "spent", EVENTS)
    assert "usage_differs" not in await hive.kinds()


async def test_no_plan_of_a_query_reads_every_charge(hive: Services) -> None:
    def plan(connection: sqlite3.Connection, sql: str) -> str:
        return " ".join(row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {sql}"))

    for sql in ("SELECT sum(cost_micro_usd) FROM charges WHERE at_ms >= 5", "SELECT 1 FROM charges WHERE turn_id = 3"):
        assert "SCAN" not in await hive.store.write(lambda tx, sql=sql: plan(tx.execute.__self__, sql))  # type: ignore[misc,attr-defined]
