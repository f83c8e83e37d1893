"""Connections on unix sockets: what is sent whole, who waits, and what one client can take from the others."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import trio

from hive_core.protocol.refusal import Refusal
from hive_core.sockets import unix
from hive_core.sockets.unix import LINES_IN_A_ROW, Connection, Lines
from tests.hives import PATIENCE_S, connect, serve

LARGE = os.urandom(4 * 1024 * 1024)


async def echo(stream: Connection) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


@asynccontextmanager
async def a_pair() -> AsyncIterator[tuple[Connection, trio.SocketStream]]:
    """Ours and a peer's."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    async with trio.SocketStream(trio.socket.from_stdlib_socket(theirs)) as peer:
        connection = Connection(ours)
        with trio.fail_after(PATIENCE_S):
            yield connection, peer
        connection.close()


async def test_what_does_not_fit_into_the_sockets_buffer_is_sent_whole_as_the_peer_reads() -> None:
    async with a_pair() as (ours, peer), trio.open_nursery() as nursery:
        nursery.start_soon(ours.send_all, LARGE)
        got = bytearray()
        while len(got) < len(LARGE):
            got += await peer.receive_some(10_000)
        assert got == LARGE


async def test_a_peer_that_does_not_read_keeps_its_own_sender_waiting_and_no_other_task() -> None:
    async with a_pair() as (ours, _), trio.open_nursery() as nursery:
        nursery.start_soon(ours.send_all, LARGE)
        async with a_pair() as (other, peer):
            await other.send_all(b"hello")
            assert await peer.receive_some() == b"hello"
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("what", ["send", "receive"])
async def test_a_connection_that_is_closed_lets_go_whoever_waits_for_it(what: str) -> None:
    async with a_pair() as (ours, _), trio.open_nursery() as nursery:

        async def wait() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await (ours.send_all(LARGE) if what == "send" else ours.receive_some())

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        ours.close()
    with pytest.raises(trio.ClosedResourceError):
        await ours.receive_some()
    with pytest.raises(trio.ClosedResourceError):
        await ours.send_all(b"x")


async def test_a_peer_that_has_hung_up_breaks_what_is_sent_to_it_and_ends_what_is_read() -> None:
    async with a_pair() as (ours, peer):
        await peer.aclose()
        assert await ours.receive_some() == b""
        with pytest.raises(trio.BrokenResourceError):
            await ours.send_all(b"x")


async def test_who_sends_without_end_keeps_nobody_else_waiting(tmp_path: Path) -> None:
    async with (
        serve(tmp_path / "s", echo) as path,
        connect(path) as flood,
        connect(path) as other,
        trio.open_nursery() as nursery,
    ):

        async def send_without_end() -> None:
            while True:
                await flood.send_bytes(b"x" * 60_000)

        async def read_all() -> None:
            while True:
                await flood.stream.receive_some()

        nursery.start_soon(send_without_end)
        nursery.start_soon(read_all)
        for number in range(20):
            assert await other.ask({"n": number}) == {"n": number}
        nursery.cancel_scope.cancel()


async def test_who_sends_thousands_of_lines_at_once_lets_others_go_between() -> None:
    """Each has its answer at once: without waiting for anything the task would run until all are answered."""
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with a_pair() as (ours, peer), trio.open_nursery() as nursery:
        lines = Lines(ours)
        await peer.send_all(b"x\n" * 16_000)
        nursery.start_soon(count_turns)
        for _ in range(16_000):
            assert isinstance(await lines.next(), Refusal)
        assert turns > 16_000 / LINES_IN_A_ROW / 2
        nursery.cancel_scope.cancel()


async def test_a_connection_over_the_limit_is_closed_at_once_and_one_that_ends_makes_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(unix, "CONNECTIONS_LIMIT", 2)
    async with serve(tmp_path / "s", echo) as path, connect(path) as one:
        async with connect(path) as two:
            assert await one.ask({}) == await two.ask({}) == {}
            async with connect(path) as three:
                await three.wait_hung_up()
            assert "over the limit of 2 was closed" in caplog.text
        await one.ask({})
        async with AsyncExitStack() as stack:
            with trio.fail_after(PATIENCE_S):
                while True:
                    again = await stack.enter_async_context(connect(path))
                    try:
                        assert await again.ask({"in": 1}) == {"in": 1}
                        break
                    except (trio.EndOfChannel, trio.BrokenResourceError):
                        pass  # two's end was not seen yet


async def test_a_handler_that_fails_ends_its_own_connection_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(stream: Connection) -> None:
        if await stream.receive_some() != b"{}\n":
            raise ValueError("no")
        await stream.send_all(b"{}\n")

    async with serve(tmp_path / "s", fail) as path, connect(path) as bad, connect(path) as good:
        await bad.send_bytes(b"bad\n")
        await bad.wait_hung_up()
        assert await good.ask({}) == {}
    assert "failed" in caplog.text
    caplog.clear()


@contextmanager
def no_more_files() -> Iterator[None]:
    """Until it ends, this process can open no file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    taken: list[int] = []
    try:
        while True:
            try:
                taken.append(os.open("/dev/null", os.O_RDONLY))
            except OSError:
                break
        yield
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_a_client_that_comes_when_no_file_can_be_opened_is_served_when_one_can(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve(tmp_path / "s", echo) as path:
        client = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
        with no_more_files(), trio.fail_after(PATIENCE_S):
            await client.connect(str(path))
            while "cannot take a connection" not in caplog.text:
                await trio.lowlevel.checkpoint()
        async with trio.SocketStream(client) as stream:
            await stream.send_all(b"hello")
            with trio.fail_after(PATIENCE_S):
                assert await stream.receive_some() == b"hello"
    caplog.clear()
