"""What an agent's container has of the hive's directories, under every driver that makes containers."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
import trio_asyncio

from hive_core.containers.mounts import agent_dirs, shape
from hive_core.git.repos import Repos
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import MANAGER, AgentName
from hive_core.snapshots import Snapshots
from hive_core.store.door import open_store
from tests.containers.drivers import IRIS, SANDBOXES, STAND_IN, UNITS, digest_of, dirs_in, driver_in, need, run, started
from tests.needs import ROOT

ARGUS = AgentName("argus")
UNTOUCHED = ("applied", "proposed", "meta", "credentials", "tombstones", "agents/iris/snapshots")
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
        ("/state/agents/iris/projects", "/projects", False),
        ("/state/agents/iris/mirrors", "/mirrors", True),
        ("/state/agents/iris/extras", "/extras", True),
    ]
    more = agent_dirs(Path("/state"), Path("/runtime"), MANAGER).mounts[7:]
    assert [(str(mount.source), mount.target, mount.read_only) for mount in more] == [
        ("/state/proposed", "/agents", False),
        ("/state/applied", "/applied", True),
        ("/state/meta", "/meta", True),
    ]


@pytest.mark.parametrize("kind", ["bwrap", STAND_IN])
async def test_a_container_with_other_mounts_is_of_another_generation(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = driver_in(tmp_path, need(kind), "")
    before = await driver.generation(IRIS, dirs_in(tmp_path))
    for module in ("host_process", "nixos_container"):
        monkeypatch.setattr(f"hive_core.containers.{module}.seen", lambda dirs: [*shape(dirs), "/another"])
    assert await driver.generation(IRIS, dirs_in(tmp_path)) != before


async def test_two_agents_edit_one_file_of_what_all_share(tmp_path: Path, sandbox: str) -> None:
    first = "umask 077; mkdir /shared/plan; echo one > /shared/plan/file; cat /proc/self/uid_map"
    second = "cat /proc/self/uid_map; echo two >> /shared/plan/file && mkdir /shared/plan/more"
    third = "cat /shared/plan/file; rmdir /shared/plan/more; mv /shared/plan/file /shared/mine; ls /shared/plan"
    _, uids = await run(tmp_path, sandbox, first)
    code, other_uids = await run(tmp_path, sandbox, second, name=ARGUS)
    assert code == 0
    assert (uids != other_uids) == (sandbox in ("nspawn", "helper-nspawn", *UNITS)), (
        "their containers have uids of their own, or none has"
    )
    code, said = await run(tmp_path, sandbox, third)
    assert (code, said.splitlines()[-2:]) == (0, ["one", "two"])
    found = [tmp_path / "shared" / "plan", tmp_path / "shared" / "mine"]
    assert {(path.lstat().st_uid, path.lstat().st_mode & 0o077) for path in found} == {(os.getuid(), 0)}


async def test_a_file_that_the_hive_has_by_another_name_too_can_be_read_in_a_mirror_and_changed_by_nothing(
    tmp_path: Path, sandbox: str
) -> None:
    """Packs of a mirror are linked there: whoever wrote one would write into every other agent's history."""
    dirs, pack = dirs_in(tmp_path), tmp_path / "mirrors" / "x.git" / "objects" / "pack" / "pack-1.pack"
    dirs.make()
    pack.parent.mkdir(parents=True)
    pack.write_text("whole")
    there = dirs.mirrors / "x" / "objects" / "pack"
    there.mkdir(parents=True)
    os.link(pack, there / pack.name)
    before = digest_of(tmp_path / "mirrors")
    inside = f"/mirrors/x/objects/pack/{pack.name}"
    ways = [
        "chmod 666 PACK",
        "echo > PACK",
        "rm PACK",
        "mv PACK /projects/mine",
        "ln PACK /projects/mine",
        "touch PACK",
    ]
    ways += ["mkdir /mirrors/y", "exec 3< PACK; echo > /proc/self/fd/3", "mount -o remount,rw,bind /mirrors"]
    script = "\n".join(f"({way}) 2> /dev/null && echo 'done: {way}'" for way in ways).replace("PACK", inside)
    assert await run(tmp_path, sandbox, f"{script}\ncat {inside}") == (0, "whole")
    assert digest_of(tmp_path / "mirrors") == before


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


async def remove(folder: Path, kind: str, script: str) -> None:
    """Run a script beside an agent's harness, and end that: of a container whose files are gone nothing else does."""
    async with started(folder, kind, "echo > STATE/ready; exec sleep 1000") as (driver, _):
        await driver.exec(IRIS, dirs_in(folder), ["/bin/sh", "-c", script])


async def test_an_agent_that_removes_everything_leaves_all_but_its_own_as_it_was_and_its_state_comes_back(
    tmp_path: Path, sandbox: str
) -> None:
    repos = Repos(tmp_path)
    for name in (IRIS, ARGUS):
        await repos.create(name, {"agent.toml": 'program = "rehearsal"\n', "CLAUDE.md": f"You are {name}.\n"})
    async with trio_asyncio.open_loop(), open_store(tmp_path / "hive.sqlite") as store:
        await store.write(lambda tx: tx.emit("canary", "operator"))
    mine, other = dirs_in(tmp_path), dirs_in(tmp_path, name="argus")
    for place in ("meta/flake.nix", "credentials/anthropic-api-key", "tombstones/echo@2026-01-01/agent/state/note"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text("whole")
    for each in (mine, other):
        each.make()
        for mount in each.mounts:
            (mount.source / "note").write_text("whole")
    (mine.state / "deep" / "er").mkdir(parents=True)
    (mine.state / "deep" / "er" / "tool").write_text("#!/bin/sh\n")
    (mine.state / "deep" / "er" / "tool").chmod(0o750)
    (mine.state / ".hidden").symlink_to("deep/er/tool")
    snapshots = Snapshots(tmp_path, IRIS, 12, 2**30)
    assert snapshots.take("before a test", 1_800_000_000_000) is not None
    host = [
        Path("/etc"),
        ROOT / "hive_core" / "templates",
        *(tmp_path / room for room in UNTOUCHED),
        other.run,
        other.state,
    ]
    names = [ROOT / "hive_core", Path("/usr/bin"), Path(sys.prefix), Path("/dev"), Path("/"), Path.home()]
    state, before = digest_of(mine.state), [digest_of(tree) for tree in host]
    listed = [sorted(os.listdir(path)) for path in names]
    database = (tmp_path / "hive.sqlite").read_bytes()

    rm = "rm -rf --no-preserve-root / 2>/dev/null; cd /state; rm -rf ./* ./.[a-z]*"
    await remove(tmp_path, sandbox, f"{rm} ~/.claude/* /shared/* /projects/* /mirrors/* /extras/*")
    assert [digest_of(tree) for tree in host] == before
    assert (tmp_path / "hive.sqlite").read_bytes() == database
    assert [sorted(os.listdir(path)) for path in names] == listed
    assert [os.listdir(place) for place in (mine.state, mine.claude, mine.projects)] == [[], [], []]
    assert [(place / "note").read_text() for place in (mine.mirrors, mine.extras)] == ["whole", "whole"]

    snapshots.restore(snapshots.last_other(), 1_800_000_001_000)
    assert digest_of(mine.state) == state
    assert (await run(tmp_path, sandbox, "cat /state/.hidden"))[1].splitlines()[-1] == "#!/bin/sh"


@pytest.mark.parametrize(
    "where", ["agents/iris", "agents/iris/state", "agents/iris/claude", "agents/iris/mirrors", "shared"]
)
@pytest.mark.parametrize("there", [True, False])
async def test_a_link_in_the_place_of_a_directory_is_refused_with_the_way_out_and_nothing_is_made_behind_it(
    tmp_path: Path, where: str, there: bool
) -> None:
    elsewhere = tmp_path / "elsewhere"
    if there:
        elsewhere.mkdir()
    dirs = dirs_in(tmp_path)
    if where == "agents/iris":
        (tmp_path / where).rmdir()
    (tmp_path / where).symlink_to(elsewhere)
    driver = driver_in(tmp_path, "none", "true")
    said = f"{tmp_path / where} is a symbolic link; put the directory itself there, or mount it from elsewhere"
    with pytest.raises(Refusal, match=f"^{re.escape(said)}$"):
        await driver.start(IRIS, dirs)
    assert not elsewhere.exists() or list(elsewhere.iterdir()) == []
    (tmp_path / where).unlink()
    assert (await (await driver.start(IRIS, dirs)).wait()).code == 0
