"""An agent that speaks to its sockets itself: whatever it says, it is charged for what it calls, and stopped."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
import trio

from hive_core.credentials import Credential
from hive_core.protocol.words import OPERATOR, AgentName
from hive_core.services.budgets import parse_change
from hive_core.sockets.http import serve_asgi
from hive_core.sockets.model import ModelRelay
from hive_core.sockets.unix import listen_unix
from tests.hives import PATIENCE_S, Peer, Services, connect, serve, wait_until
from tests.unit.test_core_harness_desk import HELLO, desk_for
from tests.unit.test_core_model_relay import STREAM_HEAD, Call, Provider, chunk

IRIS = AgentName("iris")
KEY = Credential("api_key", "ANTHROPIC_API_KEY", "sk-real")
ZEROS = {"input_tokens": 0, "output_tokens": 0}
COST = 400_000  # micro-USD of each call


def usage(**more: Any) -> dict[str, Any]:
    return {"model": "claude-haiku-4-5", "usage": {"input_tokens": COST, "output_tokens": 0}, **more}


async def whole(call: Call) -> None:
    body = json.dumps(usage()).encode()
    await call.say(f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)


@dataclass
class Rogue:
    """The agent's side: its two sockets, and what it does with them."""

    hive: Services
    provider: Provider
    harness: Peer
    model: httpx2.AsyncClient

    async def call(self) -> httpx2.Response:
        return await self.model.post("http://x/v1/messages", content=b"{}")

    async def begin(self, fence: str) -> dict[str, Any]:
        answer: dict[str, Any] = await self.harness.ask({"id": 2, "op": "lease", "fence": fence})
        return answer

    async def ack(self, turn: int, fence: str, **more: Any) -> dict[str, Any]:
        ack = {"id": 3, "op": "ack", "turn": turn, "fence": fence, "outcome": "done", "usage": ZEROS}
        answer: dict[str, Any] = await self.harness.ask({**ack, **more})
        return answer

    @property
    def spent(self) -> int:
        return self.hive.broker.ledger.spent("iris", "day")


@pytest.fixture
async def rogue(hive: Services, tmp_path: Path) -> AsyncIterator[Rogue]:
    """iris, which may spend 1 USD a day, before a provider each of whose answers costs 0.40."""
    ledger, access, provider = hive.broker.ledger, hive.agents.access, Provider(whole)
    await ledger.set_budget(parse_change({"scope": "iris", "day": "1"}, 80), OPERATOR)
    desk = desk_for(hive)
    transport = httpx2.AsyncHTTPTransport(uds=str(tmp_path / "model.sock"))
    async with (
        httpx2.AsyncClient(timeout=PATIENCE_S, trust_env=False) as client,
        httpx2.AsyncClient(transport=transport, timeout=PATIENCE_S) as model,
        serve(tmp_path / "harness.sock", desk.serve) as door,
        connect(door) as peer,
        trio.open_nursery() as nursery,
    ):
        listeners = await nursery.start(partial(trio.serve_tcp, provider.serve_one, 0, host="127.0.0.1"))
        url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        turn = (partial(ledger.running, IRIS), partial(hive.turns.note_unleased_call, IRIS))
        hooks = (ledger.call_ended, ledger.call_begins, ledger.call_moved, *turn)
        relay = ModelRelay(IRIS, client, url, access, lambda: KEY, lambda *_: None, *hooks)
        nursery.start_soon(serve_asgi, relay, listen_unix(tmp_path / "model.sock"))
        for task in (ledger.serve, partial(access.serve, hive.store), hive.agents.serve):
            nursery.start_soon(task)
        assert (await peer.ask(HELLO))["ok"]
        with trio.fail_after(3 * PATIENCE_S):
            yield Rogue(hive, provider, peer, model)
        nursery.cancel_scope.cancel()


async def test_an_agent_that_acks_reports_zero_and_claims_idle_while_it_calls_on_is_charged_and_stopped(
    rogue: Rogue,
) -> None:
    hive = rogue.hive
    for number in (1, 2):
        await hive.say("operator", "iris", "work")
        assert (await rogue.begin(f"f-{number}"))["turn"] == number
        assert (await rogue.call()).status_code == 200
        assert (await rogue.ack(number, f"f-{number}"))["counted"]
        refused = await rogue.call()
        assert refused.status_code in (403, 503), "no turn runs, or the budget holds no other one"
        await wait_until(hive.store, partial(hive.value, _SETTLED, number))
    refused = await rogue.call()
    assert refused.status_code == 503
    sentence = refused.json()["error"]["message"]
    assert sentence.startswith("the budget of iris for a day, 1.00 USD, has 0.20 USD left, and iris's next turn may")
    assert "the operator can raise it" in sentence
    assert refused.headers["x-should-retry"] == "false"
    assert hive.agents.live("iris").state == "over_budget"
    assert len(rogue.provider.calls) == 2
    await hive.broker.ledger.flush()
    rows = await hive.store.rows("SELECT turn_id, cost_micro_usd FROM charges ORDER BY id")
    assert [tuple(row) for row in rows] == [(1, COST), (2, COST)]
    differ = [
        json.loads(row[0]) for row in await hive.store.rows("SELECT data FROM events WHERE kind = 'usage_differs'")
    ]
    assert [(one["told"]["input"], one["seen"]["input"]) for one in differ] == [(0, COST), (0, COST)]


_SETTLED = "SELECT 1 FROM events WHERE kind = 'turn_settled' AND data ->> 'turn' = ?"


async def test_a_turn_that_never_ends_is_stopped_at_the_budget_whatever_it_says(rogue: Rogue) -> None:
    await rogue.hive.say("operator", "iris", "work")
    await rogue.begin("f-1")
    statuses = [(await rogue.call()).status_code for _ in range(5)]
    assert statuses == [200, 200, 200, 503, 503]
    closed = rogue.hive.agents.access.closed(IRIS)
    assert closed is not None
    assert "the budget of iris for a day, 1.00 USD, is spent (1.20 USD)" in closed.sentence


async def test_a_call_under_way_is_cut_when_the_budget_is_spent_and_no_turn_begins(rogue: Rogue) -> None:
    told, cut = trio.Event(), trio.Event()

    async def streams(call: Call) -> None:
        begins = {"type": "message_start", "message": usage(id="m")}
        await call.say(STREAM_HEAD + chunk(b"data: " + json.dumps(begins).encode() + b"\n\n"))
        told.set()
        await call.wait_hung_up()
        cut.set()

    rogue.provider.answer = streams
    await rogue.hive.say("operator", "iris", "work")
    turn = (await rogue.begin("f-1"))["turn"]

    async def call_until_cut() -> None:
        with pytest.raises(httpx2.RemoteProtocolError):
            await rogue.call()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(call_until_cut)
        await told.wait()
        rogue.provider.answer = whole
        assert (await rogue.call()).status_code == 200
        assert not cut.is_set(), "0.80 of 1.00 USD is not all"
        assert (await rogue.call()).status_code == 200
        await cut.wait()
    assert rogue.spent >= 3 * COST
    await rogue.hive.say("operator", "iris", "more")
    assert "lease" not in await rogue.ack(turn, "f-1", next="f-2")
    await rogue.harness.send({"id": 4, "op": "lease", "fence": "f-2"})
    await trio.testing.wait_all_tasks_blocked(0.05)
    raised = parse_change({"scope": "iris", "day": "5"}, 80)
    await rogue.hive.broker.ledger.set_budget(raised, OPERATOR)
    assert (await rogue.harness.read())["fence"] == "f-2", "with more money it goes on by itself"
    assert (await rogue.call()).status_code == 200


async def test_sixteen_calls_at_once_go_over_by_one_of_them_at_most(rogue: Rogue) -> None:
    statuses: list[int] = []
    await rogue.hive.say("operator", "iris", "work")
    await rogue.begin("f-1")

    async def call() -> None:
        statuses.append((await rogue.model.post("http://x/v1/messages", content=b"x" * 60_000)).status_code)

    async with trio.open_nursery() as nursery:
        for _ in range(16):
            nursery.start_soon(call)
    assert set(statuses) <= {200, 429, 503}
    assert 1 <= statuses.count(200) == len(rogue.provider.calls)
    while (await rogue.call()).status_code != 503:
        pass
    # What each may cost is estimated by its size, at 0.75 USD while no model is known: two could begin at once.
    assert 1_000_000 <= rogue.spent <= 1_000_000 + 2 * COST
