"""Snapshots of an agent's /state, on its page."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from hive_core.hive import Hive
from hive_core.limits import Limits
from hive_core.procedures.desk import Desk
from hive_core.protocol.words import OPERATOR, AgentName
from hive_core.services.agents import Agent
from hive_core.services.background import Background
from hive_core.sockets.harness import HarnessDesk
from tests.dashboards import OURS, browse, hive_of, served
from tests.hives import Services, open_services

IRIS = AgentName("iris")


@pytest.fixture
async def hive(tmp_path: Path) -> AsyncIterator[Services]:
    async with open_services(tmp_path, limits=Limits(snapshots_bytes=2**20)) as services:
        await services.add_agents("hm1nd", "iris")
        notes(services).parent.mkdir(parents=True)
        notes(services).write_text("one")
        yield services


def notes(hive: Services) -> Path:
    return hive.state_dir / "agents" / "iris" / "state" / "notes"


@asynccontextmanager
async def supervised(hive: Services) -> AsyncIterator[Hive]:
    """With agents that are kept down: there is nothing to end before a restore."""
    whole = hive_of(hive)
    for name in ("hm1nd", "iris"):
        await hive.agents.want(AgentName(name), "down", OPERATOR)

    async def serve(agent: Agent, task_status: trio.TaskStatus[Desk]) -> None:
        background = Background(hive.store, hive.broker.limits)
        task_status.started(
            HarnessDesk(agent.name, agent.role, hive.broker, hive.turns, hive.agents, background, lambda: "api_key")
        )
        await trio.sleep_forever()

    whole.reconciler._serve = serve
    async with trio.open_nursery() as nursery:
        nursery.start_soon(whole.reconciler.serve)
        yield whole
        nursery.cancel_scope.cancel()


async def test_the_page_shows_takes_and_restores_them_and_asks_once_before(hive: Services) -> None:
    async with supervised(hive) as house, browse(house) as client:
        client.headers.update(OURS)
        assert "none yet: one is taken at the edge of its next turn" in (await client.get("/agents/iris")).text
        assert (await client.post("/agents/iris/snapshot", data={"back": "/agents/iris"})).status_code == 303
        (one,) = await house.snapshots.all(IRIS)
        page = (await client.get("/agents/iris")).text
        assert f'data-snapshot="{one.id}"' in page
        assert f'aria-label="restore {one.id}"' in page
        assert "snapshots-now" not in (await client.get("/")).text
        notes(hive).write_text("two")
        fields = {"snapshot": one.id}
        asked = await client.post("/agents/iris/restore-state", data={**fields, "ask": "let it be?"})
        assert (asked.status_code, "let it be?" in asked.text, notes(hive).read_text()) == (200, True, "two")
        script = {"Accept": "application/json"}
        said = (await client.post("/agents/iris/restore-state", data=fields, headers=script)).json()
        assert said["said"].startswith(f"iris's /state is that of {one.id} again; what was there is kept as ")
        assert notes(hive).read_text() == "one"
        wrong = await client.post("/agents/iris/restore-state", data={"snapshot": "../.."}, headers=script)
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (404, "not_found")
        assert notes(hive).read_text() == "one"


async def test_a_page_is_told_of_each_change_and_of_why_none_could_be_taken(hive: Services) -> None:
    async with supervised(hive) as house, served(house) as browser:
        at = hive.at(await hive.store.last_seq(), 0)
        async with browser.stream(f"/agents/iris/live?after={at}") as answer:
            await answer.until("snapshots-now")
            taken = await house.snapshots.take(IRIS)
            assert taken is not None
            frames = await answer.until("snapshots-now")
            assert taken.id in frames[-1].data["html"]
            notes(hive).write_bytes(b"x" * 2**21)
            with pytest.raises(Exception, match="snapshots_bytes"):
                await house.snapshots.take(IRIS)
            frames = await answer.until("snapshots-now")
            assert "(snapshots_bytes); make it smaller" in frames[-1].data["html"]
