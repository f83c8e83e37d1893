"""What a turn's end leaves on its agent's row: its session, how full that is, and the errand that follows from it."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from hive_core.protocol.words import AgentName
from hive_core.services.freeze import Freeze
from hive_core.services.leases import Lease
from hive_core.services.turn_ends import ERRAND_EVERY, Told
from hive_core.store.bus import RESTING
from tests.hives import Services
from tests.processes import PATIENCE_S

IRIS, OPERATOR = AgentName("iris"), AgentName("operator")
FULL, HALF = Told(context_tokens=150, context_window=200), Told(context_tokens=100, context_window=200)


async def end(hive: Services, lease: Lease, outcome: str = "done", told: Told = HALF, **more: Any) -> None:
    assert (await hive.broker.ack(IRIS, lease.turn, outcome, told=told, **more)).counted


async def message_turn(hive: Services, told: Told = HALF, outcome: str = "done") -> None:
    await hive.say("hm1nd", "iris", "hello")
    lease = await hive.broker.lease(IRIS)
    assert lease.message is not None
    await end(hive, lease, outcome, told)


async def errand(hive: Services) -> str | None:
    found: str | None = await hive.value("SELECT errand FROM agents WHERE name = 'iris'")
    return found


async def test_a_session_above_the_watermark_is_compacted_before_the_next_message(hive: Services) -> None:
    await message_turn(hive, HALF)
    assert await errand(hive) is None
    await message_turn(hive, FULL)
    assert "errand_set" in await hive.kinds()
    await hive.say("hm1nd", "iris", "waits")
    lease = await hive.broker.lease(IRIS, "f")
    assert (lease.message, lease.errand, lease.waiting) == (None, "save_and_compact", 1)
    assert (await hive.broker.lease(IRIS, "f"))[:3] == lease[:3]
    await end(hive, lease, told=Told(context_tokens=20, context_window=200))
    agent = await hive.agents.get("iris")
    assert (agent.context_tokens, agent.context_window, agent.errand) == (20, 200, None)
    assert (await hive.broker.lease(IRIS)).message["body"] == "waits"


@pytest.mark.parametrize(("percent", "due"), [(0, None), (80, None), (75, "save_and_compact")])
async def test_the_watermark_is_the_agents_own(hive: Services, percent: int, due: str | None) -> None:
    await hive.sql("UPDATE agents SET settings = json_set(settings, '$.compact_at_percent', ?)", percent)
    await message_turn(hive, FULL)
    assert await errand(hive) == due


async def test_a_session_whose_window_nobody_knows_is_left_alone(hive: Services) -> None:
    await message_turn(hive, Told(context_tokens=10**6))
    assert await errand(hive) is None


@pytest.mark.parametrize("outcome", ["done", "failed", "cancelled"])
async def test_an_errand_is_not_tried_again_before_some_turns_with_messages(hive: Services, outcome: str) -> None:
    await message_turn(hive, FULL)
    await end(hive, await hive.broker.lease(IRIS), outcome, FULL)
    for _ in range(ERRAND_EVERY):
        assert await errand(hive) is None
        await message_turn(hive, FULL)
    assert await errand(hive) is None
    await message_turn(hive, FULL)
    assert await errand(hive) == "save_and_compact"


async def test_an_errand_that_had_to_wait_is_kept(hive: Services) -> None:
    await message_turn(hive, FULL)
    await end(hive, await hive.broker.lease(IRIS), "waiting")
    assert await errand(hive) == "save_and_compact"
    await hive.say("hm1nd", "iris", "hello")
    await hive.agents.want(IRIS, "up", "operator")  # else it rests first
    assert (await hive.broker.lease(IRIS)).errand == "save_and_compact"


async def test_an_errand_that_waits_again_and_again_keeps_no_mail_back(hive: Services) -> None:
    await message_turn(hive, FULL)
    message = await hive.say("hm1nd", "iris", "hello")
    await end(hive, await hive.broker.lease(IRIS), "waiting")
    await hive.let_time_pass()
    lease = await hive.broker.lease(IRIS)
    assert (lease.message["id"], lease.errand) == (message, None)
    await end(hive, lease)
    assert (await hive.broker.lease(IRIS)).errand == "save_and_compact"


async def test_the_clock_is_told_that_an_agent_rests_from_an_errand(hive: Services) -> None:
    """No message rests with it, and mail that is due waits for the agent's rest alone."""
    await message_turn(hive, FULL)
    lease = await hive.broker.lease(IRIS)
    with hive.store.bus.listen(RESTING) as listener, trio.fail_after(PATIENCE_S):
        await end(hive, lease, "waiting")
        await listener.wait()


async def test_an_errand_that_closes_the_way_to_the_model_again_and_again_keeps_no_mail_back(hive: Services) -> None:
    await message_turn(hive, FULL)
    message = await hive.say("hm1nd", "iris", "hello")
    lease = await hive.broker.lease(IRIS)
    freeze = Freeze(hive.store, hive.agents.access)  # one of those that close the way
    await freeze.estop("operator")
    await end(hive, lease, "waiting")
    await freeze.thaw("operator")
    lease = await hive.broker.lease(IRIS)
    assert (lease.message["id"], lease.errand) == (message, None)
    await end(hive, lease)
    assert (await hive.broker.lease(IRIS)).errand == "save_and_compact"


async def test_an_errand_that_is_lost_with_its_harness_is_over_and_costs_no_message_a_try(hive: Services) -> None:
    await message_turn(hive, FULL)
    lease = await hive.broker.lease(IRIS)
    assert (await hive.broker.close_lost_turns(IRIS)).lost == [lease.turn.id]
    assert await errand(hive) is None


async def test_a_message_whose_request_is_refused_is_given_up_at_once(hive: Services) -> None:
    await message_turn(hive, Told(reason="refusal"), "failed")
    assert await hive.states() == {1: "dead"}
    await message_turn(hive, Told(reason="crashed"), "failed")
    assert (await hive.states())[3] == "queued"


async def test_an_errand_is_a_turn_of_its_own_with_its_cause(hive: Services) -> None:
    await message_turn(hive, FULL)
    await end(hive, await hive.broker.lease(IRIS))
    newest, _ = await hive.turns.recent("iris")
    assert (newest["errand"], newest["errand_by"], newest["state"]) == ("save_and_compact", "system", "done")
