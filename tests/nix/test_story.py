"""The story of a wish: iris wants rsvg-convert, hm1nd adds pkgs.librsvg to its agent.nix, and the operator decides."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import MANAGER, OPERATOR, AgentName, CommitSha
from hive_core.services.approvals import Approval
from tests.checkouts import Checkout
from tests.hives import Services, open_services
from tests.nix.house import House, serving
from tests.tools import program_of

IRIS = AgentName("iris")


@pytest.fixture
def house(tmp_path: Path, hyperhive: Path, store: Path) -> House:
    return House(tmp_path / "state", hyperhive, store)


@pytest.fixture
async def hive(house: House) -> AsyncIterator[Services]:
    async with house.open() as services, serving(services):
        asked = await services.gate.spawn.request(MANAGER, IRIS, "You draw.", "pictures")
        await approve(services, asked["approval"])
        yield services


async def approve(services: Services, number: int) -> Approval:
    card = await services.approvals.get(number)
    return await services.gate.approve(number, card.digest, OPERATOR)


def add_librsvg(services: Services) -> CommitSha:
    """What hm1nd commits."""
    checkout = Checkout(services.repos.proposed_dir / "iris" / "config")
    module = (checkout.path / "agent.nix").read_text()
    return checkout.commit(agent__nix=module.replace("systemPackages = [", "systemPackages = [ pkgs.librsvg"))


async def packages_of(services: Services, house: House) -> set[str]:
    """What the system of iris has, by its name: what is deployed, evaluated."""
    sha = (await services.agents.get("iris")).deployed_sha
    assert sha is not None
    facts = (await house.meta.evaluate(IRIS, CommitSha(sha))).facts
    return {str(package).partition(" ")[0] for package in facts.packages}


@pytest.mark.parametrize("yes", [True, False], ids=["approved", "denied"])
async def test_what_iris_wished_for_is_there_after_the_click_and_absent_when_it_was_denied(
    house: House, hive: Services, tmp_path: Path, yes: bool
) -> None:
    await hive.say("iris", "hm1nd", "I need rsvg-convert.")
    sha = add_librsvg(hive)
    async with program_of(hive, "hm1nd", tmp_path) as hm1nd:
        asked = await hm1nd.call("request_apply_commit", agent="iris", sha=sha, reason="iris draws")
    card = await hive.approvals.get(asked["approval"])
    assert card.effect is not None
    (line,) = [line for line in card.effect["lines"] if line["what"] == "packages"]
    assert "librsvg" in line["after"]
    assert not {one for one in await packages_of(hive, house) if "librsvg" in one}, "nothing before the click"
    if yes:
        done = await approve(hive, card.id)
        assert done.state == "done", done.note
    else:
        await hive.gate.deny(card.id, "pictures can wait", OPERATOR)
    assert bool({one for one in await packages_of(hive, house) if "librsvg" in one}) is yes
    (told,) = [
        message["body"]
        for message in await hive.broker.messages.newest("hm1nd")
        if message["body"].startswith(f"approval_resolved: approval {card.id}")
    ]
    assert ("state: approved" if yes else 'reason: "pictures can wait"') in told


async def test_without_nix_the_wish_is_refused_at_once_with_the_reason(tmp_path: Path) -> None:
    async with open_services(tmp_path) as hive, serving(hive):
        await hive.gate.ensure_manager("You manage.")
        asked = await hive.gate.spawn.request(MANAGER, IRIS, "You draw.", "pictures")
        await approve(hive, asked["approval"])
        checkout = Checkout(hive.repos.proposed_dir / "iris" / "config")
        sha = checkout.commit(agent__nix="{ pkgs, ... }: { environment.systemPackages = [ pkgs.librsvg ]; }\n")
        with pytest.raises(Refusal, match=r"it changes agent\.nix, and only containers of sandbox"):
            await hive.gate.apply_commit.request(MANAGER, IRIS, sha, "iris draws")
        assert await hive.approvals.pending() == []
