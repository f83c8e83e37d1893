"""What a card tells of a change of agent.nix, by real nix: what the systems of both commits are made of."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from hive_core.protocol.effect import effect_line
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import OPERATOR, AgentName
from tests.checkouts import Checkout
from tests.hives import Services
from tests.nix.desk import Desk
from tests.nix.house import House, mended, serving, with_nixpkgs

HM1ND = AgentName("hm1nd")
MODULE = """
{ pkgs, lib, ... }:
{
  hyperhive.settings = fromTOML (builtins.readFile ./agent.toml);
  hyperhive.persona = builtins.readFile ./CLAUDE.md;
  %s
}
"""
MORE = """
  environment.systemPackages = [ pkgs.strace pkgs.taplo ];
  systemd.services.watch.serviceConfig = { ExecStart = "/bin/watch"; AmbientCapabilities = [ "CAP_NET_RAW" ]; };
  users.users.reader.extraGroups = [ "wheel" ];
  users.users.nobody-yet.enable = false;
  security.wrappers.ping = { setuid = true; capabilities = "cap_net_raw+ep"; };
  networking.firewall = { enable = true; allowedTCPPorts = [ 80 ]; };
  networking.nameservers = [ "192.0.2.1" ];
"""


@pytest.fixture
def house(tmp_path: Path, hyperhive: Path, store: Path) -> House:
    (tmp_path / "state").mkdir()
    return House(tmp_path / "state", hyperhive, store)


@pytest.fixture
async def hive(house: House) -> AsyncIterator[Services]:
    """hm1nd, built."""
    async with house.open() as services, serving(services):
        await mended(services, HM1ND)
        yield services


async def effect(hive: Services, module: str) -> dict[str, Any]:
    """What the card of a commit with this agent.nix tells."""
    sha = Checkout(hive.repos.proposed_dir / HM1ND / "config").commit(agent__nix=module)
    number = (await hive.gate.apply_commit.request(OPERATOR, HM1ND, sha, "a change"))["approval"]
    found = (await hive.approvals.get(number)).effect
    assert found is not None
    return found


async def approve(hive: Services) -> None:
    (card,) = await hive.approvals.pending()
    assert (await hive.gate.approve(card.id, card.digest, OPERATOR)).state == "done"


def told(found: dict[str, Any]) -> list[str]:
    return [("!" if line["weight"] == "wide" else "") + effect_line(line) for line in found["lines"]]


async def test_the_card_tells_what_the_system_gains_and_loses(hive: Services) -> None:
    found = await effect(hive, MODULE % MORE)
    lines = told(found)
    assert lines[:6] == [
        "!setuid: + ping (setuid, cap_net_raw+ep)",
        "!capabilities: + watch (CAP_NET_RAW)",
        "!open TCP ports: + 80",
        "!nameservers: + 192.0.2.1",
        *lines[4:6],
    ]
    assert {"packages: + strace-0, taplo-0", "users: + reader (wheel)", "services: + watch.service"} <= set(lines)
    assert "firewall: off → on" in lines
    assert not [line for line in lines if "nobody-yet" in line]
    assert found["unknown"] == ["closure: what it adds and takes, and its size, is known once it is built"]

    await approve(hive)
    other = MORE.replace("pkgs.strace pkgs.taplo", "(pkgs.strace // { drvPath = pkgs.taplo.drvPath; })")
    other = other.replace("/bin/watch", "/bin/other").replace("setuid = true", "setuid = false")
    found = await effect(hive, MODULE % other)
    assert set(told(found)) >= {
        "packages: − taplo-0",
        "packages: strace-0 → built otherwise",
        "services: watch.service → changed",
        "!setuid: ping (setuid, cap_net_raw+ep) → ping (cap_net_raw+ep)",
    }


async def test_what_no_line_is_about_is_told_as_a_system_that_is_built_otherwise(hive: Services) -> None:
    assert {"etc: + sudoers", "agent.nix: 8 lines, 277 bytes → 7 lines, 193 bytes (+2 −3 lines)"} == set(
        told(await effect(hive, MODULE % 'environment.etc."sudoers".text = "reader ALL";'))
    )
    other = 'system.build.toplevel = lib.mkForce (derivation { name = "x"; builder = "/bin/sh"; system = "x"; });'
    assert "system: as it is → built otherwise" in told(await effect(hive, MODULE % other))


async def test_settings_and_prompt_are_told_as_agent_nix_gives_them(hive: Services) -> None:
    module = MODULE.replace("./agent.toml)", './agent.toml) // { effort = "high"; }')
    module = module.replace("builtins.readFile ./CLAUDE.md", '"Just read."')
    lines = told(await effect(hive, module % ""))
    assert "effort: the program's own → high" in lines
    assert [line for line in lines if line.startswith("prompt: ")]
    assert [line for line in lines if line.startswith("agent.nix: ")]


async def test_a_change_that_is_layout_alone_is_told_by_its_lines_of_agent_nix(hive: Services) -> None:
    module = (Checkout(hive.repos.proposed_dir / HM1ND / "config").path / "agent.nix").read_text()
    found = await effect(hive, module + "# no more than this\n")
    (line,) = told(found)
    assert line.startswith("agent.nix: ")
    assert line.endswith("(+1 −0 lines)")
    assert found["unknown"] == []


async def test_the_card_of_a_new_agent_tells_its_packages_and_what_is_built_is_what_it_told_of(hive: Services) -> None:
    asked = await hive.gate.spawn.request(HM1ND, AgentName("iris"), "You read.", "r", toolkit="coder")
    card = await hive.approvals.get(asked["approval"])
    assert card.effect is not None
    lines = told(card.effect)
    assert {"packages: + jq-0, ripgrep-0", "packages: + the 3 that every agent has"} <= set(lines)
    assert card.effect["unknown"] == ["closure: what it adds and takes, and its size, is known once it is built"]
    assert card.effect["derivation"].endswith("-nixos-system.drv")
    await approve(hive)


async def test_a_toolkit_that_nixpkgs_does_not_have_makes_no_card(hive: Services) -> None:
    with pytest.raises(Refusal, match=r"^cannot use agent\.nix of iris: attribute 'pkgs\.?.*python3' missing|python3"):
        await hive.gate.spawn.request(HM1ND, AgentName("iris"), "You read.", "r", toolkit="python")
    assert await hive.approvals.pending() == []


async def test_the_card_of_a_new_agent_is_shown_again_where_another_nixpkgs_makes_another_of_it(
    house: House, tmp_path: Path
) -> None:
    async with house.open() as hive, serving(hive):
        await mended(hive, HM1ND)
        await hive.gate.spawn.request(HM1ND, AgentName("iris"), "You read.", "r", toolkit="coder", icon="🦉")
    async with with_nixpkgs(house, tmp_path / "newer", "-1").open() as hive:
        (card,) = await hive.approvals.pending()
        with pytest.raises(Refusal, match="do something else than you were shown"):
            await hive.gate.approve(card.id, card.digest, OPERATOR)
        (again,) = await hive.approvals.pending()
        assert again.effect is not None
        assert "packages: + jq-1, ripgrep-1" in told(again.effect)
        assert again.payload == card.payload


async def test_what_cannot_be_told_is_said_to_be_unknown_and_hinders_nothing(hive: Services) -> None:
    module = 'networking.nameservers = throw "not now"; environment.systemPackages = [ pkgs.git ];'
    found = await effect(hive, MODULE % module)
    unknown = [text.partition(":")[0] for text in found["unknown"]]
    assert "network" in unknown
    assert "nix cannot tell them of this commit" in str(found["unknown"])


async def test_a_card_is_shown_again_where_another_nixpkgs_makes_another_change_of_it(
    house: House, tmp_path: Path
) -> None:
    async with house.open() as services, serving(services):
        await mended(services, HM1ND)
        lines = told(await effect(services, MODULE % "environment.systemPackages = [ pkgs.taplo ];"))
        assert "packages: + taplo-0" in lines
    same, newer = (with_nixpkgs(house, tmp_path / f"nixpkgs{version}", version) for version in ("-0", "-1"))
    async with newer.open() as services:
        (card,) = await services.approvals.pending()
        with pytest.raises(Refusal, match="do something else than you were shown"):
            await services.gate.approve(card.id, card.digest, OPERATOR)
        (again,) = await services.approvals.pending()
        assert again.effect is not None
        assert "packages: + taplo-1" in told(again.effect)
        await services.sql("UPDATE approvals SET effect = ?, digest = ?", json.dumps(card.effect), card.digest)
    async with same.open() as services:  # elsewhere, and it comes to the same
        now = await services.gate.approve(card.id, card.digest, OPERATOR, patience_s=0)
        assert now.state == "approved"


async def test_a_closure_is_told_of_what_is_in_the_store_and_of_nothing_else(
    tmp_path: Path, hyperhive: Path, store: Path
) -> None:
    desk = Desk(tmp_path, hyperhive, store)
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "file").write_text("x" * 2**20)
    added = await desk.nix.run(["store", "add-path", str(tmp_path / "some")], readable=[tmp_path / "some"])
    path = added.decode().strip()
    found = await desk.meta.closure(path)
    assert found is not None
    assert found.paths == {path}
    assert str(found).startswith("1.0 MiB in 1 path")
    assert await desk.meta.closure(path.replace("-some", "-other")) is None
    assert await desk.meta.closure("github:x/y") is None
