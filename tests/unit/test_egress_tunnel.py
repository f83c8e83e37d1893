"""Tunnels through the proxy: what passes, what is counted, what ends them."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from hive_core.egress.reaching import Found
from hive_core.protocol.carrying import SEND_BUFFER_BYTES, Pipes, carry
from tests.egress_desk import (
    ask,
    dial,
    echo,
    named,
    open_desk,
    open_files,
    open_host,
    read_all,
    resolver_of,
    tunnel,
    wire,
)

MIB = 1024 * 1024
NO_FAMILY: Any = 255


async def test_bytes_pass_both_ways_and_are_counted(tmp_path: Path) -> None:
    sent = bytes(range(256)) * 20_000
    async with open_desk(tmp_path) as desk, open_host(echo) as port:
        path = await desk.serve([named(f"here.example:{port}")])
        received = []
        async with await tunnel(path, f"here.example:{port}") as stream, trio.open_nursery() as nursery:

            async def send() -> None:
                await stream.send_all(sent)
                await stream.send_eof()

            nursery.start_soon(send)
            received.append(await read_all(stream))
        assert received == [sent]
        ended = await desk.ended()
    assert (ended["sent"], ended["received"]) == (len(sent), len(sent))
    assert (ended["agent"], ended["host"], ended["port"], ended["how"]) == ("iris", "here.example", port, "tunnel")
    assert (ended["verdict"], ended["reason"], ended["address"]) == ("passed", None, "127.0.0.1")


async def test_the_end_of_one_side_passes_on_and_the_other_goes_on(tmp_path: Path) -> None:
    async def answer_at_the_end(stream: trio.SocketStream) -> None:
        taken = await read_all(stream)
        await stream.send_all(b"that was " + taken)

    async def end_first(stream: trio.SocketStream) -> None:
        await stream.send_all(b"all")
        await stream.send_eof()
        heard.append(await read_all(stream))

    heard: list[bytes] = []
    async with open_desk(tmp_path) as desk, open_host(answer_at_the_end) as one, open_host(end_first) as other:
        path = await desk.serve([named(f"here.example:{port}") for port in (one, other)])
        async with await tunnel(path, f"here.example:{one}") as stream:
            await stream.send_all(b"hello")
            await stream.send_eof()
            assert await read_all(stream) == b"that was hello"
        async with await tunnel(path, f"here.example:{other}") as stream:
            assert await read_all(stream) == b"all"
            await stream.send_all(b"later")
            await stream.send_eof()
            assert (await desk.ended())["port"] == one
            assert (await desk.ended())["verdict"] == "passed"
    assert heard == [b"later"]


async def test_what_comes_with_the_request_is_the_first_of_the_tunnel(tmp_path: Path) -> None:
    async with open_desk(tmp_path) as desk, open_host(echo) as port:
        path = await desk.serve([named(f"here.example:{port}")])
        answer = await ask(path, f"CONNECT here.example:{port} HTTP/1.1\r\nHost: x\r\n\r\nearly".encode())
        assert answer.endswith(b"\r\n\r\nearly")
        assert (await desk.ended())["sent"] == 5


async def test_a_host_that_breaks_off_is_told_as_that(tmp_path: Path) -> None:
    async def reset(stream: trio.SocketStream) -> None:
        await stream.receive_some(1)
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        await stream.aclose()

    async with open_desk(tmp_path) as desk, open_host(reset) as port:
        path = await desk.serve([named(f"here.example:{port}")])
        async with await tunnel(path, f"here.example:{port}") as stream:
            await stream.send_all(b"x")
            assert await read_all(stream) == b""
            ended = await desk.ended()
    assert ended["verdict"] == "failed"
    assert "the host broke off" in ended["reason"]


async def test_an_agent_that_hangs_up_ends_its_tunnel(tmp_path: Path) -> None:
    async with open_desk(tmp_path) as desk, open_host(flood) as port:
        path = await desk.serve([named(f"here.example:{port}")])
        async with await tunnel(path, f"here.example:{port}") as stream:
            await stream.receive_some(1)
        ended = await desk.ended()
    assert (ended["verdict"], ended["reason"]) == ("passed", "the agent hung up")
    assert ended["received"] > 0


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        ({"idle_s": 40.0, "connection_s": 1_000.0}, "nothing was sent for 40 s, the limit"),
        ({"connection_s": 50.0}, "it was open for 50 s, the limit"),
    ],
)
async def test_a_tunnel_ends_by_the_clock(
    tmp_path: Path, limits: dict[str, float], told: str, mock_clock: MockClock
) -> None:
    async with open_desk(tmp_path) as desk, open_host(echo) as port:
        path = await desk.serve([named(f"here.example:{port}")], **limits)
        async with await tunnel(path, f"here.example:{port}") as stream:
            mock_clock.jump(39)
            await stream.send_all(b"x")
            assert await stream.receive_some() == b"x"
            mock_clock.jump(41)
            assert await read_all(stream) == b""
        ended = await desk.ended()
    assert (ended["verdict"], ended["reason"]) == ("cut", told)


async def test_a_host_that_says_nothing_to_an_agent_that_has_gone_is_left(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async def silent(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    autojump_clock.autojump_threshold = 0.05  # for what the kernel is slow to bring
    async with open_desk(tmp_path) as desk, open_host(silent) as port:
        path = await desk.serve([named(f"here.example:{port}")])
        async with await tunnel(path, f"here.example:{port}"):
            pass
        ended = await desk.ended()
    assert (ended["verdict"], ended["reason"]) == ("passed", "the agent hung up")
    assert 10_000 <= ended["took_ms"] < 60_000


async def test_rules_that_change_while_a_name_is_looked_up_hold_for_its_connection(tmp_path: Path) -> None:
    begun, go_on = trio.Event(), trio.Event()

    async def slow(host: str, port: int) -> list[Found]:
        begun.set()
        await go_on.wait()
        return [(socket.AF_INET, ("127.0.0.1", port))]

    async with open_desk(tmp_path, slow) as desk, open_host(echo) as port:
        path = await desk.serve([named(f"here.example:{port}")])
        async with await dial(path) as stream:
            await stream.send_all(f"CONNECT here.example:{port} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            await begun.wait()
            await desk.say("rules", rules=wire([f"here.example:{port}"]))
            assert await read_all(stream) == b""
        go_on.set()
        assert (await desk.ended())["reason"] == "it is no longer in egress of agent.toml"


async def flood(stream: trio.SocketStream) -> None:
    while True:
        await stream.send_all(bytes(65_536))


async def sink(stream: trio.SocketStream) -> None:
    while await stream.receive_some(65_536):
        pass


@pytest.mark.parametrize("host", [flood, sink])
async def test_the_bytes_of_a_day_are_bounded_and_more_are_refused(tmp_path: Path, host: Any) -> None:
    async with open_desk(tmp_path) as desk, open_host(host) as port:
        path = await desk.serve([named(f"here.example:{port}")], bytes_per_day=3 * MIB, bytes_today=2 * MIB)
        async with await tunnel(path, f"here.example:{port}") as stream:
            with contextlib.suppress(trio.BrokenResourceError):
                await (flood(stream) if host is sink else read_all(stream))
        ended = await desk.ended()
        assert ended["verdict"] == "cut"
        assert "iris has carried 3,145,728 bytes today, the limit; more from 00:00 UTC" in ended["reason"]
        assert MIB <= ended["sent"] + ended["received"] <= 3 * MIB
        answer = await ask(path, f"CONNECT here.example:{port} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert answer.startswith(b"HTTP/1.1 429 cannot connect to here.example")
        assert (await desk.ended())["verdict"] == "refused"


async def test_connections_over_the_limit_are_turned_away_and_room_comes_back(tmp_path: Path) -> None:
    async with open_desk(tmp_path) as desk, open_host(echo) as port:
        path = await desk.serve([named(f"here.example:{port}")], connections=2)
        request = f"CONNECT here.example:{port} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        first, second = [await tunnel(path, f"here.example:{port}") for _ in range(2)]
        answers: list[bytes] = []
        async with trio.open_nursery() as nursery:

            async def knock() -> None:
                answers.append(await ask(path, request))

            for _ in range(60):  # more than are turned away at once
                nursery.start_soon(knock)
        assert len(answers) == 60
        assert all(b" 429 " in answer and b"2 connections are open, the limit of iris" in answer for answer in answers)
        async with first:
            await first.send_eof()
            assert await read_all(first) == b""
        refused = [await desk.ended() for _ in range(61)]
        assert [one["verdict"] for one in refused].count("refused") == 60
        async with second, await tunnel(path, f"here.example:{port}"):
            pass


async def test_what_the_daemon_cuts_ends_and_the_next_passes(tmp_path: Path) -> None:
    async with open_desk(tmp_path) as desk, open_host(echo) as port:
        path = await desk.serve([named(f"here.example:{port}")])
        async with await tunnel(path, f"here.example:{port}") as stream:
            await desk.say("cut")
            assert await read_all(stream) == b""
        assert (await desk.ended())["verdict"] == "cut"
        async with await tunnel(path, f"here.example:{port}") as stream:
            await stream.send_all(b"again")
            assert await stream.receive_some() == b"again"
            await desk.say("end")
            assert await read_all(stream) == b""
        assert (await desk.ended())["verdict"] == "cut"


async def test_new_rules_cut_what_they_do_not_allow_and_nothing_else(tmp_path: Path) -> None:
    async with open_desk(tmp_path) as desk, open_host(echo) as one, open_host(echo) as other:
        path = await desk.serve([named(f"here.example:{port}") for port in (one, other)])
        async with (
            await tunnel(path, f"here.example:{one}") as gone,
            await tunnel(path, f"here.example:{other}") as kept,
        ):
            await desk.say("rules", rules=wire([named(f"here.example:{other}")]))
            assert await read_all(gone) == b""
            assert (await desk.ended())["reason"] == "it is no longer in egress of agent.toml"
            await kept.send_all(b"still")
            assert await kept.receive_some() == b"still"
            await desk.say("rules", rules=wire([f"here.example:{other}"]))  # the address is no longer named
            assert await read_all(kept) == b""


async def test_agents_have_rules_and_limits_of_their_own(tmp_path: Path) -> None:
    async with open_desk(tmp_path) as desk, open_host(echo) as port:
        mine = await desk.serve([named(f"here.example:{port}")])
        others = await desk.serve([], agent="damocles")
        async with await tunnel(mine, f"here.example:{port}"):
            answer = await ask(others, f"CONNECT here.example:{port} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            assert answer.startswith(b"HTTP/1.1 403 ")
            assert (await desk.ended())["agent"] == "damocles"


async def test_a_proxy_leaves_no_file_open(tmp_path: Path) -> None:
    before = open_files()
    async with open_desk(tmp_path) as desk, open_host(echo) as port, open_host(flood) as flooding:
        path = await desk.serve([named(f"here.example:{one}") for one in (port, flooding)])
        stuck = await tunnel(path, f"here.example:{flooding}")  # it is cut with bytes on their way
        for _ in range(3):
            async with await tunnel(path, f"here.example:{port}") as stream:
                await stream.send_all(b"x")
                await stream.receive_some(1)
            await ask(path, b"CONNECT other.example:1 HTTP/1.1\r\nHost: x\r\n\r\n")
            await ask(path, b"junk\r\n\r\n")
        held = await tunnel(path, f"here.example:{port}")
    await held.aclose()
    await stuck.aclose()
    assert open_files() == before


class CountedPipes(Pipes):
    lent = 0

    def _make(self) -> tuple[int, int] | None:
        self.lent += 1
        return super()._make()


@pytest.mark.parametrize(("pipes_limit", "is_much"), [(1, True), (1, False), (0, True)])
async def test_bytes_are_carried_in_order_through_full_buffers_and_much_through_a_pipe(
    pipes_limit: int, is_much: bool
) -> None:
    pipes = CountedPipes(pipes_limit)
    (a, source), (sink, b) = trio.socket.socketpair(), trio.socket.socketpair()
    a.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES if is_much else 64 * 1024)
    sent, counted, received = bytes(range(251)) * 40_000, [], bytearray()
    with a, b, source, sink:
        view = memoryview(sent)
        with contextlib.suppress(BlockingIOError):
            while True:  # full before anybody reads
                view = view[os.write(a.fileno(), view) :]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(carry, source, sink, pipes, counted.append)

            async def send(view: memoryview) -> None:
                while view:
                    view = view[await a.send(view) :]
                a.shutdown(socket.SHUT_WR)

            nursery.start_soon(send, view)
            while data := await b.recv(10_007):
                received += data
    assert bytes(received) == sent
    assert sum(counted) == len(sent)
    assert bool(pipes.lent) == bool(pipes_limit and is_much)


async def test_a_peer_that_reads_nothing_holds_up_nobody_else(tmp_path: Path) -> None:
    async with open_desk(tmp_path) as desk, open_host(flood) as flooding, open_host(echo) as port:
        path = await desk.serve([named(f"here.example:{one}") for one in (flooding, port)])
        async with await tunnel(path, f"here.example:{flooding}"), await tunnel(path, f"here.example:{port}") as other:
            await other.send_all(b"here")
            assert await other.receive_some() == b"here"


async def test_the_next_address_is_tried_where_one_does_not_answer(tmp_path: Path) -> None:
    async with open_host(echo, "127.0.0.1") as port:
        resolver = resolver_of({"here.example": ["127.0.0.77", "127.0.0.1"]})
        async with open_desk(tmp_path, resolver) as desk:
            path = await desk.serve([named(f"here.example:{port}")])
            async with await tunnel(path, f"here.example:{port}"):
                pass
            assert (await desk.ended())["address"] == "127.0.0.1"


async def test_an_address_of_a_family_that_this_machine_does_not_have_leaves_the_others(tmp_path: Path) -> None:
    """As where the kernel was started without IPv6; here it is a family that no kernel has."""

    async def resolve(host: str, port: int) -> list[Found]:
        return [(NO_FAMILY, ("2a00::1", port)), *([(socket.AF_INET, ("127.0.0.1", port))] if host != "six" else [])]

    async with open_host(echo) as port, open_desk(tmp_path, resolve) as desk:
        path = await desk.serve([named(f"here.example:{port}"), named(f"six:{port}")])
        async with await tunnel(path, f"here.example:{port}"):
            pass
        assert (await desk.ended())["address"] == "127.0.0.1"
        answer = await ask(path, f"CONNECT six:{port} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert answer.startswith(b"HTTP/1.1 502 cannot connect to six:%d: Address family not supported" % port)


async def test_a_client_that_never_asks_is_no_connection(tmp_path: Path) -> None:
    async with open_desk(tmp_path) as desk, open_host(echo) as port:
        path = await desk.serve([named(f"here.example:{port}")])
        async with await dial(path):
            pass
        async with await tunnel(path, f"here.example:{port}"):
            pass
        assert (await desk.ended())["id"] == 1
