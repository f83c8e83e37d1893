"""The loopback: bytes between a TCP port of the sandbox and the host's model.sock."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from hive_agent.loopback import serve_loopback
from tests.processes import PATIENCE_S

Handler = Callable[[trio.SocketStream], Awaitable[None]]


@asynccontextmanager
async def open_model(path: Path, handler: Handler) -> AsyncIterator[None]:
    sock = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    await sock.bind(str(path))
    sock.listen()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, handler, [trio.SocketListener(sock)])
        yield
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_loopback(
    path: Path, *, shared: bool = False, heed: Callable[[bytes], None] | None = None
) -> AsyncIterator[int]:
    async with trio.open_nursery() as nursery:
        port: int = await nursery.start(partial(serve_loopback, shared=shared, heed=heed), str(path))
        with trio.fail_after(PATIENCE_S):
            yield port
        nursery.cancel_scope.cancel()


async def read_all(stream: trio.SocketStream) -> bytes:
    return b"".join([data async for data in stream])


async def echo_after_the_end(stream: trio.SocketStream) -> None:
    """Answers only once the other side has ended its half."""
    await stream.send_all(await read_all(stream))
    await stream.aclose()


async def test_bytes_pass_and_a_half_close_is_passed_on(tmp_path: Path) -> None:
    path, data = tmp_path / "model.sock", bytes(range(256)) * 4000
    async with (
        open_model(path, echo_after_the_end),
        open_loopback(path) as port,
        await trio.open_tcp_stream("127.0.0.1", port) as program,
    ):
        await program.send_all(data)
        await program.send_eof()
        assert await read_all(program) == data


async def test_the_first_bytes_pass_before_the_rest_is_there(tmp_path: Path) -> None:
    path, more = tmp_path / "model.sock", trio.Event()

    async def stream_slowly(stream: trio.SocketStream) -> None:
        await stream.send_all(b"first")
        await more.wait()
        await stream.send_all(b"second")
        await stream.aclose()

    async with (
        open_model(path, stream_slowly),
        open_loopback(path) as port,
        await trio.open_tcp_stream("127.0.0.1", port) as program,
    ):
        assert await program.receive_some() == b"first"
        more.set()
        assert await read_all(program) == b"second"


async def test_a_host_that_is_away_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "model.sock"
    async with open_loopback(path) as port, await trio.open_tcp_stream("127.0.0.1", port) as program:
        await program.send_all(b"early")
        await program.send_eof()
        async with open_model(path, echo_after_the_end):
            assert await read_all(program) == b"early"


async def test_a_host_that_hangs_up_ends_the_connection_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "model.sock"

    async def hang_up(stream: trio.SocketStream) -> None:
        await stream.aclose()

    async with open_loopback(path) as port:
        async with open_model(path, hang_up), await trio.open_tcp_stream("127.0.0.1", port) as program:
            assert await read_all(program) == b""
        path.unlink()
        async with open_model(path, echo_after_the_end), await trio.open_tcp_stream("127.0.0.1", port) as program:
            await program.send_all(b"again")
            await program.send_eof()
            assert await read_all(program) == b"again"


async def test_a_program_that_goes_away_hangs_up_on_the_host(tmp_path: Path) -> None:
    path, heard_end = tmp_path / "model.sock", trio.Event()

    async def listen(stream: trio.SocketStream) -> None:
        await read_all(stream)
        heard_end.set()

    async with open_model(path, listen), open_loopback(path) as port:
        program = await trio.open_tcp_stream("127.0.0.1", port)
        await program.aclose()
        await heard_end.wait()


async def test_how_the_answer_to_a_connect_begins_is_heeded_and_of_nothing_else(tmp_path: Path) -> None:
    path, heeded = tmp_path / "egress.sock", list[bytes]()

    async def refuse(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 403 no\r\n\r\n")
        await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 403 said by somebody else\r\n\r\n")
        await stream.aclose()

    async with open_model(path, refuse), open_loopback(path, heed=heeded.append) as port:
        for request in (b"GET http://git.lan/ HTTP/1.1\r\n\r\n", b"CONNECT git.lan:443 HTTP/1.1\r\n\r\n"):
            async with await trio.open_tcp_stream("127.0.0.1", port) as program:
                await program.send_all(request)
                assert await program.receive_some() == b"HTTP/1.1 403 no\r\n\r\n"
                await program.send_all(b"more")
                await read_all(program)
    assert heeded == [b"HTTP/1.1 403 no\r\n\r\n"]


@pytest.mark.parametrize("host", ["127.0.0.1", "::ffff:127.0.0.1"])
async def test_on_a_loopback_with_others_its_own_user_is_let_through(tmp_path: Path, host: str) -> None:
    path = tmp_path / "model.sock"
    async with (
        open_model(path, echo_after_the_end),
        open_loopback(path, shared=True) as port,
        await trio.open_tcp_stream(host, port) as program,
    ):
        await program.send_all(b"ours")
        await program.send_eof()
        assert await read_all(program) == b"ours"


ANOTHER_USER = """
import encodings.idna, os, socket, sys  # what the user may read no more
os.setuid(int(sys.argv[2]))
with socket.create_connection(("127.0.0.1", int(sys.argv[1])), 60) as sock:
    sock.sendall(b"POST /v1/messages HTTP/1.1\\r\\n\\r\\n" + bytes(100_000))
    sys.stdout.write(sock.makefile().read())
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root becomes another user")
async def test_on_a_loopback_with_others_another_user_is_refused_in_a_line_and_told_of_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    heard: list[trio.SocketStream] = []

    async def hear(stream: trio.SocketStream) -> None:
        heard.append(stream)

    path = tmp_path / "model.sock"
    async with open_model(path, hear), open_loopback(path, shared=True) as port:
        for _ in range(2):
            command = [sys.executable, "-c", ANOTHER_USER, str(port), "4242"]
            answer = (await trio.run_process(command, capture_stdout=True)).stdout.decode()
            assert answer.startswith("HTTP/1.1 403 Forbidden")
            assert answer.splitlines()[-1].endswith("lets its own user through alone")
    assert not heard
    assert capfd.readouterr().err == "refused uid 4242 a connection to this agent's loopback port\n"


async def test_on_a_loopback_with_others_nobody_is_let_through_who_is_gone_already(tmp_path: Path) -> None:
    heard: list[bytes] = []

    async def hear(stream: trio.SocketStream) -> None:
        heard.append(await read_all(stream))
        await stream.aclose()

    path = tmp_path / "model.sock"
    async with open_model(path, hear), open_loopback(path, shared=True) as port:
        with socket.create_connection(("127.0.0.1", port)) as gone:
            gone.sendall(b"a socket that nobody holds is shown as root's")
        async with await trio.open_tcp_stream("127.0.0.1", port) as program:
            await program.send_all(b"ours")
            await program.send_eof()
            assert await read_all(program) == b""
    assert heard == [b"ours"]
