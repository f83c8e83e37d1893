"""What is told of a host that has no NixOS containers, and of one that has."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from hive_core.containers.nixos_host import NixosHost
from hive_core.containers.nixos_look import look_for_nixos_containers
from hive_core.containers.nspawn import Found
from tests.containers.drivers import STAND_IN, need
from tests.containers.standin.host import StandInHost


@pytest.fixture
def host(tmp_path: Path) -> NixosHost:
    need(STAND_IN)
    return StandInHost(tmp_path / "host").host


def test_a_host_that_has_them_has_no_trouble(tmp_path: Path, host: NixosHost) -> None:
    assert look_for_nixos_containers(tmp_path / "state", tmp_path / "runtime", host) == Found()


def test_a_host_without_the_command_is_told_what_enables_it(tmp_path: Path, host: NixosHost) -> None:
    (Path(host.programs) / "nixos-container").unlink()
    found = look_for_nixos_containers(tmp_path, tmp_path, host)
    assert found.trouble == (
        "nixos-container is not found: enable it with `boot.enableContainers = true`, or set sandbox to bwrap"
    )


def test_a_host_that_keeps_containers_elsewhere_is_told_where_they_are_looked_for(
    tmp_path: Path, host: NixosHost
) -> None:
    found = look_for_nixos_containers(tmp_path, tmp_path, dataclasses.replace(host, confs=tmp_path / "none"))
    assert found.trouble is not None
    assert found.trouble.startswith(f"{tmp_path}/none is missing: ")


@pytest.mark.parametrize("name", ["two words", "star*", "dollar$HOME", "semicolon;reboot", "colon:ro", 'quote"', "ü"])
def test_a_directory_that_no_settings_can_name_is_told_before_any_agent_is_started(
    tmp_path: Path, host: NixosHost, name: str
) -> None:
    for folders in ((tmp_path / name, tmp_path), (tmp_path, tmp_path / name)):
        found = look_for_nixos_containers(*folders, host)
        assert found.trouble is not None
        assert found.trouble.startswith(f"{tmp_path / name} cannot be mounted into a NixOS container: ")
