"""Agents to be, whose repositories are there to be shaped: on the page, by its stream, and in `hive list`."""

from __future__ import annotations

import trio

from hive_core.cli import show
from hive_core.protocol.words import MANAGER, AgentName, CommitSha
from hive_core.services.configured import forget_configured, note_configured
from hive_core.sockets.admin import AdminDesk
from hive_core.store.writer import Transaction
from tests.dashboards import browse, hive_of, served
from tests.hives import Services
from tests.unit.test_dashboard_forms import post

ARGUS = AgentName("argus")


async def configure(hive: Services) -> None:
    await hive.store.write(lambda tx: note_configured(tx, ARGUS, CommitSha("1" * 40), MANAGER, "🦉"))


async def create(hive: Services) -> None:
    def write(tx: Transaction) -> None:
        forget_configured(tx, ARGUS)
        hive.agents.create(tx, ARGUS, MANAGER)

    await hive.store.write(write)


async def listed(hive: Services) -> str:
    return show.agents(await AdminDesk(hive_of(hive))._verbs["list"][0]({}))


async def test_the_list_and_the_page_show_it_until_it_is_an_agent(hive: Services) -> None:
    assert "argus" not in await listed(hive)
    await configure(hive)
    assert "argus is configured since 0 s, and no agent yet" in await listed(hive)
    async with browse(hive_of(hive)) as client:
        page = (await client.get("/")).text
        assert 'id="configured-argus"' in page
        assert "asked for by hm1nd" in page
        await create(hive)
        assert 'id="configured-argus"' not in (await client.get("/")).text
    assert "configured" not in await listed(hive)


async def test_its_row_comes_and_goes_by_the_stream(hive: Services) -> None:
    at = hive.at(await hive.store.last_seq())
    async with served(hive_of(hive)) as browser, browser.stream(f"/live?after={at}") as stream:
        await stream.until("agent-iris")
        await configure(hive)
        (row,) = [frame.data for frame in await stream.until("configured-argus") if frame.target == "configured-argus"]
        assert (row["list"], "🦉" in row["html"]) == ("configured", True)
        await create(hive)
        gone = [frame.data for frame in await stream.until("configured-argus") if frame.target == "configured-argus"]
        assert gone[-1]["html"] == ""


async def test_a_button_on_its_row_destroys_it_and_the_row_goes(hive: Services) -> None:
    ours = hive_of(hive)
    at = hive.at(await hive.store.last_seq())
    async with served(ours) as browser, browse(ours) as client, trio.open_nursery() as nursery:
        nursery.start_soon(ours.destruction.serve)
        async with browser.stream(f"/live?after={at}") as stream:
            await configure(hive)
            rows = [
                frame.data for frame in await stream.until("configured-argus") if frame.target == "configured-argus"
            ]
            assert 'action="/agents/argus/destroy"' in rows[-1]["html"]
            status, said = await post(client, "/agents/argus/destroy", ask="sure?")
            assert (status, said["said"]) == (200, "argus is destroyed; what it had is kept")
            gone = [
                frame.data for frame in await stream.until("configured-argus") if frame.target == "configured-argus"
            ]
            assert gone[-1]["html"] == ""
            (tombstone,) = await ours.tombstones.all()
            status, said = await post(client, "/tombstones/revive", tombstone=tombstone.label)
            assert (status, said["said"]) == (200, "argus is configured again")
        nursery.cancel_scope.cancel()
