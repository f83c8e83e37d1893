"""What every driver does alike, each with its real containers; in the place of a harness it runs a shell."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from hive_core.containers.bounds import Bounds
from hive_core.containers.former import FormerContainers
from hive_core.containers.host_process import LINES_MOST, HostProcessDriver
from hive_core.containers.inside import HOME
from hive_core.containers.mounts import agent_dirs
from hive_core.containers.nspawn import HOST_UIDS
from hive_core.containers.printed import LOG_LIMIT_BYTES
from hive_core.containers.process_tree import all_pids, parent_of
from hive_core.containers.run_command import OUTPUT_LIMIT_BYTES
from hive_core.containers.running import Done, Exit, Usage
from hive_core.kept import Keeper
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName
from tests.containers.drivers import (
    IRIS,
    KINDS,
    PATIENCE_S,
    SANDBOXES,
    STAND_IN,
    UNITS,
    beside,
    dirs_in,
    driver_in,
    first_inside,
    inside,
    make_fifo,
    mates,
    need,
    read_fifo,
    run,
    say_go,
    start_and_die,
    started,
    wait_gone,
)
from tests.containers.helped import HELPER_KINDS
from tests.containers.standin.host import StandInHost, host_of
from tests.needs import ROOT
from tests.processes import pids_naming
from tests.starters import run_forked

# What is asked of a driver that starts processes of its own: units are systemd's, whose files and locks are its own.
of_processes = pytest.mark.parametrize("sandbox", [kind for kind in SANDBOXES if kind not in UNITS], indirect=True)
# A helper has no pipe of the daemon's, and the directories of agents from its own configuration.
of_own_processes = pytest.mark.parametrize(
    "sandbox", [kind for kind in SANDBOXES if kind not in (*UNITS, *HELPER_KINDS)], indirect=True
)
of_processes_or_bare = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in UNITS], indirect=True)


@pytest.fixture(params=SANDBOXES)
def sandbox(request: pytest.FixtureRequest) -> str:
    """Each driver that puts an agent into a container."""
    return need(request.param)


# -- what an agent sees -----------------------------------------------------------------------------------------------


async def test_an_agent_writes_its_own_directories_and_finds_what_it_wrote(tmp_path: Path, sandbox: str) -> None:
    code, said = await run(tmp_path, sandbox, "pwd; touch /state/b ~/.claude/c ~/d /tmp/e && echo $HOME")
    assert (code, said.split()) == (0, ["/state", "/root"])
    dirs = dirs_in(tmp_path)
    assert [(dirs.state / "b").exists(), (dirs.claude / "c").exists()] == [True] * 2
    assert not Path("~/d").expanduser().exists()
    code, said = await run(tmp_path, sandbox, "ls /state ~/.claude ~ /tmp")
    assert code == 0
    assert {"b", "c"} <= set(said.split())
    assert not {"d", "e"} & set(said.split())


async def test_an_agent_sees_nothing_else_of_the_state_directory(tmp_path: Path, sandbox: str) -> None:
    for secret in (
        "hive.sqlite",
        "credentials/anthropic-api-key",
        "applied/iris.git/HEAD",
        "agents/damocles/state/note",
    ):
        (tmp_path / secret).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / secret).write_text("canary")
    look = f"ls {tmp_path} /agents /home/* /var/* /etc/passwd /etc/shadow $HOME/.ssh; cat {tmp_path}/* {tmp_path}/*/*"
    code, said = await run(tmp_path, sandbox, look)
    assert code != 0
    assert "canary" not in said
    # It has a /var, and but for a stand-in of a NixOS container an /etc/passwd, which is not the host's.
    assert said.count("No such file") == len(look.replace(";", "").split()) - 3 - (sandbox not in UNITS)


async def test_the_manager_alone_sees_the_configurations(tmp_path: Path, sandbox: str) -> None:
    dirs_in(tmp_path)
    (tmp_path / "proposed" / "iris").mkdir()
    assert await run(tmp_path, sandbox, "ls /agents && touch /agents/iris/written", manager=True) == (0, "iris")
    assert (tmp_path / "proposed" / "iris" / "written").exists()


async def test_the_system_can_be_used_and_not_changed(tmp_path: Path, sandbox: str) -> None:
    places = ["/usr/canary", "/bin/canary", f"{sys.prefix}/canary", f"{ROOT}/hive_core/canary"]
    script = f"for f in {' '.join(places)}; do touch $f 2>/dev/null && echo wrote $f; done"
    # Where the program looks for settings that stand above all others.
    script += "; mkdir /etc/claude-code && echo wrote settings"
    # What holds the places where programs are mounted.
    holders = ["/etc", "/bin", "/run", HOME, "/var", f"/{ROOT.parts[1]}"]
    script += "".join(f"; mv {place} {place}.was && echo wrote another {place}" for place in holders)
    script += "; mount -o remount,rw /usr; echo end"
    _, said = await run(tmp_path, sandbox, script)
    assert "wrote" not in said
    assert said.endswith("end")
    assert not any(Path(place).exists() for place in places)


@of_processes
async def test_ssh_runs_in_there_and_so_does_what_wants_a_place_for_temporary_files(
    tmp_path: Path, sandbox: str
) -> None:
    script = "mktemp -p /var/tmp >/dev/null && ssh -T -o ProxyCommand=false -o BatchMode=yes git.example 2>&1"
    code, said = await run(tmp_path, sandbox, script)
    assert (code, "UNKNOWN port" in said) == (255, True), "it came as far as to ask for a connection"


async def test_the_directory_of_its_program_is_read_only_but_for_what_the_program_writes(
    tmp_path: Path, sandbox: str
) -> None:
    script = "cd /extras/config; cat .config.json; echo; readlink projects; readlink plugins/data; readlink session-env"
    script += "; for f in .config.json projects; do rm $f 2>/dev/null || echo no; done; touch x 2>/dev/null || echo no"
    script += "; mkdir -p ~/.claude/projects && touch projects/a && ls ~/.claude/projects"
    code, said = await run(tmp_path, sandbox, script)
    assert code == 0, said
    known, *lines = said.splitlines()
    assert json.loads(known)["userID"]
    assert lines == [
        *(f"{HOME}/.claude/projects", f"{HOME}/.claude/plugins/data", f"{HOME}/.cache/claude/session-env"),
        *("no", "no", "no", "a"),
    ]


async def test_our_own_program_can_be_run(tmp_path: Path, sandbox: str) -> None:
    code, said = await run(
        tmp_path, sandbox, f"{sys.executable} -P -c 'import hive_core.protocol.lines, hive_agent; print(\"ran\")'"
    )
    assert (code, said) == (0, "ran")


async def test_an_agent_has_no_network_but_its_own_loopback(tmp_path: Path, sandbox: str) -> None:
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
            tmp_path, sandbox, f"cut -d: -f1 /proc/net/dev | tail -n +3; {sys.executable} /run/hive/program.py"
        )
    assert code == 0
    assert said.split() == ["lo", "111", "111", "101", "own"]


async def test_an_agent_that_has_the_hosts_network_reaches_what_the_host_does(tmp_path: Path, sandbox: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(f"\0{tmp_path}")
        abstract.listen()
        port = server.getsockname()[1]
        name = "127.0.0.1" if sandbox in UNITS else "localhost"  # there /etc/hosts is the system's own
        program = (
            "import socket\n"
            f"for family, address in ((socket.AF_INET, ('127.0.0.1', {port})), (socket.AF_INET, ('{name}', {port})),\n"
            f"                         (socket.AF_UNIX, '\\0{tmp_path}')):\n"
            "    try: socket.socket(family).connect(address); print('reached')\n"
            "    except OSError as exc: print(exc)\n"
            "for family, protocol in ((socket.AF_INET, socket.IPPROTO_ICMP), (socket.AF_PACKET, 0)):\n"
            "    try: socket.socket(family, socket.SOCK_RAW, protocol); print('made')\n"
            "    except OSError as exc: print(exc.errno)\n"
            "print(*sorted(name for _, name in socket.if_nameindex()))\n"
        )
        (dirs_in(tmp_path).run / "program.py").write_text(program)
        script = f"{sys.executable} /run/hive/program.py; cat /etc/resolv.conf; grep Cap /proc/self/status"
        code, said = await run(tmp_path, sandbox, script, network="host")
    assert code == 0
    lines = said.splitlines()
    assert lines[:5] == ["reached", "reached", "reached", "1", "97"]  # no right to the one, no such family
    assert lines[5].split() == sorted(name for _, name in socket.if_nameindex())
    assert "\n".join(lines[6:-5]).strip() == Path("/etc/resolv.conf").read_text().strip()
    assert {line.split()[1] for line in lines[-5:]} == {"0" * 16}


async def test_a_container_with_another_network_is_of_another_generation(tmp_path: Path, sandbox: str) -> None:
    driver = driver_in(tmp_path, sandbox, "")
    shapes = [await driver.generation(IRIS, dirs_in(tmp_path, network=network)) for network in ("private", "host")]
    assert shapes[0] != shapes[1]


async def test_an_agent_sees_no_process_of_the_host_and_has_no_capability(tmp_path: Path, sandbox: str) -> None:
    _, said = await run(tmp_path, sandbox, "cat /proc/[0-9]*/comm; grep -h Cap /proc/self/status; hostname; id -u")
    names, _, rest = said.partition("CapInh")
    assert set(names.split()) <= {"bwrap", "sh", "cat", *(["init"] if sandbox in UNITS else [])}
    assert rest.count("0000000000000000") == 5
    assert rest.split()[-2:] == ["h-iris" if sandbox in UNITS else "hive", "0"]
    code, _ = await run(tmp_path, sandbox, f"kill -0 {os.getpid()}")
    assert code != 0


async def test_an_agent_is_handed_no_open_file_of_the_daemon(tmp_path: Path, sandbox: str) -> None:
    _, said = await run(tmp_path, sandbox, "ls /proc/self/fd; readlink /proc/self/fd/0")
    assert said.split() == ["0", "1", "2", "3", "/dev/null"]  # 3 is ls itself, reading the directory


async def test_an_agent_inherits_nothing_of_the_environment(
    tmp_path: Path, sandbox: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-canary")
    code, said = await run(tmp_path, sandbox, "env; cat /proc/1/environ")
    assert code == (1 if sandbox in UNITS else 0)  # there it is the system's, and nothing that an agent may read
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


@pytest.mark.parametrize("code", [0, 7])
async def test_an_exit_code_is_told(tmp_path: Path, kind: str, code: int) -> None:
    assert await run(tmp_path, kind, f"echo last words; exit {code}") == (code, "last words")


async def test_a_program_that_cannot_be_run_is_an_end_and_leaves_nothing(tmp_path: Path, sandbox: str) -> None:
    code, _ = await run(tmp_path, sandbox, "exec /nowhere/python")
    assert code not in (0, None)


async def test_kill_ends_every_process_of_the_agent(tmp_path: Path, sandbox: str) -> None:
    script = "setsid sleep 1000 & (trap '' TERM HUP; sleep 1000) & echo > STATE/ready; sleep 1000"
    async with started(tmp_path, sandbox, script) as (_, running):
        with trio.fail_after(PATIENCE_S):
            while len(found := mates(running)) < 4:
                await trio.lowlevel.checkpoint()
        running.kill()
        with trio.fail_after(PATIENCE_S):
            exit_ = await running.wait()
        await wait_gone(found)
        assert exit_.code != 0


async def test_kill_in_the_very_moment_of_the_start_leaves_nothing(tmp_path: Path, sandbox: str) -> None:
    driver = driver_in(tmp_path, sandbox, "sleep 1000")
    # A unit is up when its start is over, after many commands: it has fewer moments, and they are dear.
    for step in range(0, 25, 5 if sandbox in UNITS else 1):
        running = await driver.start(IRIS, dirs_in(tmp_path))
        with trio.move_on_after(step * 0.0002):
            await running.wait()
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


async def test_a_harness_that_is_asked_to_stop_ends_as_it_likes(tmp_path: Path, kind: str) -> None:
    script = "trap 'echo goes; exit 5' TERM; echo > STATE/ready; while :; do sleep 0.05; done"
    async with started(tmp_path, kind, script) as (driver, running):
        running.stop()
        with trio.fail_after(PATIENCE_S):
            assert await running.wait() == Exit(5)
        running.stop()  # once more, when it is gone, is nothing
        assert await driver.last_words(IRIS) == "goes"


async def test_a_process_is_looked_after_whatever_bytes_its_name_is_of(tmp_path: Path, kind: str) -> None:
    """A name is any bytes but a line feed. This one is no UTF-8, and to who takes more for a line's end it is two."""
    program = r'n="$(printf "\377\rNSpid: 1 1")"; cp "$(command -v sleep)" "STATE/$n"; "STATE/$n" 1000 &'
    async with started(tmp_path, kind, f"{program} echo > STATE/ready; wait") as (driver, running):
        everything = mates(running)
        assert (await driver.usage(IRIS)).processes == 2 + beside(kind)
        assert (await driver.exec(IRIS, dirs_in(tmp_path), ["/bin/sh", "-c", "exit 3"])).code == 3
        running.kill()
        with trio.fail_after(PATIENCE_S):
            await running.wait()
        await wait_gone(everything)


async def test_an_agent_that_is_killed_by_a_signal_has_crashed_and_can_be_started_again(
    tmp_path: Path, kind: str
) -> None:
    script = "echo > STATE/ready; exec sleep 1000" if kind == "none" else "sleep 1000 & echo > STATE/ready; wait"
    async with started(tmp_path, kind, script) as (driver, running):
        first, everything = first_inside(running), mates(running)
        assert first is not None
        os.kill(first, signal.SIGKILL)
        with trio.fail_after(PATIENCE_S):
            assert (await running.wait()).code not in (0, None)
        await wait_gone(everything)
        await driver.forget(IRIS)
    assert await run(tmp_path, kind, "echo again") == (0, "again")


async def test_an_agent_whose_wrapper_is_killed_ends_whole(tmp_path: Path, sandbox: str) -> None:
    async with started(tmp_path, sandbox, "setsid sleep 1000 & echo > STATE/ready; wait") as (_, running):
        everything = mates(running)
        os.kill(running.pid, signal.SIGKILL)
        with trio.fail_after(PATIENCE_S):
            await running.wait()
        await wait_gone(everything)
    assert await run(tmp_path, sandbox, "echo again") == (0, "again")


async def test_what_a_killed_wrapper_left_is_ended_by_the_next_daemon_or_adopted(tmp_path: Path, sandbox: str) -> None:
    ready = make_fifo(tmp_path, "ready")
    wrapper = start_and_die(tmp_path, sandbox, "sleep 1000 & echo > /state/ready; wait")
    await read_fifo(ready)
    driver, dirs = driver_in(tmp_path, sandbox, "echo again"), dirs_in(tmp_path)
    running = await driver.find(IRIS, dirs)
    assert running is not None
    everything = mates(running)
    assert len(everything) == 2 + beside(sandbox)
    os.kill(wrapper, signal.SIGKILL)
    await wait_gone([wrapper])
    if (found := await driver.find(IRIS, dirs)) is not None:
        found.kill()
        with trio.fail_after(PATIENCE_S):
            await found.wait()
    await wait_gone(everything)
    await driver.forget(IRIS)
    assert await run(tmp_path, sandbox, "echo again") == (0, "again")


# -- how an agent is looked into --------------------------------------------------------------------------------------


async def test_what_an_agent_takes_of_the_host_is_told(tmp_path: Path, kind: str) -> None:
    async with started(tmp_path, kind, "sleep 1000 & echo > STATE/ready; wait") as (driver, running):
        usage = await driver.usage(IRIS)
        assert usage.processes == 2 + beside(kind)
        assert 100_000 < usage.memory_bytes < 100_000_000
        running.kill()
        with trio.fail_after(PATIENCE_S):
            await running.wait()
        assert await driver.usage(IRIS) == Usage(0, 0)


async def test_the_last_lines_of_an_agent_are_told_in_their_order(tmp_path: Path, kind: str) -> None:
    # A unit may write so many lines into the journal, and no more.
    await run(tmp_path, kind, "seq 98001 99000" if kind in UNITS else "seq 1 99000")
    driver = driver_in(tmp_path, kind, "")
    assert await driver.logs(IRIS, 3) == ["98998", "98999", "99000"]
    assert len(await driver.logs(IRIS, 10**9)) == LINES_MOST
    assert await driver.logs(AgentName("argus")) == []


async def test_a_command_runs_beside_the_agent_and_tells_its_code_and_what_it_printed(
    tmp_path: Path, kind: str
) -> None:
    async with started(tmp_path, kind, "echo > STATE/ready; exec sleep 1000") as (driver, _running):
        script = "pwd; echo hi > note; echo $HOME; echo bad >&2; exit 3"
        done = await driver.exec(IRIS, dirs_in(tmp_path), ["/bin/sh", "-c", script])
        home = "/root" if kind != "none" else inside(tmp_path, kind)
        assert (done.code, done.output.split()) == (3, [inside(tmp_path, kind), home, "bad"])
        assert (dirs_in(tmp_path).state / "note").read_text() == "hi\n"


async def test_a_command_in_a_container_has_no_more_rights_than_the_agent(tmp_path: Path, sandbox: str) -> None:
    look = (
        "grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status; id -u; hostname; ls / /etc /run /state;"
        " for kind in user mnt pid ipc net uts; do readlink /proc/self/ns/$kind; done; env | sort; ls /proc/self/fd"
    )
    script = f"({look}) > /state/agent 2>&1; echo > STATE/ready; exec sleep 1000"
    async with started(tmp_path, sandbox, script) as (driver, _running):
        done = await driver.exec(IRIS, dirs_in(tmp_path), ["/bin/sh", "-c", f"({look}) > /state/command 2>&1"])
        assert done == Done(0, "")
    state = dirs_in(tmp_path).state
    said = (state / "agent").read_text().replace("agent\n", "")
    assert (state / "command").read_text().replace("agent\ncommand\n", "") == said
    assert said.count("0000000000000000") == 5


async def test_a_command_beside_an_agent_that_has_the_hosts_network_has_it_too(tmp_path: Path, sandbox: str) -> None:
    async with started(tmp_path, sandbox, "echo > STATE/ready; sleep 600", "host") as (driver, _):
        done = await driver.exec(IRIS, dirs_in(tmp_path), ["readlink", "/proc/self/ns/net", "/proc/self/ns/pid"])
    of_network, of_processes = done.output.split()
    assert (of_network, done.code) == (os.readlink("/proc/self/ns/net"), 0)
    assert of_processes != os.readlink("/proc/self/ns/pid")


async def test_an_agent_that_puts_its_own_program_in_the_interpreters_place_gets_no_rights_by_a_command(
    tmp_path: Path, sandbox: str
) -> None:
    """Whatever enters a container has all rights in there for a moment: it must run nothing of the container's."""
    folders = " ".join(str(folder) for folder in reversed(Path(sys.executable).parents[:-1]))
    plant = (
        f"for folder in {folders}; do mv $folder $folder-gone && break; done"
        f"; mkdir -p {os.path.dirname(sys.executable)}"
        f"; printf '#!/bin/sh\ngrep ^Cap /proc/self/status > /state/rights\n' > {sys.executable}"
        f"; chmod 755 {sys.executable}; echo > STATE/ready; exec sleep 1000"
    )
    async with started(tmp_path, sandbox, plant) as (driver, _running):
        done = await driver.exec(IRIS, dirs_in(tmp_path), ["/bin/sh", "-c", "grep ^Cap /proc/self/status"])
    planted = dirs_in(tmp_path).state / "rights"
    said = done.output + (planted.read_text() if planted.exists() else "")
    assert {line.split()[1] for line in said.splitlines()} == {"0" * 16}, said
    assert not planted.exists()


@pytest.mark.parametrize("kind", [kind for kind in SANDBOXES if kind not in UNITS], indirect=True)
@pytest.mark.skipif(not os.path.islink("/bin"), reason="the host has a /bin of its own, which no agent can replace")
async def test_whatever_enters_a_container_is_no_file_of_the_hosts_that_the_agent_gets_hold_of(
    tmp_path: Path, kind: str
) -> None:
    """What says #!/proc/self/exe is run by what runs it: under the host's own uids it could be written from inside."""
    look = "#!/proc/self/exe\nimport os\nprint(*os.stat('/proc/self/exe')[1:3])\n"
    dirs_in(tmp_path).make()
    (dirs_in(tmp_path).state / "look").write_text(look)
    plant = "chmod 755 /state/look; echo > STATE/ready; exec sleep 1000"
    async with started(tmp_path, kind, plant) as (driver, _running):
        done = await driver.exec(IRIS, dirs_in(tmp_path), ["/state/look"])
    assert done.code == 0, done.output
    programs = [os.stat(path) for path in ("/usr/bin/nsenter", os.path.realpath(sys.executable))]
    assert done.output.split() not in [[str(found.st_ino), str(found.st_dev)] for found in programs]


async def test_looking_for_an_agent_that_has_ended_ends_no_other_that_has_the_number_of_its_directory_by_now(
    tmp_path: Path, kind: str
) -> None:
    """A directory that is removed leaves its number to the next one; moved, it has it for certain."""
    if kind == "none":
        pytest.skip("nothing is looked for by its directory")
    assert (await run(tmp_path, kind, "exit 0"))[0] == 0
    argus = AgentName("argus")
    iris, theirs = dirs_in(tmp_path), dirs_in(tmp_path, name="argus")
    await driver_in(tmp_path, kind, "").forget(IRIS)
    theirs.make()
    theirs.state.rmdir()
    iris.state.rename(theirs.state)
    iris.make()
    ready = tmp_path / "agents" / "argus" / "state" / "ready"
    os.mkfifo(ready)
    driver = driver_in(tmp_path, kind, "echo > /state/ready; exec sleep 1000")
    running = await driver.start(argus, theirs)
    try:
        await read_fifo(ready)
        assert await driver.find(IRIS, iris) is None
        assert (await driver.usage(argus)).processes == 1 + beside(kind)
    finally:
        running.kill()
        with trio.CancelScope(shield=True), trio.move_on_after(PATIENCE_S):
            await running.wait()


async def test_a_command_that_does_not_end_is_killed_with_all_that_it_started(tmp_path: Path, kind: str) -> None:
    mark = f"7.0031{os.getpid()}"
    async with started(tmp_path, kind, "echo > STATE/ready; exec sleep 1000") as (driver, _running):
        with pytest.raises(Refusal, match=r"did not end within 0\.5 s"):
            await driver.exec(IRIS, dirs_in(tmp_path), ["/bin/sh", "-c", f"setsid sleep {mark} & sleep 1000"], 0.5)
        await wait_gone(pids_naming(f"sleep\0{mark}\0"))
        with trio.fail_after(PATIENCE_S):
            while (await driver.usage(IRIS)).processes > 1 + beside(kind):
                await trio.lowlevel.checkpoint()


async def test_a_command_that_floods_is_cut_and_one_for_an_agent_that_has_ended_is_refused(
    tmp_path: Path, kind: str
) -> None:
    async with started(tmp_path, kind, "echo > STATE/ready; exec sleep 1000") as (driver, running):
        done = await driver.exec(IRIS, dirs_in(tmp_path), ["/bin/sh", "-c", "yes floods | head -c 10000000"])
        assert (done.code, len(done.output)) == (0, OUTPUT_LIMIT_BYTES)
        running.kill()
        with trio.fail_after(PATIENCE_S):
            await running.wait()
        with pytest.raises(Refusal, match="does not run"):
            await driver.exec(IRIS, dirs_in(tmp_path), ["true"])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in HELPER_KINDS], indirect=True)
async def test_a_container_is_of_another_generation_when_it_would_be_bounded_or_made_otherwise(
    tmp_path: Path, kind: str
) -> None:
    class Bounded:
        bounds, kind = Bounds(2**30, 100, 100), "as the test has it"

        def sweep(self, keep: Collection[str]) -> None: ...

    driver, again, bounded = (driver_in(tmp_path, kind, "", cgroups=groups) for groups in (None, None, Bounded()))
    dirs = dirs_in(tmp_path)
    generation = await driver.generation(IRIS, dirs)
    assert generation
    assert await again.generation(IRIS, dirs) == generation
    assert await bounded.generation(IRIS, dirs) != generation
    again._claude = Path("/another/claude")
    assert await again.generation(IRIS, dirs) != generation


# -- what stays, and what does not ------------------------------------------------------------------------------------


async def test_nothing_but_its_own_directories_survives_an_agents_end(tmp_path: Path, sandbox: str) -> None:
    places = ["/etc/canary", "/tmp/canary", "/canary", "$HOME/.profile", "$HOME/canary", "/var/canary", "/run/canary"]
    script = f"for f in {' '.join(places)} /dev/shm/canary; do echo canary > $f; done 2>/dev/null; ls $HOME -A"
    _, said = await run(tmp_path, sandbox, f"{script}; echo kept > ~/.claude/canary")
    assert "canary" in said.split()
    _, said = await run(tmp_path, sandbox, f"cat {' '.join(places)} /dev/shm/canary; cat ~/.claude/canary")
    assert said.splitlines()[-1] == "kept"
    assert said.count("No such file") == len(places) + 1


async def test_what_an_agent_makes_belongs_to_the_daemons_user(tmp_path: Path, sandbox: str) -> None:
    assert (await run(tmp_path, sandbox, "mkdir /state/folder; echo > ~/.claude/file; stat -c %u /state/folder"))[
        0
    ] == 0
    dirs = dirs_in(tmp_path)
    assert {os.lstat(path).st_uid for path in (dirs.state / "folder", dirs.claude / "file")} == {os.getuid()}


async def test_a_name_has_up_to_thirty_characters(tmp_path: Path, kind: str) -> None:
    names = [AgentName("a" * 30), AgentName("a" * 29 + "b")]
    driver = driver_in(tmp_path, kind, "hostname; exit 4")
    running = [await driver.start(name, dirs_in(tmp_path, name=name)) for name in names]
    with trio.fail_after(PATIENCE_S):
        assert [await each.wait() for each in running] == [Exit(4), Exit(4)]


async def test_several_agents_run_side_by_side_and_each_ends_alone(tmp_path: Path, sandbox: str) -> None:
    driver, names = driver_in(tmp_path, sandbox, "exec sleep 1000"), [AgentName(f"agent-{n}") for n in range(4)]
    running = [await driver.start(name, dirs_in(tmp_path, name=name)) for name in names]
    running[0].kill()
    with trio.fail_after(PATIENCE_S):
        await running[0].wait()
    found = [await driver.find(name, dirs_in(tmp_path, name=name)) for name in names]
    assert [each is not None for each in found] == [False, True, True, True]
    for each in running[1:]:
        each.kill()
        with trio.fail_after(PATIENCE_S):
            await each.wait()


async def test_a_destroyed_agent_leaves_its_directories_and_nothing_else(tmp_path: Path, kind: str) -> None:
    await run(tmp_path, kind, f"echo kept > {inside(tmp_path, kind)}/note")
    driver = driver_in(tmp_path, kind, "")
    await driver.destroy(IRIS)
    await driver.destroy(IRIS)
    assert list((tmp_path / "processes").iterdir()) == []
    assert (dirs_in(tmp_path).state / "note").read_text() == "kept\n"
    assert await driver.find(IRIS, dirs_in(tmp_path)) is None
    assert await driver.missed_exit(IRIS) is None
    assert await driver.logs(IRIS) == []


async def test_whatever_an_agent_left_behind_is_kept_when_it_is_destroyed_and_removed_when_it_is_purged(
    tmp_path: Path, sandbox: str
) -> None:
    planted = (
        "cd /state; mkdir -p deep/er shut; echo kept > note; ln -s /etc link; ln note twin; mkfifo pipe; "
        "echo x > shut/file; chmod 0 shut/file shut deep; touch 'a\nb' ./-rf; head -c 2000000 /dev/zero > ~/.claude/big"
    )
    code, said = await run(tmp_path, sandbox, planted)
    assert code == 0, said
    await driver_in(tmp_path, sandbox, "").destroy(IRIS)
    dirs = dirs_in(tmp_path)
    (dirs.projects / "x").mkdir()
    (dirs.projects / "x" / "unpushed").write_text("kept")
    (dirs.mirrors / "x").mkdir()
    keeper = Keeper(tmp_path, lambda name: agent_dirs(tmp_path, tmp_path / "runtime", name).run)
    assert await keeper.put_away(IRIS, "iris@2026-01-01") > 2_000_000
    kept = tmp_path / "tombstones" / "iris@2026-01-01"
    assert (kept / "agent" / "state" / "note").read_text() == "kept\n"
    assert (kept / "agent" / "projects" / "x" / "unpushed").read_text() == "kept"
    assert not (kept / "agent" / "mirrors").exists(), "they are the hive's"
    assert not (tmp_path / "agents" / "iris").exists()
    await keeper.remove(kept.name, 1)
    assert list((tmp_path / "tombstones").iterdir()) == []


# -- daemons that die -------------------------------------------------------------------------------------------------


async def test_an_agent_outlives_its_daemon_and_the_next_one_adopts_it_and_reads_its_exit_code(
    tmp_path: Path, sandbox: str
) -> None:
    go = make_fifo(tmp_path, "go")
    pid = start_and_die(tmp_path, sandbox, "read word < /state/go; exit 7")
    driver = driver_in(tmp_path, sandbox, "")
    running = await driver.find(IRIS, dirs_in(tmp_path))
    assert running is not None
    assert running.pid == pid
    with trio.fail_after(PATIENCE_S):
        await say_go(go)
        assert await running.wait() == Exit(7)
    assert await driver.find(IRIS, dirs_in(tmp_path)) is None
    await driver.forget(IRIS)
    assert await driver.missed_exit(IRIS) is None


async def test_an_adopted_agent_can_be_killed_whole(tmp_path: Path, sandbox: str) -> None:
    ready = make_fifo(tmp_path, "ready")
    start_and_die(tmp_path, sandbox, "setsid sleep 1000 & echo > /state/ready; sleep 1000")
    await read_fifo(ready)
    running = await driver_in(tmp_path, sandbox, "").find(IRIS, dirs_in(tmp_path))
    assert running is not None
    found = mates(running)
    running.kill()
    with trio.fail_after(PATIENCE_S):
        await running.wait()
    await wait_gone(found)


async def test_an_exit_that_nobody_watched_is_told_once(tmp_path: Path, sandbox: str) -> None:
    go = make_fifo(tmp_path, "go")
    pid = start_and_die(tmp_path, sandbox, "read word < /state/go; exit 9")
    descriptor = os.pidfd_open(pid)
    with trio.fail_after(PATIENCE_S):
        await say_go(go)
        await trio.lowlevel.wait_readable(descriptor)
    os.close(descriptor)
    driver = driver_in(tmp_path, sandbox, "")
    with trio.fail_after(PATIENCE_S):
        # The process is gone before its unit, where it has one.
        while await driver.find(IRIS, dirs_in(tmp_path)) is not None:
            await trio.lowlevel.checkpoint()
    assert await driver.missed_exit(IRIS) == Exit(9)
    assert await driver.missed_exit(IRIS) is None


@of_own_processes
async def test_an_agent_that_watches_the_life_pipe_ends_with_its_daemon(tmp_path: Path, sandbox: str) -> None:
    pid = start_and_die(tmp_path, sandbox, "cat <&LIFE; exit 5", "life")
    await wait_gone([pid])
    assert await driver_in(tmp_path, sandbox, "").missed_exit(IRIS) == Exit(5)


# Kills its own process at the Nth step that shows from outside of the program, counted from the start of the agent.
STARTER_THAT_IS_KILLED = """
import os, signal, sys, trio
from pathlib import Path
from tests.containers.drivers import IRIS, dirs_in, driver_in

STEPS = ("open", "os.mkdir", "os.rename", "fcntl.flock", "subprocess.Popen")
folder, script, kind, left = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])

def count(event, arguments):
    global left
    if event in STEPS:
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

driver, dirs = driver_in(folder, kind, script), dirs_in(folder)
sys.addaudithook(count)
trio.run(driver.start, IRIS, dirs)
left = 1
print("started", flush=True)
"""


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind not in (HOST_UIDS, *UNITS, *HELPER_KINDS)], indirect=True
)
async def test_at_whatever_step_of_a_start_a_daemon_is_killed_the_next_one_finds_what_it_started(
    tmp_path: Path, kind: str
) -> None:
    ready = make_fifo(tmp_path, "ready")
    script = f"echo > {inside(tmp_path, kind)}/ready; sleep 1000"
    driver, dirs = driver_in(tmp_path, kind, script), dirs_in(tmp_path)
    never_started = not_remembered = step = 0
    while True:
        code, _ = run_forked(STARTER_THAT_IS_KILLED, str(tmp_path), script, kind, str(step))
        assert code in (0, -signal.SIGKILL)
        not_remembered += not (tmp_path / "processes" / "iris.json").exists()
        running = await driver.find(IRIS, dirs)
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
            await driver.forget(IRIS)
            await wait_gone(pids_naming(str(tmp_path)))
        if code == 0:
            break
        step += 1
        shutil.rmtree(dirs.extras / "config", ignore_errors=True)  # so that each start has the same steps
    # There are steps before the agent runs, and steps between that and its process file.
    assert 0 < never_started < not_remembered


async def test_an_agent_of_which_all_files_were_removed_is_ended_before_it_is_started_again(
    tmp_path: Path, sandbox: str
) -> None:
    ready = make_fifo(tmp_path, "ready")
    script = f"echo > {inside(tmp_path, sandbox)}/ready; sleep 1000"
    driver, dirs = driver_in(tmp_path, sandbox, script), dirs_in(tmp_path)
    old = await driver.start(IRIS, dirs)
    await read_fifo(ready)
    files = driver._files if isinstance(driver, HostProcessDriver) else None
    if files is None:
        pytest.skip("its files are the helper's, or systemd's")
    for file in files.glob("iris.*"):
        file.unlink()
    later = driver_in(tmp_path, sandbox, script)
    assert await later.find(IRIS, dirs) is None
    new = await later.start(IRIS, dirs)
    await read_fifo(ready)
    with trio.fail_after(PATIENCE_S):
        await old.wait()
    assert new.pid != old.pid
    new.kill()
    with trio.fail_after(PATIENCE_S):
        await new.wait()


@of_processes
async def test_whoever_only_reads_the_status_file_is_not_taken_for_the_agent(tmp_path: Path, sandbox: str) -> None:
    go = make_fifo(tmp_path, "go")
    pid = start_and_die(tmp_path, sandbox, "read word < /state/go")
    (tmp_path / "processes" / "iris.json").unlink()
    with (tmp_path / "processes" / "iris.status").open():
        driver, dirs = driver_in(tmp_path, sandbox, ""), dirs_in(tmp_path)
        running = await driver.find(IRIS, dirs)
        assert running is not None
        assert running.pid == pid
        with trio.fail_after(PATIENCE_S):
            await say_go(go)
            await running.wait()
        await driver.forget(IRIS)
        assert await driver.find(IRIS, dirs) is None


async def test_nothing_that_an_agent_does_inside_hides_it_from_the_next_daemon(tmp_path: Path, sandbox: str) -> None:
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
    pid = start_and_die(tmp_path, sandbox, f"exec {sys.executable} /run/hive/let_go.py")
    await read_fifo(ready)
    (tmp_path / "processes" / "iris.json").unlink()
    running = await driver_in(tmp_path, sandbox, "").find(IRIS, dirs)
    assert running is not None
    assert running.pid == pid
    running.kill()
    with trio.fail_after(PATIENCE_S):
        await running.wait()


@of_processes_or_bare
async def test_it_is_the_agent_that_is_found_by_its_lock_and_not_what_it_started(tmp_path: Path, kind: str) -> None:
    async with started(tmp_path, kind, "sleep 1000 & echo > STATE/ready; wait") as (driver, running):
        (tmp_path / "processes" / "iris.json").unlink()
        found = await driver.find(IRIS, dirs_in(tmp_path))
        assert found is not None
        assert found.pid == running.pid
        found.kill()
        with trio.fail_after(PATIENCE_S):
            await found.wait()
            await running.wait()


@of_processes
async def test_an_agent_whose_process_file_cannot_be_written_is_ended_again(tmp_path: Path, sandbox: str) -> None:
    (tmp_path / "processes" / ".iris.json").mkdir(parents=True)
    driver, dirs = driver_in(tmp_path, sandbox, "sleep 1000"), dirs_in(tmp_path)
    with pytest.raises(OSError, match="Is a directory"):
        await driver.start(IRIS, dirs)
    await wait_gone(pids_naming(str(tmp_path)))
    assert await driver.find(IRIS, dirs) is None


async def test_its_sockets_can_be_connected_to_and_not_replaced(tmp_path: Path, sandbox: str) -> None:
    code, said = await run(tmp_path, sandbox, "touch /run/hive/a || rm -r /run/hive")
    assert code != 0
    assert "Read-only file system" in said


async def test_no_setting_of_the_kernel_can_be_opened_for_writing(tmp_path: Path, sandbox: str) -> None:
    look = (
        "find /proc -maxdepth 4 -path '/proc/[0-9]*' -prune -o -path /proc/self -prune"
        " -o -path /proc/thread-self -prune -o -type f -print 2>/dev/null"
        " | while read f; do (: >> $f) 2>/dev/null && echo OPEN $f; done; echo looked"
    )
    code, said = await run(tmp_path, sandbox, look)
    assert code == 0
    assert said.split() == ["looked"]


async def test_when_the_harness_ends_the_kernel_ends_all_that_it_started(tmp_path: Path, sandbox: str) -> None:
    mark = f"7.{os.getpid()}"
    code, _ = await run(tmp_path, sandbox, f"setsid sleep {mark} & exit 3")
    assert (code, pids_naming(f"sleep\0{mark}\0")) == (3, [])


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
from tests.containers.drivers import IRIS, dirs_in, driver_in
from tests.containers.test_every_driver import READ_A_KEY, SYSCALLS

async def main(folder, script, kind, filtered):
    driver = driver_in(folder, kind, script)
    if not filtered:  # as on a processor that there is no filter for
        driver._filter = None
    await (await driver.start(IRIS, dirs_in(folder))).wait()

libc = ctypes.CDLL(None, use_errno=True)
if libc.syscall(SYSCALLS["keyctl"], 1, b"hive-test") < 0:
    sys.exit("no kernel keys")
assert libc.syscall(SYSCALLS["add_key"], b"user", b"hive-canary", b"canary", 6, -3) > 0
print(subprocess.check_output([sys.executable, "-c", READ_A_KEY], text=True).strip())
trio.run(main, Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4] == "filtered")
"""


@needs_a_known_processor
@pytest.mark.parametrize("filtered", ["filtered", "not filtered"])
async def test_an_agent_has_no_key_of_the_session_that_its_daemon_was_started_in(
    tmp_path: Path, kind: str, filtered: str
) -> None:
    run_dir = dirs_in(tmp_path).run
    (run_dir / "read.py").write_text(READ_A_KEY)
    script = f"{sys.executable} {inside(tmp_path, kind, 'run')}/read.py"
    starter = await trio.run_process(
        [sys.executable, "-c", STARTER_WITH_A_KEY, str(tmp_path), script, kind, filtered],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_stdout=True,
        capture_stderr=True,
        check=False,
    )
    if b"no kernel keys" in starter.stderr:
        pytest.skip("this machine has no kernel keys")
    assert starter.stdout.decode().strip() == "b'canary'", starter.stderr
    assert await driver_in(tmp_path, kind, "").last_words(IRIS) == "no key"


async def test_the_list_of_the_hosts_keys_cannot_be_read(tmp_path: Path, sandbox: str) -> None:
    _, said = await run(tmp_path, sandbox, "cat /proc/keys /proc/key-users; echo end")
    assert not any(line[:1].isdigit() for line in said.splitlines())
    assert said.endswith("end")


@needs_a_known_processor
async def test_calls_that_no_agent_needs_are_refused(tmp_path: Path, sandbox: str) -> None:
    program = (
        "import ctypes, errno\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        f"for name, number in {SYSCALLS}.items():\n"
        "    done = libc.syscall(number, 3, 0, 0, 0, 0)\n"
        "    print(name, done, errno.errorcode.get(ctypes.get_errno()))\n"
    )
    (dirs_in(tmp_path).run / "program.py").write_text(program)
    code, said = await run(tmp_path, sandbox, f"{sys.executable} /run/hive/program.py")
    assert code == 0, said
    foreign = {"x32_getpid"}
    assert said.splitlines() == [f"{name} -1 {'ENOSYS' if name in foreign else 'EPERM'}" for name in SYSCALLS]


@needs_a_known_processor
async def test_only_sockets_that_stay_in_the_sandbox_can_be_made(tmp_path: Path, sandbox: str) -> None:
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
    code, said = await run(tmp_path, sandbox, f"{sys.executable} /run/hive/program.py; grep Seccomp: /proc/self/status")
    assert code == 0, said
    made = [line for line in said.splitlines() if line.endswith(" made")]
    assert set(made) <= {"1 made", "2 made", "10 made", "16 made"}  # unix, inet, inet6, netlink
    assert {"1 made", "2 made", "16 made"} <= set(made)
    assert {"40 EAFNOSUPPORT", "38 EAFNOSUPPORT"} <= set(said.splitlines())
    assert said.splitlines()[-1].split() == ["Seccomp:", "2"]


async def test_what_an_agent_works_with_runs_under_the_filter(tmp_path: Path, sandbox: str) -> None:
    script = (
        "cd ~ && git init -q repo && cd repo && echo hi > file && git add file"
        " && git -c user.name=i -c user.email=i@i commit -q -m one && git log --format=%s && git gc -q"
        f" && {sys.executable} -c 'import subprocess, threading, multiprocessing, ssl, sqlite3, asyncio, socket;"
        ' subprocess.run(["true"], check=True); threading.Thread(target=print, args=("thread",)).start();'
        " asyncio.run(asyncio.sleep(0)); multiprocessing.Lock(); socket.if_nameindex();"
        ' socket.getaddrinfo("127.0.0.1", 80)\''
    )
    assert await run(tmp_path, sandbox, script) == (0, "one\nthread")


# -- what an agent prints ---------------------------------------------------------------------------------------------


@of_processes_or_bare
async def test_what_an_agent_prints_is_kept_from_its_end_and_takes_no_more_than_a_megabyte(
    tmp_path: Path, kind: str
) -> None:
    code, said = await run(tmp_path, kind, "yes floods | head -c 20000000; echo; echo the end")
    assert code == 0
    assert said.endswith("\nthe end")
    log = tmp_path / "processes" / "iris.log"
    assert 200_000 < log.stat().st_size <= LOG_LIMIT_BYTES
    await run(tmp_path, kind, "echo again")
    assert b"the end\nagain\n" in log.read_bytes()


async def test_what_an_agent_printed_cannot_be_opened_or_emptied_from_inside(tmp_path: Path, sandbox: str) -> None:
    script = (
        "echo first >&2; for f in /proc/1/fd/1 /proc/1/fd/2 /proc/self/fd/1; do"
        " (: > $f) 2>/dev/null && echo emptied; (: < $f) 2>/dev/null && echo opened; done;"
        f" {sys.executable} -c 'import os; os.ftruncate(2, 0)' 2>&1 | tail -n 1 | cut -c 1-7"
    )
    _, said = await run(tmp_path, sandbox, script)
    assert said.split() == ["first", "OSError"]


async def test_an_agent_whose_daemon_is_gone_goes_on_printing_and_the_next_daemon_reads_it(
    tmp_path: Path, sandbox: str
) -> None:
    go = make_fifo(tmp_path, "go")
    start_and_die(
        tmp_path,
        sandbox,
        "read word < /state/go; yes floods | head -c LONG; echo; echo the end; exit 4".replace(
            "LONG", "3000" if sandbox in UNITS else "3000000"
        ),
    )
    driver = driver_in(tmp_path, sandbox, "")
    running = await driver.find(IRIS, dirs_in(tmp_path))
    assert running is not None
    with trio.fail_after(PATIENCE_S):
        await say_go(go)
        assert await running.wait() == Exit(4)
    assert (await driver.last_words(IRIS)).endswith("\nthe end")


@of_processes
async def test_no_reader_of_what_an_agent_prints_is_left_behind(tmp_path: Path, sandbox: str) -> None:
    def own() -> set[int]:  # of whichever thread
        return {pid for pid in all_pids() if parent_of(pid) == os.getpid()}

    before = own()  # of which some may just end
    await run(tmp_path, sandbox, "echo hi")
    assert own() <= before


# -- another runtime directory ----------------------------------------------------------------------------------------


@of_own_processes
@pytest.mark.parametrize("remembered", [True, False])
async def test_an_agent_that_knows_another_runtime_directory_is_ended_and_can_be_started_again(
    tmp_path: Path, sandbox: str, caplog: pytest.LogCaptureFixture, remembered: bool
) -> None:
    ready = make_fifo(tmp_path, "ready")
    pid = start_and_die(tmp_path, sandbox, "echo > /state/ready; sleep 1000")
    await read_fifo(ready)
    if not remembered:
        (tmp_path / "processes" / "iris.json").unlink()
    dirs = dirs_in(tmp_path)
    moved = agent_dirs(tmp_path, tmp_path / "elsewhere", IRIS)
    moved.run.mkdir(parents=True)
    driver = driver_in(tmp_path, sandbox, "ls /run/hive")
    assert await driver.find(IRIS, moved) is None
    await wait_gone([pid])
    assert await driver.missed_exit(IRIS) is None, "it did not crash"
    assert str(dirs.run) in caplog.text
    assert str(moved.run) in caplog.text
    (moved.run / "sockets").touch()
    with trio.fail_after(PATIENCE_S):
        await (await driver.start(IRIS, moved)).wait()
    assert (await driver.last_words(IRIS)).endswith("sockets")


@pytest.mark.parametrize(
    ("before", "now"), [("bwrap", "nspawn"), ("nspawn", "bwrap"), ("bwrap", STAND_IN), (STAND_IN, "bwrap")]
)
async def test_an_agent_in_another_kind_of_container_than_is_set_is_ended_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, before: str, now: str
) -> None:
    for each in (before, now):
        need(each)
    await run(tmp_path, now, "true")  # what it left behind then says nothing of now
    ready = make_fifo(tmp_path, "ready")
    start_and_die(tmp_path, before, "setsid sleep 1000 & echo > /state/ready; wait")
    await read_fifo(ready)
    as_before = await driver_in(tmp_path, before, "").find(IRIS, dirs_in(tmp_path))
    assert as_before is not None
    everything = mates(as_before)
    assert len(everything) == 2 + beside(before)
    driver = driver_in(tmp_path, now, "")
    assert await driver.find(IRIS, dirs_in(tmp_path)) is None
    await wait_gone([as_before.pid, *everything])
    assert ("its sandbox is another now" if before == STAND_IN else f"with sandbox {before}, and this") in caplog.text
    assert await driver.missed_exit(IRIS) is None, "it did not crash"
    assert await run(tmp_path, now, "echo again") == (0, "again")


@pytest.mark.parametrize(
    ("before", "now"), [("bwrap", "nspawn"), ("nspawn", "bwrap"), ("nspawn", STAND_IN), (STAND_IN, "bwrap")]
)
async def test_an_agent_that_is_destroyed_in_another_kind_of_container_than_it_had_leaves_neither(
    tmp_path: Path, before: str, now: str
) -> None:
    for each in (before, now):
        need(each)
        await run(tmp_path, each, "true")
    await driver_in(tmp_path, now, "").destroy(IRIS)
    assert list((tmp_path / "processes").iterdir()) == []
    if STAND_IN in (before, now):
        host = StandInHost(tmp_path / "host")
        assert host.run("nixos-container", "list") == ""
        assert not list((tmp_path / "host/run/systemd/system").iterdir())
        assert not list((tmp_path / "host/nix/var/nix/profiles/per-container").iterdir())


async def test_a_container_that_cannot_be_removed_with_the_agent_that_had_it_is_named_with_the_way_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for each in (STAND_IN, "bwrap"):
        await run(tmp_path, need(each), "true")
    host = host_of(tmp_path / "host")
    driver = driver_in(tmp_path, "bwrap", "")
    driver.former = FormerContainers(tmp_path, replace(host, programs="/nowhere"))  # type: ignore[union-attr]
    await driver.destroy(IRIS)
    assert list((tmp_path / "processes").iterdir()) == []
    assert "as root: `nixos-container destroy h-iris`" in caplog.text


async def test_an_agent_whose_runtime_directory_was_made_anew_is_ended(tmp_path: Path, sandbox: str) -> None:
    ready = make_fifo(tmp_path, "ready")
    pid = start_and_die(tmp_path, sandbox, "echo > /state/ready; sleep 1000")
    await read_fifo(ready)
    dirs = dirs_in(tmp_path)
    dirs.run.rename(tmp_path / "kept")  # so that the new one cannot get its number
    dirs.run.mkdir()
    assert await driver_in(tmp_path, sandbox, "").find(IRIS, dirs) is None
    await wait_gone([pid])
