"""The bridge between a program's stdio and the hive's socket, run as the program runs it."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hive_agent.bridge import ANSWER_LIMIT_BYTES, Lines, TooLong
from hive_agent.own_command import own_command
from hive_core.protocol.lines import LINE_LIMIT_BYTES
from tests.processes import PATIENCE_S

INITIALIZE = {"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": {"protocolVersion": "2025-11-25"}}
INITIALIZED = {"jsonrpc": "2.0", "method": "notifications/initialized"}


def call(number: int, text: str = "hi") -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": number, "method": "tools/call", "params": {"name": "send", "text": text}}


def result(number: object, value: object = "done") -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": number, "result": {"value": value}}


def raw(message: object) -> bytes:
    return json.dumps(message).encode() + b"\n"


class Connection:
    """The host's end of one connection."""

    def __init__(self, peer: socket.socket) -> None:
        self._peer = peer
        self._peer.settimeout(PATIENCE_S)
        self._lines = peer.makefile("rb")

    def read(self) -> Any:
        line = self.read_raw()
        return json.loads(line) if line else None

    def read_raw(self) -> bytes:
        return self._lines.readline()

    def write(self, message: object) -> None:
        self._peer.sendall(raw(message))

    def close(self) -> None:
        self._lines.close()
        self._peer.close()


class Host:
    """The hive's socket, which a test can take away and put back."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._listener: socket.socket | None = None
        self._connections: list[Connection] = []

    def open(self) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(self._path))
        self._listener.listen()
        self._listener.settimeout(PATIENCE_S)

    def accept(self) -> Connection:
        assert self._listener is not None
        self._connections.append(Connection(self._listener.accept()[0]))
        return self._connections[-1]

    def die(self) -> None:
        """As a killed daemon does: everything is closed, the file stays behind."""
        for connection in self._connections:
            connection.close()
        self._connections.clear()
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def revive(self) -> None:
        self._path.unlink()
        self.open()


class Program:
    """The program's end: what claude does with the bridge it started."""

    def __init__(self, path: Path, *more: str) -> None:
        self.process = subprocess.Popen(
            own_command("mcp", "--socket", str(path), *more), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._rest = b""

    def write(self, *messages: object) -> None:
        self.write_raw(b"".join(raw(message) for message in messages))

    def write_raw(self, data: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def read(self) -> Any:
        assert self.process.stdout is not None
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE_S)
            assert ready, "the bridge says nothing"
            self._rest += os.read(self.process.stdout.fileno(), 1 << 20)
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

    def hang_up(self) -> int:
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(PATIENCE_S)

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path / "mcp.sock")
    host.open()
    yield host
    host.die()


@pytest.fixture
def program(host: Host, tmp_path: Path) -> Iterator[Program]:
    program = Program(tmp_path / "mcp.sock")
    yield program
    program.close()


def shake_hands(host: Host, program: Program) -> Connection:
    connection = host.accept()
    program.write(INITIALIZE)
    assert connection.read() == INITIALIZE
    connection.write(result(0))
    assert program.read() == result(0)
    program.write(INITIALIZED)
    assert connection.read() == INITIALIZED
    return connection


def come_back(host: Host) -> Connection:
    """A new host takes the replayed handshake."""
    host.revive()
    connection = host.accept()
    assert connection.read() == INITIALIZE
    connection.write(result(0, "from another host"))
    assert connection.read() == INITIALIZED
    return connection


def test_messages_pass_unchanged_both_ways(host: Host, program: Program) -> None:
    connection = shake_hands(host, program)
    program.write(call(1, "é\u2028"))
    assert connection.read() == call(1, "é\u2028")
    connection.write({"jsonrpc": "2.0", "method": "notifications/progress", "params": {"progress": 1}})
    connection.write(result(1))
    assert program.read()["method"] == "notifications/progress"
    assert program.read() == result(1)


def test_a_call_in_flight_when_the_host_dies_is_made_again_and_answered(host: Host, program: Program) -> None:
    connection = shake_hands(host, program)
    program.write(call(1), call(2))
    assert [connection.read(), connection.read()] == [call(1), call(2)]
    host.die()
    connection = come_back(host)
    assert [connection.read(), connection.read()] == [call(1), call(2)]
    connection.write(result(2))
    connection.write(result(1))
    assert [program.read(), program.read()] == [result(2), result(1)]


def test_an_answered_call_is_not_made_again(host: Host, program: Program) -> None:
    connection = shake_hands(host, program)
    program.write(call(1), call(2))
    connection.write(result(1))
    assert program.read() == result(1)
    host.die()
    connection = come_back(host)
    assert connection.read() == call(2)


def test_a_call_made_while_the_host_is_away_waits_for_it(host: Host, program: Program) -> None:
    shake_hands(host, program)
    host.die()
    program.write(call(7))
    assert come_back(host).read() == call(7)


def test_a_call_cancelled_while_the_host_is_away_is_not_made(host: Host, program: Program) -> None:
    connection = shake_hands(host, program)
    program.write(call(1), call(2))
    assert [connection.read(), connection.read()] == [call(1), call(2)]
    host.die()
    program.write({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 1}})
    assert come_back(host).read() == call(2)


def test_a_cancelled_call_tells_the_host_and_its_late_answer_goes_nowhere(host: Host, program: Program) -> None:
    connection = shake_hands(host, program)
    cancel = {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 1}}
    program.write(call(1), cancel, call(2))
    assert [connection.read() for _ in range(3)] == [call(1), cancel, call(2)]
    connection.write(result(1))
    connection.write(result(2))
    assert program.read() == result(2)


def test_a_host_that_dies_before_it_welcomed_is_asked_again(host: Host, program: Program) -> None:
    connection = host.accept()
    program.write(INITIALIZE)
    assert connection.read() == INITIALIZE
    host.die()
    host.revive()
    connection = host.accept()
    assert connection.read() == INITIALIZE
    connection.write(result(0))
    assert program.read() == result(0)


def test_a_host_that_dies_during_the_replay_is_asked_again(host: Host, program: Program) -> None:
    shake_hands(host, program)
    program.write(call(1))
    host.die()
    host.revive()
    assert host.accept().read() == INITIALIZE
    host.die()
    assert come_back(host).read() == call(1)


def test_a_host_that_refuses_the_replay_is_left_and_tried_again(host: Host, program: Program) -> None:
    shake_hands(host, program)
    program.write(call(1))
    host.die()
    host.revive()
    connection = host.accept()
    assert connection.read() == INITIALIZE
    connection.write({"jsonrpc": "2.0", "id": 0, "error": {"code": -32000, "message": "not yet"}})
    assert connection.read() is None
    connection = host.accept()
    assert connection.read() == INITIALIZE


def test_a_bridge_started_before_its_host_waits_for_it(tmp_path: Path) -> None:
    program, host = Program(tmp_path / "mcp.sock"), Host(tmp_path / "mcp.sock")
    try:
        program.write(INITIALIZE)
        host.open()
        assert host.accept().read() == INITIALIZE
    finally:
        program.close()
        host.die()


def test_a_line_that_is_not_json_is_the_hosts_to_answer(host: Host, program: Program) -> None:
    connection = shake_hands(host, program)
    error = {"jsonrpc": "2.0", "id": None, "error": {"code": -32700, "message": "not JSON"}}
    program.write_raw(b"{oops\n")
    assert connection.read_raw() == b"{oops\n"
    connection.write(error)
    assert program.read() == error


@pytest.mark.parametrize("number", [5, "five"])
def test_a_line_over_the_limit_is_refused_by_its_id_and_the_next_one_passes(
    host: Host, program: Program, number: int | str
) -> None:
    connection = shake_hands(host, program)
    huge = {"jsonrpc": "2.0", "method": "tools/call", "params": {"text": "x" * LINE_LIMIT_BYTES}, "id": number}
    program.write(huge, call(6))
    refused = program.read()
    assert refused["id"] == number
    assert f"{LINE_LIMIT_BYTES:,} bytes; send less in one line" in refused["error"]["message"]
    assert connection.read() == call(6)


def test_a_line_of_just_the_hosts_limit_passes(host: Host, program: Program) -> None:
    connection = shake_hands(host, program)
    room = LINE_LIMIT_BYTES - len(raw(call(5, ""))) + 1  # its newline does not count
    program.write(call(5, "x" * room))
    assert connection.read() == call(5, "x" * room)


def test_that_a_call_goes_on_reaches_the_program_before_its_answer(host: Host, program: Program) -> None:
    connection = shake_hands(host, program)
    program.write(call(1))
    assert connection.read() == call(1)
    for number in (1, 2):
        progress = {"progressToken": "p", "progress": number}
        connection.write({"jsonrpc": "2.0", "method": "notifications/progress", "params": progress})
        assert program.read()["params"] == progress
    connection.write(result(1))
    assert program.read() == result(1)


def test_a_long_answer_passes_whole(host: Host, program: Program) -> None:
    connection = shake_hands(host, program)
    program.write(call(1))
    assert connection.read() == call(1)
    connection.write(result(1, "y" * 3_000_000))
    assert program.read() == result(1, "y" * 3_000_000)


def test_the_bridge_ends_with_the_programs_stdin(host: Host, program: Program) -> None:
    shake_hands(host, program)
    assert program.hang_up() == 0


def test_the_bridge_ends_with_the_programs_stdin_while_the_host_is_away(host: Host, program: Program) -> None:
    shake_hands(host, program)
    host.die()
    assert program.hang_up() == 0


@pytest.mark.parametrize("arguments", [[], ["--socket"], ["--sock", "x"]])
def test_wrong_arguments_get_the_usage(arguments: list[str]) -> None:
    done = subprocess.run(own_command("mcp", *arguments), capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"usage: hive-agent mcp --socket PATH" in done.stderr


@given(st.binary(max_size=200), st.lists(st.integers(1, 40), max_size=20))
def test_lines_are_the_same_however_the_bytes_are_cut(data: bytes, cuts: list[int]) -> None:
    lines, got, rest = Lines(), [], data
    for cut in cuts:
        got += lines.feed(rest[:cut])
        rest = rest[cut:]
    got += lines.feed(rest)
    assert got == [line + b"\n" for line in data.split(b"\n")[:-1]]


def test_of_an_endless_line_little_is_kept() -> None:
    lines = Lines()
    for _ in range(30):
        assert lines.feed(b"x" * 1_000_000) == []
    assert len(lines._rest) <= ANSWER_LIMIT_BYTES
    (line,) = lines.feed(b'"id": 3}\n')
    assert isinstance(line, TooLong)
    assert line.id == "3"


# -- the harness's own tool -------------------------------------------------------------------------------------------

LIST = {"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {}}


@pytest.fixture
def harness() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(f"\0hive-test-{os.getpid()}")
        listener.listen()
        listener.settimeout(PATIENCE_S)
        yield listener


@pytest.fixture
def equipped(host: Host, harness: socket.socket, tmp_path: Path) -> Iterator[Program]:
    program = Program(tmp_path / "mcp.sock", "--harness", f"hive-test-{os.getpid()}")
    yield program
    program.close()


def test_the_harnesss_tool_stands_behind_those_of_the_host(host: Host, equipped: Program) -> None:
    connection = shake_hands(host, equipped)
    equipped.write(LIST, {**LIST, "id": 2})
    for number, more in ((1, {}), (2, {"nextCursor": "x"})):
        connection.read()
        connection.write({"jsonrpc": "2.0", "id": number, "result": {"tools": [{"name": "send"}], **more}})
    names = [[tool["name"] for tool in equipped.read()["result"]["tools"]] for _ in range(2)]
    assert names == [["send", "run_in_background"], ["send"]]


def test_its_call_goes_to_the_harness_alone_also_while_the_host_is_away(
    host: Host, harness: socket.socket, equipped: Program
) -> None:
    shake_hands(host, equipped)
    host.die()
    call = {"name": "run_in_background", "arguments": {"command": "make"}}
    equipped.write({"jsonrpc": "2.0", "id": 7, "method": "tools/call", "params": call})
    asked = Connection(harness.accept()[0])
    request = asked.read()
    assert request["arguments"] == {"command": "make"}
    assert request["env"]["PATH"] == os.environ["PATH"]
    asked.write({"work": "a1"})
    answer = equipped.read()
    assert (answer["id"], answer["result"]["structuredContent"]) == (7, {"work": "a1"})
    equipped.write({"jsonrpc": "2.0", "id": 8, "method": "tools/call", "params": call})
    second = Connection(harness.accept()[0])
    second.write({"error": "cannot run in the background: no turn runs"})
    answer = equipped.read()
    assert answer["result"] == {
        "content": [{"type": "text", "text": "cannot run in the background: no turn runs"}],
        "isError": True,
    }
    asked.close()
    second.close()


def test_a_harness_that_is_gone_is_a_result_that_is_an_error(
    host: Host, harness: socket.socket, equipped: Program
) -> None:
    shake_hands(host, equipped)
    harness.close()
    call = {"name": "run_in_background", "arguments": {"command": "make"}}
    equipped.write({"jsonrpc": "2.0", "id": 7, "method": "tools/call", "params": call})
    answer = equipped.read()["result"]
    assert answer["isError"]
    assert "the harness does not answer" in answer["content"][0]["text"]
