"""Plain requests through the proxy: what the host gets of them, and what comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from tests.egress_desk import Desk, Scripted, ask, dial, open_desk, open_host, read_all

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
POSTS = ["GET", "HEAD", "POST"]


def plain(port: int, methods: list[str] = POSTS) -> dict[str, Any]:
    return {"to": f"http://here.example:{port}", "addresses": ["127.0.0.0/8"], "methods": methods}


async def exchange(folder: Path, request: str, host: Scripted, body: bytes = b"") -> tuple[bytes, dict[str, Any]]:
    """The answer to a request, in which PORT stands for the host's; and what the daemon was told."""
    async with open_desk(folder) as desk, open_host(host) as port:
        path = await desk.serve([plain(port)])
        answer = await ask(path, request.replace("PORT", str(port)).encode() + body)
        return answer.replace(str(port).encode(), b"PORT"), await desk.ended()


async def test_a_request_is_written_anew_for_the_host(tmp_path: Path) -> None:
    host = Scripted(OK)
    request = (
        "GET http://HERE.example.:PORT?q=1 HTTP/1.1\r\nHost: elsewhere.example\r\nAccept: */*\r\n"
        "Proxy-Authorization: Basic c2VjcmV0\r\nProxy-Connection: keep-alive\r\nConnection: X-Own\r\nX-Own: 1\r\n"
        "Upgrade: websocket\r\nTE: trailers\r\n\r\n"
    )
    answer, told = await exchange(tmp_path, request, host)
    head = host.heard[0].split(b"\r\n")
    assert head[0] == b"GET /?q=1 HTTP/1.1"
    assert head[1].startswith(b"Host: here.example:")
    assert sorted(head[2:]) == [b"", b"", b"Accept: */*", b"Connection: close"]
    assert answer == OK
    assert (told["how"], told["verdict"], told["address"]) == ("GET", "passed", "127.0.0.1")
    assert (told["sent"], told["received"]) == (len(host.heard[0]), len(OK))


@pytest.mark.parametrize(
    ("framing", "body", "heard"),
    [
        ("Content-Length: 4", b"body", b"body"),
        (
            "Transfer-Encoding: chunked",
            b"2\r\nbo\r\n2\r\ndy\r\n0\r\nX-Late: 1\r\n\r\n",
            b"2\r\nbo\r\n2\r\ndy\r\n0\r\n\r\n",
        ),
        ("Content-Length: 4\r\nExpect: 100-continue", b"body", b"body"),
        ("Content-Length: 4\r\nConnection: content-length", b"body", b"body"),
    ],
)
async def test_a_body_arrives_as_it_was_sent(tmp_path: Path, framing: str, body: bytes, heard: bytes) -> None:
    host = Scripted(OK)
    request = f"POST http://here.example:PORT/ HTTP/1.1\r\nHost: x\r\n{framing}\r\n\r\n"
    answer, _ = await exchange(tmp_path, request, host, body)
    assert host.heard[0].endswith(b"\r\n\r\n" + heard)
    assert b"Expect" not in host.heard[0]
    assert answer.endswith(OK)
    assert answer.startswith(b"HTTP/1.1 100 ") == ("Expect" in framing)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (OK, OK),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: X-O\r\nX-O:\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        ),
        (
            b"HTTP/1.0 200 OK\r\n\r\nhello",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        ),
        (b"HTTP/1.1 103 Early\r\n\r\n" + OK, OK),
        (b"HTTP/1.1 304 Not Modified\r\nETag: x\r\n\r\n", b"HTTP/1.1 304 Not Modified\r\nETag: x\r\n\r\n"),
    ],
)
async def test_an_answer_is_read_and_written_anew(tmp_path: Path, given: bytes, told: bytes) -> None:
    answer, _ = await exchange(tmp_path, "GET http://here.example:PORT/ HTTP/1.1\r\nHost: x\r\n\r\n", Scripted(given))
    assert answer == told


async def test_an_old_client_is_answered_to_the_end_of_the_connection(tmp_path: Path) -> None:
    answer, _ = await exchange(tmp_path, "GET http://here.example:PORT/ HTTP/1.0\r\n\r\n", Scripted(OK))
    assert b"Transfer-Encoding" not in answer
    assert answer.endswith(b"\r\n\r\nhello")


async def test_the_length_of_an_answer_to_head_is_told(tmp_path: Path) -> None:
    answer, _ = await exchange(
        tmp_path,
        "HEAD http://here.example:PORT/ HTTP/1.1\r\nHost: x\r\n\r\n",
        Scripted(b"HTTP/1.1 200 OK\r\nContent-Length: 7000000\r\n\r\n"),
    )
    assert answer == b"HTTP/1.1 200 OK\r\nContent-Length: 7000000\r\n\r\n"


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (b"", "it hung up without a whole one"),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "illegal status line"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello", "conflicting Content-Length"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 40_000, "too long|Receive buffer"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nhello", "Transfer-Encoding"),
        (b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\n\r\n", "cannot read the answer"),
    ],
)
async def test_an_answer_that_cannot_be_read_is_told_as_that(tmp_path: Path, given: bytes, why: str) -> None:
    answer, told = await exchange(
        tmp_path, "GET http://here.example:PORT/ HTTP/1.1\r\nHost: x\r\n\r\n", Scripted(given)
    )
    assert answer.startswith(b"HTTP/1.1 502 cannot read the answer of http://here.example:PORT: ")
    assert told["verdict"] == "failed"
    assert any(one in told["reason"] for one in why.split("|")), told["reason"]


async def test_an_answer_that_is_cut_is_not_ended_for_the_client(tmp_path: Path) -> None:
    given = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"
    answer, told = await exchange(
        tmp_path, "GET http://here.example:PORT/ HTTP/1.1\r\nHost: x\r\n\r\n", Scripted(given)
    )
    assert answer == given
    assert told["verdict"] == "failed"
    assert "was cut" in told["reason"]


async def test_an_answer_before_the_end_of_the_request_passes(tmp_path: Path) -> None:
    """And the client is left, since what it still sends would be read as its next request."""
    host = Scripted(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n", wait_for_body=False)
    async with open_desk(tmp_path) as desk, open_host(host) as port:
        path = await desk.serve([plain(port)])
        async with await dial(path) as stream:
            await stream.send_all(
                f"POST http://here.example:{port}/ HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\nx".encode()
            )
            assert (await read_all(stream)).startswith(b"HTTP/1.1 413 Too Large\r\n")
        assert (await desk.ended())["verdict"] == "passed"


async def test_a_client_that_breaks_off_its_body_ends_its_request(tmp_path: Path) -> None:
    async with open_desk(tmp_path) as desk, open_host(Scripted(OK)) as port:
        path = await desk.serve([plain(port)])
        async with await dial(path) as stream:
            await stream.send_all(
                f"POST http://here.example:{port}/ HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nx".encode()
            )
        assert (await desk.ended())["reason"] == "the agent hung up"


async def requests_in_a_row(desk: Desk, path: Path, targets: list[str]) -> list[bytes]:
    """The first lines of the answers to requests that are sent at once over one connection."""
    async with await dial(path) as stream:
        await stream.send_all("".join(f"GET {one} HTTP/1.1\r\nHost: x\r\n\r\n" for one in targets).encode())
        await stream.send_eof()
        answers = await read_all(stream)
    return [line for line in answers.replace(b"hello", b"\r\n").split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]


async def test_a_client_is_kept_and_each_request_has_a_connection_of_its_own(tmp_path: Path) -> None:
    one, other = Scripted(OK), Scripted(OK)
    async with open_desk(tmp_path) as desk, open_host(one) as first, open_host(other) as second:
        path = await desk.serve([plain(first), plain(second)])
        targets = [f"http://here.example:{port}/{n}" for n, port in enumerate((first, second, first))]
        assert await requests_in_a_row(desk, path, targets) == [b"HTTP/1.1 200 OK"] * 3
        assert [(await desk.ended())["port"] for _ in targets] == [first, second, first]
    assert [heard.split()[1] for heard in (*one.heard, *other.heard)] == [b"/0", b"/2", b"/1"]


async def test_the_next_request_of_a_kept_client_is_judged_anew(tmp_path: Path) -> None:
    """As is where a redirect leads: the client asks for that by itself."""
    host = Scripted(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/\r\nContent-Length: 0\r\n\r\n")
    async with open_desk(tmp_path) as desk, open_host(host) as port:
        path = await desk.serve([plain(port)])
        targets = [f"http://here.example:{port}/", f"http://127.0.0.1:{port}/", f"http://here.example:{port}/"]
        first, second = await requests_in_a_row(desk, path, targets)
        assert first == b"HTTP/1.1 302 Found"
        assert second.startswith(b"HTTP/1.1 403 cannot connect: http://127.0.0.1:")
        assert [(await desk.ended())["verdict"] for _ in range(2)] == ["passed", "refused"]
    assert len(host.heard) == 1


async def test_a_silent_host_is_left_by_the_clock(tmp_path: Path) -> None:
    async def silent(stream: trio.SocketStream) -> None:
        await read_all(stream)

    async with open_desk(tmp_path) as desk, open_host(silent) as port:
        path = await desk.serve([plain(port)], idle_s=0.05)
        assert await ask(path, f"GET http://here.example:{port}/ HTTP/1.1\r\nHost: x\r\n\r\n".encode()) == b""
        assert (await desk.ended())["reason"] == "nothing was sent for 0.05 s, the limit"
