"""The loopback: bytes between a TCP port of the sandbox and the host's model.sock."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

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
async def open_loopback(path: Path) -> AsyncIterator[int]:
    async with trio.open_nursery() as nursery:
        port: int = await nursery.start(serve_loopback, str(path))
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
