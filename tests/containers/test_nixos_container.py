"""What only a driver has whose containers are NixOS systems, on a stand-in NixOS host (standin/host.py)."""

from __future__ import annotations

import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from hypothesis import example, given
from hypothesis import strategies as st

from hive_core.containers import nixos_container
from hive_core.containers.bounds import Bounds
from hive_core.containers.inside import program_paths
from hive_core.containers.nixos_conf import checked, conf_text
from hive_core.containers.process_tree import start_time
from hive_core.containers.running import Exit
from hive_core.containers.running_unit import RunningUnit
from hive_core.protocol.container_id import container_id
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName, StorePath, parse_store_path
from tests.containers.drivers import IRIS, PATIENCE_S, STAND_IN, Systems, dirs_in, make_fifo, need, read_fifo
from tests.containers.standin.host import system_files, write_program
from tests.processes import pids_naming
from tests.starters import run_forked

BOUNDS = Bounds(memory_bytes=500 * 2**20, cpu_percent=200, tasks=100)
WAITS = "echo > /state/ready; exec sleep 1000"
CONF = "etc/nixos-containers/h-iris.conf"


@pytest.fixture(autouse=True)
def _needed() -> None:
    need(STAND_IN)


@pytest.fixture
def driver(tmp_path: Path) -> Systems:
    return Systems(tmp_path, BOUNDS)


async def start(driver: Systems, folder: Path, name: AgentName = IRIS) -> RunningUnit:
    """Start the system that the agent has."""
    with trio.fail_after(PATIENCE_S):
        return await super(Systems, driver).start(name, dirs_in(folder, name=name))


async def end(running: RunningUnit) -> Exit:
    running.kill()
    with trio.CancelScope(shield=True), trio.fail_after(PATIENCE_S):
        return await running.wait()


@asynccontextmanager
async def waiting(driver: Systems, folder: Path) -> AsyncIterator[RunningUnit]:
    """An agent that runs until the block ends."""
    ready = make_fifo(folder, "ready")
    await driver.switch(IRIS, driver.stand_in.system(WAITS))
    running = await start(driver, folder)
    try:
        await read_fifo(ready)
        yield running
    finally:
        await end(running)
        ready.unlink()


def refused(caught: pytest.ExceptionInfo[BaseException]) -> str:
    return str(caught.value)


# -- built, switched to, gone back from -------------------------------------------------------------------------------


def derivation_of(driver: Systems, folder: Path, build: str) -> StorePath:
    """What a system for iris is built from by a script, as an evaluation leaves it in the store."""
    made = folder / "made"
    shutil.rmtree(made, ignore_errors=True)
    for name, text in system_files("exit 6", {}).items():
        write_program(made / "system" / name, text)
    (made / "system.nix").write_text(
        'derivation { name = "nixos-system-iris"; system = "x86_64-linux"; builder = "/bin/sh";'
        f" args = [ \"-c\" ''{build}'' ]; }}"
    )
    said = driver.stand_in.run("nix", "eval", "--raw", "--file", str(made / "system.nix"), "drvPath")
    return parse_store_path(said)


async def test_an_agent_runs_the_system_that_was_evaluated_once_it_is_built_and_switched_to(
    tmp_path: Path, driver: Systems
) -> None:
    system = await driver.build(IRIS, derivation_of(driver, tmp_path, "/usr/bin/cp -r ${./system} $out"))
    assert await driver.current(IRIS) is None, "nothing is switched by building"
    assert driver.stand_in.run("nixos-container", "list") == ""
    await driver.switch(IRIS, system)
    assert await driver.current(IRIS) == system
    assert await (await start(driver, tmp_path)).wait() == Exit(6)


async def test_a_build_that_fails_tells_its_last_lines_and_changes_nothing(tmp_path: Path, driver: Systems) -> None:
    async with waiting(driver, tmp_path):
        before = await driver.current(IRIS)
        with pytest.raises(Refusal) as caught:
            await driver.build(IRIS, derivation_of(driver, tmp_path, "echo no such compiler >&2; exit 1"))
        assert refused(caught).startswith("cannot build iris: ")
        assert "no such compiler" in refused(caught)
        gone = derivation_of(driver, tmp_path, "echo another; exit 1")
        driver.stand_in.run("nix-store", "--delete", gone)
        with pytest.raises(Refusal, match=r"cannot build iris: the store has no .* any more") as caught:
            await driver.build(IRIS, gone)
        assert caught.value.code == "not_found"
        assert await driver.current(IRIS) == before
        assert (await driver.usage(IRIS)).processes > 0


async def test_a_system_is_switched_to_while_the_harness_goes_on(tmp_path: Path, driver: Systems) -> None:
    async with waiting(driver, tmp_path) as running:
        harness, shape = await driver._harness(IRIS), await driver.generation(IRIS, dirs_in(tmp_path))
        assert harness is not None
        since = start_time(harness)
        await driver.switch(IRIS, driver.stand_in.system(WAITS, {"once": "echo switched > /run/once"}))
        done = await driver.exec(IRIS, dirs_in(tmp_path), ["cat", "/run/once"])
        assert done.output == "switched\n"
        assert (await driver._harness(IRIS), start_time(harness)) == (harness, since)
        assert await driver.generation(IRIS, dirs_in(tmp_path)) != shape, "so that it is replaced at its turn's edge"
        assert not running.ended


async def test_a_switch_whose_unit_fails_is_undone_and_names_it(tmp_path: Path, driver: Systems) -> None:
    async with waiting(driver, tmp_path) as running:
        before = await driver.current(IRIS)
        with pytest.raises(Refusal) as caught:
            await driver.switch(IRIS, driver.stand_in.system(WAITS, {"migrate": "echo no table >&2; exit 1"}))
        assert refused(caught).startswith("cannot switch iris (code 4): a unit of the new system failed: ")
        assert "migrate.service" in refused(caught)
        assert refused(caught).endswith("it has the system before again")
        assert await driver.current(IRIS) == before
        done = await driver.exec(IRIS, dirs_in(tmp_path), ["readlink", "/run/current-system"])
        assert done.output.strip() == before
        assert not running.ended
        with pytest.raises(Refusal, match="no other system before"):
            await driver.roll_back(IRIS)


async def test_a_switch_that_is_undone_goes_back_to_what_there_was_and_not_to_the_newest(
    tmp_path: Path, driver: Systems
) -> None:
    newer = driver.stand_in.system(WAITS, {"once": "true"})
    async with waiting(driver, tmp_path):
        before = await driver.current(IRIS)
        await driver.switch(IRIS, newer)
        await driver._nix_env(IRIS, "--rollback")  # somebody, by hand
        assert await driver.current(IRIS) == before
        with pytest.raises(Refusal, match="it has the system before again"):
            await driver.switch(IRIS, driver.stand_in.system(WAITS, {"migrate": "exit 1"}))
        assert await driver.current(IRIS) == before


async def test_an_agent_goes_back_to_the_system_before_and_forgets_the_one_it_had(
    tmp_path: Path, driver: Systems
) -> None:
    first, second, third = (driver.stand_in.system(f"exit {code}") for code in (1, 2, 3))
    for system in (first, second, third):
        await driver.switch(IRIS, system)
    assert await driver.roll_back(IRIS) == second
    assert await (await start(driver, tmp_path)).wait() == Exit(2)
    assert await driver.roll_back(IRIS) == first
    with pytest.raises(Refusal, match="cannot roll iris back: it has had no other system before"):
        await driver.roll_back(IRIS)
    assert await driver.current(IRIS) == first
    await driver.switch(IRIS, third)
    assert await driver.current(IRIS) == third


async def test_what_is_no_nixos_system_is_not_switched_to(tmp_path: Path, driver: Systems) -> None:
    (tmp_path / "text").write_text("hi")
    path = StorePath(driver.stand_in.run("nix-store", "--add", str(tmp_path / "text")).strip())
    with pytest.raises(Refusal, match="as a NixOS system: it has no init"):
        await driver.switch(IRIS, path)
    with pytest.raises(Refusal, match="as a store path"):
        await driver.switch(IRIS, StorePath(f"{path}/../../etc"))
    assert driver.stand_in.run("nixos-container", "list") == ""


async def test_an_agent_without_a_system_is_not_started_and_says_why(tmp_path: Path, driver: Systems) -> None:
    with pytest.raises(Refusal, match="cannot start iris: it has no system yet"):
        await start(driver, tmp_path)


# -- what the host says of a container --------------------------------------------------------------------------------


async def test_a_container_has_no_link_to_the_host_and_its_id_fits(tmp_path: Path, driver: Systems) -> None:
    long = AgentName("a" * 30)
    await driver.switch(long, driver.stand_in.system("cut -d: -f1 /proc/net/dev"))
    assert driver.stand_in.run("nixos-container", "list").split() == [container_id(long)]
    assert len(container_id(long)) <= 11
    await (await start(driver, tmp_path, long)).wait()
    assert (await driver.last_words(long)).split()[-1] == "lo"


async def test_what_somebody_changes_in_the_settings_is_put_back_before_a_start(
    tmp_path: Path, driver: Systems
) -> None:
    await driver.switch(IRIS, driver.stand_in.system("ls -d /host; exit 3"))
    await (await start(driver, tmp_path)).wait()
    conf = driver.stand_in.folder / CONF
    drop_in = driver.stand_in.folder / "run/systemd/system/container@h-iris.service.d/hyperhive.conf"
    told = conf.read_text(), drop_in.read_text()
    assert {line.partition("=")[0] for line in told[1].splitlines()} >= {"MemoryMax", "CPUQuota", "TasksMax", "Restart"}
    conf.write_text(conf.read_text().rstrip() + " --bind=/:/host\nHOST_ADDRESS=10.0.0.1\n")
    drop_in.unlink()
    assert await (await start(driver, tmp_path)).wait() == Exit(3)
    assert (conf.read_text(), drop_in.read_text()) == told
    assert "/host" not in await driver.last_words(IRIS) or "No such file" in await driver.last_words(IRIS)


@pytest.mark.parametrize("by", ["the same daemon", "the next daemon"])
async def test_a_container_whose_settings_were_written_and_not_yet_read_by_systemd_is_not_started_without_them(
    tmp_path: Path, driver: Systems, by: str
) -> None:
    await driver.switch(IRIS, driver.stand_in.system("exit 7"))
    systemctl = driver.stand_in.folder / "bin" / "systemctl"
    real = systemctl.rename(systemctl.with_name("real"))
    write_program(systemctl, f'#!/bin/sh\n[ "$1" = daemon-reload ] && echo busy >&2 && exit 1\nexec {real} "$@"\n')
    with pytest.raises(Refusal, match="cannot start iris: busy"):
        await start(driver, tmp_path)
    real.rename(systemctl)
    again = driver if by == "the same daemon" else Systems(tmp_path, BOUNDS)
    # Its end is written down by what those settings say.
    assert await (await start(again, tmp_path)).wait() == Exit(7)


async def test_a_directory_that_the_settings_cannot_name_is_refused_in_a_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "with a space"
    folder.mkdir()
    driver = Systems(tmp_path, BOUNDS)
    await driver.switch(IRIS, driver.stand_in.system("true"))
    before = (driver.stand_in.folder / CONF).read_text()
    with pytest.raises(Refusal, match="only letters, digits and"):
        await start(driver, folder)
    assert (driver.stand_in.folder / CONF).read_text() == before


def flags_of_ours() -> set[str]:
    """Those of a container without directories of its own."""
    texts = [conf_text("", StorePath("/nix/store/system"), [], [], base) for base in (None, 1000)]
    return {flag for text in texts for flag in text.split("EXTRA_NSPAWN_FLAGS=")[1].split()}


@given(st.text(min_size=1, max_size=40))
@example("--bind=/:/host")
@example("--link-journal=no")
@example("--bind=/a*:/b")
@example("--bind=/a:/b;reboot")
@example("--bind=/a$HOME:/b")
@example("--capability=all")
@example("--quiet\n")
def test_no_flag_but_those_on_the_list_is_written(flag: str) -> None:
    # Which directories are bound is for the daemon to say; and hypothesis knows the texts that stand in our code.
    if flag == "--bind=/:/host" or {*flag.split(" ")} <= flags_of_ours():
        checked({"EXTRA_NSPAWN_FLAGS": flag})
        return
    with pytest.raises(Refusal, match="into a container's settings"):
        checked({"EXTRA_NSPAWN_FLAGS": f"--quiet {flag}"})
    with pytest.raises(Refusal, match="into a container's settings"):
        checked({"EXTRA_NSPAWN_FLAGS": "--quiet", f"X{flag}": ""})  # some texts are keys that may stand there


async def test_the_containers_own_root_can_neither_reach_nixs_daemon_nor_choose_its_next_system(
    tmp_path: Path, driver: Systems
) -> None:
    """Not the agent, which has no rights in there, but what could have them all."""
    folders = "cd /nix/var/nix; for d in daemon-socket profiles gcroots; do"
    look = f"{folders} ls -A $d; touch $d/canary 2>/dev/null && echo wrote; done; grep CapEff /proc/self/status"
    (driver.stand_in.folder / "nix/var/nix/daemon-socket/socket").touch()
    async with waiting(driver, tmp_path):
        said = driver.stand_in.run("nixos-container", "run", "h-iris", "--", "/bin/sh", "-c", look)
    name, rights = said.split()
    assert (name, int(rights, 16) > 0) == ("CapEff:", True)


async def test_no_profile_of_an_agents_shell_has_a_say_in_what_the_host_does_in_its_container(
    tmp_path: Path, driver: Systems
) -> None:
    """`nixos-container run` reads it, and where it does not enter the namespace of users it does so as the host."""
    async with waiting(driver, tmp_path) as running:
        plant = ["sh", "-c", "echo 'echo >> /state/said' > ~/.profile"]
        assert (await driver.exec(IRIS, dirs_in(tmp_path), plant)).code == 0
        driver.stand_in.run("nixos-container", "run", "h-iris", "--", "true")
        said = dirs_in(tmp_path).state / "said"
        assert said.read_text() == "\n", "the profile is one that is read"
        await driver.switch(IRIS, driver.stand_in.system(WAITS, {"once": "true"}))
        assert await driver._harness(IRIS) is not None
        running.stop()
        with trio.fail_after(PATIENCE_S):
            await running.wait()
        assert said.read_text() == "\n"


# -- what is not ours, or is left over --------------------------------------------------------------------------------


async def test_somebody_elses_container_of_the_same_id_is_never_touched(tmp_path: Path, driver: Systems) -> None:
    host = driver.stand_in
    host.run("nixos-container", "create", "h-iris", "--system-path", host.system("exec sleep 1000"))
    conf = host.folder / CONF
    binds = " ".join(f"--bind-ro={path}" for path in program_paths(None))  # our interpreter, for its init
    conf.write_text(f"PRIVATE_NETWORK=1\nEXTRA_NSPAWN_FLAGS=--bind={tmp_path}:/state {binds}\n")
    host.run("nixos-container", "start", "h-iris")
    before, state = conf.read_text(), host.run("systemctl", "show", "container@h-iris.service")
    other = host.system("true")
    for call in (driver.switch(IRIS, other), driver.roll_back(IRIS)):
        with pytest.raises(Refusal, match=r"made by somebody else|no other system before"):
            await call
    with pytest.raises(Refusal, match=r"cannot use the container h-iris for iris: .*was made by somebody else"):
        await start(driver, tmp_path)
    assert await driver.find(IRIS, dirs_in(tmp_path)) is None
    assert (await driver.usage(IRIS)).processes == 0
    await driver.destroy(IRIS)
    assert (conf.read_text(), host.run("systemctl", "show", "container@h-iris.service")) == (before, state)
    host.run("nixos-container", "stop", "h-iris")


async def test_a_unit_of_the_same_name_that_runs_without_a_container_of_ours_is_left_alone(
    tmp_path: Path, driver: Systems
) -> None:
    async with waiting(driver, tmp_path) as running:
        conf = driver.stand_in.folder / CONF
        kept = conf.read_text()
        conf.unlink()
        with pytest.raises(Refusal, match=r"container@h-iris\.service runs, and no container of ours is in it"):
            await driver.switch(IRIS, driver.stand_in.system("true"))
        assert not running.ended
        conf.write_text(kept)


async def test_a_unit_that_failed_before_is_started_again(tmp_path: Path, driver: Systems) -> None:
    await driver.switch(IRIS, driver.stand_in.system("exit 1"))
    for _ in range(2):
        assert await (await start(driver, tmp_path)).wait() == Exit(1)
    assert "ActiveState=failed" in driver.stand_in.run("systemctl", "show", "container@h-iris.service")


async def test_a_container_that_a_daemon_which_died_had_half_made_is_made_anew(tmp_path: Path, driver: Systems) -> None:
    host = driver.stand_in
    (tmp_path / "processes").mkdir()
    (tmp_path / "processes" / "iris.creating").touch()
    host.run("nixos-container", "create", "h-iris", "--system-path", host.system("exit 1"))
    await driver.switch(IRIS, host.system("exit 2"))
    assert await (await start(driver, tmp_path)).wait() == Exit(2)
    assert not (tmp_path / "processes" / "iris.creating").exists()


async def test_a_container_that_cannot_be_created_leaves_nothing(tmp_path: Path, driver: Systems) -> None:
    system = driver.stand_in.system("true")
    (driver.stand_in.folder / "bin" / "nix-env").write_text("#!/bin/sh\necho no space left on device >&2; exit 1\n")
    with pytest.raises(Refusal, match=r"cannot create the container of iris: .*no space left on device"):
        await driver.switch(IRIS, system)
    assert driver.stand_in.run("nixos-container", "list") == ""
    assert await driver.current(IRIS) is None


async def test_a_container_whose_mount_is_missing_says_so_and_is_an_end(tmp_path: Path, driver: Systems) -> None:
    await driver.switch(IRIS, driver.stand_in.system("true"))
    dirs = dirs_in(tmp_path)
    dirs.make()
    shutil.rmtree(dirs.claude)
    dirs.claude.symlink_to("/nowhere")
    try:
        running = await super(Systems, driver).start(IRIS, dirs)
        assert (await running.wait()).code != 0
        said = await driver.last_words(IRIS)
    except (Refusal, OSError) as exc:
        said = str(exc)
    assert "claude" in said


# -- how it ends ------------------------------------------------------------------------------------------------------


async def test_a_harness_that_does_not_stop_when_asked_is_ended_by_force(tmp_path: Path, driver: Systems) -> None:
    ready = make_fifo(tmp_path, "ready")
    await driver.switch(IRIS, driver.stand_in.system("trap '' TERM; echo > /state/ready; while :; do sleep 1; done"))
    running = await start(driver, tmp_path)
    await read_fifo(ready)
    running.stop()
    with trio.move_on_after(1):
        await running.wait()
    assert not running.ended
    assert (await end(running)).code is None
    assert (await driver.usage(IRIS)).processes == 0


async def test_a_container_that_does_not_come_up_in_time_is_stopped_and_does_not_come_up_later(
    tmp_path: Path, driver: Systems, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nixos_container, "_START_WITHIN_S", 2.0)
    await driver.switch(IRIS, driver.stand_in.system("", init="#!/bin/sh\nsleep 1000\n"))
    with pytest.raises(Refusal, match=r"did not end within 2 s"):
        await start(driver, tmp_path)
    assert (await driver._host.state("container@h-iris.service")).ended
    assert not [pid for pid in pids_naming(str(driver.stand_in.folder)) if _is_container(pid)]


async def test_a_systemd_that_does_not_answer_is_no_end_of_the_agent(tmp_path: Path, driver: Systems) -> None:
    async with waiting(driver, tmp_path) as running:
        systemctl = driver.stand_in.folder / "bin" / "systemctl"
        kept = systemctl.read_text()
        systemctl.write_text("#!/bin/sh\necho Failed to connect to bus >&2; exit 1\n")
        for call in (driver.find(IRIS, dirs_in(tmp_path)), start(driver, tmp_path)):
            with pytest.raises(Refusal, match=r"cannot look at container@h-iris\.service: Failed to connect") as caught:
                await call
            assert caught.value.code == "unavailable", "it is tried again, and what runs counts as running"
        systemctl.write_text(kept)
        found = await driver.find(IRIS, dirs_in(tmp_path))
        assert found is not None
        assert found.pid == running.pid


async def test_a_container_that_ends_just_then_is_waited_for_by_the_next_daemon(
    tmp_path: Path, driver: Systems
) -> None:
    await driver.switch(IRIS, driver.stand_in.system("true"))
    driver.stand_in.state.set_state("h-iris", "deactivating", 0, "0123")
    found = trio.Event()

    async def look() -> None:
        assert await driver.find(IRIS, dirs_in(tmp_path)) is None
        found.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look)
        with trio.move_on_after(1):
            await found.wait()
        assert not found.is_set()
        driver.stand_in.state.set_state("h-iris", "inactive", 0, "0123")


async def test_a_container_that_reboots_has_ended_and_systemd_does_not_start_it_again(
    tmp_path: Path, driver: Systems
) -> None:
    await driver.switch(IRIS, driver.stand_in.system("exit 133"))
    assert await (await start(driver, tmp_path)).wait() == Exit(133)
    assert await driver.find(IRIS, dirs_in(tmp_path)) is None


async def test_logs_go_over_restarts_and_end_with_the_agent(tmp_path: Path, driver: Systems) -> None:
    for number in range(2):
        await driver.switch(IRIS, driver.stand_in.system(f"echo run {number}"))
        await (await start(driver, tmp_path)).wait()
    assert await driver.logs(IRIS) == ["run 0", "run 1"]
    assert await driver.last_words(IRIS) == "run 1"
    await driver.destroy(IRIS)
    assert await driver.logs(IRIS) == []
    assert driver.stand_in.run("nixos-container", "list") == ""
    assert not list((driver.stand_in.folder / "run/systemd/system").iterdir())


# Kills its own process when it is about to run the Nth of the host's commands.
STARTER_THAT_IS_KILLED = """
import os, signal, sys, trio
from pathlib import Path
from tests.containers.drivers import IRIS, Systems, dirs_in

folder, left = Path(sys.argv[1]), int(sys.argv[2])

def count(event, arguments):
    global left
    if event == "subprocess.Popen":
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

async def main():
    driver = Systems(folder, None)
    driver.script = "exec sleep 1000"
    sys.addaudithook(count)
    await driver.start(IRIS, dirs_in(folder))
    print("started", flush=True)

trio.run(main)
"""


async def test_before_whatever_command_a_daemon_is_killed_the_next_one_has_one_container(
    tmp_path: Path, driver: Systems
) -> None:
    driver.script = "exec sleep 1000"
    step, code = 0, 1
    while code:
        code, _ = run_forked(STARTER_THAT_IS_KILLED, str(tmp_path), str(step))
        assert code in (0, -signal.SIGKILL)
        running = await driver.find(IRIS, dirs_in(tmp_path)) or await driver.start(IRIS, dirs_in(tmp_path))
        containers = [pid for pid in pids_naming(str(driver.stand_in.folder)) if _is_container(pid)]
        assert containers == [running.pid], f"killed before command {step}"
        await end(running)
        await driver.destroy(IRIS)
        step += 1
    assert step > 5


def _is_container(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text() == "systemd-nspawn\n" and start_time(pid) is not None
    except OSError:
        return False
