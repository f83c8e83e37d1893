"""The helper itself: whom it answers, what it refuses, and what becomes of agents when it is killed. As root."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from hive_core.containers.helped import Helper
from hive_core.containers.host_names import host_name
from hive_core.containers.mounts import agent_dirs
from hive_core.containers.process_tree import all_pids
from hive_core.containers.running import Exit
from hive_core.containers.status_file import is_locked
from hive_core.helper.cli import read_own_config
from hive_core.helper.desk import REQUEST_LIMIT_BYTES
from hive_core.helper.staging import open_folder
from hive_core.protocol.lines import encode
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName
from hive_core.sockets.unix import Connection, Lines, listen_unix, serve_unix
from tests.containers.drivers import IRIS, PATIENCE_S, let_all_enter, make_fifo, mates, need, read_fifo, wait_gone
from tests.containers.helped import (
    Helped,
    ask,
    end_helper,
    error,
    helped_in,
    mounts_below,
    send,
    start_helper,
    swapping,
)
from tests.hanging_disk import hanging
from tests.needs import ROOT
from tests.processes import children_of, look_until, pids_naming

OWNER, GROUP = 4242, 4343


@pytest.fixture(autouse=True)
def _needs() -> None:
    need("helper-nspawn")


@pytest.fixture
def owned(tmp_path: Path) -> Path:
    """A hive's state directory that belongs to a user without any rights, as the directories of iris do."""
    dirs = agent_dirs(tmp_path / "hive", tmp_path / "hive" / "runtime", IRIS)
    dirs.make()
    for path in (tmp_path / "hive", *(tmp_path / "hive").rglob("*")):
        os.chown(path, OWNER, GROUP, follow_symlinks=False)
    let_all_enter(tmp_path)
    return tmp_path / "hive"


def serve(folder: Path, hive: Path, script: str, sandbox: str = "nspawn") -> None:
    (folder / "script").write_text(script)
    start_helper(folder, sandbox, user=OWNER, state_dir=hive)


@contextlib.contextmanager
def looked_after(folder: Path) -> Iterator[None]:
    """Kill what runs of iris in the end."""
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            ask(folder, {"verb": "kill", "name": "iris"})


# -- a daemon without rights ------------------------------------------------------------------------------------------

# Everything is imported before the rights are gone: the interpreter may stand where nobody else can read.
DAEMON = """
import os, sys, trio
from pathlib import Path
from hive_core.containers.helped import Helper, HelpedDriver
from hive_core.containers.mounts import agent_dirs
from hive_core.containers.process_tree import all_pids
from hive_core.containers.process import ProcessDriver
from hive_core.protocol.words import AgentName

async def main(folder, hive):
    driver = HelpedDriver(Helper(folder / "helper.sock", hive, hive / "runtime"), "nspawn",
        ProcessDriver(hive, sandbox="", claude=None, orphan_grace_s=600))
    iris, dirs = AgentName("iris"), agent_dirs(hive, hive / "runtime", AgentName("iris"))
    running = await driver.start(iris, dirs)
    while not (dirs.state / "made").exists():
        await trio.sleep(0.01)
    done = await driver.exec(iris, dirs, ["sh", "-c", "id -u; echo of-a-command > /state/command; exit 3"])
    found = await driver.find(iris, dirs)
    print(os.getuid(), done.code, done.output.strip(), found.pid == running.pid)
    try:
        os.kill(running.pid, 0)
        print("may signal it")
    except PermissionError:
        print("may not signal it")
    (dirs.state / "go").write_text("go")
    print((await running.wait()).code, (await driver.logs(iris))[-1], (dirs.state / "made").read_text().strip())
    running = await driver.start(iris, dirs)
    running.kill()
    print((await running.wait()).code != 0, (await driver.usage(iris)).processes)
    await driver.forget(iris)
    await driver.destroy(iris)

async def nothing():
    await trio.to_thread.run_sync(int)

trio.run(nothing)
os.setgroups([])
os.setresgid(4343, 4343, 4343)
os.setresuid(4242, 4242, 4242)
trio.run(main, Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.parametrize("sandbox", ["nspawn", "bwrap"])
def test_a_daemon_without_rights_starts_watches_and_ends_an_agent_whose_files_are_its_own(
    tmp_path: Path, owned: Path, sandbox: str
) -> None:
    if sandbox == "bwrap" and not readable_by_all(Path(sys.base_prefix)):
        pytest.skip("the interpreter stands where nobody but its user can read: bwrap, as another user, cannot bind it")
    script = "echo begun; echo mine > /state/made; while [ ! -e /state/go ]; do sleep 0.05; done; rm /state/go; exit 7"
    serve(tmp_path, owned, script, sandbox)
    with looked_after(tmp_path):
        done = subprocess.run(
            [sys.executable, "-c", DAEMON, str(tmp_path), str(owned)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=PATIENCE_S * 2,
        )
    assert done.returncode == 0, done.stderr + (tmp_path / "helper.log").read_text()
    assert done.stdout.splitlines() == [f"{OWNER} 3 0 True", "may not signal it", "7 begun mine", "True 0"]
    made = [owned / "agents" / "iris" / "state" / name for name in ("made", "command")]
    assert [(path.stat().st_uid, path.stat().st_gid) for path in made] == [
        (OWNER, GROUP if sandbox == "nspawn" else OWNER)
    ] * 2
    assert pids_naming(str(owned)) == []


def readable_by_all(path: Path) -> bool:
    return all(each.stat().st_mode & stat.S_IXOTH for each in (path, *path.parents))


def test_only_the_daemons_user_and_root_are_answered(tmp_path: Path, owned: Path) -> None:
    serve(tmp_path, owned, "true")
    path = tmp_path / "helper.sock"
    assert (path.stat().st_uid, stat.S_IMODE(path.stat().st_mode)) == (OWNER, 0o600)
    path.chmod(0o666)  # as if somebody had let others in

    def answer_to(uid: int) -> str:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.setresuid(uid, uid, uid)
                os.write(writer, json.dumps(ask(tmp_path, {"verb": "list"})).encode())
            finally:
                os._exit(0)
        os.close(writer)
        with open(reader) as told:
            said = told.read()
        os.waitpid(pid, 0)
        return said

    assert json.loads(answer_to(OWNER)) == {"agents": {}}
    assert error(json.loads(answer_to(OWNER + 1))) == (
        f"cannot ask the helper: it answers uid {OWNER} and root, not {OWNER + 1}"
    )


# -- hostile requests -------------------------------------------------------------------------------------------------


def test_whatever_is_asked_ends_in_one_sentence_and_starts_nothing(tmp_path: Path, owned: Path) -> None:
    serve(tmp_path, owned, "touch /state/ran")
    chance = random.Random(5)
    verbs = ["start", "exec", "kill", "destroy", "logs", "mount", "", None, 3, [], {}, "hello", "__init__", "serve"]
    names = [
        "../iris",
        "/etc",
        "iris/../..",
        ".",
        "",
        "a" * 31,
        "IRIS",
        "iris\n",
        "iris\0",
        None,
        7,
        ["iris"],
        "operator",
    ]
    extras: list[dict[str, Any]] = [{}, {"argv": ["id"]}, {"path": "/etc"}, {"base": 0}, {"lines": -1}, {"limit": "x"}]
    for verb in verbs:
        for name in names:
            request = {"verb": verb, "name": name, **chance.choice(extras)}
            assert error(ask(tmp_path, request)).startswith("cannot "), request
    for extra in ({"argv": ["id"]}, {"command": ["id"]}, {"dirs": {}}, {"uid": 0}, {"state_dir": "/etc"}):
        assert "it has no argument" in error(ask(tmp_path, {"verb": "start", "name": "iris", **extra}))
    for network in ("Host", "", None, 1, True, ["host"], {"host": 1}):
        assert "out of bounds" in error(ask(tmp_path, {"verb": "start", "name": "iris", "network": network}))
    for measure in (0, -1, 10**9, True, 1.5, "9", None, [], {}):
        assert "out of bounds" in error(ask(tmp_path, {"verb": "logs", "name": "iris", "lines": measure}))
    for command in ("id", [], [1], ["a\0b"], ["\ud800"], ["x"] * 65, ["x" * 40_000], None):
        assert "out of bounds" in error(ask(tmp_path, {"verb": "exec", "name": "iris", "command": command}))
    lines = [b"", b"\n", b"[]\n", b"{", b"\xff\xfe\n", b'"x"\n', b"[" * 50_000 + b"\n", b"{}\n", b"nul\0l\n"]
    lines += [bytes(chance.randrange(256) for _ in range(chance.randrange(200))) + b"\n" for _ in range(100)]
    lines.append(b'{"verb": "' + b"x" * REQUEST_LIMIT_BYTES + b'"}\n')
    for line in [line for line in lines if line.endswith(b"\n") and line.strip()]:
        assert error(send(tmp_path, line)).startswith("cannot "), line[:80]
    assert ask(tmp_path, {"verb": "list"}) == {"agents": {}}
    assert not (owned / "agents" / "iris" / "state" / "ran").exists()
    assert not (tmp_path / "processes").exists()


def answered(folder: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError):
        return ask(folder, {"verb": "list"})
    return None


def test_only_whom_its_own_configuration_lists_gets_the_hosts_network(tmp_path: Path, owned: Path) -> None:
    serve(tmp_path, owned, "sleep 600")
    said = error(ask(tmp_path, {"verb": "start", "name": "argus", "network": "host"}))
    assert said == (
        "cannot start argus in the host's network: the helper's own configuration does not list it; "
        'add "argus" to host_network there, and start the helper again'
    )
    assert ask(tmp_path, {"verb": "list"})["agents"] == {}
    with looked_after(tmp_path):
        assert ask(tmp_path, {"verb": "start", "name": "iris", "network": "host"})["pid"]


def test_who_says_nothing_and_who_comes_with_many_holds_up_nobody(tmp_path: Path, owned: Path) -> None:
    serve(tmp_path, owned, "true")
    socks: list[socket.socket] = []
    with contextlib.ExitStack() as opened:
        for number in range(200):
            sock = opened.enter_context(socket.socket(socket.AF_UNIX))
            socks.append(sock)
            sock.connect(str(tmp_path / "helper.sock"))
            if number < 100:
                with contextlib.suppress(OSError):
                    sock.send(b'{"verb": ')
        assert sock.recv(1000) == b"", "it is one too many"
        # The first are told, and hung up on; then there is room again.
        socks[0].settimeout(PATIENCE_S)
        assert error(json.loads(socks[0].recv(1000))).startswith("cannot read the request: no whole line came within")
        assert look_until(lambda: answered(tmp_path)) == {"agents": {}}


# -- hostile directories ----------------------------------------------------------------------------------------------


def test_what_is_planted_where_a_directory_belongs_is_refused_with_its_path(tmp_path: Path, owned: Path) -> None:
    serve(tmp_path, owned, "true")
    state = owned / "agents" / "iris" / "state"
    secret = tmp_path / "secret"
    secret.mkdir(mode=0o755)
    state.rmdir()
    plants = {
        "a link": lambda: state.symlink_to(secret),
        "a link of its own": lambda: state.symlink_to(owned / "agents" / "iris" / "claude"),
        "a pipe": lambda: os.mkfifo(state),
        "a device": lambda: os.mknod(state, stat.S_IFCHR | 0o666, os.makedev(1, 3)),
        "a file": state.touch,
        "nothing": lambda: None,
    }
    for what, plant in plants.items():
        plant()
        said = error(ask(tmp_path, {"verb": "start", "name": "iris"}))
        assert said.startswith(f"cannot use {state}: state is not a directory there"), what
        state.unlink(missing_ok=True)
    state.mkdir()  # root's
    assert "it belongs to uid 0, and has to belong to uid 4242" in error(
        ask(tmp_path, {"verb": "start", "name": "iris"})
    )
    state.rmdir()
    whole = owned / "agents"
    whole.rename(owned / "elsewhere")
    whole.symlink_to(owned / "elsewhere")
    said = error(ask(tmp_path, {"verb": "start", "name": "iris"}))
    assert said.startswith(f"cannot use {state}: agents is not a directory there")
    assert not (tmp_path / "processes" / "iris.json").exists()


def test_a_directory_that_is_swapped_for_a_link_at_any_moment_never_leads_an_agent_elsewhere(
    tmp_path: Path, owned: Path
) -> None:
    """Root's own directory is what is to be reached; somebody swaps all the time while agents are started."""
    serve(tmp_path, owned, "ls -a /state; touch /state/reached")
    secret = tmp_path / "secret"
    secret.mkdir(mode=0o777)
    (secret / "canary").touch()
    started = refused = 0
    with swapping(owned / "agents" / "iris" / "state", secret), looked_after(tmp_path):
        while started < 8 or refused < 8:
            answer = ask(tmp_path, {"verb": "start", "name": "iris"})
            if "pid" in answer:
                started += 1
                assert ask(tmp_path, {"verb": "exit", "name": "iris"}) == {"code": 0}
                ask(tmp_path, {"verb": "forget", "name": "iris"})
            else:
                refused += 1
                assert "is not a directory there" in error(answer)
    assert sorted(os.listdir(secret)) == ["canary"]
    assert "canary" not in str(ask(tmp_path, {"verb": "logs", "name": "iris", "lines": 500}))


def test_a_descriptor_of_a_directory_stays_what_it_is_when_its_path_leads_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    descriptor = open_folder(tmp_path / "state", os.getuid())
    try:
        (tmp_path / "state").rename(tmp_path / "moved")
        (tmp_path / "state").symlink_to("/etc")
        assert os.path.samefile(f"/proc/self/fd/{descriptor}", tmp_path / "moved")
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("sandbox", ["nspawn", "bwrap"])
def test_a_disk_that_hangs_holds_up_nobody_but_the_agent_whose_it_is(tmp_path: Path, owned: Path, sandbox: str) -> None:
    if sandbox == "bwrap" and not readable_by_all(Path(sys.base_prefix)):
        pytest.skip("the interpreter stands where nobody but its user can read: bwrap, as another user, cannot bind it")
    agent_dirs(owned, owned / "runtime", AgentName("argus")).make()
    for path in (*(owned / "agents").rglob("*"), *(owned / "runtime").rglob("*")):
        os.chown(path, OWNER, GROUP, follow_symlinks=False)
    serve(tmp_path, owned, "exit 7", sandbox)
    hung, said = {"verb": "start", "name": "iris"}, []
    with hanging(owned / "agents" / "iris" / "state"):
        others = [threading.Thread(target=lambda: said.append(error(ask(tmp_path, hung)))) for _ in range(5)]
        for other in others:
            other.start()
        others_exit = [ask(tmp_path, {"verb": verb, "name": "argus"}) for verb in ("start", "exit", "forget")]
        assert others_exit[1] == {"code": 7}
        look_until(lambda: len(said) == 4)  # the first waits for the disk, and holds no more connections than its own
        assert ask(tmp_path, {"verb": "list"}) == {"agents": {}}
    for other in others:
        other.join(PATIENCE_S)
    why = "cannot see to iris: what was asked of it before has not been done for 10 s; look for a disk that hangs"
    assert said[:4] == [why] * 4
    assert said[4].startswith("cannot use")
    assert "pid" in ask(tmp_path, hung)
    ask(tmp_path, {"verb": "exit", "name": "iris"})


def test_nothing_that_is_mounted_for_an_agent_is_seen_by_the_host_or_stays(tmp_path: Path, owned: Path) -> None:
    serve(tmp_path, owned, "exit 0")
    before = mounts_below(tmp_path)
    assert "pid" in ask(tmp_path, {"verb": "start", "name": "iris"})
    assert mounts_below(tmp_path) == before
    assert ask(tmp_path, {"verb": "exit", "name": "iris"}) == {"code": 0}
    assert list((tmp_path / "stage").iterdir()) == []


def test_nobody_elses_process_is_taken_for_an_agent_whose_lock_it_was_handed(tmp_path: Path, owned: Path) -> None:
    """bubblewrap is run as the daemon's user, who may take the lock's descriptor from it and send it to others."""
    serve(tmp_path, owned, "true", "bwrap")
    (tmp_path / "processes").mkdir()
    status = tmp_path / "processes" / "iris.status"
    status.touch()
    with subprocess.Popen(["flock", str(status), "sleep", "1000"]) as stranger:
        try:
            look_until(lambda: is_locked(status) and children_of(stranger.pid))
            for verb in ("find", "kill", "stop", "find"):
                assert ask(tmp_path, {"verb": verb, "name": "iris"}) in ({}, {"pid": None})
            assert stranger.poll() is None
        finally:
            for pid in (*children_of(stranger.pid), stranger.pid):
                os.kill(pid, signal.SIGKILL)


async def test_nothing_of_the_daemons_user_has_a_descriptor_of_the_helpers_own_files(tmp_path: Path) -> None:
    """Who has the status file's is the agent: the daemon's user would hand it to somebody whom root is to kill."""
    ready = make_fifo(tmp_path, "ready")
    driver = helped_in(tmp_path, "helper-bwrap", "echo > /state/ready; sleep 1000")
    running = await driver.start(IRIS, agent_dirs(tmp_path, tmp_path / "runtime", IRIS))
    await read_fifo(ready)
    own = str(tmp_path / "processes")
    holders = [pid for pid in all_pids() if any(link.startswith(own) for link in links_of_descriptors(pid))]
    keepers = [pid for pid in holders if "printed.py" in Path(f"/proc/{pid}/cmdline").read_text()]
    wrapper = Path(f"/proc/{running.pid}/cmdline").read_text()
    running.kill()
    with trio.fail_after(PATIENCE_S):
        await running.wait()
        await driver.forget(IRIS)
    assert sorted(holders) == sorted([*keepers, running.pid])
    assert wrapper.startswith("/bin/sh")


def links_of_descriptors(pid: int) -> list[str]:
    with contextlib.suppress(OSError):
        return [os.readlink(f"/proc/{pid}/fd/{number}") for number in os.listdir(f"/proc/{pid}/fd")]
    return []


# -- helpers that die -------------------------------------------------------------------------------------------------


async def test_a_helper_that_is_killed_at_any_moment_of_a_start_leaves_one_agent_or_none(tmp_path: Path) -> None:
    ready = make_fifo(tmp_path, "ready")
    script = "echo > /state/ready; sleep 1000"
    driver = helped_in(tmp_path, "helper-nspawn", script)
    dirs = agent_dirs(tmp_path, tmp_path / "runtime", IRIS)
    dirs.make()
    begun = trio.current_time()
    running = await driver.start(IRIS, dirs)
    whole_s = trio.current_time() - begun
    await read_fifo(ready)
    running.kill()
    with trio.fail_after(PATIENCE_S):
        await running.wait()
        await driver.forget(IRIS)
    ran = left = step = 0
    while ran < 2 and step < 60:  # the first dies before it has done anything, the last ones with all done
        moment_s = whole_s * step / 8
        step += 1
        pid = int((tmp_path / "helper.pid").read_text())
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(tmp_path / "helper.sock"))
            if moment_s:
                sock.sendall(b'{"verb": "start", "name": "iris"}\n')
                await trio.sleep(moment_s)
            os.kill(pid, signal.SIGKILL)
        await wait_gone([pid])
        start_helper(tmp_path, "nspawn")
        with trio.fail_after(PATIENCE_S):
            if (running := await driver.find(IRIS, dirs)) is None:
                left += 1
                running = await driver.start(IRIS, dirs)
            else:
                ran += 1
                with pytest.raises(BlockingIOError, match="runs already"):
                    await driver.start(IRIS, dirs)
            await read_fifo(ready)
            assert len(pids_naming(f"--machine={host_name(IRIS, tmp_path)}")) <= 2, "the shell, and systemd-nspawn"
            running.kill()
            await running.wait()
            await driver.forget(IRIS)
        await wait_gone(pids_naming(host_name(IRIS, tmp_path)))
    assert ran
    assert left


async def test_agents_outlive_their_helper_and_their_end_is_seen_while_there_is_none(tmp_path: Path) -> None:
    ready, go = make_fifo(tmp_path, "ready"), make_fifo(tmp_path, "go")
    driver = helped_in(tmp_path, "helper-nspawn", "echo > /state/ready; read word < /state/go; exit 5")
    dirs = agent_dirs(tmp_path, tmp_path / "runtime", IRIS)
    running = await driver.start(IRIS, dirs)
    await read_fifo(ready)
    everything = mates(running)
    end_helper(tmp_path)
    with trio.fail_after(PATIENCE_S):
        with pytest.raises(Refusal, match=r"cannot reach the helper on .*helper.sock: .*; `systemctl start") as refusal:
            await driver.find(IRIS, dirs)
        assert refusal.value.code == "unavailable"
        await trio.to_thread.run_sync(go.write_text, "go\n", abandon_on_cancel=True)
        await wait_gone(everything)
        with pytest.raises(Refusal, match="cannot reach the helper"):
            await running.wait()  # it has ended, and how is the helper's to tell
        start_helper(tmp_path, "nspawn")
        assert await running.wait() == Exit(5)
        assert running.ended
        assert await driver.find(IRIS, dirs) is None


async def test_an_end_that_is_asked_for_while_the_helper_is_away_is_brought_about_by_the_next_one(
    tmp_path: Path,
) -> None:
    ready = make_fifo(tmp_path, "ready")
    driver = helped_in(tmp_path, "helper-nspawn", "echo > /state/ready; sleep 1000")
    dirs = agent_dirs(tmp_path, tmp_path / "runtime", IRIS)
    running = await driver.start(IRIS, dirs)
    await read_fifo(ready)
    everything = mates(running)
    end_helper(tmp_path)
    with trio.fail_after(PATIENCE_S):
        running.kill()
        with pytest.raises(Refusal, match="cannot reach the helper"):
            await running.wait()
        start_helper(tmp_path, "nspawn")
        await running.wait()
        await wait_gone(everything)
        await driver.forget(IRIS)


async def test_a_helper_of_another_hive_is_not_asked_for_anything(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    start_helper(tmp_path, "nspawn", state_dir=other)
    driver = Helped(tmp_path, "nspawn")
    with pytest.raises(Refusal, match=f"its state_dir is {other}, and the daemon's {tmp_path}; give both the same"):
        await driver.find(IRIS, agent_dirs(tmp_path, tmp_path / "runtime", IRIS))
    otherwise = Helper(tmp_path / "helper.sock", other, other / "runtime", "nixos-container")
    with pytest.raises(Refusal, match="its sandbox is nspawn, and the daemon's nixos-container; give both the same"):
        await otherwise.ask("current", IRIS)


@pytest.mark.parametrize("answer", [{}, {"lines": 5, "processes": "x", "code": []}, {"code": 0, "missed": "yes"}])
async def test_a_helper_that_answers_otherwise_than_it_should_is_refused_in_one_sentence(
    tmp_path: Path, answer: dict[str, Any]
) -> None:
    driver = Helped(tmp_path, "nspawn")
    hello = {"state_dir": str(tmp_path), "runtime_dir": str(tmp_path / "runtime")}
    dirs = agent_dirs(tmp_path, tmp_path / "runtime", IRIS)

    async def answer_one(stream: Connection) -> None:
        request = await Lines(stream).next()
        assert isinstance(request, dict)
        await stream.send_all(encode(hello if request["verb"] == "hello" else answer))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_unix, listen_unix(tmp_path / "helper.sock"), answer_one)
        for call in (
            driver.usage(IRIS),
            driver.logs(IRIS),
            driver.exec(IRIS, dirs, ["true"]),
            driver.start(IRIS, dirs),
        ):
            with pytest.raises((Refusal, OSError), match=r"cannot use the helper's answer|gave no descriptor"):
                await call
        nursery.cancel_scope.cancel()


# -- what it believes -------------------------------------------------------------------------------------------------


def config_in(folder: Path, **settings: str) -> Path:
    folder.mkdir(exist_ok=True)
    values = {
        "helper": f"{folder}/helper.sock",
        "helper_state_dir": f"{folder}/own",
        "runtime_dir": "/run/h",
        "helper_user": "0",
        **settings,
    }
    path = folder / "config.toml"
    path.write_text("".join(f'{key} = "{value}"\n' for key, value in values.items()))
    return path


def test_a_configuration_is_believed_only_when_root_alone_can_change_it(tmp_path: Path) -> None:
    path = config_in(tmp_path / "etc")
    assert read_own_config(path).helper_state_dir == tmp_path / "etc" / "own"
    path.chmod(0o664)
    with pytest.raises(Refusal, match=f"{path} can be changed by others than root"):
        read_own_config(path)
    path.chmod(0o600)
    os.chown(path, OWNER, 0)
    with pytest.raises(Refusal, match="can be changed by others than root"):
        read_own_config(path)
    os.chown(path, 0, 0)
    os.chown(path.parent, OWNER, 0)
    with pytest.raises(Refusal, match=f"cannot use {path} as --config: {path.parent} can be changed"):
        read_own_config(path)
    os.chown(path.parent, 0, 0)
    # A link that root made into what is another's.
    (tmp_path / "theirs").mkdir()
    path.rename(tmp_path / "theirs" / "config.toml")
    os.chown(tmp_path / "theirs", OWNER, 0)
    path.symlink_to("../theirs/config.toml")
    with pytest.raises(Refusal, match=f"cannot use {path} as --config: {tmp_path}/theirs can be changed"):
        read_own_config(path)


def test_directories_and_programs_of_the_helper_must_be_roots(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    os.chown(theirs, OWNER, 0)
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(Refusal, match=r"others than root may enter it \(its mode has 055 for them\); `chmod 700"):
        read_own_config(config_in(tmp_path / "etc", helper_state_dir=str(tmp_path / "open")))
    for setting, value in (
        ("helper_state_dir", theirs / "own"),
        ("helper", theirs / "helper.sock"),
        ("nspawn_root", theirs),
    ):
        with pytest.raises(Refusal, match=f"{theirs} can be changed by others than root"):
            read_own_config(config_in(tmp_path / "etc", **{setting: str(value)}))
    claude = theirs / "claude"
    claude.touch(mode=0o755)
    path = config_in(tmp_path / "etc", claude=str(claude), state_dir=str(tmp_path))
    command = [sys.executable, "-m", "hive_core.helper", "serve", "--config", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 4
    assert f"hive-root: cannot use {claude} as claude: {theirs} can be changed by others than root" in done.stderr


@pytest.mark.parametrize("part", ["__init__.py", "", "__pycache__"])
def test_a_module_that_somebody_else_could_change_is_no_part_of_the_helper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    theirs = tmp_path / "packages" / "planted" / part
    (tmp_path / "packages" / "planted").mkdir(parents=True)
    (tmp_path / "packages" / "planted" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    __import__("planted")
    try:
        path = config_in(tmp_path / "etc")
        read_own_config(path)
        os.chown(theirs, OWNER, 0)
        with pytest.raises(Refusal, match=f"as a part of the helper: {theirs} can be changed by others than root"):
            read_own_config(path)
    finally:
        del sys.modules["planted"]


def test_where_somebody_else_could_add_a_module_none_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    read_own_config(config_in(tmp_path / "etc"))
    folder.chmod(0o1777)  # what is there is its owner's alone to change, as in /tmp; what is not there is anybody's
    with pytest.raises(Refusal, match=f"as a part of the helper: {folder} can be changed by others than root"):
        read_own_config(config_in(tmp_path / "etc"))


def test_the_helper_loads_nothing_of_repositories_containers_of_nixos_and_pages() -> None:
    """Who audits it reads what it loads."""
    look = "import sys, hive_core.helper.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", look], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert "hive_core.helper.desk" in loaded
    assert {"git", "jinja2", "starlette", "hive_core.git.repos", "hive_core.containers.nixos_conf"} & {*loaded} == set()


def test_a_helper_without_a_socket_to_serve_or_a_user_says_so(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("")
    with pytest.raises(Refusal, match=f"{path} sets no `helper`; set it to the path"):
        read_own_config(path)
    command = [sys.executable, "-m", "hive_core.helper", "serve", "--config"]
    path = config_in(tmp_path / "etc", helper_user="nobody-of-that-name", state_dir=str(tmp_path))
    done = subprocess.run([*command, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert "hive-root: cannot serve nobody-of-that-name: there is no such user" in done.stderr


def test_uids_of_an_agent_are_its_own_until_it_is_destroyed(tmp_path: Path, owned: Path) -> None:
    serve(tmp_path, owned, "cat /proc/self/uid_map")

    def uids() -> str:
        assert "pid" in ask(tmp_path, {"verb": "start", "name": "iris"})
        assert ask(tmp_path, {"verb": "exit", "name": "iris"}) == {"code": 0}
        ask(tmp_path, {"verb": "forget", "name": "iris"})
        return str(ask(tmp_path, {"verb": "logs", "name": "iris", "lines": 1})["lines"][0].split())

    first = uids()
    held = json.loads((tmp_path / "uid_ranges.json").read_text())
    assert first == str(["0", str(held["iris"]), "65536"])
    assert uids() == first
    assert ask(tmp_path, {"verb": "destroy", "name": "iris"}) == {}
    assert json.loads((tmp_path / "uid_ranges.json").read_text()) == {}
    assert list((tmp_path / "processes").iterdir()) == []
    assert AgentName("iris") == IRIS
