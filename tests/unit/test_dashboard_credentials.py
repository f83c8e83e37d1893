"""The panel of credentials: what it shows, what its forms do, and that it is live. Logins run in tests/containers."""

from __future__ import annotations

from pathlib import Path

import httpx2
import pytest

from hive_core.hive import Hive
from hive_core.procedures.logins import Login
from hive_core.protocol.words import OPERATOR, AgentName
from hive_core.store.bus import CREDENTIALS
from tests.dashboards import OURS, browse, hive_of, served
from tests.hives import Services

KEY = "sk-ant-api03-canary-0123456789"
LINK = "https://claude.com/cai/oauth/authorize?code=true&state=a<b"
IRIS = AgentName("iris")


@pytest.fixture
async def house(hive: Services) -> Hive:
    await hive.sql("UPDATE agents SET settings = json_set(settings, '$.program', 'claude') WHERE name = 'iris'")
    house = hive_of(hive, claude=Path("claude"), bwrap_trouble="bwrap is missing")
    await house.breaker.load()
    return house


async def limited(house: Hive) -> None:
    await house.logins.give("default", "api_key", KEY, OPERATOR)
    credential = house.breaker.credential_for(IRIS)
    assert credential is not None
    headers = {"retry-after": "600", "anthropic-ratelimit-unified-5h-utilization": "0.97"}
    house.breaker.answered(IRIS, credential, 429, httpx2.Headers(headers))
    await house.breaker.tick()


async def test_a_row_tells_what_it_is_who_uses_it_and_what_is_left_and_never_the_secret(house: Hive) -> None:
    await limited(house)
    async with browse(house) as client:
        page = (await client.get("/")).text
    row = page[page.index('id="credential-default"') : page.index("log in with another")]
    for told in ('data-state="limited"', "API key", "5h: 3 % left", "used by iris", "/credentials/resume", "(429)"):
        assert told in row
    assert "canary" not in page


async def test_a_hive_of_rehearsals_shows_no_credential(hive: Services) -> None:
    house = hive_of(hive)
    await house.breaker.load()
    async with browse(house) as client:
        assert 'id="credential-' not in (await client.get("/")).text


async def test_a_login_shows_its_link_as_text_and_a_labelled_field(house: Hive) -> None:
    house.logins.all["work"] = Login("work", "the test", state="link", link=LINK)
    async with browse(house) as client:
        page = (await client.get("/")).text
    row = page[page.index('id="credential-work"') : page.index("log in with another")]
    assert 'href="https://claude.com/cai/oauth/authorize?code=true&amp;state=a&lt;b"' in row
    assert 'rel="noreferrer noopener"' in row
    assert '<label for="code-work">' in row
    house.logins.all["work"] = Login("work", "the test", state="failed", sentence="it <b>failed</b>")
    async with browse(house) as client:
        assert "it &lt;b&gt;failed&lt;/b&gt;" in (await client.get("/")).text


async def test_a_limited_credential_is_tried_again_by_a_click(house: Hive) -> None:
    await limited(house)
    async with browse(house) as client:
        answer = await client.post("/credentials/resume", data={"credential": "default"}, headers=OURS)
        assert answer.status_code in (200, 303)
    assert house.access.closed(IRIS) is None


@pytest.mark.parametrize(
    ("word", "data", "status", "said"),
    [
        ("login", {"credential": "../x"}, 400, "as a credential&#39;s name"),
        ("login", {"credential": "default"}, 403, "bwrap is missing"),
        ("code", {"credential": "default", "code": "x"}, 409, "no login of default waits"),
        ("cancel", {"credential": "default"}, 404, "no login of default runs"),
        ("resume", {"credential": "default"}, 404, "none: `hive login`"),
    ],
)
async def test_what_cannot_be_done_says_why(
    house: Hive, word: str, data: dict[str, str], status: int, said: str
) -> None:
    async with browse(house) as client:
        answer = await client.post(f"/credentials/{word}", data=data, headers=OURS)
    assert (answer.status_code, said in answer.text) == (status, True), answer.text


async def test_the_panel_is_live_and_the_word_that_a_credential_is_missing_goes(house: Hive) -> None:
    async with served(house) as browser, browser.stream(f"/live?after={await position(house)}") as answer:
        (*_, frame) = await answer.until("credential-default")
        assert 'data-state="missing"' in frame.data["html"]
        await limited(house)
        await answer.until("no-credential")
        while 'data-state="limited"' not in frame.data["html"]:
            (*_, frame) = await answer.until("credential-default")
        house.logins.all["work"] = Login("work", "the test")
        house.store.bus.publish([CREDENTIALS])
        (*_, frame) = await answer.until("credential-work")
        assert frame.data["list"] == "credentials"
        del house.logins.all["work"]
        house.store.bus.publish([CREDENTIALS])
        (*_, frame) = await answer.until("credential-work")
        assert frame.data["html"] == ""


async def position(house: Hive) -> str:
    from dashboard.live import Position
    from hive_core.services.events import timeline

    return str(Position(await timeline(house.store), await house.store.last_seq()))
