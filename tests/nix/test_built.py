"""The same walk down to the container's profile: nix builds what is approved, and the driver that is shipped
switches to it, on a stand-in NixOS host."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from hive_core.containers.mounts import agent_dirs
from hive_core.containers.nixos_build import NixosContainerDriver, SystemBuilds
from hive_core.containers.ranges import pick_range
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName
from tests.containers.standin.host import StandInHost
from tests.hives import Services
from tests.nix.house import House, mended, serving
from tests.nix.test_deployments import HM1ND, IRIS, MORE, approve, ask, checkout, lock, spawn, what_is
from tests.processes import pids_naming, wait_gone
from tests.small_disks import small_disk, small_disks

STRACE = MORE % "environment.systemPackages = [ pkgs.strace ];"


def building(script: str) -> str:
    """A module with a package that is built by a script."""
    package = f'derivation {{ name = "x"; system = "x86_64-linux"; builder = "/bin/sh"; args = [ "-c" "{script}" ]; }}'
    return MORE % f"environment.systemPackages = [ ({package}) ];"


class BuiltHouse(House):
    """With the driver of NixOS containers in the place of scripted systems."""

    def __init__(self, folder: Path, hyperhive: Path, host: Path, build_s: float = 60) -> None:
        self.host = StandInHost(host)
        super().__init__(folder / "state", hyperhive, self.host.folder)

        async def base_of(name: AgentName) -> int:
            return pick_range(name, ())

        builds = SystemBuilds(self.folder, build_s=build_s, host=self.host.host)
        self.systems = NixosContainerDriver(
            self.folder, builds, base_of=base_of, claude=None, bounds=None, host=self.host.host
        )
        self.folder.mkdir(exist_ok=True)


@asynccontextmanager
async def open_house(house: BuiltHouse) -> AsyncIterator[Services]:
    """hm1nd and iris, built."""
    async with house.open() as services, serving(services):
        await mended(services, HM1ND)
        assert (await spawn(services)).state == "done"
        yield services


async def test_what_is_approved_is_built_and_becomes_the_containers_next_generation(
    tmp_path: Path, hyperhive: Path
) -> None:
    house = BuiltHouse(tmp_path, hyperhive, tmp_path / "host")
    async with open_house(house) as hive:
        dirs = agent_dirs(house.folder, house.folder / "run", IRIS)
        first, shape = await house.systems.current(IRIS), await house.systems.generation(IRIS, dirs)
        assert first is not None
        settings = checkout(hive).commit(agent__toml='program = "rehearsal"\neffort = "high"\n')
        assert (await approve(hive, await ask(hive, settings))).state == "done"
        assert await house.systems.current(IRIS) == first, "settings travel with the lease, and need no other container"
        assert (await approve(hive, await ask(hive, checkout(hive).commit(agent__nix=STRACE)))).state == "done"
        assert await house.systems.current(IRIS) != first
        assert await house.systems.generation(IRIS, dirs) != shape, "so that it is replaced at its turn's edge"
        assert lock(house)["iris"] == (await hive.agents.get(IRIS)).deployed_sha
        assert await house.systems.roll_back(IRIS) == first


async def test_a_build_that_fails_ends_the_approval_with_its_last_lines(tmp_path: Path, hyperhive: Path) -> None:
    house = BuiltHouse(tmp_path, hyperhive, tmp_path / "host")
    async with open_house(house) as hive:
        before = await what_is(hive, house)
        broken = building("echo no such compiler; exit 1")
        failed = await approve(hive, await ask(hive, checkout(hive).commit(agent__nix=broken)))
        assert failed.state == "failed"
        assert (failed.note or "").startswith("cannot build iris: ")
        assert "no such compiler" in (failed.note or "")
        assert await what_is(hive, house) == before


async def test_a_build_that_hangs_is_ended_and_names_its_limit_and_the_next_approval_works(
    tmp_path: Path, hyperhive: Path
) -> None:
    house, quick = (BuiltHouse(tmp_path, hyperhive, tmp_path / "host", build_s) for build_s in (60, 1))
    async with open_house(house):
        pass
    async with quick.open() as hive, serving(hive):
        before = await what_is(hive, quick)
        hanging = building("/usr/bin/sleep 1000")
        failed = await approve(hive, await ask(hive, checkout(hive).commit(agent__nix=hanging)))
        why = "it took longer than 1 s (build_s) and was ended; build less, or set build_s higher"
        assert (failed.state, failed.note) == ("failed", f"cannot build iris: {why}")
        assert await what_is(hive, quick) == before
        # What builds sees the store elsewhere; what it runs, it runs below the sandbox that we began.
        wait_gone(*pids_naming(str(quick.host.folder)))
    async with house.open() as hive, serving(hive):
        assert (await approve(hive, await ask(hive, checkout(hive).commit(agent__nix=STRACE)))).state == "done"


@small_disks
async def test_a_disk_that_is_full_in_the_middle_of_a_build_leaves_everything_as_it_was(
    tmp_path: Path, hyperhive: Path
) -> None:
    with small_disk(tmp_path / "disk", "64m") as disk:
        house = BuiltHouse(tmp_path, hyperhive, disk / "host")
        async with open_house(house) as hive:
            before = await what_is(hive, house)
            huge = building("/bin/cat /dev/zero > $out")
            failed = await approve(hive, await ask(hive, checkout(hive).commit(agent__nix=huge)))
            assert failed.state == "failed"
            assert (failed.note or "").startswith("cannot build iris: ")
            assert "No space left on device" in (failed.note or "")
            assert await what_is(hive, house) == before
            sha = checkout(hive).commit(agent__nix=STRACE)
            with pytest.raises(Refusal, match=r"cannot use agent\.nix of iris: .*[Nn]o space left on device"):
                await ask(hive, sha)
            house.host.run("nix-store", "--gc")
            assert (await approve(hive, await ask(hive, sha))).state == "done"
