"""What is built is what was evaluated for the card, to the last byte: the derivation is bound to the click."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from hive_core.effects import derivation_of
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import OPERATOR, AgentName
from hive_core.services.approvals import Approval, settle
from tests.hives import Services
from tests.nix.house import House, mended, serving, with_nixpkgs
from tests.nix.test_built import STRACE, BuiltHouse, open_house
from tests.nix.test_deployments import HM1ND, MORE, approve, ask, checkout, what_is

EFFORT = 'program = "rehearsal"\neffort = "high"\n'


@pytest.fixture
def house(tmp_path: Path, hyperhive: Path, store: Path) -> House:
    (tmp_path / "state").mkdir()
    return House(tmp_path / "state", hyperhive, store)


@asynccontextmanager
async def approved_and_not_begun(house: House) -> AsyncIterator[Approval]:
    """A change of hm1nd's, approved under a daemon that did not come to it."""
    async with house.open() as hive, serving(hive):
        await mended(hive, HM1ND)
        number = await ask(hive, checkout(hive, HM1ND).commit(agent__toml=EFFORT), HM1ND)
    async with house.open() as hive:
        card = await hive.approvals.get(number)
        await hive.store.write(lambda tx: settle(tx, card, "approved", None, OPERATOR))
        yield card


async def ended(hive: Services, card: Approval) -> Approval:
    return await hive.approvals.wait_settled(card.id)


async def test_what_was_approved_is_not_built_from_another_nixpkgs_and_can_be_asked_for_again(
    house: House, tmp_path: Path
) -> None:
    async with approved_and_not_begun(house) as card:
        assert derivation_of(card.effect).endswith(".drv")
    async with with_nixpkgs(house, tmp_path / "newer", "-1").open() as hive, serving(hive):
        failed = await ended(hive, card)
        assert failed.state == "failed"
        assert (failed.note or "").startswith("cannot build hm1nd: nixpkgs or hyperhive are others than when it was")
        agent = await hive.agents.get(HM1ND)
        assert agent.deployed_sha == card.payload["base"]
        again = await ask(hive, checkout(hive, HM1ND).head(), HM1ND)
        assert (await approve(hive, again)).state == "done"


async def test_the_same_nixpkgs_at_another_place_makes_the_same_of_it(house: House, tmp_path: Path) -> None:
    async with approved_and_not_begun(house) as card:
        pass
    async with with_nixpkgs(house, tmp_path / "moved", "-0").open() as hive, serving(hive):
        assert (await ended(hive, card)).state == "done"


async def test_a_card_of_a_release_that_kept_no_derivation_is_carried_out(house: House, tmp_path: Path) -> None:
    async with approved_and_not_begun(house) as card:
        pass
    newer = with_nixpkgs(house, tmp_path / "newer", "-1")
    async with newer.open() as hive:
        older = {key: value for key, value in (card.effect or {}).items() if key != "derivation"}
        await hive.sql("UPDATE approvals SET effect = ? WHERE id = ?", json.dumps(older), card.id)
    async with newer.open() as hive, serving(hive):
        assert (await ended(hive, card)).state == "done"


async def test_a_store_that_was_cleaned_since_the_card_is_given_the_same_again(tmp_path: Path, hyperhive: Path) -> None:
    house = BuiltHouse(tmp_path, hyperhive, tmp_path / "host")
    async with open_house(house) as hive:
        number = await ask(hive, checkout(hive).commit(agent__nix=STRACE))
        shown = derivation_of((await hive.approvals.get(number)).effect)
        house.host.run("nix-store", "--delete", shown)
        assert (await approve(hive, number)).state == "done"
        assert house.host.run("nix-store", "--check-validity", shown) == ""


async def test_a_module_that_says_of_its_system_what_is_not_built_is_refused(tmp_path: Path, hyperhive: Path) -> None:
    house = BuiltHouse(tmp_path, hyperhive, tmp_path / "host")
    async with open_house(house) as hive:
        small = await house.systems.current(HM1ND)
        claim = f'{{ outPath = "{small}"; }}'
        forged = (
            "system.build.toplevel = lib.mkForce (derivation { name = "
            f'"x"; builder = "/bin/sh"; system = "x86_64-linux"; args = [ "-c" ": > $out" ]; }} // {claim});'
        )
        before = await what_is(hive, house)
        module = (MORE % forged).replace("pkgs, ", "pkgs, lib, ")
        failed = await approve(hive, await ask(hive, checkout(hive).commit(agent__nix=module)))
        assert failed.state == "failed"
        assert f"agent.nix says that it is {small}, and it is " in (failed.note or "")
        assert await what_is(hive, house) == before


async def test_what_is_no_derivation_makes_no_card(hive_of_one: Services) -> None:
    module = (MORE % 'system.build.toplevel = lib.mkForce { outPath = "x"; drvPath = "y"; };').replace(
        "pkgs, ", "lib, "
    )
    sha = checkout(hive_of_one, HM1ND).commit(agent__nix=module)
    with pytest.raises(Refusal, match=r"system\.build\.toplevel is no system"):
        await ask(hive_of_one, sha, HM1ND)


@pytest.fixture
async def hive_of_one(house: House) -> AsyncIterator[Services]:
    async with house.open() as services, serving(services):
        await mended(services, AgentName("hm1nd"))
        yield services


async def test_a_card_of_which_every_line_stays_is_shown_again_where_it_would_be_built_otherwise(
    house: House, tmp_path: Path
) -> None:
    async with house.open() as hive, serving(hive):
        await mended(hive, HM1ND)
        await ask(hive, checkout(hive, HM1ND).commit(agent__toml=EFFORT), HM1ND)
    newer = with_nixpkgs(house, tmp_path / "newer", "-0")
    packages = newer.sources.nixpkgs / "pkgs.nix"
    packages.write_text(packages.read_text().replace('": > $out"', '"echo > $out"'))
    async with newer.open() as hive:
        (card,) = await hive.approvals.pending()
        with pytest.raises(Refusal, match="do something else than you were shown"):
            await hive.gate.approve(card.id, card.digest, OPERATOR, patience_s=0)
        (again,) = await hive.approvals.pending()
        assert again.effect is not None
        assert card.effect is not None
        assert again.effect["lines"] == card.effect["lines"]
        assert derivation_of(again.effect) != derivation_of(card.effect)
