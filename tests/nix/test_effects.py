"""What a card tells of a change of agent.nix, by real nix: what the systems of both commits are made of."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from hive_core.flakes.effects_of_systems import Facts, parse_facts, system_lines
from hive_core.policy_rules import Case, allows, parse_rules
from hive_core.protocol.effect import builds_line, effect_line
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import OPERATOR, AgentName
from tests.checkouts import Checkout
from tests.hives import Services
from tests.nix.desk import Desk
from tests.nix.house import House, mended, serving, with_nixpkgs
from tests.nix.test_built import BuiltHouse, open_house
from tests.nixes import Nix, quoted

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


async def effect(hive: Services, module: str, **files: str) -> dict[str, Any]:
    """What the card of a commit with this agent.nix, and these files, tells."""
    sha = Checkout(hive.repos.proposed_dir / HM1ND / "config").commit(agent__nix=module, **files)
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
        "!setuid: + ping (setuid root, cap_net_raw+ep)",
        "!capabilities: + watch (CAP_NET_RAW)",
        "!open TCP ports: + 80",
        "!nameservers: + 192.0.2.1",
        *lines[4:6],
    ]
    assert {"packages: + strace-0, taplo-0", "users: + reader (wheel)", "services: + watch.service"} <= set(lines)
    assert "firewall: off → on" in lines
    assert re.fullmatch(r"builds: [0-9a-z]{12}…-nixos-system", str(builds_line(found)))
    assert not [line for line in lines if "nobody-yet" in line]
    assert found["unknown"] == ["closure: what it adds and takes, and its size, is known once it is built"]

    await approve(hive)
    other = MORE.replace("pkgs.strace pkgs.taplo", "(pkgs.strace // { drvPath = pkgs.taplo.drvPath; })")
    other = other.replace("/bin/watch", "/bin/other").replace("setuid = true", "setuid = false")
    found = await effect(hive, MODULE % other)
    assert set(told(found)) >= {
        "packages: − taplo-0",
        "packages: strace-0 → built otherwise",
        "services: dbus.service, watch.service → changed",
        "!setuid: ping (setuid root, cap_net_raw+ep) → ping (cap_net_raw+ep)",
    }


async def test_who_may_start_a_program_with_rights_of_its_own_is_told_where_that_is_not_everybody(
    hive: Services,
) -> None:
    wrapper = 'security.wrappers.ping = { setuid = true; group = "%s"; permissions = "%s"; };'
    found = await effect(hive, MODULE % wrapper % ("wheel", "u+rx,g+x"))
    assert told(found)[0] == "!setuid: + ping (setuid root, mode u+rx,g+x of group wheel)"
    await approve(hive)
    closed = "ping (setuid root, mode u+rx,g+x of group wheel)"
    found = await effect(hive, MODULE % wrapper % ("users", "u+rx,g+x"))
    assert told(found)[0] == f"!setuid: {closed} → ping (setuid root, mode u+rx,g+x of group users)"
    found = await effect(hive, MODULE % wrapper % ("wheel", "u+rx,g+x,o+x"))
    assert told(found)[0] == f"!setuid: {closed} → ping (setuid root)"


async def test_what_no_line_is_about_is_told_as_a_system_that_is_built_otherwise(hive: Services) -> None:
    assert {
        "etc: + sudoers",
        "scripts: as they are → changed",
        "agent.nix: 8 lines, 277 bytes → 7 lines, 193 bytes (+2 −3 lines)",
    } == set(told(await effect(hive, MODULE % 'environment.etc."sudoers".text = "reader ALL";')))
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
    assert str(builds_line(found)).endswith("-nixos-system, the same as now")
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
    assert re.fullmatch(r"builds: [0-9a-z]{12}…-nixos-system", str(builds_line(card.effect)))
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
            await hive.gate.approve(card.id, card.digest, OPERATOR, patience_s=0)
        (again,) = await hive.approvals.pending()
        assert again.effect is not None
        assert "packages: + jq-1, ripgrep-1" in told(again.effect)
        assert again.payload == card.payload


QUIET = """
  environment.etc."motd" = { text = "hello"; mode = "0644"; };
  systemd.units."watch.timer" = { text = "x"; wantedBy = [ ]; };
  systemd.user.units."nag.timer".text = "x";
  users.users.ada.uid = 1000;
  users.groups.wheel.members = [ ];
  security.wrappers.ping = { setuid = true; owner = "nobody"; source = "${pkgs.strace}/bin/ping"; };
  networking.firewall = { enable = true; interfaces.eth0.allowedTCPPorts = [ 22 ]; };
  networking.interfaces.eth0.useDHCP = false;
"""
LOUD = """
  environment.etc."motd" = { text = "hello"; mode = "0666"; };
  systemd.units."watch.timer" = { text = "x"; wantedBy = [ "timers.target" ]; };
  systemd.user.units."nag.timer".text = "y";
  users.users.ada.uid = 0;
  users.groups.wheel.members = [ "ada" ];
  security.wrappers.ping = { setuid = true; owner = "nobody"; source = "${pkgs.taplo}/bin/ping"; };
  networking.firewall = {
    enable = true; trustedInterfaces = [ "lo" "eth1" ];
    interfaces.eth0 = { allowedTCPPorts = [ 22 ]; allowedUDPPortRanges = [ { from = 60; to = 70; } ]; };
  };
  networking.interfaces.eth0.useDHCP = true;
"""


async def test_no_way_that_nixos_has_to_say_a_thing_passes_unseen(hive: Services) -> None:
    await effect(hive, MODULE % QUIET)
    await approve(hive)
    found = await effect(hive, MODULE % LOUD)
    assert {line for line in told(found) if not line.startswith("agent.nix")} == {
        "etc: motd → changed",
        "services: user: nag.timer, watch.timer → changed",
        "users: ada → ada (wheel, as root)",
        "!setuid: ping → another program",
        "!trusted interfaces: + eth1",
        "!open UDP ports: + 60-70 on eth0",
        "!DHCP: off → on",
    }


async def test_what_agent_nix_does_not_read_is_told_as_a_file_that_changes(hive: Services) -> None:
    deaf = MODULE.replace("(builtins.readFile ./agent.toml)", "''model = \"opus\"''")
    deaf = deaf.replace("builtins.readFile ./CLAUDE.md", '"Just read."') % ""
    await effect(hive, deaf)
    await approve(hive)
    found = await effect(hive, deaf, agent__toml='tools = ["Bash", "WebFetch"]\n', CLAUDE__md="Obey me.\n")
    assert told(found) == ["files: CLAUDE.md, agent.toml → changed"]


@pytest.mark.parametrize(
    ("module", "missing"),
    [
        ('networking.nameservers = lib.mkForce [ (throw "not now") ];', {"network"}),
        ("users.users.ada.extraGroups = [ (x: x) ];", {"users"}),
        ("environment.systemPackages = [ { outPath = pkgs.git.outPath; name = { }; } ];", {"packages"}),
        ("systemd.services.watch.serviceConfig.AmbientCapabilities = { };", {"capabilities"}),
        # What no evaluation can catch.
        ('users.users.ada.extraGroups = [ (abort "never") ];', set(Facts.model_fields) - {"absent"}),
        ("security.wrappers.x = let a = { source = a.source; }; in a;", set(Facts.model_fields) - {"absent"}),
    ],
)
async def test_what_cannot_be_told_is_said_to_be_unknown_and_hinders_nothing(
    hive: Services, module: str, missing: set[str]
) -> None:
    found = await effect(hive, MODULE % module)
    unknown = {text.partition(":")[0] for text in found["unknown"]}
    assert unknown - {"closure"} == missing
    assert "nix cannot tell them of this commit" in str(found["unknown"])


@pytest.mark.parametrize("option", ["environment.etc", "security.wrappers", "networking.firewall", "systemd"])
def test_an_option_that_a_nixos_does_not_have_is_named_and_costs_what_is_told_of_it_alone(
    nix: Nix, option: str
) -> None:
    path = json.dumps(option.split("."))
    found = nix.value(
        "let without = path: set: let name = builtins.head path; rest = builtins.tail path; in"
        " if rest == [ ] then removeAttrs set [ name ] else set // { ${name} = without rest set.${name}; };"
        f" path = builtins.fromJSON {quoted(path)};"
        ' config = (self.lib.mkAgent { system = "x86_64-linux"; name = "iris"; modules = [ ]; }).config;'
        " in (import ./hive_core/templates/nix/wanted.nix (without path config)).facts"
    )
    facts = parse_facts(found)
    gone = {key for key, of in (facts.absent or {}).items() if of.startswith(option)}
    assert gone
    assert gone == {key for key in Facts.model_fields if getattr(facts, key) is None}
    _, unknown = system_lines(facts, facts)
    assert all(f"this commit, whose NixOS has no {option}" in text for text in unknown)


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
            await services.gate.approve(card.id, card.digest, OPERATOR, patience_s=0)
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
    assert set(found.sizes) == {path}
    assert str(found).startswith("1.0 MiB in 1 path")
    assert await desk.meta.closure(path.replace("-some", "-other")) is None
    assert await desk.meta.closure("github:x/y") is None


async def test_what_follows_from_other_packages_is_not_told_by_itself(hive: Services) -> None:
    found = await effect(hive, MODULE % "environment.systemPackages = [ pkgs.strace ];")
    assert [line for line in told(found) if not line.startswith(("agent.nix", "model", "prompt"))] == [
        "packages: + strace-0"
    ]
    assert found["unknown"] == ["closure: strace-0 is not in the store yet, so its size is known once it is built"]
    more = 'environment.systemPackages = [ pkgs.strace ]; environment.etc."motd".text = "x";'
    assert {"packages: + strace-0", "etc: + motd", "services: dbus.service → changed"} <= set(
        told(await effect(hive, MODULE % more))
    )


(SMALL_PACKAGE,) = parse_rules(
    """
    [[policy]]
    name = "small packages"
    kind = "apply_commit"
    agents = ["iris"]
    requested_by = ["hm1nd"]
    only = ["packages", "closure", "agent.nix"]
    at_most = { closure_bytes = 50_000_000 }
    """,
    "here",
)


async def test_a_package_that_is_in_the_store_is_told_by_what_it_brings(tmp_path: Path, hyperhive: Path) -> None:
    house = BuiltHouse(tmp_path, hyperhive, tmp_path / "host")
    small = 'environment.systemPackages = [ pkgs.strace ]; environment.etc."motd".text = "x";'
    async with open_house(house) as services:
        checkout = Checkout(services.repos.proposed_dir / "iris" / "config")
        strace = MODULE % "environment.systemPackages = [ pkgs.strace ];"
        sha = checkout.commit(agent__nix=strace)
        asked = (await services.gate.apply_commit.request(HM1ND, AgentName("iris"), sha, "r"))["approval"]
        first = (await services.approvals.get(asked)).effect
        assert first is not None
        assert first["unknown"] == ["closure: strace-0 is not in the store yet, so its size is known once it is built"]
        # hm1nd has it meanwhile.
        sha = Checkout(services.repos.proposed_dir / HM1ND / "config").commit(agent__nix=strace)
        theirs = (await services.gate.apply_commit.request(OPERATOR, HM1ND, sha, "r"))["approval"]
        card = await services.approvals.get(theirs)
        assert (await services.gate.approve(theirs, card.digest, OPERATOR)).state == "done"
        sha = checkout.commit(agent__nix=strace + "# again\n")
        asked = (await services.gate.apply_commit.request(HM1ND, AgentName("iris"), sha, "r"))["approval"]
        found = (await services.approvals.get(asked)).effect
        assert found is not None
        assert found["unknown"] == []
        (closure,) = (line for line in found["lines"] if line["what"] == "closure")
        assert closure["after"].endswith("in 1 path: strace-0")
        assert 0 < closure["amounts"]["closure_bytes"] < 1_000
        sha = checkout.commit(agent__nix=MODULE % small)
        asked = (await services.gate.apply_commit.request(HM1ND, AgentName("iris"), sha, "r"))["approval"]
        mixed = (await services.approvals.get(asked)).effect
        assert mixed is not None
        assert mixed["unknown"] == ["closure: what it adds and takes, and its size, is known once it is built"]
        for one, passes in ((first, False), (found, True), (mixed, False)):
            assert allows(SMALL_PACKAGE, Case("apply_commit", "iris", HM1ND, one)) is passes
