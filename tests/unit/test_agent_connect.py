"""`hive-agent connect`: what ssh runs to get through the hive's proxy."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hive_agent.claude_command import environment
from hive_agent.own_command import own_command
from hive_agent.runner import Seat
from tests.processes import PATIENCE_S

Answer = Callable[[socket.socket, bytes], None]


@contextlib.contextmanager
def open_proxy(path: Path, answer: Answer) -> Iterator[list[bytes]]:
    """A proxy for one connection, or none: the head that it was sent is kept, and `answer` does the rest."""
    heads: list[bytes] = []

    def serve() -> None:
        try:
            connection, _ = listener.accept()
        except OSError:
            return  # nobody came as long as the block ran
        with connection:
            head = b""
            while b"\r\n\r\n" not in head:
                head += connection.recv(4096)
            heads.append(head.partition(b"\r\n\r\n")[0])
            answer(connection, head.partition(b"\r\n\r\n")[2])

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield heads
        finally:
            listener.shutdown(socket.SHUT_RDWR)  # else the thread would take what comes to the next with this number
            thread.join(PATIENCE_S)


def connect(path: Path, *words: str, said: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = own_command("connect", "--socket", str(path), *words)
    return subprocess.run(command, input=said, capture_output=True, timeout=PATIENCE_S)


def echo_in_capitals(connection: socket.socket, rest: bytes) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\nhello, ")
    while data := connection.recv(4096):
        rest += data
    connection.sendall(rest.upper())


def refuse(connection: socket.socket, rest: bytes) -> None:
    connection.sendall(b"HTTP/1.1 403 not listed; asked the operator (approval 3)\r\nContent-Length: 0\r\n\r\n")


def test_bytes_pass_both_ways_and_the_end_of_stdin_is_passed_on(tmp_path: Path) -> None:
    said = b"x" * 300_000 + b" the end"
    with open_proxy(tmp_path / "e.sock", echo_in_capitals) as heads:
        done = connect(tmp_path / "e.sock", "git.example.org", "22", said=said)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == b"hello, " + said.upper()
    assert heads == [b"CONNECT git.example.org:22 HTTP/1.1\r\nHost: git.example.org:22"]


def test_an_address_of_six_stands_in_brackets(tmp_path: Path) -> None:
    with open_proxy(tmp_path / "e.sock", echo_in_capitals) as heads:
        connect(tmp_path / "e.sock", "2001:db8::1", "22")
    assert heads[0].startswith(b"CONNECT [2001:db8::1]:22 HTTP/1.1")


def test_a_refusal_is_one_line_and_an_exit_code(tmp_path: Path) -> None:
    with open_proxy(tmp_path / "e.sock", refuse):
        done = connect(tmp_path / "e.sock", "git.example.org", "22")
    assert (done.returncode, done.stdout) == (1, b"")
    said = "hive-agent: cannot connect to git.example.org:22: not listed; asked the operator (approval 3)\n"
    assert done.stderr.decode() == said


def test_a_proxy_that_hangs_up_or_is_not_there_is_one_line(tmp_path: Path) -> None:
    with open_proxy(tmp_path / "e.sock", lambda *_: None):
        done = connect(tmp_path / "e.sock", "h", "1")
    assert (done.returncode, done.stderr.splitlines()) == (
        1,
        [b"hive-agent: cannot connect to h:1: the hive's proxy hung up"],
    )
    done = connect(tmp_path / "none.sock", "h", "1")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)


@pytest.mark.parametrize("words", [("h",), ("h\r\nX: y", "1"), ("h", "0"), ("h", "65536"), ("h", "٣"), ("", "1")])
def test_what_is_no_host_and_port_is_refused_before_anything_is_sent(tmp_path: Path, words: tuple[str, ...]) -> None:
    assert connect(tmp_path / "none.sock", *words).returncode == 2


def test_ssh_goes_through_the_proxy_by_the_environment_of_the_program(tmp_path: Path) -> None:
    if shutil.which("ssh") is None or shutil.which("git") is None:
        pytest.skip("there is no ssh, or no git")
    where = str(tmp_path)
    seat = Seat("iris", where, where, where, where, "/usr/bin:/bin", None, True, 1, egress_port=2)
    with open_proxy(tmp_path / "egress.sock", refuse) as heads:
        done = subprocess.run(
            ["git", "ls-remote", "ssh://git@git.example.org:2222/x"],
            env=environment(seat, "api_key"),
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
    assert done.returncode != 0
    assert "not listed; asked the operator (approval 3)" in done.stderr
    assert heads[0].startswith(b"CONNECT git.example.org:2222 ")
