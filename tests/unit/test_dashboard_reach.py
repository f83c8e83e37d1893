"""What an agent reached, on its page."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from hive_core.hive import Hive
from hive_core.protocol.words import AgentName
from hive_core.services.connections import Connection
from tests.dashboards import browse, hive_of, served
from tests.hives import Services, open_services

IRIS = AgentName("iris")


@pytest.fixture
async def hive(tmp_path: Path) -> AsyncIterator[Services]:
    async with open_services(tmp_path) as services:
        await services.add_agents("hm1nd", "iris")
        yield services


async def note(house: Hive, host: str, verdict: str, **more: Any) -> None:
    now_ms = house.connections.now_ms
    one = Connection(IRIS, 1, host, 443, "tunnel", now_ms, verdict=verdict, ended_at_ms=now_ms, **more)
    house.connections.ended(one)
    await house.connections.flush()


async def test_the_page_tells_what_it_may_reach_what_it_talked_to_and_what_it_was_refused(hive: Services) -> None:
    house = hive_of(hive)
    async with browse(house) as client:
        page = (await client.get("/agents/iris")).text
        assert "may reach nothing beside its model" in page
        assert "nothing in the last 7 days" in page
        policy = json.dumps({"egress": [{"to": "git.lan:443"}]})
        await hive.sql("UPDATE agents SET policy = ? WHERE name = 'iris'", policy)
        await note(house, "git.lan", "passed", sent=10, received=2_000)
        await note(house, "2001:db8::1", "refused", reason="<b>not</b> listed\u202e")
        page = (await client.get("/agents/iris")).text
        assert "may reach <code>git.lan:443</code>" in page
        assert "[2001:db8::1]:443" in page
        assert "&lt;b&gt;not&lt;/b&gt; listed" in page
        assert "\u202e" not in page
        assert "</span> connection, " in page
        assert "refused in 7 days" in page
        assert 'id="reach-now"' not in (await client.get("/")).text


async def test_of_who_has_the_hosts_network_nobody_is_told_that_it_reaches_nothing(hive: Services) -> None:
    policy = json.dumps({"network": "host", "egress": [{"to": "git.lan:443"}]})
    await hive.sql("UPDATE agents SET policy = ? WHERE name = 'iris'", policy)
    house = hive_of(hive)
    async with browse(house) as client:
        page = (await client.get("/agents/iris")).text
        assert "may reach what this machine does, and nothing tells of that: it has the host's network" in page
        assert "git.lan" not in page


async def test_a_page_is_told_of_each_connection(hive: Services) -> None:
    house = hive_of(hive)
    async with served(house) as browser:
        at = hive.at(await hive.store.last_seq(), 0)
        async with browser.stream(f"/agents/iris/live?after={at}") as answer:
            await answer.until("reach-now")
            await note(house, "git.lan", "passed")
            frames = await answer.until("reach-now")
            assert "git.lan:443" in frames[-1].data["html"]
