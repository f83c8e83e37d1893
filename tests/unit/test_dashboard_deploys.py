"""What was deployed to an agent, on its page, and the way back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hive_core.protocol.words import MANAGER, AgentName
from tests.checkouts import Checkout
from tests.dashboards import OURS, browse, hive_of, served
from tests.git.test_gate import approve, serving
from tests.hives import Services, open_services

IRIS = AgentName("iris")


@pytest.fixture
async def hive(tmp_path: Path) -> AsyncIterator[Services]:
    """hm1nd and iris, with one change."""
    async with open_services(tmp_path) as services, serving(services):
        await services.gate.ensure_manager("You manage.")
        number = (await services.gate.spawn.request(MANAGER, IRIS, "You read.", "a reader"))["approval"]
        await approve(services, number)
        await change(services, "opus")
        yield services


async def change(hive: Services, model: str) -> None:
    checkout = Checkout(hive.repos.proposed_dir / "iris" / "config")
    sha = checkout.commit(agent__toml=f'program = "rehearsal"\nmodel = "{model}"\n')
    asked = await hive.gate.apply_commit.request(MANAGER, IRIS, sha, "<b>bold</b>")
    await approve(hive, asked["approval"])


async def test_the_page_shows_the_log_and_a_button_makes_the_card_of_the_way_back(hive: Services) -> None:
    async with browse(hive_of(hive)) as client:
        client.headers.update(OURS)
        page = (await client.get("/agents/iris")).text
        log = page[page.index('id="deploys-now"') :]
        assert [log.index(tag) for tag in ("deployed/2", "deployed/0")] == sorted(
            log.index(tag) for tag in ("deployed/2", "deployed/0")
        )
        assert "&lt;b&gt;bold&lt;/b&gt;" in log
        assert "unproven: it is not served now" in log
        assert 'aria-label="roll back to deployed/0"' in log
        assert 'aria-label="roll back to deployed/2"' not in log
        done = await client.post("/agents/iris/rollback", data={"to": "deployed/0"})
        assert (done.status_code, done.headers["location"]) == (303, "/approvals/3")
        (card,) = await hive.approvals.pending()
        assert (card.payload["back"], card.requested_by) == ("deployed/0", "operator")
        assert "deployed/0" in (await client.get("/approvals/3")).text
        wrong = await client.post("/agents/iris/rollback", data={"to": "../x"}, headers={"Accept": "application/json"})
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "usage")
        assert (await hive.kinds())[-1] == "approval_refused"


async def test_a_page_is_told_of_what_is_deployed(hive: Services) -> None:
    async with served(hive_of(hive)) as browser:
        at = hive.at(await hive.store.last_seq(), 0)
        async with browser.stream(f"/agents/iris/live?after={at}") as answer:
            await change(hive, "haiku")
            while "deployed/3" not in (await answer.until("deploys-now"))[-1].data["html"]:
                pass  # how far it is, is told too
