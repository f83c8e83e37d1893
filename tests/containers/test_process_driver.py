"""What is the process driver's own: bubblewrap as it is found, and agents with nothing around them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from hive_core.config import Config
from hive_core.containers import bubblewrap, choice, confined, host_process
from hive_core.containers.bubblewrap import sandbox_trouble
from hive_core.containers.choice import Choice, make_driver
from hive_core.containers.entering import confined as confined_command
from hive_core.containers.mounts import AgentDirs
from hive_core.containers.process import ProcessDriver
from hive_core.containers.process_tree import first_in_namespace
from hive_core.protocol.words import AgentName
from tests.containers.drivers import (
    IRIS,
    PATIENCE_S,
    dirs_in,
    driver_in,
    let_all_enter,
    make_fifo,
    need,
    read_fifo,
    run,
    start_and_die,
    wait_gone,
)
from tests.needs import ROOT
from tests.processes import children_of, pids_naming


@pytest.fixture(autouse=True)
def _needs_bwrap() -> None:
    need("bwrap")


def test_bubblewrap_works_here() -> None:
    assert sandbox_trouble() is None


def test_bubblewrap_that_is_not_there_is_named_with_the_fix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "bubblewrap is not installed: `apt-get install bubblewrap`" in (sandbox_trouble() or "")


def test_bubblewrap_that_fails_is_told_with_its_reason_and_a_fix(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2; exit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    said = sandbox_trouble() or ""
    assert "No permissions to create new namespace" in said
    assert "namespaces" in said


async def test_bubblewrap_is_the_one_on_the_daemons_own_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "bwrap").write_text(f'#!/bin/sh\ntouch {tmp_path}/used\nexec {shutil.which("bwrap")} "$@"\n')
    (tmp_path / "bin" / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    assert await run(tmp_path, "bwrap", "echo hi") == (0, "hi")
    assert (tmp_path / "used").exists()


async def test_without_a_sandbox_kill_ends_the_group(tmp_path: Path) -> None:
    ready = make_fifo(tmp_path, "ready")
    driver = driver_in(tmp_path, "none", f"sleep 1000 & echo $! > {ready}; wait")
    running = await driver.start(IRIS, dirs_in(tmp_path))
    child = int(await read_fifo(ready))
    running.kill()
    with trio.fail_after(PATIENCE_S):
        await running.wait()
    await wait_gone([child])


async def test_what_bwrap_watched_is_ended_also_when_nobody_saw_bwrap_die(tmp_path: Path) -> None:
    ready = make_fifo(tmp_path, "ready")
    pid = start_and_die(tmp_path, "bwrap", "echo > /state/ready; sleep 1000")
    await read_fifo(ready)
    inside = children_of(pid)
    assert inside
    os.kill(pid, signal.SIGKILL)
    await wait_gone([pid])
    assert await driver_in(tmp_path, "bwrap", "").find(IRIS, dirs_in(tmp_path)) is None
    await wait_gone(inside)


async def test_a_stranger_that_has_the_pid_of_an_agent_that_is_gone_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "processes").mkdir()
    stranger = await trio.lowlevel.open_process(
        ["/bin/sh", "-c", "read word", "hive_agent.cli", "serve", "--run", "/run/hive", "--state", "/state"],
        stdin=subprocess.PIPE,
    )
    (tmp_path / "processes" / "iris.status").write_text(json.dumps({"child-pid": stranger.pid}) + "\n")
    (dirs := dirs_in(tmp_path)).state.mkdir(parents=True)
    state = dirs.state.stat()
    (tmp_path / "processes" / "iris.run").write_text(json.dumps({"state": [state.st_dev, state.st_ino]}))
    assert await driver_in(tmp_path, "bwrap", "").find(IRIS, dirs) is None
    assert stranger.stdin is not None
    await stranger.stdin.send_all(b"go\n")
    with trio.fail_after(PATIENCE_S):
        assert await stranger.wait() == 0


def test_a_filter_that_does_not_work_here_is_told_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bubblewrap, "filter_program", lambda: struct.pack("=HBBI", 0xFFFF, 0, 0, 0))
    said = sandbox_trouble() or ""
    assert "SECCOMP" in said
    assert "CONFIG_SECCOMP_FILTER" in said


def test_a_processor_without_a_filter_is_told_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    for module in (bubblewrap, choice, host_process):
        monkeypatch.setattr(module, "filter_program", lambda: None)

    async def first_uid(name: AgentName) -> int:
        raise AssertionError(f"{name} needs no uids of its own")

    config = Config(state_dir=tmp_path, runtime_dir=tmp_path)
    make_driver(config, Choice("bwrap"), claude=None, life_fd=None, first_uid=first_uid, at_end=[].append)
    assert "no filter of system calls" in caplog.text
    assert sandbox_trouble() is None


ESCAPES = """
import subprocess, sys, time
from hive_agent.descendants import adopt_orphans
adopt_orphans()
# One whose parent lives, one whose parent is gone, and one that makes more all the time; each in a session of its own.
subprocess.Popen(["/bin/sh", "-c", "setsid sleep 4321.MARK & echo > READY; sleep 4322.MARK"], start_new_session=True)
subprocess.Popen(["/bin/sh", "-c", "setsid sleep 4323.MARK & exit 0"], start_new_session=True).wait()
subprocess.Popen(["setsid", "/bin/sh", "-c", "while :; do setsid sleep 4324.MARK & sleep 0.01; done"])
time.sleep(1000)
"""


async def test_without_a_sandbox_kill_ends_also_what_has_a_session_of_its_own(tmp_path: Path) -> None:
    ready = make_fifo(tmp_path, "ready")
    mark = str(os.getpid())
    program = tmp_path / "escapes.py"
    program.write_text(ESCAPES.replace("MARK", mark).replace("READY", str(ready)))
    driver = driver_in(tmp_path, "none", f"exec {sys.executable} {program}")
    driver._environment = lambda _: {**os.environ, "PYTHONPATH": str(ROOT)}  # type: ignore[method-assign]
    stranger = await trio.lowlevel.open_process(["setsid", "sleep", f"4325.{mark}"])
    try:
        running = await driver.start(IRIS, dirs_in(tmp_path))
        await read_fifo(ready)
        with trio.fail_after(PATIENCE_S):
            while not all(pids_naming(f"432{n}.{mark}") for n in (1, 2, 3, 4)):
                await trio.lowlevel.checkpoint()
        running.kill()
        with trio.fail_after(PATIENCE_S):
            await running.wait()
        left = [pid for n in (1, 2, 3, 4) for pid in pids_naming(f"432{n}.{mark}")]
        await wait_gone(left)
        assert [pid for n in (1, 2, 3, 4) for pid in pids_naming(f"432{n}.{mark}")] == []
        assert stranger.returncode is None
        running.kill()  # once more, when it is gone, is nothing
    finally:
        for n in (1, 2, 3, 4, 5):
            for pid in pids_naming(f"432{n}.{mark}"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        await stranger.wait()


class NowhereDriver(ProcessDriver):
    def _command(self, name: AgentName, dirs: AgentDirs) -> list[str]:
        return ["/nowhere/python"]


async def test_a_program_that_cannot_be_started_is_an_os_error(tmp_path: Path) -> None:
    driver = NowhereDriver(tmp_path, sandbox="none", claude=None, orphan_grace_s=600, life_fd=None)
    before = children_of(os.getpid())
    with pytest.raises(FileNotFoundError):
        await driver.start(IRIS, dirs_in(tmp_path))
    assert children_of(os.getpid()) == before


def test_a_daemon_without_rights_runs_a_command_in_a_sandbox_of_its_own(tmp_path: Path) -> None:
    python = shutil.which("python3", path="/usr/bin")
    if os.geteuid() != 0 or python is None:
        pytest.skip("a user without rights is what root can become, with an interpreter that everybody can run")
    become = ["setpriv", "--reuid=4242", "--regid=4242", "--clear-groups", "--bounding-set=-all", "--no-new-privs"]
    let_all_enter(tmp_path)
    program = tmp_path / "confined.py"
    shutil.copy(confined.__file__, program)
    sandbox = [
        *become,
        *bubblewrap._bwrap(None),
        "--as-pid-1",
        *bubblewrap._system(),
        "--bind",
        str(tmp_path),
        "/state",
    ]
    with subprocess.Popen([*sandbox, "sh", "-c", "echo; exec sleep 1000"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        first = first_in_namespace(process.pid)
        entering = [python, "-I", "-S", str(program), "--enter-as-is", str(first), "--chdir", "/state"]
        look = [
            "--env",
            "PATH=/usr/bin:/bin",
            "--",
            "sh",
            "-c",
            "pwd; id -u; echo $$; grep -c ^Cap.*0000000000000000 /proc/$$/status",
        ]
        done = subprocess.run([*become, *entering, *look], capture_output=True, text=True)
        assert first is not None
        os.kill(first, signal.SIGKILL)
    assert (done.stdout.split(), done.stderr) == (["/state", "0", "2", "5"], "")


@pytest.mark.parametrize("how", ["--enter", "--enter-as-is"])
def test_whatever_is_in_no_container_is_not_entered_by_whoever_has_the_number_of_what_was(how: str) -> None:
    """An agent's process may end between the look for it and the entering, and its number go to one of the host's."""
    done = subprocess.run([*confined_command(None, {}, how, str(os.getpid())), "id"], capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr == f"hive: process {os.getpid()} is in no container (any more)\n"
