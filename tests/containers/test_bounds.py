"""What an agent may take of the host, under each driver, with real control groups."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from hive_core.containers.bounds import Bounds
from hive_core.containers.cgroups import Cgroups, folders_of, hand_down, joining, mounted_trees
from hive_core.containers.host_process import HostProcessDriver
from tests.containers.drivers import (
    IRIS,
    PATIENCE_S,
    UNITS,
    dirs_in,
    driver_in,
    inside,
    make_fifo,
    mates,
    read_fifo,
)

BOUNDS = Bounds(memory_bytes=96 * 2**20, cpu_percent=20, tasks=24)


@pytest.fixture
def cgroups(tmp_path: Path) -> Cgroups:
    groups = Cgroups(tmp_path, BOUNDS)
    if groups.trouble:
        pytest.skip(groups.trouble)
    return groups


def groups_of(hive: Cgroups) -> list[Path]:
    return [group for parent, _ in hive._wanted() for group in (parent / hive._folder).glob("*/")]


async def run_bounded(folder: Path, kind: str, cgroups: Cgroups, program: str) -> tuple[int | None, str]:
    (dirs_in(folder).run / "program.py").write_text(program)
    driver = driver_in(folder, kind, f"exec {sys.executable} {inside(folder, kind, 'run')}/program.py", cgroups=cgroups)
    with trio.fail_after(PATIENCE_S):
        code = (await (await driver.start(IRIS, dirs_in(folder))).wait()).code
    await driver.forget(IRIS)
    return code, await driver.last_words(IRIS, 10_000)


async def test_an_agent_that_holds_more_memory_than_it_may_is_killed_and_its_last_words_name_the_setting(
    tmp_path: Path, kind: str, cgroups: Cgroups
) -> None:
    code, said = await run_bounded(tmp_path, kind, cgroups, "print('begun', flush=True); b'x' * 500_000_000")
    assert code != 0
    assert said.startswith("begun")
    number = "some" if kind in UNITS else "1"  # systemd says no number
    assert f"the kernel killed {number} of its processes: together they held more than agent_memory_bytes" in said


async def test_an_agent_that_starts_more_processes_than_it_may_gets_no_more(
    tmp_path: Path, kind: str, cgroups: Cgroups
) -> None:
    program = (
        "import subprocess\n"
        "started = []\n"
        "try:\n"
        "    while len(started) < 100: started.append(subprocess.Popen(['sleep', '100']))\n"
        "except OSError as exc: print(type(exc).__name__, len(started))\n"
        "for one in started: one.kill()\n"
    )
    code, said = await run_bounded(tmp_path, kind, cgroups, program)
    assert (code, said.split()[0]) == (0, "BlockingIOError")
    assert 10 < int(said.split()[1]) < BOUNDS.tasks


async def test_an_agent_that_computes_gets_no_more_of_the_processors_than_it_may(
    tmp_path: Path, kind: str, cgroups: Cgroups
) -> None:
    program = (
        "import time\n"
        "begun, used = time.monotonic(), time.process_time()\n"
        "while time.process_time() - used < 0.2: pass\n"
        "print(time.monotonic() - begun)\n"
    )
    code, said = await run_bounded(tmp_path, kind, cgroups, program)
    assert code == 0
    assert float(said) > 0.2 / (BOUNDS.cpu_percent / 100) - 0.2


async def test_a_command_in_a_container_is_bounded_as_the_agent_is(tmp_path: Path, kind: str, cgroups: Cgroups) -> None:
    ready = make_fifo(tmp_path, "ready")
    driver = driver_in(tmp_path, kind, f"echo > {inside(tmp_path, kind)}/ready; exec sleep 1000", cgroups=cgroups)
    running = await driver.start(IRIS, dirs_in(tmp_path))
    try:
        await read_fifo(ready)
        grab = f"b'x' * {BOUNDS.memory_bytes * 2}; print('has it')"
        done = await driver.exec(IRIS, dirs_in(tmp_path), [sys.executable, "-I", "-c", grab])
        assert (done.code != 0, done.output) == (True, "")
    finally:
        running.kill()
        with trio.CancelScope(shield=True), trio.move_on_after(PATIENCE_S):
            await running.wait()
            await driver.forget(IRIS)


async def test_all_of_an_agent_is_in_its_groups_and_they_go_when_it_has_ended(
    tmp_path: Path, kind: str, cgroups: Cgroups
) -> None:
    ready = make_fifo(tmp_path, "ready")
    script = f"setsid sleep 1000 & echo > {inside(tmp_path, kind)}/ready; wait"
    driver = driver_in(tmp_path, kind, script, cgroups=cgroups)
    running = await driver.start(IRIS, dirs_in(tmp_path))
    await read_fifo(ready)
    everything = {running.pid, *mates(running)}
    assert len(everything) >= 2
    for group in groups_of(cgroups):
        assert everything <= {int(pid) for file in group.rglob("cgroup.procs") for pid in file.read_text().split()}
        assert os.getpid() not in {int(pid) for pid in (group / "cgroup.procs").read_text().split()}
    running.kill()
    with trio.fail_after(PATIENCE_S):
        await running.wait()
        await driver.forget(IRIS)
        while groups_of(cgroups):  # what was killed leaves its group a moment later
            await trio.lowlevel.checkpoint()
            await driver.forget(IRIS)
    assert "memory" not in await driver.last_words(IRIS)


async def test_groups_that_are_still_there_are_taken_again(tmp_path: Path, kind: str, cgroups: Cgroups) -> None:
    cgroups.make("iris")
    assert (await run_bounded(tmp_path, kind, cgroups, "print('runs')")) == (0, "runs")


def test_a_daemon_that_may_make_no_groups_is_told_how_it_could(tmp_path: Path, cgroups: Cgroups) -> None:
    """Run as a process without rights: as root, a group can always be made."""
    pid = os.fork()
    if pid == 0:
        os.setuid(65534)
        trouble = Cgroups(tmp_path, BOUNDS).trouble or ""
        os._exit(0 if "Permission denied); run the daemon as root, or as a systemd unit" in trouble else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_no_name_of_a_group_leads_a_command_out_of_it_or_keeps_it_from_running(
    tmp_path: Path, cgroups: Cgroups
) -> None:
    """An agent that is root of its container makes groups in its own, whose names are any bytes but a line feed."""
    kind = "" if len(cgroups._wanted()) == 1 else "pids"
    parent, _ = cgroups._wanted()[-1]
    other = f"hive-elsewhere-{os.getpid()}"  # another test of this machine may try the same
    for name in (
        f"{other}-".encode() + b"\xff\xfe",
        f"a\x0b1:{kind}:{other}".encode(),
        f"a\r1:{kind}:{other}".encode(),
    ):
        group, elsewhere = parent / os.fsdecode(name), mounted_trees()[kind] / other
        for folder in (group, elsewhere):
            folder.mkdir()
        try:
            with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
                (group / "cgroup.procs").write_text(str(process.pid))
                command = joining(process.pid, ["true"])
                assert str(group / "cgroup.procs") in command
                assert str(elsewhere / "cgroup.procs") not in command
                assert subprocess.run(command, check=False).returncode == 0
                process.communicate(b"\n")
        finally:
            for folder in (group, elsewhere):
                folder.rmdir()


@pytest.fixture
def tree_for_all() -> Iterator[tuple[Path, str]]:
    """A group in the cgroup2 tree of this machine, and a controller that it may hand down."""
    root = mounted_trees().get("")
    kinds = (root / "cgroup.controllers").read_text().split() if root else []
    if root is None or not kinds or os.geteuid() != 0:
        pytest.skip("no cgroup2 with a controller in which we may make groups")
    control, group = root / "cgroup.subtree_control", root / f"hive-bounds-{os.getpid()}"
    before = control.read_text().split()
    group.mkdir()
    try:
        control.write_text(f"+{kinds[0]}")
        yield group, kinds[0]
    finally:
        for folder in (*sorted(group.glob("*/")), group):
            folder.rmdir()
        if kinds[0] not in before:
            control.write_text(f"-{kinds[0]}")


def test_in_the_tree_for_all_the_daemon_makes_way_for_groups_of_agents(tree_for_all: tuple[Path, str]) -> None:
    """With whichever controller this kernel has there: that of memory may be in another tree."""
    group, kind = tree_for_all
    pid = os.fork()
    if pid == 0:
        (group / "cgroup.procs").write_text("0")
        hand_down(group, group / "hive-1", [kind])
        hand_down(group, group / "hive-1", [kind])  # the next agent
        ours = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
        (group / "hive-1" / "iris").mkdir()
        handed = (group / "hive-1" / "iris" / "cgroup.controllers").read_text().split()
        (group / "hive-1" / "iris").rmdir()
        os._exit(0 if ours.endswith(f"/{group.name}/hive-daemon") and handed == [kind] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize("kind", ["bwrap"])
async def test_the_next_driver_removes_the_empty_group_of_an_agent_that_is_no_more(
    tmp_path: Path, kind: str, cgroups: Cgroups, stays: subprocess.Popen[bytes]
) -> None:
    """Its last process was not gone when its end was seen, so its group could not be removed then."""
    driver = driver_in(tmp_path, kind, "", cgroups=cgroups)
    for file in cgroups.make(IRIS):
        file.write_text(str(stays.pid))
    await driver.destroy(IRIS)
    assert {group.name for group in groups_of(cgroups)} == {"iris"}
    driver_in(tmp_path, kind, "", cgroups=cgroups)
    assert {group.name for group in groups_of(cgroups)} == {"iris"}, "somebody is in there"
    stays.kill()
    stays.wait()
    driver_in(tmp_path, kind, "", cgroups=cgroups)
    assert [folder for folder in folders_of(tmp_path) if folder.exists()] == []


@pytest.mark.parametrize("kind", ["bwrap"])
async def test_a_group_that_somebody_may_be_about_to_enter_stays_and_a_daemon_that_ends_leaves_none_that_is_empty(
    tmp_path: Path, kind: str, cgroups: Cgroups
) -> None:
    assert (await run_bounded(tmp_path, kind, cgroups, "print('ran')")) == (0, "ran")
    entries = cgroups.make(IRIS)
    driver = driver_in(tmp_path, kind, "", cgroups=cgroups)
    assert all(file.exists() for file in entries), "she is known, and may have been started by a daemon that died"
    assert isinstance(driver, HostProcessDriver)
    driver.tidy()
    assert [folder for folder in folders_of(tmp_path) if folder.exists()] == []


@pytest.fixture
def stays() -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends when it is told to."""
    process = subprocess.Popen(["sleep", "1000"])
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("kind", ["bwrap"])
async def test_a_group_that_cannot_be_removed_troubles_nobody_and_tells_nothing_false_of_the_next_run(
    tmp_path: Path, kind: str, cgroups: Cgroups, stays: subprocess.Popen[bytes]
) -> None:
    try:
        for file in cgroups.make(IRIS):
            file.write_text(str(stays.pid))
        _, said = await run_bounded(tmp_path, kind, cgroups, "print('begun', flush=True); b'x' * 500_000_000")
        assert "the kernel killed 1 of its processes" in said
        assert groups_of(cgroups), "it could not be removed"
        code, said = await run_bounded(tmp_path, kind, cgroups, "print('well')")
        assert (code, said.count("the kernel killed"), said.endswith("well")) == (0, 1, True)
    finally:
        stays.kill()
        stays.wait()
        await driver_in(tmp_path, kind, "", cgroups=cgroups).destroy(IRIS)
