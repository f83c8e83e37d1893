"""The breaker's rules, on a clock that the test sets; at the end with the real relays of ten agents."""

from __future__ import annotations

import json
import random
import sqlite3
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2
import pytest
import trio
import trio.testing

from hive_core.credentials import Credential, Credentials
from hive_core.limits import Limits
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import OPERATOR, AgentName
from hive_core.provider_limits import FAR_MS
from hive_core.services.access import Access, Closed
from hive_core.services.agents import set_deployed
from hive_core.services.breaker import Breaker
from hive_core.services.broker import Broker
from hive_core.services.leases import begin_turn
from hive_core.sockets.http import serve_asgi
from hive_core.sockets.model import ModelRelay
from hive_core.sockets.unix import listen_unix
from hive_core.store import writer
from tests.hives import PATIENCE_S, SETTINGS, Services, held_writer
from tests.unit.test_core_model_relay import Call, Provider, plain_answer

KEY, OTHER = "sk-ant-api03-canary-one", "sk-ant-api03-canary-two"
IRIS, DAMOCLES, HM1ND = AgentName("iris"), AgentName("damocles"), AgentName("hm1nd")
U = "anthropic-ratelimit-unified"


class Desk:
    """A breaker over the services of a test, and a clock that stands still until the test moves it."""

    def __init__(self, hive: Services, **limits: Any) -> None:
        self.hive = hive
        self.now_s = hive.clock()
        self.credentials = Credentials(hive.state_dir, {})
        self.limits = Limits(**limits)
        self.breaker = self.begin()

    def begin(self) -> Breaker:
        """A breaker that knows nothing yet, as of a daemon that starts."""
        self.access = Access(self.hive.store.bus)
        self.breaker = Breaker(
            self.hive.store, self.credentials, self.access, self.limits, random.Random(0), lambda: self.now_s
        )
        return self.breaker

    async def pass_s(self, seconds: float) -> None:
        self.now_s += seconds
        await self.breaker.tick()

    async def answer(self, agent: AgentName, status: int, after_s: float | None = None, **headers: str) -> None:
        if after_s is not None:
            headers["retry-after"] = f"{after_s:g}"
        credential = self.breaker.credential_for(agent)
        assert credential is not None
        self.breaker.answered(agent, credential, status, httpx2.Headers(headers))
        await self.breaker.tick()

    def state_of(self, agent: AgentName) -> str | None:
        closed = self.closed(agent)
        return closed.state if closed else None

    def closed(self, agent: AgentName) -> Closed | None:
        return self.access.closed(agent)

    def until_s(self, agent: AgentName = IRIS) -> float:
        """How long an agent has to wait from now, as it is told."""
        closed = self.closed(agent)
        assert closed is not None
        assert closed.until_ms is not None
        return closed.until_ms / 1000 - self.now_s

    def row(self, name: str = "default") -> dict[str, Any]:
        return next(row for row in self.breaker.rows() if row["name"] == name)

    async def told(self) -> list[tuple[str, dict[str, Any]]]:
        """The events about credentials, oldest first."""
        rows = await self.hive.store.rows("SELECT kind, data FROM events WHERE kind LIKE 'credential%' ORDER BY seq")
        return [(row["kind"].removeprefix("credential_"), json.loads(row["data"])) for row in rows]

    async def kinds(self) -> list[str]:
        return [kind for kind, _ in await self.told()]

    async def messages(self) -> list[str]:
        """What hm1nd was told by the hive."""
        rows = await self.hive.store.rows("SELECT body FROM messages WHERE sender = 'system' ORDER BY id")
        return [row["body"] for row in rows]


async def as_claude(hive: Services) -> None:
    await hive.sql("UPDATE agents SET settings = json_set(settings, '$.program', 'claude')")


@asynccontextmanager
async def desk_of(hive: Services, **limits: Any) -> AsyncIterator[Desk]:
    await as_claude(hive)
    desk = Desk(hive, **limits)
    desk.credentials.put("default", "api_key", KEY)
    await desk.breaker.load()
    yield desk


@pytest.fixture
async def desk(hive: Services) -> AsyncIterator[Desk]:
    async with desk_of(hive) as desk:
        yield desk


# -- no credential ----------------------------------------------------------------------------------------------------


async def test_an_agent_without_its_credential_waits_visibly_and_leases_no_turn(hive: Services, desk: Desk) -> None:
    desk.credentials.remove("default")
    closed = desk.closed(IRIS)
    assert closed is not None
    assert (closed.state, closed.cuts) == ("needs_login", False)
    assert "`hive login`" in closed.sentence
    assert desk.row()["state"] == "missing"


async def test_the_rehearsal_needs_no_credential(hive: Services, desk: Desk) -> None:
    await hive.sql("UPDATE agents SET settings = json_set(settings, '$.program', 'rehearsal') WHERE name = 'iris'")
    desk.credentials.remove("default")
    await desk.breaker.tick()
    assert (desk.closed(IRIS), desk.breaker.credential_for(IRIS)) == (None, None)
    assert desk.state_of(DAMOCLES) == "needs_login"


async def test_each_agent_uses_the_credential_that_its_settings_name(hive: Services, desk: Desk) -> None:
    await hive.sql("""UPDATE agents SET policy = '{"credential": "work"}' WHERE name = 'iris'""")
    await desk.breaker.tick()
    assert "`hive login work`" in (desk.closed(IRIS) or NONE).sentence
    assert desk.closed(DAMOCLES) is None
    token = "sk-ant-oat01-" + "x" * 30
    path = desk.credentials.put("work", "oauth_token", token)
    assert desk.breaker.credential_for(IRIS) == Credential("oauth_token", str(path), token, "work")
    assert (desk.breaker.kind_for(IRIS), desk.breaker.kind_for(DAMOCLES)) == ("oauth_token", "api_key")
    assert [(row["name"], row["agents"]) for row in desk.breaker.rows()] == [
        ("default", ["damocles", "hm1nd"]),
        ("work", ["iris"]),
    ]


async def test_an_agent_whose_settings_name_another_credential_uses_that_from_then_on(
    hive: Services, desk: Desk
) -> None:
    settings = {**SETTINGS, "program": "claude", "policy": {"credential": "work"}}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(desk.breaker.serve)
        await trio.testing.wait_all_tasks_blocked()
        await hive.store.write(lambda tx: set_deployed(tx, "iris", "1" * 40, settings))
        with trio.fail_after(20):  # not at its next look, which is half a minute later
            while desk.breaker.name_of(IRIS) != "work":
                await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()


NONE = Closed("", "")


async def test_a_file_that_somebody_puts_there_lets_the_waiting_agents_go_on(desk: Desk) -> None:
    desk.credentials.remove("default")
    await desk.breaker.tick()
    with desk.hive.store.bus.listen("access") as listener:
        desk.credentials.put("default", "api_key", OTHER)
        await desk.pass_s(30)
        with trio.fail_after(PATIENCE_S):
            await listener.wait()
    assert desk.closed(IRIS) is None
    await desk.breaker.tick()
    assert await desk.kinds() == ["changed"]


# -- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 529])
async def test_a_reset_time_closes_for_every_agent_on_the_credential_until_then(desk: Desk, status: int) -> None:
    await desk.answer(IRIS, status, after_s=90)
    for agent in (IRIS, DAMOCLES, HM1ND):
        closed = desk.closed(agent)
        assert closed is not None
        assert (closed.state, closed.cuts) == ("rate_limited", False)
        assert f"({status})" in closed.sentence
        assert desk.until_s(agent) == pytest.approx(90, abs=0.01)
    await desk.pass_s(89)
    assert desk.state_of(DAMOCLES) == "rate_limited"
    await desk.pass_s(1.1)
    assert desk.closed(IRIS) is None
    ((kind, data),) = await desk.told()
    assert (kind, data["credential"], data["status"]) == ("limited", "default", status)


@pytest.mark.parametrize("status", [429, 529])
async def test_without_a_reset_time_the_rest_doubles_by_chance_up_to_an_hour(desk: Desk, status: int) -> None:
    rests = []
    for _ in range(14):
        await desk.answer(IRIS, status)
        rests.append(desk.until_s())
        await desk.pass_s(rests[-1] + 0.01)
        assert desk.closed(IRIS) is None
    expected = [min(15 * 2**n, 3600) for n in range(14)]
    assert all(at / 2 <= rest <= at * 1.5 for at, rest in zip(expected, rests, strict=True))
    assert len({rest / at for at, rest in zip(expected, rests, strict=True)}) > 10
    await desk.answer(IRIS, 200)
    await desk.answer(IRIS, status)
    assert desk.until_s() <= 22.5, "a success begins anew"


async def test_calls_that_were_under_way_with_the_limited_one_are_the_same_event(desk: Desk) -> None:
    await desk.answer(IRIS, 429, after_s=60)
    await desk.answer(DAMOCLES, 429)
    await desk.answer(HM1ND, 200)
    assert desk.until_s() == pytest.approx(60, abs=0.01)
    await desk.answer(DAMOCLES, 429, after_s=120)
    assert desk.until_s() == pytest.approx(120, abs=0.01)
    assert await desk.kinds() == ["limited"]


async def test_calls_that_were_under_way_with_the_refused_one_are_the_same_event(desk: Desk) -> None:
    await desk.answer(IRIS, 401)
    until_s = desk.until_s()
    for agent in (DAMOCLES, HM1ND):
        await desk.answer(agent, 401)
    assert desk.until_s() == until_s
    assert await desk.kinds() == ["refused"]


async def test_a_refusal_while_a_credential_rests_until_a_reset_that_was_told_shortens_no_rest(desk: Desk) -> None:
    await desk.answer(IRIS, 429, after_s=1000)
    await desk.answer(DAMOCLES, 401)
    assert desk.until_s() == pytest.approx(1000, abs=0.01)
    assert desk.state_of(IRIS) == "needs_login"


async def test_agents_on_another_credential_go_on(hive: Services, desk: Desk) -> None:
    desk.credentials.put("work", "api_key", OTHER)
    await hive.sql("""UPDATE agents SET policy = '{"credential": "work"}' WHERE name = 'iris'""")
    await desk.breaker.tick()
    await desk.answer(IRIS, 429, after_s=60)
    assert (desk.state_of(IRIS), desk.state_of(DAMOCLES)) == ("rate_limited", None)


async def test_other_answers_close_nothing(desk: Desk) -> None:
    for status in (200, 400, 404, 413, 500, 502, 503):
        await desk.answer(IRIS, status)
    assert desk.closed(IRIS) is None
    assert (desk.row()["state"], await desk.kinds()) == ("works", [])


async def test_a_clock_that_was_set_back_locks_nobody_out_for_ever(desk: Desk) -> None:
    await desk.answer(IRIS, 429, after_s=60)
    await desk.pass_s(-FAR_MS / 1000)
    assert desk.closed(IRIS) is None
    await desk.answer(IRIS, 200)
    assert desk.state_of(DAMOCLES) == "rate_limited"
    desk.breaker.claimed(HM1ND, int(desk.now_s * 1000) + 60_000)
    await desk.pass_s(-FAR_MS / 1000)
    assert [desk.closed(agent) for agent in (DAMOCLES, HM1ND)] == [None] * 2


async def test_what_was_known_holds_in_the_next_daemon(desk: Desk) -> None:
    await desk.answer(IRIS, 429, after_s=60, **{f"{U}-5h-utilization": "0.97"})
    await desk.begin().load()
    assert desk.until_s(DAMOCLES) == pytest.approx(60, abs=0.01)
    assert desk.row()["windows"]["5h"]["used"] == 0.97
    await desk.pass_s(61)
    await desk.answer(IRIS, 200)
    await desk.begin().load()
    assert desk.closed(DAMOCLES) is None
    assert desk.row()["state"] == "works"


async def test_another_secret_is_another_credential(desk: Desk) -> None:
    old = desk.breaker.credential_for(IRIS)
    assert old is not None
    await desk.answer(IRIS, 429, after_s=60)
    desk.credentials.put("default", "api_key", OTHER)
    assert desk.closed(IRIS) is None
    desk.breaker.answered(IRIS, old, 429, httpx2.Headers({"retry-after": "60"}))
    assert desk.closed(IRIS) is None, "a late answer to the old one closed the new one"
    await desk.answer(IRIS, 429, after_s=60)
    desk.breaker.answered(IRIS, old, 429, httpx2.Headers({"retry-after": "600"}))
    assert desk.until_s() == pytest.approx(60, abs=0.01), "a late answer to the old one changed the new one"
    desk.credentials.put("default", "api_key", f"{OTHER}-again")
    await desk.begin().load()
    assert desk.closed(IRIS) is None


# -- how it opens -----------------------------------------------------------------------------------------------------


async def test_after_a_limit_one_agent_tries_and_the_others_follow_one_after_another(
    hive: Services, desk: Desk
) -> None:
    for agent in (DAMOCLES, HM1ND, IRIS):
        await hive.say("operator", agent, "work")
    await desk.answer(IRIS, 429, after_s=60)
    await desk.pass_s(61)
    assert [agent for agent in (HM1ND, DAMOCLES, IRIS) if desk.closed(agent) is None] == [IRIS]
    assert "iris tries the credential" in (desk.closed(DAMOCLES) or NONE).sentence
    await desk.answer(IRIS, 200)
    assert desk.closed(IRIS) is None
    first, second = sorted(desk.until_s(agent) for agent in (HM1ND, DAMOCLES))
    assert 0 < first < 15 < second < 30
    await desk.pass_s(first + 0.01)
    assert [desk.closed(HM1ND), desk.closed(DAMOCLES)].count(None) == 1
    await desk.pass_s(30)
    assert [desk.closed(HM1ND), desk.closed(DAMOCLES)].count(None) == 2
    assert await desk.kinds() == ["limited", "reopened"]
    assert desk.row()["state"] == "works"


async def test_an_agent_that_does_nothing_with_its_try_loses_it_to_one_that_waits(hive: Services, desk: Desk) -> None:
    for agent in (DAMOCLES, IRIS):
        await hive.say("operator", agent, "work")
    await desk.answer(IRIS, 429, after_s=60)
    await desk.pass_s(61)
    await desk.pass_s(59)
    assert [agent for agent in (DAMOCLES, IRIS) if desk.closed(agent) is None] == [IRIS]
    await desk.pass_s(2)
    assert [agent for agent in (DAMOCLES, IRIS) if desk.closed(agent) is None] == [DAMOCLES]
    await desk.pass_s(61)
    assert desk.closed(IRIS) is None, "whoever calls first, when all have had their try"
    assert desk.breaker.credential_for(IRIS) is not None
    await desk.pass_s(61)
    assert [agent for agent in (DAMOCLES, IRIS) if desk.closed(agent) is None] == [DAMOCLES], "then all may try again"


async def test_an_agent_that_something_else_keeps_from_the_model_is_not_the_one_to_try(
    hive: Services, desk: Desk
) -> None:
    for agent in (DAMOCLES, IRIS):
        await hive.say("operator", agent, "work")
    desk.access.add(lambda name: Closed("over_budget", "no money") if name == IRIS else None)
    await desk.answer(IRIS, 429, after_s=60)
    await desk.pass_s(61)
    assert desk.closed(DAMOCLES) is None
    assert desk.state_of(IRIS) == "rate_limited"


async def test_when_nobody_has_anything_to_do_nobody_is_woken_again_and_again(hive: Services, desk: Desk) -> None:
    await desk.answer(IRIS, 429, after_s=60)
    await desk.pass_s(61)
    with hive.store.bus.listen("access") as listener:
        await desk.pass_s(30)
        await desk.pass_s(30)
        assert not listener._woken.is_set()
        await hive.say("operator", DAMOCLES, "work")
        await desk.pass_s(30)
        assert listener._woken.is_set()
    assert [agent for agent in (HM1ND, DAMOCLES, IRIS) if desk.closed(agent) is None] == [DAMOCLES]


async def test_when_nobody_has_anything_to_do_the_first_who_calls_tries(desk: Desk) -> None:
    await desk.answer(IRIS, 429, after_s=60)
    await desk.pass_s(61)
    assert [desk.closed(agent) for agent in (IRIS, DAMOCLES, HM1ND)] == [None] * 3
    assert desk.breaker.credential_for(DAMOCLES) is not None
    assert [agent for agent in (HM1ND, DAMOCLES, IRIS) if desk.closed(agent) is None] == [DAMOCLES]


async def test_a_try_that_is_limited_again_closes_again(hive: Services, desk: Desk) -> None:
    await desk.answer(IRIS, 429, after_s=60)
    await desk.pass_s(61)
    await desk.answer(IRIS, 429, after_s=600)
    assert desk.until_s(DAMOCLES) == pytest.approx(600, abs=0.01)
    assert await desk.kinds() == ["limited", "limited"]


@pytest.mark.parametrize("status", [401, 429])
async def test_after_a_try_that_failed_another_that_waits_is_the_next(hive: Services, desk: Desk, status: int) -> None:
    for agent in (DAMOCLES, HM1ND, IRIS):
        await hive.say("operator", agent, "work")
    tried = []
    for _ in range(4):
        await desk.answer(IRIS if not tried else tried[-1], status)  # its own request may be what is refused
        await desk.pass_s(desk.until_s() + 0.01)
        tried += [agent for agent in (DAMOCLES, HM1ND, IRIS) if desk.closed(agent) is None]
    assert tried[:3] == [IRIS, DAMOCLES, HM1ND]
    assert len(tried) == 6, "when all have failed whoever calls first tries"
    await desk.answer(DAMOCLES, 200)
    assert desk.row()["state"] == "works"


class Town:
    """Agents that take their turns with a broker that asks the breaker; the requests of one message are too large."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.broker = Broker(desk.hive.store, desk.limits, random.Random(0), access=desk.access)
        self.too_large = 0
        self.done: list[int] = []
        self.turned_away_s: list[float] = []

    async def pass_s(self, seconds: float) -> None:
        self.desk.hive.clock.ahead_s += seconds
        self.desk.now_s = self.desk.hive.clock()
        await self.desk.breaker.tick()

    async def take_turn(self, agent: AgentName, status: int = 429) -> None:
        """One turn of an agent, if it gets one: with the message that is too large it ends as the provider says."""
        lease = await self.desk.hive.store.write(
            lambda tx: begin_turn(tx, agent, "fence", self.desk.limits, self.desk.access.closed)
        )
        if lease is None:
            return
        large = lease.message["id"] == self.too_large
        if large:
            self.turned_away_s.append(self.desk.now_s)
        else:
            self.done.append(lease.message["id"])
        await self.desk.answer(agent, status if large else 200)
        await self.broker.ack(agent, lease.turn, "waiting" if large else "done")


@pytest.mark.parametrize("status", [429, 403])
async def test_a_message_whose_own_calls_are_turned_away_each_time_keeps_no_other_mail_of_its_agent_back(
    hive: Services, desk: Desk, status: int
) -> None:
    town = Town(desk)
    town.too_large = await hive.say("operator", IRIS, "too large")
    others = [await hive.say("operator", IRIS, "work") for _ in range(3)]
    for _ in range(12):
        await town.take_turn(IRIS, status)
        await town.pass_s(max(desk.until_s(), 0) + 1 if desk.closed(IRIS) else 1)
    assert town.done == others
    assert (await hive.states("iris"))[town.too_large] == "queued", "it is never given up for that"


async def test_a_message_whose_own_calls_close_the_credential_each_time_does_it_ever_more_seldom(
    hive: Services, desk: Desk
) -> None:
    town = Town(desk)
    town.too_large = await hive.say("operator", IRIS, "too large")
    for _ in range(150):
        await hive.say("operator", DAMOCLES, "work")
        for agent in (IRIS, DAMOCLES):
            await town.take_turn(agent)
        await town.pass_s(10)
    gaps = [later - earlier for earlier, later in pairwise(town.turned_away_s)]
    assert len(gaps) < 10, "of 1,500 s"
    assert gaps[-1] > 4 * gaps[0]
    assert len(town.done) > 100


async def test_a_message_that_an_ordinary_limit_cuts_short_is_the_next_when_that_is_over(
    hive: Services, desk: Desk
) -> None:
    town = Town(desk)
    town.too_large = await hive.say("operator", IRIS, "cut short by the limit")
    await hive.say("operator", IRIS, "later")
    for _ in range(2):
        await town.take_turn(IRIS)
        await town.pass_s(desk.until_s() + 1)
    assert (await town.broker.lease(IRIS)).message["id"] == town.too_large


async def test_a_login_lets_those_go_on_at_once_who_were_to_follow_later(desk: Desk) -> None:
    await desk.answer(IRIS, 429, after_s=60)
    await desk.pass_s(61)
    await desk.answer(IRIS, 200)
    assert desk.state_of(DAMOCLES) == "rate_limited"
    desk.credentials.put("default", "api_key", OTHER)
    await desk.breaker.renewed("default", OPERATOR)
    assert [desk.closed(agent) for agent in (IRIS, DAMOCLES, HM1ND)] == [None] * 3


async def test_stay_stopped_means_until_the_operator_resumes(hive: Services) -> None:
    async with desk_of(hive, after_limit="stay") as desk:
        await desk.answer(IRIS, 429, after_s=60)
        await desk.begin().load()
        await desk.pass_s(7 * 86_400)
        closed = desk.closed(IRIS)
        assert closed is not None
        assert (closed.state, closed.until_ms) == ("rate_limited", None)
        assert "`hive credentials resume default`" in closed.sentence
        await desk.breaker.resume("default", OPERATOR)
        assert desk.closed(IRIS) is None
        assert await desk.kinds() == ["limited", "resumed"]
        # An overload is no limit of the account's.
        await desk.answer(IRIS, 529, after_s=60)
        await desk.pass_s(61)
        assert desk.closed(IRIS) is None


async def test_the_operator_may_try_a_limited_credential_at_once(desk: Desk) -> None:
    await desk.answer(IRIS, 429, after_s=600)
    assert await desk.breaker.resume("default", OPERATOR) == {
        "credential": "default",
        "agents": ["damocles", "hm1nd", "iris"],
    }
    assert desk.closed(IRIS) is None
    await desk.answer(IRIS, 200)
    for name, code in (("default", "conflict"), ("work", "not_found")):
        with pytest.raises(Refusal) as refused:
            await desk.breaker.resume(name, OPERATOR)
        assert refused.value.code == code


# -- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [401, 403])
async def test_a_refused_credential_needs_a_login_and_is_tried_again_ever_more_seldom(desk: Desk, status: int) -> None:
    rests = []
    if status == 403:
        await desk.answer(IRIS, status)
    for _ in range(9):
        (agent, *_) = (agent for agent in (DAMOCLES, IRIS, HM1ND) if desk.closed(agent) is None)
        await desk.answer(agent, status)
        assert {desk.state_of(agent) for agent in (IRIS, DAMOCLES, HM1ND)} == {"needs_login"}
        rests.append(desk.until_s())
        await desk.pass_s(rests[-1] + 0.01)
    expected = [min(60 * 2**n, 3600) for n in range(9)]
    assert all(at / 2 <= rest <= at * 1.5 for at, rest in zip(expected, rests, strict=True))
    (message,) = await desk.messages()
    assert f"refuses the credential default ({status})" in message
    assert desk.row()["state"] == "refused"


async def test_a_403_that_one_agent_gets_rests_that_agent_alone_ever_longer(desk: Desk) -> None:
    rests = []
    for _ in range(9):
        await desk.answer(IRIS, 403)
        await desk.answer(IRIS, 403)  # of a call that was under way with that one
        closed = desk.closed(IRIS)
        assert closed is not None
        assert (closed.state, closed.cuts) == ("needs_login", False)
        assert "refuses what iris asks for (403), and of no other agent" in closed.sentence
        assert [desk.closed(agent) for agent in (DAMOCLES, HM1ND)] == [None] * 2
        rests.append(desk.until_s())
        with desk.hive.store.bus.listen("access") as listener:
            await desk.pass_s(rests[-1] + 0.01)
            assert listener._woken.is_set(), "it goes on by itself"
        assert desk.closed(IRIS) is None
    expected = [min(60 * 2**n, 3600) for n in range(9)]
    assert all(at / 2 <= rest <= at * 1.5 for at, rest in zip(expected, rests, strict=True))
    assert (await desk.messages(), desk.row()["state"]) == ([], "untried")
    kind, data = (await desk.told())[0]
    assert (kind, data["credential"], data["status"], len(await desk.told())) == ("refused_to_agent", "default", 403, 9)
    await desk.answer(IRIS, 200)
    await desk.answer(IRIS, 403)
    assert desk.until_s() <= 90, "a success begins anew"


async def test_a_403_closes_the_credential_when_a_second_agent_gets_one_and_no_call_worked_between(desk: Desk) -> None:
    await desk.answer(IRIS, 403)
    await desk.answer(HM1ND, 200)
    await desk.answer(DAMOCLES, 403)
    assert [desk.state_of(agent) for agent in (IRIS, DAMOCLES, HM1ND)] == ["needs_login", "needs_login", None]
    assert desk.row()["state"] == "works"
    await desk.answer(HM1ND, 403)
    assert desk.row()["state"] == "refused"
    assert "refuses the credential default (403)" in (desk.closed(IRIS) or NONE).sentence
    assert await desk.kinds() == ["refused_to_agent", "refused_to_agent", "refused"]


async def test_a_403_of_long_ago_says_nothing_of_the_credential(desk: Desk) -> None:
    await desk.answer(IRIS, 403)
    await desk.pass_s(desk.until_s() + 3601)
    await desk.answer(DAMOCLES, 403)
    assert [desk.state_of(agent) for agent in (IRIS, DAMOCLES, HM1ND)] == [None, "needs_login", None]


async def test_a_403_of_the_only_agent_on_a_credential_is_the_credentials(hive: Services, desk: Desk) -> None:
    desk.credentials.put("work", "api_key", OTHER)
    await hive.sql("""UPDATE agents SET policy = '{"credential": "work"}' WHERE name = 'iris'""")
    await desk.breaker.tick()
    await desk.answer(IRIS, 403)
    assert desk.row("work")["state"] == "refused"
    assert "`hive login work`" in (desk.closed(IRIS) or NONE).sentence


async def test_an_agent_that_tries_a_rested_credential_and_gets_a_403_leaves_the_try_to_another(
    hive: Services, desk: Desk
) -> None:
    for agent in (DAMOCLES, IRIS):
        await hive.say("operator", agent, "work")
    await desk.answer(IRIS, 429, after_s=60)
    await desk.pass_s(61)
    await desk.answer(IRIS, 403)
    assert [desk.state_of(agent) for agent in (IRIS, DAMOCLES)] == ["needs_login", None]
    await desk.answer(DAMOCLES, 200)
    assert desk.row()["state"] == "works"


async def test_an_agent_that_rests_alone_can_be_let_on_by_the_operator_and_by_another_secret(desk: Desk) -> None:
    await desk.answer(IRIS, 403)
    await desk.breaker.resume("default", OPERATOR)
    assert desk.closed(IRIS) is None
    await desk.answer(IRIS, 403)
    desk.credentials.put("default", "api_key", OTHER)
    await desk.breaker.renewed("default", OPERATOR)
    assert desk.closed(IRIS) is None
    await desk.answer(IRIS, 403)
    await desk.pass_s(-FAR_MS / 1000 - 120)
    assert desk.closed(IRIS) is None, "a clock that was set back locks nobody out"


async def test_a_401_that_was_no_more_than_a_hiccup_heals_by_itself(desk: Desk) -> None:
    await desk.answer(IRIS, 401)
    await desk.pass_s(91)
    await desk.answer(IRIS, 200)
    await desk.pass_s(31)
    assert desk.closed(DAMOCLES) is None
    assert await desk.kinds() == ["refused", "reopened"]
    assert "works again" in (await desk.messages())[1]


async def test_a_login_lets_the_agents_go_on_at_once_and_hm1nd_is_told(desk: Desk) -> None:
    await desk.answer(IRIS, 401)
    desk.credentials.put("default", "api_key", OTHER)
    told = await desk.breaker.renewed("default", OPERATOR)
    assert told["agents"] == ["damocles", "hm1nd", "iris"]
    assert "canary" not in str(told)
    assert [desk.closed(agent) for agent in (IRIS, DAMOCLES, HM1ND)] == [None] * 3
    assert await desk.kinds() == ["refused", "logged_in"]
    assert "gave the credential default" in (await desk.messages())[1]
    assert desk.row()["state"] == "untried"


async def test_a_hive_without_hm1nd_keeps_the_event(hive: Services, desk: Desk) -> None:
    await hive.sql("DELETE FROM agents WHERE name = 'hm1nd'")
    await desk.answer(IRIS, 401)
    assert await desk.kinds() == ["refused"]


async def test_while_nothing_can_be_written_a_limit_holds_and_is_written_down_later(
    hive: Services, desk: Desk, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "LOCKED_MS", 10)
    with closing(sqlite3.connect(hive.state_dir / "hive.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        await desk.answer(IRIS, 401)
        assert desk.state_of(DAMOCLES) == "needs_login"
        assert await desk.breaker.tick() >= 1
    assert await desk.kinds() == []
    await desk.breaker.tick()
    assert await desk.kinds() == ["refused"]
    assert "cannot write down" in caplog.text


async def test_what_two_write_down_at_once_is_written_once(desk: Desk) -> None:
    desk.breaker.claimed(IRIS, int(desk.now_s * 1000) + 60_000)
    credential = desk.breaker.credential_for(IRIS)
    assert credential is not None
    desk.breaker.answered(IRIS, credential, 401, httpx2.Headers())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(desk.breaker.tick)
        nursery.start_soon(desk.breaker.tick)
    assert await desk.kinds() == ["refused"]
    assert len(await desk.messages()) == 1


async def test_a_removed_credential_is_forgotten(desk: Desk) -> None:
    await desk.answer(IRIS, 401)
    desk.credentials.remove("default")
    assert (await desk.breaker.removed("default", OPERATOR))["agents"] == ["damocles", "hm1nd", "iris"]
    assert desk.row()["state"] == "missing"
    assert await desk.hive.value("SELECT count(*) FROM credential_states") == 0
    assert await desk.kinds() == ["refused", "removed"]


# -- windows and claims -----------------------------------------------------------------------------------------------


async def test_how_much_of_the_windows_is_left_is_kept_as_it_was_told(desk: Desk) -> None:
    assert desk.row()["windows"] == {}
    await desk.answer(IRIS, 200, **{f"{U}-5h-utilization": "0.25", f"{U}-5h-reset": f"{desk.now_s + 60:.0f}"})
    await desk.answer(DAMOCLES, 200, **{f"{U}-7d-utilization": "0.5"})
    windows = desk.row()["windows"]
    assert {name: window["left"] for name, window in windows.items()} == {"5h": 0.75, "7d": 0.5}
    assert windows["7d"]["reset_ms"] is None
    await desk.pass_s(61)
    assert desk.row()["windows"].keys() == {"7d"}, "one that is over is unknown again"


async def test_a_window_whose_reset_nobody_told_is_over_after_its_own_length(desk: Desk) -> None:
    await desk.answer(IRIS, 200, **{f"{U}-5h-utilization": "0.9", f"{U}-7d-utilization": "0.9"})
    for seconds, known in ((5 * 3600 - 1, {"5h", "7d"}), (1, {"7d"}), (163 * 3600, set())):
        await desk.pass_s(seconds)
        assert desk.breaker.windows_used(IRIS).keys() == known


@pytest.mark.parametrize("reset_s", [None, 60])
async def test_a_window_that_was_told_under_a_clock_far_ahead_is_unknown_when_that_is_right(
    desk: Desk, reset_s: float | None
) -> None:
    reset = {} if reset_s is None else {f"{U}-7d-reset": f"{desk.now_s + reset_s:.0f}"}
    await desk.answer(IRIS, 200, **{f"{U}-7d-utilization": "0.9"}, **reset)
    await desk.pass_s(-30 * 86_400)
    assert desk.breaker.windows_used(IRIS) == {}


async def test_windows_that_look_the_same_are_not_written_again(hive: Services, desk: Desk) -> None:
    await desk.answer(IRIS, 200, **{f"{U}-5h-utilization": "0.25"})
    before = await hive.value("SELECT windows FROM credential_states")
    desk.now_s += 5
    await desk.answer(IRIS, 200, **{f"{U}-5h-utilization": "0.2504"})
    assert await hive.value("SELECT windows FROM credential_states") == before
    await desk.answer(IRIS, 200, **{f"{U}-5h-utilization": "0.26"})
    assert await hive.value("SELECT windows FROM credential_states") != before


async def test_what_comes_while_the_rest_is_written_down_is_written_next(hive: Services, desk: Desk) -> None:
    credential = desk.breaker.credential_for(IRIS)
    assert credential is not None
    desk.breaker.answered(IRIS, credential, 200, httpx2.Headers({f"{U}-5h-utilization": "0.25"}))
    async with trio.open_nursery() as nursery, held_writer(hive.store, nursery):
        nursery.start_soon(desk.breaker.tick)
        await trio.testing.wait_all_tasks_blocked()
        desk.breaker.answered(IRIS, credential, 200, httpx2.Headers({f"{U}-5h-utilization": "0.5"}))
    assert '"used": 0.25' in await hive.value("SELECT windows FROM credential_states")
    await desk.breaker.tick()
    assert '"used": 0.5' in await hive.value("SELECT windows FROM credential_states")


async def test_what_an_agent_claims_closes_that_agent_alone_and_not_for_ever(desk: Desk) -> None:
    desk.breaker.claimed(IRIS, int(desk.now_s * 1000) + 10 * FAR_MS)
    assert desk.until_s(IRIS) == pytest.approx(FAR_MS / 1000, abs=1)
    assert desk.closed(DAMOCLES) is None
    desk.breaker.claimed(DAMOCLES, int(desk.now_s * 1000) - 1)
    assert desk.closed(DAMOCLES) is None
    await desk.breaker.resume("default", OPERATOR)
    assert desk.closed(IRIS) is None
    desk.breaker.claimed(IRIS, int(desk.now_s * 1000) + 60_000)
    await desk.pass_s(61)
    assert desk.closed(IRIS) is None


# -- with the relays --------------------------------------------------------------------------------------------------


async def limited(call: Call) -> None:
    await call.say(b"HTTP/1.1 429 No\r\nretry-after: 60\r\ncontent-length: 2\r\n\r\n{}")


async def test_ten_agents_find_a_limit_out_once_and_come_back_one_after_another(hive: Services, tmp_path: Path) -> None:
    names = [AgentName(f"a{n}") for n in range(10)]
    await hive.add_agents(*names)
    for name in names:
        await hive.say("operator", name, "work")
    provider = Provider(limited)
    async with desk_of(hive) as desk, AsyncExitStack() as stack, trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, provider.serve_one, 0, host="127.0.0.1"))
        url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        client = await stack.enter_async_context(httpx2.AsyncClient(timeout=PATIENCE_S, trust_env=False))
        doors = {}
        for name in names:
            answered, credential = partial(desk.breaker.answered, name), partial(desk.breaker.credential_for, name)
            relay = ModelRelay(name, client, url, desk.access, credential, answered, lambda call: None)
            nursery.start_soon(serve_asgi, relay, listen_unix(tmp_path / f"{name}.sock"))
            transport = httpx2.AsyncHTTPTransport(uds=str(tmp_path / f"{name}.sock"))
            doors[name] = await stack.enter_async_context(httpx2.AsyncClient(transport=transport, timeout=PATIENCE_S))

        async def round_of_calls() -> dict[AgentName, int]:
            """Every agent calls once; with what each was answered."""
            return {n: (await doors[n].post("http://x/v1/messages", content=b"{}")).status_code for n in names}

        with trio.fail_after(3 * PATIENCE_S):
            assert list((await round_of_calls()).values()) == [429] + [503] * 9
            await desk.pass_s(59)
            assert set((await round_of_calls()).values()) == {503}
            assert len(provider.calls) == 1
            provider.answer = plain_answer
            await desk.pass_s(2)
            answers = await round_of_calls()
            assert [name for name, status in answers.items() if status == 200] == [names[0]]
            came = []
            for _ in range(30):
                await desk.pass_s(1)
                came.append(list((await round_of_calls()).values()).count(200))
            assert came == sorted(came)
            assert came[-1] == 10
            assert max(b - a for a, b in pairwise(came)) <= 2, "they came back together"
        nursery.cancel_scope.cancel()


async def test_another_agents_answer_under_way_is_not_cut_by_a_limit(hive: Services, tmp_path: Path) -> None:
    goes_on = trio.Event()

    async def streams(call: Call) -> None:
        await call.say(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nab")
        await goes_on.wait()
        await call.say(b"cd")

    provider = Provider(streams)
    async with desk_of(hive) as desk, trio.open_nursery() as nursery, httpx2.AsyncClient(trust_env=False) as client:
        listeners = await nursery.start(partial(trio.serve_tcp, provider.serve_one, 0, host="127.0.0.1"))
        url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        answered, credential = partial(desk.breaker.answered, IRIS), partial(desk.breaker.credential_for, IRIS)
        relay = ModelRelay(IRIS, client, url, desk.access, credential, answered, lambda call: None)
        nursery.start_soon(serve_asgi, relay, listen_unix(tmp_path / "iris.sock"))
        transport = httpx2.AsyncHTTPTransport(uds=str(tmp_path / "iris.sock"))
        with trio.fail_after(3 * PATIENCE_S):
            async with (
                httpx2.AsyncClient(transport=transport, timeout=PATIENCE_S) as door,
                door.stream("POST", "http://x/v1/messages", content=b"{}") as answer,
            ):
                chunks = answer.aiter_raw()
                assert await anext(chunks) == b"ab"
                await desk.answer(DAMOCLES, 429, after_s=60)
                assert desk.state_of(IRIS) == "rate_limited"
                goes_on.set()
                assert await anext(chunks) == b"cd"
        nursery.cancel_scope.cancel()
