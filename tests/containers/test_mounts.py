"""What an agent's container has of the hive's directories, under every driver that makes containers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hive_core.containers.mounts import agent_dirs, shape
from hive_core.protocol.words import MANAGER, AgentName
from hive_core.repos import Repos
from tests.containers.drivers import IRIS, SANDBOXES, STAND_IN, digest_of, dirs_in, driver_in, need, run

ARGUS = AgentName("argus")
REFUSED = ("Read-only file system", "Permission denied", "Operation not permitted")


@pytest.fixture(params=SANDBOXES)
def sandbox(request: pytest.FixtureRequest) -> str:
    """Each driver that puts an agent into a container."""
    return need(request.param)


def test_every_mount_is_said_once_and_only_the_managers_are_more() -> None:
    mounts = agent_dirs(Path("/state"), Path("/runtime"), IRIS).mounts
    assert [(str(mount.source), mount.target, mount.read_only) for mount in mounts] == [
        ("/runtime/agents/iris", "/run/hive", True),
        ("/state/agents/iris/state", "/state", False),
        ("/state/agents/iris/claude", "/root/.claude", False),
        ("/state/shared", "/shared", False),
    ]
    more = agent_dirs(Path("/state"), Path("/runtime"), MANAGER).mounts[4:]
    assert [(str(mount.source), mount.target, mount.read_only) for mount in more] == [
        ("/state/proposed", "/agents", False),
        ("/state/applied", "/applied", True),
        ("/state/meta", "/meta", True),
    ]


async def test_a_container_with_other_mounts_is_of_another_generation(
    tmp_path: Path, sandbox: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = driver_in(tmp_path, sandbox, "")
    before = await driver.generation(IRIS)
    for module in ("host_process", "nixos_container"):
        monkeypatch.setattr(f"hive_core.containers.{module}.seen", lambda name: [*shape(name), "/another"])
    assert await driver.generation(IRIS) != before


async def test_two_agents_edit_one_file_of_what_all_share(tmp_path: Path, sandbox: str) -> None:
    first = "umask 077; mkdir /shared/plan; echo one > /shared/plan/file; cat /proc/self/uid_map"
    second = "cat /proc/self/uid_map; echo two >> /shared/plan/file && mkdir /shared/plan/more"
    third = "cat /shared/plan/file; rmdir /shared/plan/more; mv /shared/plan/file /shared/mine; ls /shared/plan"
    _, uids = await run(tmp_path, sandbox, first)
    code, other_uids = await run(tmp_path, sandbox, second, name=ARGUS)
    assert code == 0
    assert (uids != other_uids) == (sandbox in ("nspawn", STAND_IN)), (
        "their containers have uids of their own, or none has"
    )
    code, said = await run(tmp_path, sandbox, third)
    assert (code, said.splitlines()[-2:]) == (0, ["one", "two"])
    found = [tmp_path / "shared" / "plan", tmp_path / "shared" / "mine"]
    assert {(path.lstat().st_uid, path.lstat().st_mode & 0o077) for path in found} == {(os.getuid(), 0)}


async def test_the_manager_reads_what_is_deployed_and_cannot_write_it(tmp_path: Path, sandbox: str) -> None:
    sha = await Repos(tmp_path).create(IRIS, {"agent.toml": 'program = "rehearsal"\n', "CLAUDE.md": "You are iris.\n"})
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "flake.nix").write_text("{ }\n")
    look = "cd ~ && git clone -q /applied/iris.git read && git -C read rev-parse HEAD && cat /meta/flake.nix"
    assert await run(tmp_path, sandbox, look, manager=True) == (0, f"{sha}\n{{ }}")
    write = "git -C /applied/iris.git tag mine; echo > /meta/flake.nix; rm -rf /applied/* /meta/*"
    before = [digest_of(tmp_path / room) for room in ("applied", "meta")]
    code, said = await run(tmp_path, sandbox, f"({write}) 2>&1; touch /applied/canary /meta/canary", manager=True)
    assert code != 0
    assert any(reason in said for reason in REFUSED)
    assert [digest_of(tmp_path / room) for room in ("applied", "meta")] == before


async def test_a_hive_without_a_meta_flake_has_an_empty_one(tmp_path: Path, sandbox: str) -> None:
    assert await run(tmp_path, sandbox, "ls -A /meta && echo read", manager=True) == (0, "read")


async def test_the_manager_has_of_other_agents_their_configuration_alone(tmp_path: Path, sandbox: str) -> None:
    iris = dirs_in(tmp_path)
    iris.make()
    for place in (iris.state, iris.claude, iris.run, tmp_path / "proposed" / "iris" / "config"):
        place.mkdir(parents=True, exist_ok=True)
        (place / "canary").write_text("of iris")
    found = "find / -xdev -name canary 2>/dev/null; find /agents /applied /meta /shared /state -name canary"
    assert (await run(tmp_path, sandbox, found, manager=True))[1].split() == ["/agents/iris/config/canary"]


async def test_an_agent_has_neither_configurations_nor_what_is_deployed(tmp_path: Path, sandbox: str) -> None:
    code, said = await run(tmp_path, sandbox, "ls -d /agents /applied /meta")
    assert code != 0
    assert said.count("No such file") == 3
