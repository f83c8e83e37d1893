"""The stand-in for a NixOS host surprises as the real one does."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.containers.drivers import STAND_IN, need
from tests.containers.standin.host import StandInHost, system_files, write_program
from tests.containers.standin.state import parse_settings
from tests.containers.standin.unit import nspawn_script


@pytest.fixture
def host(tmp_path: Path) -> StandInHost:
    need(STAND_IN)
    return StandInHost(tmp_path / "host")


def said(host: StandInHost, *words: str) -> tuple[int, str]:
    """How nixos-container ended, and what it said."""
    words = (f"{host.host.programs}/nixos-container", *words)
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.returncode, done.stdout.strip()


def test_a_host_has_its_store_before_anybody_adds_to_it(host: StandInHost) -> None:
    # Commands that find no database make one each, and all but the first may say "is busy".
    assert (host.state.nix / "var/nix/db/db.sqlite").exists()


def test_a_name_is_short_and_taken_once_and_each_container_is_given_addresses(host: StandInHost) -> None:
    system = host.system("true")
    for name in ("h-a", "h-b"):
        assert said(host, "create", name, "--system-path", system)[0] == 0
    confs = [parse_settings(host.state.conf_file(name)) for name in ("h-a", "h-b")]
    assert [(conf["HOST_ADDRESS"], conf["LOCAL_ADDRESS"]) for conf in confs] == [
        ("10.233.1.1", "10.233.1.2"),
        ("10.233.2.1", "10.233.2.2"),
    ]
    assert said(host, "show-ip", "h-b") == (0, "10.233.2.2")
    assert said(host, "create", "h-a", "--system-path", system) == (
        1,
        "nixos-container: container 'h-a' already exists",
    )
    assert said(host, "create", "h-" + "a" * 10, "--system-path", system)[1].endswith("is too long")
    assert said(host, "create", "../a", "--system-path", system)[1].endswith("invalid container name")
    assert said(host, "list") == (0, "h-a\nh-b")
    assert said(host, "status", "h-a") == (0, "down")


def test_what_is_not_there_is_gone_and_can_be_destroyed_again(host: StandInHost) -> None:
    assert said(host, "status", "h-a") == (1, "gone\nnixos-container: container 'h-a' does not exist")
    assert said(host, "destroy", "h-a") == (0, "")
    assert said(host, "start", "h-a")[0] == 1


def test_an_address_makes_a_link_to_the_host_also_where_the_network_is_private(host: StandInHost) -> None:
    private = {"PRIVATE_NETWORK": "1", "HOST_ADDRESS": "10.233.1.1"}
    assert "--network-veth" in nspawn_script(host.state, "h-a", private)
    assert "--network-veth" not in nspawn_script(host.state, "h-a", {**private, "HOST_ADDRESS": ""})


def test_a_drop_in_counts_once_systemd_was_told_to_read_it(host: StandInHost) -> None:
    unit = "container@h-a.service"
    drop_in = host.state.drop_ins / f"{unit}.d" / "a.conf"
    drop_in.parent.mkdir()
    drop_in.write_text("[Service]\nRestart=no\n")
    assert host.state.loaded_drop_in(unit) == {}
    host.run("systemctl", "daemon-reload")
    assert host.state.loaded_drop_in(unit) == {"Restart": ["no"]}


def test_an_update_builds_the_flake_and_makes_it_the_next_generation(tmp_path: Path, host: StandInHost) -> None:
    for name, text in system_files("true", {}).items():
        write_program(tmp_path / "flake" / "system" / name, text)
    copy = 'builder = "/bin/sh"; args = [ "-c" "/usr/bin/cp -r ${./system} $out" ];'
    system = f'derivation {{ name = "nixos-system-a"; system = "x86_64-linux"; {copy} }}'
    (tmp_path / "flake" / "flake.nix").write_text(
        f"{{ outputs = _: {{ nixosConfigurations.a.config.system.build.toplevel = {system}; }}; }}"
    )
    assert said(host, "create", "h-a", "--system-path", host.system("exit 1"))[0] == 0
    assert said(host, "update", "h-a", "--system-path", host.system("exit 2"))[0] == 1, "that one is not for update"
    code, told = said(host, "update", "h-a", "--flake", f"path:{tmp_path}/flake#a")
    assert code == 0, told
    assert (host.host.profiles / "h-a" / "system").readlink() == Path("system-2-link")
    assert said(host, "update", "h-a", "--flake", f"path:{tmp_path}/flake#b")[0] == 1
