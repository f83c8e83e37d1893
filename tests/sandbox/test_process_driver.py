"""The process driver with the real bubblewrap; in the place of a harness it runs a shell."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from hive_core.containers.process import AgentDirs, Exit, ProcessDriver, Running, sandbox_trouble
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
        mates = namespace_mates(running)
        assert len(mates) >= 4
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
