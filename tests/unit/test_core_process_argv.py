"""What the process driver asks bwrap for; what bwrap makes of it is in tests/containers."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from hive_agent.serve_cli import make_parser, seat_maker
from hive_core.containers.bubblewrap import bwrap_command
from hive_core.containers.inside import OUR_PASSWD, PROC_OF_THE_HOST, SYSTEM_PATHS, is_below
from hive_core.containers.mounts import AgentDirs, agent_dirs
from hive_core.containers.printed import keep_printed
from hive_core.containers.process import ProcessDriver
from hive_core.containers.seccomp import filter_program
from hive_core.containers.status_file import status_value
from hive_core.protocol.words import AgentName

IRIS, HM1ND = AgentName("iris"), AgentName("hm1nd")
WITH_TWO = {"--bind", "--ro-bind", "--ro-bind-try", "--symlink"}
WITH_ONE = {
    "--uid",
    "--gid",
    "--hostname",
    "--cap-drop",
    "--json-status-fd",
    "--seccomp",
    "--tmpfs",
    "--remount-ro",
    "--perms",
    "--proc",
    "--dev",
    "--chdir",
}


def driver_in(
    state: Path, sandbox: str = "bwrap", claude: Path | None = None, life_fd: int | None = None
) -> ProcessDriver:
    return ProcessDriver(state, sandbox=sandbox, claude=claude, orphan_grace_s=600, life_fd=life_fd)


def dirs_in(state: Path, manager: bool = False) -> AgentDirs:
    return agent_dirs(state, state / "runtime", HM1ND if manager else IRIS)


def options(argv: list[str]) -> Iterator[tuple[str, ...]]:
    """bwrap's options, each with its arguments."""
    words = iter(argv[1:])
    for word in words:
        count = 2 if word in WITH_TWO else 1 if word in WITH_ONE else 0
        yield (word, *(next(words) for _ in range(count)))


@pytest.mark.parametrize("manager", [False, True])
def test_every_namespace_is_the_agents_own_and_no_capability_is_left(tmp_path: Path, manager: bool) -> None:
    argv = bwrap_command(dirs_in(tmp_path, manager), None, 7, 8)
    asked = list(options(argv))
    assert Path(argv[0]).name == "bwrap"
    assert asked[-1] == ("--",)
    assert {
        ("--unshare-all",),
        ("--unshare-user",),
        ("--disable-userns",),
        ("--new-session",),
        ("--cap-drop", "ALL"),
    } <= set(asked)
    assert {("--json-status-fd", "7"), ("--seccomp", "8")} <= set(asked)
    known = (
        WITH_ONE
        | WITH_TWO
        | {"--unshare-all", "--unshare-user", "--disable-userns", "--as-pid-1", "--new-session", "--"}
    )
    assert {option[0] for option in asked} <= known
    assert not any(word.startswith(("--share", "--dev-bind", "--cap-add", "--die-with-parent")) for word in argv)


@pytest.mark.parametrize("manager", [False, True])
def test_only_the_agents_own_directories_and_what_all_share_can_be_written(tmp_path: Path, manager: bool) -> None:
    dirs = dirs_in(tmp_path, manager)
    binds = {option[1:] for option in options(bwrap_command(dirs, None, 7, 8)) if option[0] == "--bind"}
    own = {(str(dirs.state), "/state"), (str(dirs.claude), "/root/.claude"), (str(tmp_path / "shared"), "/shared")}
    own |= {(str(dirs.projects), "/projects")}
    assert binds == own | ({(str(tmp_path / "proposed"), "/agents")} if manager else set())


def test_nothing_of_the_host_is_seen_but_the_system_and_the_program(tmp_path: Path) -> None:
    claude = tmp_path / "bin" / "claude"
    claude.parent.mkdir()
    claude.touch()
    argv = bwrap_command(dirs_in(tmp_path), claude, 7, 8)
    seen = [option[1] for option in options(argv) if option[0].startswith("--ro-bind")]
    assert str(claude) in seen
    mine = [str(path) for path in (dirs_in(tmp_path).run, dirs_in(tmp_path).mirrors, dirs_in(tmp_path).extras)]
    seen = [path for path in seen if path not in ("/dev/null", OUR_PASSWD, *PROC_OF_THE_HOST, *mine)]
    for path in seen:
        private = [str(tmp_path), "/", "/root", "/home", "/etc", "/var", "/run", "/tmp", os.getcwd(), str(Path.home())]
        assert path not in private
        assert (
            path in (*SYSTEM_PATHS, str(claude), os.path.realpath(sysconfig.get_paths()["purelib"]))
            or path.startswith(("/etc/", sys.prefix, sys.base_prefix))
            or (Path(path).name in ("hive_core", "hive_agent", "hive_mind") or is_below(sys.executable, {path}))
        )
    for secret in ("credentials", "hive.sqlite", "applied", ".ssh", "passwd", "shadow"):
        assert not any(secret in path for path in seen)


def test_the_environment_is_built_from_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-canary")
    monkeypatch.setenv("LD_PRELOAD", "/canary.so")
    monkeypatch.setenv("PYTHONSTARTUP", "/canary.py")
    for sandbox in ("bwrap", "none"):
        with contextlib.ExitStack() as opened:
            environment = driver_in(tmp_path, sandbox)._launch(IRIS, dirs_in(tmp_path), 7, opened).environment
        assert set(environment) == {"PATH", "LANG", "PYTHONPATH", "HOME"}
        assert "canary" not in str(environment)


def test_the_manager_runs_its_own_program_and_sees_the_configurations(tmp_path: Path) -> None:
    driver = driver_in(tmp_path, life_fd=9, claude=tmp_path / "claude")
    manager, agent = driver._command(HM1ND, dirs_in(tmp_path, True)), driver._command(IRIS, dirs_in(tmp_path))
    assert "hive_mind.cli" in manager
    assert "hive_agent.cli" in agent
    assert manager[manager.index("--configs") + 1] == "/agents"
    assert "--configs" not in agent
    assert agent[agent.index("--run") + 1] == "/run/hive"
    assert agent[agent.index("--life-fd") + 1] == "9"
    assert agent[agent.index("--sandbox") + 1] == "bwrap"


def test_without_a_sandbox_the_program_is_told_where_its_directories_really_are(tmp_path: Path) -> None:
    dirs = dirs_in(tmp_path, True)
    command = driver_in(tmp_path, "none")._command(HM1ND, dirs)
    told = {command[n]: command[n + 1] for n in range(len(command) - 1)}
    assert (told["--run"], told["--state"], told["--configs"]) == (str(dirs.run), str(dirs.state), str(dirs.proposed))
    assert told["--sandbox"] == "none"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"child-pid": 12}\n{"exit-code": 3}\n', 3),
        ('{"child-pid": 12}\n', None),
        ("", None),
        ("junk", None),
        ("[]\n", None),
        ('{"exit-code": "3"}\n', None),
        ('{"child-pid": 12}\n{"exit-', None),
    ],
)
def test_an_exit_code_is_read_from_whatever_the_status_file_holds(tmp_path: Path, text: str, value: int | None) -> None:
    (tmp_path / "status").write_text(text)
    assert status_value(tmp_path / "status", "exit-code") == value


def test_no_status_file_is_no_exit_code(tmp_path: Path) -> None:
    assert status_value(tmp_path / "none", "exit-code") is None


@pytest.mark.parametrize(
    "identity", [None, "", "junk", "[]", "{}", '{"pid": "x"}', '{"pid": 1}', '{"pid": -5, "started": 1}']
)
async def test_a_process_file_that_names_no_agent_of_ours_finds_none(tmp_path: Path, identity: str | None) -> None:
    (tmp_path / "processes").mkdir()
    if identity is not None:
        (tmp_path / "processes" / "iris.json").write_text(identity)
    assert await driver_in(tmp_path).find(IRIS, dirs_in(tmp_path)) is None


async def test_a_pid_that_was_given_to_another_process_is_not_adopted(tmp_path: Path) -> None:
    (tmp_path / "processes").mkdir()
    identity = {"pid": os.getpid(), "started": 1, "sandbox": "bwrap"}
    (tmp_path / "processes" / "iris.json").write_text(json.dumps(identity))
    assert await driver_in(tmp_path).find(IRIS, dirs_in(tmp_path)) is None


async def test_an_exit_that_was_missed_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "processes").mkdir()
    (tmp_path / "processes" / "iris.json").write_text('{"pid": 1, "started": 2}')
    (tmp_path / "processes" / "iris.status").write_text('{"child-pid": 12}\n{"exit-code": 3}\n')
    driver = driver_in(tmp_path)
    missed = await driver.missed_exit(IRIS)
    assert missed is not None
    assert missed.code == 3
    assert await driver.missed_exit(IRIS) is None


async def test_last_words_are_the_end_of_the_log_however_long_it_is(tmp_path: Path) -> None:
    driver = driver_in(tmp_path)
    assert await driver.last_words(IRIS) == ""
    (tmp_path / "processes").mkdir()
    with (tmp_path / "processes" / "iris.log").open("wb") as log:
        log.truncate(50_000_000_000)  # sparse: reading it whole would end the daemon
        log.seek(0, os.SEEK_END)
        log.write("é the end\xff\n".encode("latin-1"))
    words = await driver.last_words(IRIS, 20)
    assert words.endswith("the end�")
    assert len(words) <= 20


def verdict(program: bytes, abi: int, number: int, argument: int = 0) -> str:
    """What the kernel would make of a call: the few instructions that our filter is made of, carried out."""
    data = struct.pack("<iIQQ", number if number < 2**31 else number - 2**32, abi, 0, argument)
    value, at = 0, 0
    while True:
        code, if_so, if_not, operand = struct.unpack_from("=HBBI", program, 8 * at)
        at += 1
        if code == 0x20:
            (value,) = struct.unpack_from("<I", data, operand)
        elif code in (0x15, 0x35):
            at += if_so if (value == operand if code == 0x15 else value >= operand) else if_not
        else:
            assert code == 0x06
            return "allowed" if operand == 0x7FFF0000 else os.strerror(operand & 0xFFFF)


REFUSED, UNKNOWN, NO_FAMILY = "Operation not permitted", "Function not implemented", "Address family not supported"


@pytest.mark.parametrize(
    ("machine", "abi", "keyctl", "socket", "plain"),
    [("x86_64", 0xC000003E, 250, 41, (0, 1, 59, 101, 435)), ("aarch64", 0xC00000B7, 219, 198, (63, 64, 221, 117, 435))],
)
def test_the_filter_refuses_what_it_names_on_every_processor_it_knows(
    machine: str, abi: int, keyctl: int, socket: int, plain: tuple[int, ...]
) -> None:
    program = filter_program(machine)
    assert program is not None
    assert verdict(program, abi, keyctl) == REFUSED
    assert {verdict(program, abi, number) for number in plain} == {"allowed"}
    assert verdict(program, abi ^ 0x80000000, plain[0]) == UNKNOWN, "the calls of another ABI"
    assert verdict(program, 0x40000003, plain[0]) == UNKNOWN, "the calls of a 32-bit program"
    assert verdict(program, abi, 0x40000000 | plain[0]) == UNKNOWN, "x32"
    for family in (0, 15, 17, 29, 31, 38, 40, 44, 2**31):
        assert verdict(program, abi, socket, family).startswith(NO_FAMILY)
    for family in (1, 2, 10, 16):
        assert verdict(program, abi, socket, family) == "allowed"
    assert verdict(program, abi, socket, 2**32 + 40).startswith(NO_FAMILY), "the kernel looks at 32 bits"


def test_a_processor_whose_calls_are_not_known_has_no_filter() -> None:
    assert filter_program("riscv64") is None


def test_a_disk_that_is_full_holds_up_nobody_who_prints(tmp_path: Path) -> None:
    source, printer = os.pipe()
    os.write(printer, b"lost")
    os.close(printer)
    full = os.open("/dev/full", os.O_RDWR)
    try:
        keep_printed(source, full)  # to its end
    finally:
        os.close(full)
        os.close(source)


@pytest.mark.parametrize("sandbox", ["bwrap", "none"])
def test_the_harness_takes_what_it_is_started_with_and_works_in_the_directories_that_it_has(
    tmp_path: Path, sandbox: str
) -> None:
    dirs = dirs_in(tmp_path)
    theirs, ours = socket.socketpair()
    with theirs, ours:
        command = driver_in(tmp_path, sandbox, tmp_path / "claude", theirs.fileno())._command(IRIS, dirs)
        seat = seat_maker(make_parser().parse_args(command[command.index("serve") + 1 :]))("iris", 1, 2)
    places = [seat.run_dir, seat.state_dir, seat.projects_dir, seat.mirrors_dir, seat.extras_dir]
    bare = [str(path) for path in (dirs.run, dirs.state, dirs.projects, dirs.mirrors, dirs.extras)]
    assert places == (bare if sandbox == "none" else ["/run/hive", "/state", "/projects", "/mirrors", "/extras"])
