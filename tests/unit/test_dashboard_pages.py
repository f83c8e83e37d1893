"""What the pages show of a hive."""

from __future__ import annotations

import re

import pytest

from dashboard.rows import ASSETS, asset_url
from hive_core.credentials import Credentials
from hive_core.hive import Hive
from hive_core.protocol.words import MANAGER, AgentName
from tests.dashboards import browse, hive_of, signed_in
from tests.hives import Services


async def test_the_dashboard_shows_agents_calls_and_flow_with_the_number_it_is_true_for(hive: Services) -> None:
    await hive.say("operator", "iris", "a message to iris")
    await hive.gate.spawn.request(MANAGER, AgentName("argus"), "You watch.", "two eyes")
    async with browse(hive_of(hive)) as client:
        page = (await client.get("/")).text
    for hook in ("agent-hm1nd", "agent-iris", "agent-damocles", "approval-1", "message-1", "to-iris"):
        assert f'id="{hook}"' in page
    assert f'data-live="/live" data-after="{hive.at(await hive.store.last_seq())}"' in page
    assert "<title>(1) hyperhive</title>" in page
    assert "You watch." in page


async def test_an_agents_page_shows_its_turns_and_its_mail_alone(hive: Services) -> None:
    await hive.say("operator", "iris", "a message to iris")
    await hive.say("operator", "damocles", "a message to damocles")
    turn = (await hive.broker.lease(AgentName("iris"))).turn
    await hive.turns.add_lines(AgentName("iris"), turn.id, 0, ["one line", "another line"])
    ours = hive_of(hive)
    cookie = await signed_in(ours)
    seq = await hive.store.last_seq()
    async with browse(ours, headers=cookie) as client, browse(ours, "iris", cookie) as at_home:
        page = (await client.get("/agents/iris")).text
        assert (await at_home.get("/")).text == page
        assert 'id="agent-damocles"' in (await client.get("/agents/damocles")).text
    assert f'data-live="/agents/iris/live" data-after="{hive.at(seq, 2)}"' in page
    assert page.index('id="turn-1"') < page.index('id="line-1"') < page.index('id="line-2"')
    assert 'id="message-1"' in page
    assert "damocles" not in page


@pytest.mark.parametrize(
    "path", ["/nowhere", "/agents/nobody", "/agents/%2E%2E", "/agents/%00", "/agents/iris/x", "/static/x"]
)
async def test_what_is_not_there_is_a_page_that_says_so(hive: Services, path: str) -> None:
    async with browse(hive_of(hive)) as client:
        answer = await client.get(path)
    assert answer.status_code == 404
    assert 'href="/"' in answer.text


async def test_a_hive_without_sandboxes_is_red_on_every_page(hive: Services) -> None:
    for path in ("/", "/agents/iris"):
        async with browse(hive_of(hive, unsafe=True)) as client:
            assert 'id="unsafe"' in (await client.get(path)).text
        async with browse(hive_of(hive)) as client:
            assert 'id="unsafe"' not in (await client.get(path)).text
        async with browse(hive_of(hive, sandbox="none", sandbox_trouble="bwrap <is> missing")) as client:
            assert "bwrap &lt;is&gt; missing" in (await client.get(path)).text


async def test_a_hive_whose_agents_have_no_uids_of_their_own_says_so_on_every_page(hive: Services) -> None:
    for path in ("/", "/agents/iris"):
        async with browse(hive_of(hive, sandbox_weakness="<no> rootidmap")) as client:
            assert "&lt;no&gt; rootidmap" in (await client.get(path)).text
        async with browse(hive_of(hive)) as client:
            assert 'id="sandbox-weakness"' not in (await client.get(path)).text


async def test_a_missing_credential_is_told_when_an_agent_needs_one(hive: Services) -> None:
    async with browse(await opened(hive)) as client:
        assert 'id="no-credential"' not in (await client.get("/")).text
    await hive.sql("UPDATE agents SET settings = json_set(settings, '$.program', 'claude') WHERE name = 'iris'")
    async with browse(await opened(hive)) as client:
        assert "ANTHROPIC_API_KEY" in (await client.get("/")).text
        assert 'id="no-credential"' in (await client.get("/agents/iris")).text
        assert 'id="no-credential"' not in (await client.get("/agents/damocles")).text
    async with browse(await opened(hive, ANTHROPIC_API_KEY="secret-canary")) as client:
        page = (await client.get("/")).text
    assert 'id="no-credential"' not in page
    assert "secret-canary" not in page


async def opened(hive: Services, **environment: str) -> Hive:
    house = hive_of(hive, credentials=Credentials(hive.state_dir, environment))
    await house.breaker.load()
    return house


async def test_files_are_kept_by_their_content(hive: Services) -> None:
    async with browse(hive_of(hive), headers={}) as client:
        for name, kind in ASSETS.items():
            fresh = await client.get(asset_url(name))
            assert fresh.headers["content-type"].startswith(kind)
            assert "immutable" in fresh.headers["cache-control"]
            plain = await client.get(f"/static/{name}")
            assert plain.headers["cache-control"] == "no-cache"
            again = await client.get(f"/static/{name}", headers={"If-None-Match": plain.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")


async def test_a_page_holds_nothing_inline_that_its_policy_would_stop(hive: Services) -> None:
    async with browse(hive_of(hive, unsafe=True)) as client:
        for path in ("/", "/agents/iris", "/nowhere"):
            page = (await client.get(path)).text
            assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?! defer src=\"/static/)", page)


async def test_a_bug_is_a_page_and_a_line_in_the_log(hive: Services, caplog: pytest.LogCaptureFixture) -> None:
    ours = hive_of(hive)
    ours.agents = None  # type: ignore[assignment]  # as broken as a hive can be
    async with browse(ours) as client:
        client._transport.raise_app_exceptions = False  # type: ignore[attr-defined]
        answer = await client.get("/")
    assert (answer.status_code, "its log says why" in answer.text) == (500, True)
    assert "cannot answer GET /" in caplog.text
    caplog.clear()
