"""What only a whole nixpkgs can show: systems and packages instantiated to their last derivation. Nothing is built."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.nixes import GIVEN, Nix

HOST = 'host { services.hyperhive.enable = true; boot.isContainer = true; services.hyperhive.adminUsers = [ "ada" ]; }'


@pytest.fixture(scope="module")
def nix(tmp_path_factory: pytest.TempPathFactory) -> Nix:
    return Nix(Path(tmp_path_factory.mktemp("nix")))


@pytest.mark.parametrize(
    "wanted",
    [
        f"({HOST}).config.system.build.toplevel",
        '(self.lib.mkAgent { system = "x86_64-linux"; name = "iris"; modules = [ ]; }).config.system.build.toplevel',
        "self.packages.x86_64-linux.default",
        "self.packages.aarch64-linux.hive-agent",
        "self.devShells.x86_64-linux.default",
        "self.checks.x86_64-linux.modules",
        "self.legacyPackages.x86_64-linux.vmTests.swarm",
        "self.legacyPackages.x86_64-linux.vmTests.containers",
        "self.formatter.x86_64-linux",
    ],
)
def test_it_is_instantiated_whole(nix: Nix, wanted: str) -> None:
    assert nix.value(f"({wanted}).drvPath", GIVEN).endswith(".drv")


def test_the_units_that_nixos_writes_are_those_of_the_module(nix: Nix) -> None:
    text = nix.value(f'({HOST}).config.systemd.units."hyperhive.service".text', GIVEN)
    for line in ("Type=notify", "WatchdogSec=60", "RuntimeDirectoryPreserve=yes"):
        assert line in text
    assert nix.value(f'({HOST}).config.systemd.units."hyperhive.service".aliases', GIVEN) == ["hive-c0re.service"]


def test_everything_that_a_card_tells_of_a_system_can_be_told_of_one(nix: Nix) -> None:
    agent = 'self.lib.mkAgent { system = "x86_64-linux"; name = "iris"; modules = [ ]; }'
    facts = nix.value(f"(import ./hive_core/templates/nix/wanted.nix ({agent}).config).facts", GIVEN)
    assert facts["absent"] == {}
    assert [key for key, value in facts.items() if value is None] == []
    assert {"dbus.service", "hive-agent.service"} <= set(facts["services"])
    assert facts["setuid"]["mount"]["setuid"] is True
