"""The process driver with the real bubblewrap; in the place of a harness it runs a shell."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from hive_core.containers import bubblewrap, process
from hive_core.containers.bubblewrap import AgentDirs, sandbox_trouble
from hive_core.containers.printed import LOG_LIMIT_BYTES
from hive_core.containers.process import ProcessDriver
from hive_core.containers.process_tree import all_pids, parent_of
from hive_core.containers.running import Exit, Running
from hive_core.protocol.words import AgentName
from tests.needs import ROOT
from tests.processes import children_of, pids_naming

IRIS = AgentName("iris")
PATIENCE_S = 20.0


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path) -> Iterator[None]:
    """Many agents here outlive who started them; those of a test that failed are ended by pid."""
    yield
    for pid in pids_naming(str(tmp_path)):
        for each in (*children_of(pid), pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)


class ShellDriver(ProcessDriver):
    """The driver as it is, but the agent is a script."""

    script = ""

    def _command(self, name: AgentName, dirs: AgentDirs) -> list[str]:
        return ["/bin/sh", "-c", self.script]


def driver_in(folder: Path, script: str, sandbox: str = "bwrap", life_fd: int | None = None) -> ShellDriver:
    driver = ShellDriver(folder, sandbox=sandbox, claude=None, orphan_grace_s=600, life_fd=life_fd)
    driver.script = script
    return driver


def dirs_in(folder: Path, manager: bool = False) -> AgentDirs:
    own = folder / "agents" / "iris"
    for path in (own / "run", folder / "proposed"):
        path.mkdir(parents=True, exist_ok=True)
    return AgentDirs(own / "run", own / "state", own / "claude", folder / "proposed" if manager else None)


async def run(folder: Path, script: str, manager: bool = False, sandbox: str = "bwrap") -> tuple[int | None, str]:
    """Run a script as an agent to its end: (exit code, what it printed)."""
    driver = driver_in(folder, script, sandbox)
    with trio.fail_after(PATIENCE_S):
        running = await driver.start(IRIS, dirs_in(folder, manager))
        code = (await running.wait()).code
    return code, driver.last_words(IRIS, 100_000)


def namespace_mates(running: Running) -> list[int]:
    """The host's numbers of all processes in the agent's pid namespace."""
    status = json.loads(running._status.read_text().splitlines()[0])
    wanted, found = f"pid:[{status['pid-namespace']}]", []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.readlink(entry / "ns" / "pid") == wanted:
                found.append(int(entry.name))
        except OSError:
            continue
    return found


async def wait_gone(pids: list[int]) -> None:
    with trio.fail_after(PATIENCE_S):
        for pid in pids:
            try:
                descriptor = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
            try:
                await trio.lowlevel.wait_readable(descriptor)
            finally:
                os.close(descriptor)


async def read_fifo(path: Path) -> str:
    """Wait for what an agent writes into a pipe with a name."""
    with trio.fail_after(PATIENCE_S):
        return await trio.to_thread.run_sync(path.read_text, abandon_on_cancel=True)


def make_fifo(folder: Path, name: str) -> Path:
    path = dirs_in(folder).state / name
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    return path


STARTER = """
import os, sys, trio
from pathlib import Path
from tests.sandbox.test_process_driver import IRIS, dirs_in, driver_in

async def main(folder, script, with_life_pipe):
    life_fd, held = os.pipe() if with_life_pipe else (None, None)
    driver = driver_in(folder, script, life_fd=life_fd)
    driver.script = script.replace("LIFE", str(life_fd))
    running = await driver.start(IRIS, dirs_in(folder))
    print(running.pid, flush=True)
    await trio.sleep_forever()

trio.run(main, Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "life")
"""


def start_and_die(folder: Path, script: str, life: str = "") -> int:
    """Another process starts the agent and is killed by SIGKILL. Returns the agent's pid."""
    with subprocess.Popen(
        [sys.executable, "-c", STARTER, str(folder), script, life],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    ) as starter:
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
        starter.send_signal(signal.SIGKILL)
    return pid


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


# -- what an agent sees -----------------------------------------------------------------------------------------------


async def test_an_agent_writes_its_own_directories_and_finds_what_it_wrote(tmp_path: Path) -> None:
    code, said = await run(tmp_path, "pwd; touch /state/b ~/.claude/c ~/d /tmp/e && echo $HOME")
    assert (code, said.split()) == (0, ["/state", "/root"])
    dirs = dirs_in(tmp_path)
    assert [(dirs.state / "b").exists(), (dirs.claude / "c").exists()] == [True] * 2
    assert not Path("~/d").expanduser().exists()
    code, said = await run(tmp_path, "ls /state ~/.claude ~ /tmp")
    assert code == 0
    assert {"b", "c"} <= set(said.split())
    assert not {"d", "e"} & set(said.split())


async def test_an_agent_sees_nothing_else_of_the_state_directory(tmp_path: Path) -> None:
    for secret in (
        "hive.sqlite",
        "credentials/anthropic-api-key",
        "applied/iris.git/HEAD",
        "agents/damocles/state/note",
    ):
        (tmp_path / secret).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / secret).write_text("canary")
    code, said = await run(tmp_path, f"ls {tmp_path} /agents /home /var /etc/passwd /etc/shadow; cat {tmp_path}/*")
    assert code != 0
    assert "canary" not in said
    assert said.count("No such file") == 7


async def test_the_manager_alone_sees_the_configurations(tmp_path: Path) -> None:
    dirs_in(tmp_path)
    (tmp_path / "proposed" / "iris").mkdir()
    assert await run(tmp_path, "ls /agents && touch /agents/iris/written", manager=True) == (0, "iris")
    assert (tmp_path / "proposed" / "iris" / "written").exists()


async def test_the_system_can_be_used_and_not_changed(tmp_path: Path) -> None:
    places = ["/usr/canary", "/bin/canary", f"{sys.prefix}/canary", f"{ROOT}/hive_core/canary"]
    script = f"for f in {' '.join(places)}; do touch $f 2>/dev/null && echo wrote $f; done"
    script += "; mount -o remount,rw /usr; echo end"
    _, said = await run(tmp_path, script)
    assert "wrote" not in said
    assert said.endswith("end")
    assert not any(Path(place).exists() for place in places)


async def test_our_own_program_can_be_run(tmp_path: Path) -> None:
    code, said = await run(
        tmp_path, f"{sys.executable} -P -c 'import hive_core.protocol.lines, hive_agent; print(\"ran\")'"
    )
    assert (code, said) == (0, "ran")


async def test_an_agent_has_no_network_but_its_own_loopback(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(f"\0{tmp_path}")
        abstract.listen()
        port = server.getsockname()[1]
        program = (
            "import socket\n"
            f"for family, address in ((socket.AF_INET, ('127.0.0.1', {port})), (socket.AF_UNIX, '\\0{tmp_path}'),\n"
            "                         (socket.AF_INET, ('192.0.2.1', 80))):\n"
            "    try: socket.socket(family).connect(address); print('reached')\n"
            "    except OSError as exc: print(exc.errno)\n"
            "with socket.create_server(('127.0.0.1', 0)) as own:\n"
            "    socket.create_connection(own.getsockname()); print('own')\n"
        )
        (dirs_in(tmp_path).run / "program.py").write_text(program)
        code, said = await run(
            tmp_path, f"cut -d: -f1 /proc/net/dev | tail -n +3; {sys.executable} /run/hive/program.py"
        )
    assert code == 0
    assert said.split() == ["lo", "111", "111", "101", "own"]


async def test_an_agent_sees_no_process_of_the_host_and_has_no_capability(tmp_path: Path) -> None:
    _, said = await run(tmp_path, "cat /proc/[0-9]*/comm; grep -h Cap /proc/self/status; hostname; id -u")
    names, _, rest = said.partition("CapInh")
    assert set(names.split()) <= {"bwrap", "sh", "cat"}
    assert rest.count("0000000000000000") == 5
    assert rest.split()[-2:] == ["hive", "0"]
    code, _ = await run(tmp_path, f"kill -0 {os.getpid()}")
    assert code != 0


async def test_an_agent_is_handed_no_open_file_of_the_daemon(tmp_path: Path) -> None:
    _, said = await run(tmp_path, "ls /proc/self/fd; readlink /proc/self/fd/0")
    assert said.split() == ["0", "1", "2", "3", "/dev/null"]  # 3 is ls itself, reading the directory


async def test_an_agent_inherits_nothing_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-canary")
    code, said = await run(tmp_path, "env; cat /proc/1/environ")
    assert code == 0
    assert "canary" not in said
    assert {line.split("=")[0] for line in said.replace("\0", "\n").splitlines() if "=" in line} <= {
        "HOME",
        "PATH",
        "LANG",
        "PYTHONPATH",
        "PWD",
        "OLDPWD",
        "SHLVL",
        "_",
    }


# -- how an agent ends ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sandbox", ["bwrap", "none"])
@pytest.mark.parametrize("code", [0, 7])
async def test_an_exit_code_is_told(tmp_path: Path, sandbox: str, code: int) -> None:
    assert await run(tmp_path, f"echo last words; exit {code}", sandbox=sandbox) == (code, "last words")


class NowhereDriver(ProcessDriver):
    def _command(self, name: AgentName, dirs: AgentDirs) -> list[str]:
        return ["/nowhere/python"]


async def test_a_program_that_cannot_be_started_is_an_os_error(tmp_path: Path) -> None:
    driver = NowhereDriver(tmp_path, sandbox="none", claude=None, orphan_grace_s=600, life_fd=None)
    with pytest.raises(FileNotFoundError):
        await driver.start(IRIS, dirs_in(tmp_path))


async def test_bubblewrap_is_the_one_on_the_daemons_own_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "bwrap").write_text(f'#!/bin/sh\ntouch {tmp_path}/used\nexec {shutil.which("bwrap")} "$@"\n')
    (tmp_path / "bin" / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    assert await run(tmp_path, "echo hi") == (0, "hi")
    assert (tmp_path / "used").exists()


@asynccontextmanager
async def started(folder: Path, script: str, sandbox: str = "bwrap") -> AsyncIterator[tuple[ShellDriver, Running]]:
    """An agent that runs until the block ends, and has said that it is ready."""
    ready = make_fifo(folder, "ready")
    where = "/state" if sandbox == "bwrap" else str(ready.parent)
    driver = driver_in(folder, f"{script.replace('STATE', where)}", sandbox)
    running = await driver.start(IRIS, dirs_in(folder))
    try:
        await read_fifo(ready)
        yield driver, running
    finally:
        running.kill()


async def test_kill_ends_every_process_of_the_agent(tmp_path: Path) -> None:
    script = "setsid sleep 1000 & (trap '' TERM HUP; sleep 1000) & echo > STATE/ready; sleep 1000"
    async with started(tmp_path, script) as (_, running):
        with trio.fail_after(PATIENCE_S):
            while len(mates := namespace_mates(running)) < 4:
                await trio.lowlevel.checkpoint()
        running.kill()
        with trio.fail_after(PATIENCE_S):
            exit_ = await running.wait()
        await wait_gone(mates)
        assert exit_.code != 0


async def test_without_a_sandbox_kill_ends_the_group(tmp_path: Path) -> None:
    ready = make_fifo(tmp_path, "ready")
    driver = driver_in(tmp_path, f"sleep 1000 & echo $! > {ready}; wait", "none")
    running = await driver.start(IRIS, dirs_in(tmp_path))
    child = int(await read_fifo(ready))
    running.kill()
    with trio.fail_after(PATIENCE_S):
        await running.wait()
    await wait_gone([child])


async def test_kill_in_the_very_moment_of_the_start_leaves_nothing(tmp_path: Path) -> None:
    driver = driver_in(tmp_path, "sleep 1000")
    for step in range(25):
        running = await driver.start(IRIS, dirs_in(tmp_path))
        with trio.move_on_after(step * 0.0002):
            await trio.lowlevel.wait_readable(running._pidfd)
        running.kill()
        with trio.fail_after(PATIENCE_S):
            await running.wait()
    left = pids_naming(str(tmp_path))
    try:
        await wait_gone(left)
    except trio.TooSlowError:
        for pid in left:  # ours, by their number
            os.kill(pid, signal.SIGKILL)
        raise


# -- daemons that die -------------------------------------------------------------------------------------------------


async def test_an_agent_outlives_its_daemon_and_the_next_one_adopts_it_and_reads_its_exit_code(tmp_path: Path) -> None:
    go = make_fifo(tmp_path, "go")
    pid = start_and_die(tmp_path, "read word < /state/go; exit 7")
    driver = driver_in(tmp_path, "")
    running = driver.find(IRIS, dirs_in(tmp_path))
    assert running is not None
    assert running.pid == pid
    with trio.fail_after(PATIENCE_S):
        await trio.to_thread.run_sync(go.write_text, "go\n")
        assert await running.wait() == Exit(7)
    assert driver.find(IRIS, dirs_in(tmp_path)) is None
    driver.forget(IRIS)
    assert driver.missed_exit(IRIS) is None


async def test_an_adopted_agent_can_be_killed_whole(tmp_path: Path) -> None:
    ready = make_fifo(tmp_path, "ready")
    start_and_die(tmp_path, "setsid sleep 1000 & echo > /state/ready; sleep 1000")
    await read_fifo(ready)
    running = driver_in(tmp_path, "").find(IRIS, dirs_in(tmp_path))
    assert running is not None
    mates = namespace_mates(running)
    running.kill()
    with trio.fail_after(PATIENCE_S):
        await running.wait()
    await wait_gone(mates)


async def test_an_exit_that_nobody_watched_is_told_once(tmp_path: Path) -> None:
    go = make_fifo(tmp_path, "go")
    pid = start_and_die(tmp_path, "read word < /state/go; exit 9")
    descriptor = os.pidfd_open(pid)
    with trio.fail_after(PATIENCE_S):
        await trio.to_thread.run_sync(go.write_text, "go\n")
        await trio.lowlevel.wait_readable(descriptor)
    os.close(descriptor)
    driver = driver_in(tmp_path, "")
    assert driver.find(IRIS, dirs_in(tmp_path)) is None
    assert driver.missed_exit(IRIS) == Exit(9)
    assert driver.missed_exit(IRIS) is None


async def test_an_agent_that_watches_the_life_pipe_ends_with_its_daemon(tmp_path: Path) -> None:
    pid = start_and_die(tmp_path, "cat <&LIFE; exit 5", "life")
    await wait_gone([pid])
    assert driver_in(tmp_path, "").missed_exit(IRIS) == Exit(5)


# Kills its own process at the Nth step that shows from outside of the program, counted from the start of the agent.
STARTER_THAT_IS_KILLED = """
import os, signal, sys, trio
from pathlib import Path
from tests.sandbox.test_process_driver import IRIS, dirs_in, driver_in

STEPS = ("open", "os.mkdir", "os.rename", "fcntl.flock", "subprocess.Popen")
folder, script, sandbox, left = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])

def count(event, arguments):
    global left
    if event in STEPS:
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

driver, dirs = driver_in(folder, script, sandbox), dirs_in(folder)
sys.addaudithook(count)
trio.run(driver.start, IRIS, dirs)
left = 1
print("started", flush=True)
"""


@pytest.mark.parametrize("sandbox", ["bwrap", "none"])
async def test_at_whatever_step_of_a_start_a_daemon_is_killed_the_next_one_finds_what_it_started(
    tmp_path: Path, sandbox: str
) -> None:
    ready = make_fifo(tmp_path, "ready")
    where = "/state" if sandbox == "bwrap" else str(ready.parent)
    script = f"echo > {where}/ready; sleep 1000"
    driver, dirs = driver_in(tmp_path, script, sandbox), dirs_in(tmp_path)
    never_started = not_remembered = step = 0
    while True:
        starter = await trio.run_process(
            [sys.executable, "-c", STARTER_THAT_IS_KILLED, str(tmp_path), script, sandbox, str(step)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_stdout=True,
            check=False,
        )
        not_remembered += not (tmp_path / "processes" / "iris.json").exists()
        running = driver.find(IRIS, dirs)
        if running is None:
            never_started += 1
            assert pids_naming(str(tmp_path)) == [], f"killed at step {step}, it left an agent that nobody finds"
        else:
            await read_fifo(ready)
            with pytest.raises(BlockingIOError, match="runs already"):
                await driver.start(IRIS, dirs)
            running.kill()
            with trio.fail_after(PATIENCE_S):
                await running.wait()
            driver.forget(IRIS)
            await wait_gone(pids_naming(str(tmp_path)))
        if starter.returncode == 0:
            break
        step += 1
    # There are steps before the agent runs, and steps between that and its process file.
    assert 0 < never_started < not_remembered


async def test_whoever_only_reads_the_status_file_is_not_taken_for_the_agent(tmp_path: Path) -> None:
    go = make_fifo(tmp_path, "go")
    pid = start_and_die(tmp_path, "read word < /state/go")
    (tmp_path / "processes" / "iris.json").unlink()
    with (tmp_path / "processes" / "iris.status").open():
        driver, dirs = driver_in(tmp_path, ""), dirs_in(tmp_path)
        running = driver.find(IRIS, dirs)
        assert running is not None
        assert running.pid == pid
        with trio.fail_after(PATIENCE_S):
            await trio.to_thread.run_sync(go.write_text, "go\n")
            await running.wait()
        driver.forget(IRIS)
        assert driver.find(IRIS, dirs) is None


async def test_nothing_that_an_agent_does_inside_hides_it_from_the_next_daemon(tmp_path: Path) -> None:
    ready = make_fifo(tmp_path, "ready")
    let_go = (
        "import contextlib, fcntl, os\n"
        "for number in range(1024):\n"
        "    with contextlib.suppress(OSError): fcntl.flock(number, fcntl.LOCK_UN)\n"
        "os.closerange(0, 1024)\n"
        "open('/state/ready', 'w').write('ready')\n"
        "import time; time.sleep(1000)\n"
    )
    dirs = dirs_in(tmp_path)
    (dirs.run / "let_go.py").write_text(let_go)
    pid = start_and_die(tmp_path, f"exec {sys.executable} /run/hive/let_go.py")
    await read_fifo(ready)
    (tmp_path / "processes" / "iris.json").unlink()
    running = driver_in(tmp_path, "").find(IRIS, dirs)
    assert running is not None
    assert running.pid == pid
    running.kill()
    with trio.fail_after(PATIENCE_S):
        await running.wait()


@pytest.mark.parametrize("sandbox", ["bwrap", "none"])
async def test_it_is_the_agent_that_is_found_by_its_lock_and_not_what_it_started(tmp_path: Path, sandbox: str) -> None:
    async with started(tmp_path, "sleep 1000 & echo > STATE/ready; wait", sandbox) as (driver, running):
        (tmp_path / "processes" / "iris.json").unlink()
        found = driver.find(IRIS, dirs_in(tmp_path))
        assert found is not None
        assert found.pid == running.pid
        found.kill()
        with trio.fail_after(PATIENCE_S):
            await found.wait()
            await running.wait()


async def test_an_agent_whose_process_file_cannot_be_written_is_ended_again(tmp_path: Path) -> None:
    (tmp_path / "processes" / ".iris.json").mkdir(parents=True)
    driver, dirs = driver_in(tmp_path, "sleep 1000"), dirs_in(tmp_path)
    with pytest.raises(IsADirectoryError):
        await driver.start(IRIS, dirs)
    await wait_gone(pids_naming(str(tmp_path)))
    assert driver.find(IRIS, dirs) is None


async def test_what_bwrap_watched_is_ended_also_when_nobody_saw_bwrap_die(tmp_path: Path) -> None:
    ready = make_fifo(tmp_path, "ready")
    pid = start_and_die(tmp_path, "echo > /state/ready; sleep 1000")
    await read_fifo(ready)
    inside = children_of(pid)
    assert inside
    os.kill(pid, signal.SIGKILL)
    await wait_gone([pid])
    assert driver_in(tmp_path, "").find(IRIS, dirs_in(tmp_path)) is None
    await wait_gone(inside)


async def test_a_stranger_that_has_the_pid_of_an_agent_that_is_gone_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "processes").mkdir()
    stranger = await trio.lowlevel.open_process(
        ["/bin/sh", "-c", "read word", "hive_agent.cli", "serve", "--run", "/run/hive", "--state", "/state"],
        stdin=subprocess.PIPE,
    )
    (tmp_path / "processes" / "iris.status").write_text(json.dumps({"child-pid": stranger.pid}) + "\n")
    (dirs := dirs_in(tmp_path)).state.mkdir(parents=True)
    assert driver_in(tmp_path, "").find(IRIS, dirs) is None
    assert stranger.stdin is not None
    await stranger.stdin.send_all(b"go\n")
    with trio.fail_after(PATIENCE_S):
        assert await stranger.wait() == 0


async def test_its_sockets_can_be_connected_to_and_not_replaced(tmp_path: Path) -> None:
    code, said = await run(tmp_path, "touch /run/hive/a || rm -r /run/hive")
    assert code != 0
    assert "Read-only file system" in said


async def test_no_setting_of_the_kernel_can_be_opened_for_writing(tmp_path: Path) -> None:
    look = (
        "find /proc -maxdepth 4 -path '/proc/[0-9]*' -prune -o -path /proc/self -prune"
        " -o -path /proc/thread-self -prune -o -type f -print 2>/dev/null"
        " | while read f; do (: >> $f) 2>/dev/null && echo OPEN $f; done; echo looked"
    )
    code, said = await run(tmp_path, look)
    assert code == 0
    assert said.split() == ["looked"]


async def test_when_the_harness_ends_the_kernel_ends_all_that_it_started(tmp_path: Path) -> None:
    code, _ = await run(tmp_path, "setsid sleep 4567 & exit 3")
    assert code == 3
    left = [p for p in Path("/proc").glob("[0-9]*/cmdline") if b"sleep\x004567" in p.read_bytes()]
    assert left == []


# -- what the kernel does for an agent --------------------------------------------------------------------------------

# What Python has no name for: the numbers are those of the processor this runs on.
SYSCALLS = {
    "x86_64": {"keyctl": 250, "add_key": 248, "request_key": 249, "bpf": 321, "userfaultfd": 323, "io_uring_setup": 425}
    | {"perf_event_open": 298, "syslog": 103, "fsopen": 430, "x32_getpid": 0x40000000 + 39},
    "aarch64": {
        "keyctl": 219,
        "add_key": 217,
        "request_key": 218,
        "bpf": 280,
        "userfaultfd": 282,
        "io_uring_setup": 425,
    }
    | {"perf_event_open": 241, "syslog": 116, "fsopen": 430},
}.get(os.uname().machine, {})
needs_a_known_processor = pytest.mark.skipif(not SYSCALLS, reason="there is no filter for this processor")
# Finds a key in its session keyring and prints it: keyctl(SEARCH), keyctl(READ).
READ_A_KEY = f"""
import ctypes
keyctl = lambda *arguments: ctypes.CDLL(None, use_errno=True).syscall({SYSCALLS.get("keyctl")}, *arguments)
found = keyctl(10, -3, b"user", b"hive-canary", 0)
text = ctypes.create_string_buffer(64)
length = keyctl(11, found, text, 64) if found > 0 else -1
print(text.raw[:length] if length > 0 else "no key")
"""


# A process of its own, in a login session with a key, as an operator's is; it starts an agent and waits for its end.
STARTER_WITH_A_KEY = """
import ctypes, os, subprocess, sys, trio
from pathlib import Path
from hive_core.containers import process
from tests.sandbox.test_process_driver import IRIS, READ_A_KEY, SYSCALLS, dirs_in, driver_in

async def main(folder, script, sandbox, filtered):
    if not filtered:  # as on a processor that there is no filter for
        process.filter_program = lambda: None
    await (await driver_in(folder, script, sandbox).start(IRIS, dirs_in(folder))).wait()

libc = ctypes.CDLL(None, use_errno=True)
if libc.syscall(SYSCALLS["keyctl"], 1, b"hive-test") < 0:
    sys.exit("no kernel keys")
assert libc.syscall(SYSCALLS["add_key"], b"user", b"hive-canary", b"canary", 6, -3) > 0
print(subprocess.check_output([sys.executable, "-c", READ_A_KEY], text=True).strip())
trio.run(main, Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4] == "filtered")
"""


@needs_a_known_processor
@pytest.mark.parametrize("sandbox", ["bwrap", "none"])
@pytest.mark.parametrize("filtered", ["filtered", "not filtered"])
async def test_an_agent_has_no_key_of_the_session_that_its_daemon_was_started_in(
    tmp_path: Path, sandbox: str, filtered: str
) -> None:
    run_dir = dirs_in(tmp_path).run
    (run_dir / "read.py").write_text(READ_A_KEY)
    script = f"{sys.executable} {'/run/hive' if sandbox == 'bwrap' else run_dir}/read.py"
    starter = await trio.run_process(
        [sys.executable, "-c", STARTER_WITH_A_KEY, str(tmp_path), script, sandbox, filtered],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_stdout=True,
        capture_stderr=True,
        check=False,
    )
    if b"no kernel keys" in starter.stderr:
        pytest.skip("this machine has no kernel keys")
    assert starter.stdout.decode().strip() == "b'canary'", starter.stderr
    assert driver_in(tmp_path, "").last_words(IRIS) == "no key"


async def test_the_list_of_the_hosts_keys_cannot_be_read(tmp_path: Path) -> None:
    _, said = await run(tmp_path, "cat /proc/keys /proc/key-users; echo end")
    assert not any(line[:1].isdigit() for line in said.splitlines())
    assert said.endswith("end")


@needs_a_known_processor
async def test_calls_that_no_agent_needs_are_refused(tmp_path: Path) -> None:
    program = (
        "import ctypes, errno\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        f"for name, number in {SYSCALLS}.items():\n"
        "    done = libc.syscall(number, 3, 0, 0, 0, 0)\n"
        "    print(name, done, errno.errorcode.get(ctypes.get_errno()))\n"
    )
    (dirs_in(tmp_path).run / "program.py").write_text(program)
    code, said = await run(tmp_path, f"{sys.executable} /run/hive/program.py")
    assert code == 0, said
    foreign = {"x32_getpid"}
    assert said.splitlines() == [f"{name} -1 {'ENOSYS' if name in foreign else 'EPERM'}" for name in SYSCALLS]


@needs_a_known_processor
async def test_only_sockets_that_stay_in_the_sandbox_can_be_made(tmp_path: Path) -> None:
    program = (
        "import errno, socket\n"
        "for family in (1, 2, 10, 16, 15, 21, 29, 30, 31, 38, 40, 42, 44):\n"
        "    kind = {38: socket.SOCK_SEQPACKET, 16: socket.SOCK_RAW}.get(family, socket.SOCK_STREAM)\n"
        "    try: socket.socket(family, kind).close(); print(family, 'made')\n"
        "    except OSError as exc: print(family, errno.errorcode[exc.errno])\n"
        "try: socket.socket(2**32 + 40, socket.SOCK_STREAM)\n"
        "except (OSError, OverflowError): print('none')\n"
    )
    (dirs_in(tmp_path).run / "program.py").write_text(program)
    code, said = await run(tmp_path, f"{sys.executable} /run/hive/program.py; grep Seccomp: /proc/self/status")
    assert code == 0, said
    made = [line for line in said.splitlines() if line.endswith(" made")]
    assert set(made) <= {"1 made", "2 made", "10 made", "16 made"}  # unix, inet, inet6, netlink
    assert {"1 made", "2 made", "16 made"} <= set(made)
    assert {"40 EAFNOSUPPORT", "38 EAFNOSUPPORT"} <= set(said.splitlines())
    assert said.splitlines()[-1].split() == ["Seccomp:", "2"]


async def test_what_an_agent_works_with_runs_under_the_filter(tmp_path: Path) -> None:
    script = (
        "cd ~ && git init -q repo && cd repo && echo hi > file && git add file"
        " && git -c user.name=i -c user.email=i@i commit -q -m one && git log --format=%s && git gc -q"
        f" && {sys.executable} -c 'import subprocess, threading, multiprocessing, ssl, sqlite3, asyncio, socket;"
        ' subprocess.run(["true"], check=True); threading.Thread(target=print, args=("thread",)).start();'
        " asyncio.run(asyncio.sleep(0)); multiprocessing.Lock(); socket.if_nameindex();"
        ' socket.getaddrinfo("127.0.0.1", 80)\''
    )
    assert await run(tmp_path, script) == (0, "one\nthread")


def test_a_filter_that_does_not_work_here_is_told_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bubblewrap, "filter_program", lambda: struct.pack("=HBBI", 0xFFFF, 0, 0, 0))
    said = sandbox_trouble() or ""
    assert "SECCOMP" in said
    assert "CONFIG_SECCOMP_FILTER" in said


def test_a_processor_without_a_filter_is_told_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    for module in (bubblewrap, process):
        monkeypatch.setattr(module, "filter_program", lambda: None)
    driver_in(tmp_path, "")
    assert "no filter of system calls" in caplog.text
    assert sandbox_trouble() is None


# -- what an agent prints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sandbox", ["bwrap", "none"])
async def test_what_an_agent_prints_is_kept_from_its_end_and_takes_no_more_than_a_megabyte(
    tmp_path: Path, sandbox: str
) -> None:
    code, said = await run(tmp_path, "yes floods | head -c 20000000; echo; echo the end", sandbox=sandbox)
    assert code == 0
    assert said.endswith("\nthe end")
    log = tmp_path / "processes" / "iris.log"
    assert 200_000 < log.stat().st_size <= LOG_LIMIT_BYTES
    await run(tmp_path, "echo again", sandbox=sandbox)
    assert b"the end\nagain\n" in log.read_bytes()


async def test_what_an_agent_printed_cannot_be_opened_or_emptied_from_inside(tmp_path: Path) -> None:
    script = (
        "echo first >&2; for f in /proc/1/fd/1 /proc/1/fd/2 /proc/self/fd/1; do"
        " (: > $f) 2>/dev/null && echo emptied; (: < $f) 2>/dev/null && echo opened; done;"
        f" {sys.executable} -c 'import os; os.ftruncate(2, 0)' 2>&1 | tail -n 1 | cut -c 1-7"
    )
    _, said = await run(tmp_path, script)
    assert said.split() == ["first", "OSError"]


async def test_an_agent_whose_daemon_is_gone_goes_on_printing_and_the_next_daemon_reads_it(tmp_path: Path) -> None:
    go = make_fifo(tmp_path, "go")
    start_and_die(tmp_path, "read word < /state/go; yes floods | head -c 3000000; echo; echo the end; exit 4")
    driver = driver_in(tmp_path, "")
    running = driver.find(IRIS, dirs_in(tmp_path))
    assert running is not None
    with trio.fail_after(PATIENCE_S):
        await trio.to_thread.run_sync(go.write_text, "go\n")
        assert await running.wait() == Exit(4)
    assert driver.last_words(IRIS).endswith("\nthe end")


async def test_no_reader_of_what_an_agent_prints_is_left_behind(tmp_path: Path) -> None:
    def own() -> list[int]:  # of whichever thread
        return [pid for pid in all_pids() if parent_of(pid) == os.getpid()]

    before = own()
    await run(tmp_path, "echo hi")
    with pytest.raises(FileNotFoundError):
        await NowhereDriver(tmp_path, sandbox="none", claude=None, orphan_grace_s=600, life_fd=None).start(
            IRIS, dirs_in(tmp_path)
        )
    assert own() == before


# -- without a sandbox ------------------------------------------------------------------------------------------------

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
    driver = driver_in(tmp_path, f"exec {sys.executable} {program}", "none")
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


# -- another runtime directory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("remembered", [True, False])
async def test_an_agent_that_knows_another_runtime_directory_is_ended_and_can_be_started_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, remembered: bool
) -> None:
    ready = make_fifo(tmp_path, "ready")
    pid = start_and_die(tmp_path, "echo > /state/ready; sleep 1000")
    await read_fifo(ready)
    if not remembered:
        (tmp_path / "processes" / "iris.json").unlink()
    dirs = dirs_in(tmp_path)
    moved = dataclasses.replace(dirs, run=tmp_path / "elsewhere")
    moved.run.mkdir()
    driver = driver_in(tmp_path, "ls /run/hive")
    assert driver.find(IRIS, moved) is None
    await wait_gone([pid])
    assert driver.missed_exit(IRIS) is None, "it did not crash"
    assert str(dirs.run) in caplog.text
    assert str(moved.run) in caplog.text
    (moved.run / "sockets").touch()
    with trio.fail_after(PATIENCE_S):
        await (await driver.start(IRIS, moved)).wait()
    assert driver.last_words(IRIS).endswith("sockets")


async def test_an_agent_whose_runtime_directory_was_made_anew_is_ended(tmp_path: Path) -> None:
    ready = make_fifo(tmp_path, "ready")
    pid = start_and_die(tmp_path, "echo > /state/ready; sleep 1000")
    await read_fifo(ready)
    dirs = dirs_in(tmp_path)
    dirs.run.rename(tmp_path / "kept")  # so that the new one cannot get its number
    dirs.run.mkdir()
    assert driver_in(tmp_path, "").find(IRIS, dirs) is None
    await wait_gone([pid])
