"""NixOS containers through the helper: what it makes of a store path, where it puts mounts, whom it leaves alone."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import trio

from hive_core.containers.idmapped import clone_mount
from hive_core.containers.mounts import agent_dirs
from hive_core.containers.nixos_container import NixosContainers
from hive_core.containers.running import Exit
from hive_core.helper.drivers import AGENTS_MOST
from hive_core.helper.staging import staging_command
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName
from tests.containers.drivers import (
    IRIS,
    PATIENCE_S,
    HelpedStandIn,
    base_of,
    dirs_in,
    let_all_enter,
    make_fifo,
    need,
    read_fifo,
    wait_gone,
)
from tests.containers.helped import (
    HELPED_STAND_IN,
    ask,
    end_helper,
    error,
    log_of,
    mounts_below,
    start_helper,
    swapping,
)
from tests.containers.standin.host import StandInHost, system_files, write_program

WAITS = "echo > /state/ready; exec sleep 1000"
OWNER, GROUP = 4242, 4343


@pytest.fixture(autouse=True)
def _needed() -> None:
    need(HELPED_STAND_IN)


@pytest.fixture
def driver(tmp_path: Path) -> HelpedStandIn:
    return HelpedStandIn(tmp_path)


async def start(driver: HelpedStandIn, folder: Path) -> Any:
    """Start the system that the agent has."""
    with trio.fail_after(PATIENCE_S * 2):
        return await super(HelpedStandIn, driver).start(IRIS, dirs_in(folder))


async def end(running: Any) -> None:
    running.kill()
    with trio.CancelScope(shield=True), trio.fail_after(PATIENCE_S):
        await running.wait()


# -- a store path is all that is said ---------------------------------------------------------------------------------


async def test_a_switch_that_fails_is_undone_and_the_one_before_can_be_gone_back_to(
    tmp_path: Path, driver: HelpedStandIn
) -> None:
    ready = make_fifo(tmp_path, "ready")
    first, second = (driver.stand_in.system(f"{WAITS} # {number}") for number in (1, 2))
    await driver.switch(IRIS, first)
    running = await start(driver, tmp_path)
    await read_fifo(ready)
    with pytest.raises(Refusal, match=r"a unit of the new system failed: .*it has the system before again"):
        await driver.switch(IRIS, driver.stand_in.system(WAITS, {"migrate": "exit 1"}))
    assert await driver.current(IRIS) == first
    await driver.switch(IRIS, second)
    assert await driver.roll_back(IRIS) == first
    assert not running.ended
    with pytest.raises(Refusal, match="cannot roll iris back: it has had no other system before"):
        await driver.roll_back(IRIS)
    await end(running)


async def test_an_agent_whose_switch_does_not_come_to_an_end_is_killed_at_once(
    tmp_path: Path, driver: HelpedStandIn
) -> None:
    ready, hangs = make_fifo(tmp_path, "ready"), make_fifo(tmp_path, "hangs")
    first = driver.stand_in.system(WAITS)
    await driver.switch(IRIS, first)
    running = await start(driver, tmp_path)
    await read_fifo(ready)
    second = driver.stand_in.system(WAITS, {"migrate": "echo > /state/hangs; exec sleep 1000"})
    said: list[str] = []

    async def switch() -> None:
        try:
            await driver.switch(IRIS, second)
        except Refusal as refusal:
            said.append(refusal.message)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(switch)
        await read_fifo(hangs)
        await end(running)
    assert running.ended
    assert "it has the system before again" in said[0]
    assert await driver.current(IRIS) == first


async def test_an_agent_without_a_system_is_not_started_and_is_not_taken_for_one_that_runs(
    tmp_path: Path, driver: HelpedStandIn
) -> None:
    with pytest.raises(OSError, match="cannot start iris: it has no system yet") as caught:
        await start(driver, tmp_path)
    assert not isinstance(caught.value, BlockingIOError)
    assert await driver.current(IRIS) is None


def planted(host: StandInHost, name: str) -> Path:
    """A system that is in the store's directory, and that nix knows nothing of."""
    folder = host.host.store / f"{'0' * 32}-{name}"
    for file, text in system_files("true", {}).items():
        write_program(folder / file, text)
    return folder


async def test_a_path_that_is_no_registered_system_of_roots_is_refused_and_makes_nothing(
    tmp_path: Path, driver: HelpedStandIn
) -> None:
    host = driver.stand_in
    (tmp_path / "text").write_text("hi")
    text = host.run("nix-store", "--add", str(tmp_path / "text")).strip()
    system = host.system("true")
    planted(host, "planted")
    link = host.host.store / f"{'1' * 32}-link"
    link.symlink_to(host.host.store / Path(system).name)
    theirs = planted(host, "theirs")
    os.chown(theirs, OWNER, GROUP)
    inner = planted(host, "inner")
    (inner / "bin").rename(tmp_path / "bin")
    (inner / "bin").symlink_to(tmp_path / "bin")
    planted(host, "built.drv")
    store = "/nix/store/"
    refused = {
        f"{store}{'0' * 32}-planted": "nix does not know it as a path of its store",
        f"{store}{'0' * 32}-gone": "is no directory of root's",
        f"{store}{link.name}": "is no directory of root's",
        f"{store}{theirs.name}": "is no directory of root's",
        f"{store}{inner.name}": "is no directory of root's",
        f"{store}{'0' * 32}-built.drv": "it is a derivation",
        text: "is no directory of root's",
        f"{system}/": "out of bounds as system",
        f"{system}/../{Path(system).name}": "out of bounds as system",
        f"{system}\n": "out of bounds as system",
        f"/tmp/{Path(system).name}": "out of bounds as system",
        f"..{system}": "out of bounds as system",
        "": "out of bounds as system",
        "x" * 10_000_000: "cannot read",
    }
    for path, why in refused.items():
        said = error(ask(tmp_path, {"verb": "switch", "name": "iris", "system": path}))
        assert said.startswith("cannot "), path[:200]
        assert why in said or len(path) > 1000, path[:200]
    wrong: list[Any] = [None, 7, True, [system], {"path": system}]
    for value in wrong:
        assert "out of bounds as system" in error(ask(tmp_path, {"verb": "switch", "name": "iris", "system": value}))
    assert error(ask(tmp_path, {"verb": "switch", "name": "iris"})) == "cannot do switch: it needs a system"
    assert "it has no argument" in error(ask(tmp_path, {"verb": "roll_back", "name": "iris", "system": system}))
    assert "/iris" in error(ask(tmp_path, {"verb": "switch", "name": "../iris", "system": system}))
    assert host.run("nixos-container", "list") == ""
    assert list((tmp_path / "processes").glob("iris.*")) == []


async def test_what_has_a_system_is_one_of_so_many_agents_as_there_may_be(
    tmp_path: Path, driver: HelpedStandIn
) -> None:
    system = driver.stand_in.system("true")
    for number in range(AGENTS_MOST - 1):
        (tmp_path / "processes").mkdir(exist_ok=True)
        (tmp_path / "processes" / f"agent-{number}.run").touch()
    await driver.switch(IRIS, system)
    with pytest.raises(Refusal, match=f"there are {AGENTS_MOST} agents; destroy some"):
        await driver.switch(AgentName("argus"), system)
    await driver.destroy(IRIS)
    await driver.switch(AgentName("argus"), system)


async def test_who_is_not_root_in_a_container_finds_its_programs_and_settings(
    tmp_path: Path, driver: HelpedStandIn
) -> None:
    """The helper's own files are root's alone, by its umask: what a container begins with is none of them."""
    await driver.switch(IRIS, driver.stand_in.system("stat -c '%a %n' / /etc /nix /usr /usr/bin /home /var /var/lib"))
    running = await start(driver, tmp_path)
    with trio.fail_after(PATIENCE_S):
        assert await running.wait() == Exit(0)
    assert {line.split()[0] for line in await driver.logs(IRIS)} == {"755"}


# -- whose directories it gets ----------------------------------------------------------------------------------------


async def test_nothing_is_mounted_on_the_host_but_while_a_container_begins(
    tmp_path: Path, driver: HelpedStandIn
) -> None:
    ready = make_fifo(tmp_path, "ready")
    await driver.switch(IRIS, driver.stand_in.system(WAITS))
    running = await start(driver, tmp_path)
    await read_fifo(ready)
    assert mounts_below(tmp_path) == []
    assert list((tmp_path / "stage").iterdir()) == []
    # So nobody else can start it either: it would be another agent's directories, or none.
    await end(running)
    with pytest.raises(subprocess.CalledProcessError):
        driver.stand_in.run("nixos-container", "start", "h-iris")


def test_what_a_killed_helper_had_mounted_is_taken_away_by_the_next_one(tmp_path: Path, driver: HelpedStandIn) -> None:
    end_helper(tmp_path)
    own = tmp_path / "own"
    own.mkdir()
    (own / "canary").write_text("whole")
    folder = tmp_path / "stage" / "h-iris"
    folder.mkdir()
    for _ in range(2):  # one on the other, as if two had been killed
        mounts = [clone_mount(own, read_only=False, base=None) for _ in range(3)]
        words = staging_command("/proc/self/ns/mnt", folder, mounts)
        subprocess.run(words, pass_fds=mounts, check=True)
        for mount in mounts:
            os.close(mount)
    assert sorted(mounts_below(tmp_path)) == [str(folder), *(f"{folder}/{number}" for number in range(3))]
    assert (folder / "2" / "canary").read_text() == "whole"
    start_helper(tmp_path, "nixos-container")
    assert mounts_below(tmp_path) == []
    assert list((tmp_path / "stage").iterdir()) == []
    assert (own / "canary").read_text() == "whole"


async def test_a_helper_that_is_killed_at_any_moment_of_a_start_leaves_one_container_or_none(
    tmp_path: Path, driver: HelpedStandIn
) -> None:
    ready = make_fifo(tmp_path, "ready")
    await driver.switch(IRIS, driver.stand_in.system(WAITS))
    dirs = dirs_in(tmp_path)
    begun = trio.current_time()
    running = await start(driver, tmp_path)
    whole_s = trio.current_time() - begun
    await read_fifo(ready)
    await end(running)
    await driver.forget(IRIS)
    ran = left = step = 0
    while ran < 2 and step < 40:  # the first dies before it has done anything, the last ones with all done
        moment_s = whole_s * step / 5
        step += 1
        pid = int((tmp_path / "helper.pid").read_text())
        async with trio.open_nursery() as nursery:

            async def begin() -> None:
                with contextlib.suppress(Refusal, OSError):  # or it had just started
                    await start(driver, tmp_path)

            nursery.start_soon(begin)
            with trio.move_on_after(moment_s):
                await trio.sleep_forever()
            os.kill(pid, signal.SIGKILL)
        await wait_gone([pid])
        start_helper(tmp_path, "nixos-container")
        assert mounts_below(tmp_path) == []
        with trio.fail_after(PATIENCE_S * 2):
            if (running := await driver.find(IRIS, dirs)) is None:
                left += 1
                # One that was just beginning has lost its mounts: it ends, and that is waited for.
                while "ActiveState=activating" in driver.stand_in.run("systemctl", "show", "container@h-iris.service"):
                    await trio.lowlevel.checkpoint()
                running = await driver.find(IRIS, dirs) or await start(driver, tmp_path)
            else:
                ran += 1
                with pytest.raises(BlockingIOError, match="runs already"):
                    await start(driver, tmp_path)
            await read_fifo(ready)
            await end(running)
            await driver.forget(IRIS)
    assert ran
    assert left


@pytest.fixture
def owned(tmp_path: Path) -> Path:
    """A hive's state directory that belongs to a user without any rights, as the directories of iris do."""
    agent_dirs(tmp_path / "hive", tmp_path / "hive" / "runtime", IRIS).make()
    for path in (tmp_path / "hive", *(tmp_path / "hive").rglob("*")):
        os.chown(path, OWNER, GROUP, follow_symlinks=False)
    let_all_enter(tmp_path)
    return tmp_path / "hive"


def wire(folder: Path, verb: str, **more: object) -> dict[str, Any]:
    return ask(folder, {"verb": verb, "name": "iris", **more})


def test_the_daemons_user_is_the_containers_root_in_its_directories_whatever_its_group(
    tmp_path: Path, owned: Path
) -> None:
    host = StandInHost(tmp_path / "host")
    start_helper(tmp_path, "nixos-container", user=OWNER, state_dir=owned)
    assert wire(tmp_path, "switch", system=host.system("id -u; echo mine > /state/made; exit 7")) == {}
    assert "pid" in wire(tmp_path, "start")
    assert wire(tmp_path, "exit") == {"code": 7}
    made = (owned / "agents" / "iris" / "state" / "made").stat()
    assert (made.st_uid, made.st_gid, stat.S_IMODE(made.st_mode) & 0o7000) == (OWNER, GROUP, 0)
    assert wire(tmp_path, "logs", lines=5) == {"lines": ["0"]}
    assert wire(tmp_path, "destroy") == {}
    assert host.run("nixos-container", "list") == ""
    assert list((tmp_path / "processes").iterdir()) == []
    assert (tmp_path / "uid_ranges.json").read_text() == "{}"


def test_a_directory_that_is_swapped_for_a_link_at_any_moment_never_leads_a_container_elsewhere(
    tmp_path: Path, owned: Path
) -> None:
    host = StandInHost(tmp_path / "host")
    start_helper(tmp_path, "nixos-container", user=OWNER, state_dir=owned)
    assert wire(tmp_path, "switch", system=host.system("ls -a /state; touch /state/reached")) == {}
    secret = tmp_path / "secret"
    secret.mkdir(mode=0o777)
    (secret / "canary").touch()
    started = refused = 0
    with swapping(owned / "agents" / "iris" / "state", secret):
        while started < 4 or refused < 4:
            answer = wire(tmp_path, "start")
            if "pid" in answer:
                started += 1
                assert wire(tmp_path, "exit") == {"code": 0}
                wire(tmp_path, "forget")
            else:
                refused += 1
                assert "is not a directory there" in error(answer)
    assert sorted(os.listdir(secret)) == ["canary"]
    assert "canary" not in str(wire(tmp_path, "logs", lines=500))
    assert mounts_below(tmp_path) == []


# -- what is not the helper's -----------------------------------------------------------------------------------------


async def test_somebody_elses_container_and_unit_of_the_same_id_are_never_touched(
    tmp_path: Path, driver: HelpedStandIn
) -> None:
    host = driver.stand_in
    host.run("nixos-container", "create", "h-iris", "--system-path", host.system("exec sleep 1000"))
    conf = host.folder / "etc/nixos-containers/h-iris.conf"
    before = conf.read_text()
    system = host.system("true")
    for call in (driver.switch(IRIS, system), driver.roll_back(IRIS)):
        with pytest.raises(Refusal, match=r"made by somebody else|no other system before"):
            await call
    with pytest.raises(OSError, match=r"was made by somebody else"):
        await start(driver, tmp_path)
    assert await driver.find(IRIS, dirs_in(tmp_path)) is None
    await driver.destroy(IRIS)
    assert conf.read_text() == before
    conf.unlink()
    host.state.set_state("h-iris", "active", os.getpid(), "0123")
    with pytest.raises(Refusal, match=r"container@h-iris\.service runs, and no container of ours is in it"):
        await driver.switch(IRIS, system)
    assert await driver.find(IRIS, dirs_in(tmp_path)) is None
    host.state.forget("h-iris")


async def test_a_container_of_the_same_hive_that_a_root_daemon_left_is_ended_and_keeps_its_system(
    tmp_path: Path, owned: Path
) -> None:
    host, helped = StandInHost(tmp_path / "host"), tmp_path / "helped"
    former = NixosContainers(owned, base_of=base_of, claude=None, bounds=None, host=host.host)
    system = host.system("exec sleep 1000")
    await former.switch(IRIS, system)
    dirs = agent_dirs(owned, owned / "runtime", IRIS)
    with trio.fail_after(PATIENCE_S):
        left = await former.start(IRIS, dirs)
    helped.mkdir()
    (helped / "host").symlink_to(host.folder)
    start_helper(helped, "nixos-container", user=OWNER, state_dir=owned)
    try:
        assert wire(helped, "current") == {"system": system}
        assert wire(helped, "find") == {"pid": None}
        assert "it was started by a daemon that was root" in log_of(helped)
        with trio.fail_after(PATIENCE_S):
            assert await left.wait() == Exit(None)
        assert "pid" in wire(helped, "start")
        assert wire(helped, "find")["pid"] > 0
        assert wire(helped, "kill") == {}
        wire(helped, "exit")
    finally:
        end_helper(helped)
