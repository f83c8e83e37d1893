"""Agents that are destroyed, on the pages."""

from __future__ import annotations

from hive_core.protocol.words import AgentName
from tests.dashboards import OURS, browse, served
from tests.hives import Services
from tests.unit.test_core_tombstones import destroying

IRIS = AgentName("iris")


async def test_destroy_revive_and_purge_by_forms_each_asked_first_where_something_is_lost(hive: Services) -> None:
    async with destroying(hive) as house, browse(house) as client:
        client.headers.update(OURS)
        ask = {"ask": "destroy iris?"}
        asked = await client.post("/agents/iris/destroy", data=ask)
        assert (asked.status_code, "destroy iris?" in asked.text, "Y3S" in asked.text) == (200, True, True)
        assert len(await hive.agents.all()) == 3
        done = await client.post("/agents/iris/destroy", data={"back": "/"})
        assert (done.status_code, done.headers["location"]) == (303, "/")
        (tombstone,) = await house.tombstones.all()
        page = (await client.get("/")).text
        assert f'id="tombstone-{tombstone.id}"' in page
        assert f"remove {tombstone.label} for good?" in page
        assert 'id="agent-iris"' not in page
        assert (await client.get("/agents/iris")).status_code == 404
        assert (await client.post("/tombstones/revive", data={"tombstone": tombstone.label})).status_code == 303
        assert 'id="agent-iris"' in (await client.get("/")).text
        await client.post("/agents/iris/destroy", data={"back": "/"})
        (tombstone,) = await house.tombstones.all()
        asked = await client.post("/tombstones/purge", data={"tombstone": tombstone.label, "ask": "sure?"})
        assert "Y3S" in asked.text
        assert await house.tombstones.all() == [tombstone]
        script = {"Accept": "application/json"}
        said = (await client.post("/tombstones/purge", data={"tombstone": "iris"}, headers=script)).json()
        assert said == {"ok": True, "said": f"{tombstone.label} is removed"}
        wrong = await client.post("/tombstones/purge", data={"tombstone": "../agents"}, headers=script)
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "usage")


async def test_the_rows_of_agents_and_tombstones_come_and_go_by_the_stream(hive: Services) -> None:
    at = hive.at(await hive.store.last_seq())
    async with destroying(hive) as house, served(house) as browser:
        async with browser.stream(f"/live?after={at}") as answer:
            await answer.until("agent-iris")
            await house.destruction.destroy(IRIS, at_once=False)
            (tombstone,) = await house.tombstones.all()
            frames = await answer.until("budget-of-iris")
            told = {frame.target: frame.data["html"] for frame in frames}
            assert (told["agent-iris"], told["to-iris"]) == ("", "")
            assert "R3V1V3" in told[f"tombstone-{tombstone.id}"]
            await house.destruction.revive("iris")
            frames = await answer.until(f"tombstone-{tombstone.id}")
            while frames[-1].data["html"]:
                frames += await answer.until(f"tombstone-{tombstone.id}")
            assert frames[-1].data["html"] == ""
        # A page that was loaded before all this, and comes back, is told the same.
        after = await browser.told(f"/live?after={at}", f"tombstone-{tombstone.id}")
        assert after[-1].data["html"] == ""


async def test_the_page_of_an_agent_that_is_destroyed_loads_itself_again(hive: Services) -> None:
    at = hive.at(await hive.store.last_seq(), 0)
    async with (
        destroying(hive) as house,
        served(house) as browser,
        browser.stream(f"/agents/iris/live?after={at}") as answer,
    ):
        await answer.until("agent-iris")
        await house.destruction.destroy(IRIS, at_once=False)
        await answer.until("reset")
