"""A corpus of what has fooled proxies: each is refused in one line, reaches nobody, and leaves the proxy as it was."""

from __future__ import annotations

import random
import socket
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from hive_core.egress.heads import HEAD_LIMIT_BYTES, No, end_of_head, parse_head
from hive_core.egress.reaching import Found
from tests.egress_desk import Scripted, ask, dial, echo, named, open_desk, open_host, read_all, resolver_of, tunnel

NAME = "here.example"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"

# PORT is the port of a host on this machine's loopback, which NAME is allowed to be at by tunnel and by plain requests.
MALFORMED = {
    "a NUL in the host": (b"CONNECT here.example\0.evil.example:PORT HTTP/1.1\r\nHost: x\r\n\r\n", "a host is labels"),
    "a NUL behind the port": (b"CONNECT here.example:PORT\0 HTTP/1.1\r\nHost: x\r\n\r\n", "as a port"),
    "a NUL in a header": (
        b"CONNECT here.example:PORT HTTP/1.1\r\nHost: x\r\nA: b\0c\r\n\r\n",
        "cannot read the request",
    ),
    "a line end in the target": (b"CONNECT here.example:PORT\r\nX: y HTTP/1.1\r\n\r\n", "no request line"),
    "a CR in the target": (b"CONNECT here.example\r:PORT HTTP/1.1\r\nHost: x\r\n\r\n", "a host is labels"),
    "a CR in a header": (b"GET http://here.example:PORT/ HTTP/1.1\r\nHost: x\r\nA: b\rC: d\r\n\r\n", "cannot read"),
    "two spaces": (b"CONNECT  here.example:PORT HTTP/1.1\r\nHost: x\r\n\r\n", "no request line"),
    "a tab": (b"CONNECT\there.example:PORT\tHTTP/1.1\r\nHost: x\r\n\r\n", "no request line"),
    "an empty line first": (b"\r\nCONNECT here.example:PORT HTTP/1.1\r\nHost: x\r\n\r\n", "no request line"),
    "HTTP/0.9": (b"GET http://here.example:PORT/\r\n\r\n", "no request line"),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "no request line"),
    "HTTP/1.2": (b"CONNECT here.example:PORT HTTP/1.2\r\nHost: x\r\n\r\n", "no request line"),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n\n", "no request line"),
    "origin form": (b"GET / HTTP/1.1\r\nHost: here.example:PORT\r\n\r\n", "names its whole address"),
    "asterisk form": (b"OPTIONS * HTTP/1.1\r\nHost: here.example:PORT\r\n\r\n", "names its whole address"),
    "authority form of GET": (b"GET here.example:PORT HTTP/1.1\r\nHost: x\r\n\r\n", "names its whole address"),
    "absolute form of CONNECT": (b"CONNECT http://here.example:PORT HTTP/1.1\r\nHost: x\r\n\r\n", "cannot use"),
    "a path behind the authority": (b"CONNECT here.example:PORT/ HTTP/1.1\r\nHost: x\r\n\r\n", "as a port"),
    "no port": (b"CONNECT here.example HTTP/1.1\r\nHost: x\r\n\r\n", "it has no port"),
    "an empty port": (b"CONNECT here.example: HTTP/1.1\r\nHost: x\r\n\r\n", "as a port"),
    "a port of 0": (b"CONNECT here.example:0 HTTP/1.1\r\nHost: x\r\n\r\n", "as a port"),
    "a port that wraps": (b"CONNECT here.example:65616 HTTP/1.1\r\nHost: x\r\n\r\n", "as a port"),
    "a port in other digits": ("CONNECT here.example:４４３ HTTP/1.1\r\nHost: x\r\n\r\n".encode(), "as a port"),
    "a signed port": (b"CONNECT here.example:+80 HTTP/1.1\r\nHost: x\r\n\r\n", "as a port"),
    "two ports": (b"CONNECT here.example:PORT:PORT HTTP/1.1\r\nHost: x\r\n\r\n", "cannot use"),
    "https without a tunnel": (b"GET https://here.example:PORT/ HTTP/1.1\r\nHost: x\r\n\r\n", "use CONNECT"),
    "ftp": (b"GET ftp://here.example:PORT/ HTTP/1.1\r\nHost: x\r\n\r\n", "only http is plain"),
    "a fragment": (b"GET http://here.example:PORT/#a HTTP/1.1\r\nHost: x\r\n\r\n", "leave out the #"),
    "a fragment in the authority": (b"GET http://here.example:PORT#@evil.example/ HTTP/1.1\r\nHost: x\r\n\r\n", "#"),
    "a user": (b"GET http://here.example:PORT@evil.example/ HTTP/1.1\r\nHost: x\r\n\r\n", "leave out the @"),
    "a user in a tunnel": (b"CONNECT here.example@evil.example:PORT HTTP/1.1\r\nHost: x\r\n\r\n", "leave out the @"),
    "a backslash": (b"GET http://here.example\\@evil.example/ HTTP/1.1\r\nHost: x\r\n\r\n", "leave out the @"),
    "no host": (b"GET http:///path HTTP/1.1\r\nHost: x\r\n\r\n", "a host is labels"),
    "a percent sign in the host": (b"CONNECT here%2eexample:PORT HTTP/1.1\r\nHost: x\r\n\r\n", "a host is labels"),
    "two trailing dots": (b"CONNECT here.example..:PORT HTTP/1.1\r\nHost: x\r\n\r\n", "a host is labels"),
    "a wildcard": (b"CONNECT *.example:PORT HTTP/1.1\r\nHost: x\r\n\r\n", "a host is labels"),
    "IDN": ("CONNECT Bücher.example:443 HTTP/1.1\r\nHost: x\r\n\r\n".encode(), "write xn--bcher-kva.example"),
    "IDN in a URL": ("GET http://bücher.example/ HTTP/1.1\r\nHost: x\r\n\r\n".encode(), "write xn--bcher-kva.example"),
    "letters of full width": ("CONNECT ｈere.example:PORT HTTP/1.1\r\nHost: x\r\n\r\n".encode(), "write here.example"),
    "an ideographic dot": ("CONNECT here。example:PORT HTTP/1.1\r\nHost: x\r\n\r\n".encode(), "write here.example"),
    "Latin-1": (b"CONNECT b\xfccher.example:443 HTTP/1.1\r\nHost: x\r\n\r\n", "it is not ASCII"),
    "a path that is not ASCII": (
        "GET http://here.example:PORT/ü HTTP/1.1\r\nHost: x\r\n\r\n".encode(),
        "a path is ASCII",
    ),
    "a zone": (b"CONNECT [::1%lo]:PORT HTTP/1.1\r\nHost: x\r\n\r\n", "no zone"),
    "an encoded zone": (b"CONNECT [fe80::1%25eth0]:PORT HTTP/1.1\r\nHost: x\r\n\r\n", "no zone"),
    "IPv6 without brackets": (b"CONNECT ::1:PORT HTTP/1.1\r\nHost: x\r\n\r\n", "write an IPv6 address as"),
    "a name in brackets": (b"CONNECT [here.example]:PORT HTTP/1.1\r\nHost: x\r\n\r\n", "only an IPv6 address"),
    "IPvFuture": (b"CONNECT [v1.a:b]:PORT HTTP/1.1\r\nHost: x\r\n\r\n", "no IPv6 address"),
    "a short address": (b"CONNECT 127.1:PORT HTTP/1.1\r\nHost: x\r\n\r\n", "write 127.0.0.1"),
    "a hexadecimal address": (b"CONNECT 0x7f000001:PORT HTTP/1.1\r\nHost: x\r\n\r\n", "write 127.0.0.1"),
    "a mixed address": (b"CONNECT 0x7f.1:PORT HTTP/1.1\r\nHost: x\r\n\r\n", "write 127.0.0.1"),
    "a decimal address": (b"CONNECT 2130706433:PORT HTTP/1.1\r\nHost: x\r\n\r\n", "write 127.0.0.1"),
    "an octal address": (b"CONNECT 017700000001:PORT HTTP/1.1\r\nHost: x\r\n\r\n", "write 127.0.0.1"),
    "octal parts": (b"CONNECT 0177.0.0.01:PORT HTTP/1.1\r\nHost: x\r\n\r\n", "write 127.0.0.1"),
    "TRACE": (b"TRACE http://here.example:PORT/ HTTP/1.1\r\nHost: x\r\n\r\n", "cannot pass on TRACE"),
    "a small method": (b"get http://here.example:PORT/ HTTP/1.1\r\nHost: x\r\n\r\n", "cannot pass on get"),
    "a method of another protocol": (b"MKCOL http://here.example:PORT/ HTTP/1.1\r\nHost: x\r\n\r\n", "cannot pass on"),
    "two hosts": (b"GET http://here.example:PORT/ HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", "cannot read the request"),
    "no Host": (b"GET http://here.example:PORT/ HTTP/1.1\r\nA: b\r\n\r\n", "cannot read the request"),
    "both framings": (
        b"POST http://here.example:PORT/ HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"0\r\n\r\n",
        "both Transfer-Encoding and Content-Length",
    ),
    "two lengths": (
        b"POST http://here.example:PORT/ HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        "Content-Length",
    ),
    "two lengths in one": (
        b"POST http://here.example:PORT/ HTTP/1.1\r\nHost: x\r\nContent-Length: 5, 6\r\n\r\n",
        "Content-Length",
    ),
    "a signed length": (
        b"POST http://here.example:PORT/ HTTP/1.1\r\nHost: x\r\nContent-Length: +5\r\n\r\n",
        "Content-Length",
    ),
    "a long length": (
        b"POST http://here.example:PORT/ HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"9" * 50 + b"\r\n\r\n",
        "Content-Length",
    ),
    "another coding": (
        b"POST http://here.example:PORT/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        "Transfer-Encoding",
    ),
    "a coding twice": (
        b"POST http://here.example:PORT/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n",
        "Transfer-Encoding",
    ),
    "a space before the colon": (
        b"POST http://here.example:PORT/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding : chunked\r\n\r\n",
        "cannot read the request",
    ),
    "a coding of an old client": (
        b"POST http://here.example:PORT/ HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n",
        "HTTP/1.0 has no Transfer-Encoding",
    ),
    "a folded header": (
        b"POST http://here.example:PORT/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding:\r\n chunked\r\n\r\n",
        "goes on in the next line",
    ),
    "a folded first header": (
        b"GET http://here.example:PORT/ HTTP/1.1\r\n Host: x\r\n\r\n",
        "goes on in the next line",
    ),
    "a tunnel with a body": (
        b"CONNECT here.example:PORT HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello",
        "CONNECT has no body",
    ),
    "a huge head": (
        b"CONNECT here.example:PORT HTTP/1.1\r\nHost: x\r\nA: " + b"a" * HEAD_LIMIT_BYTES + b"\r\n\r\n",
        "longer than 32,768 bytes",
    ),
    "a head without end": (b"CONNECT here.example:PORT HTTP/1.1\r\n" + b"A: b\r\n" * 6_000, "longer than 32,768 bytes"),
    "a line without end": (b"CONNECT " + b"a" * 40_000, "longer than 32,768 bytes"),
}

# Another spelling, or another host: all of them well formed, and none of them in the rules.
UNLISTED = [
    *("127.0.0.1:PORT", "[::1]:PORT", "[::ffff:127.0.0.1]:PORT", "[0:0:0:0:0:ffff:7f00:1]:PORT", "localhost:PORT"),
    *("[64:ff9b::7f00:1]:PORT", "[2002:7f00:1::]:PORT", "[2001:0:7f00:1::]:PORT", "[::7f00:1]:PORT", "0.0.0.0:PORT"),
    *("10.0.0.1:80", "169.254.169.254:80", "[fd00:ec2::254]:80", "localhost.:PORT", "here.example:1"),
    *("xhere.example:PORT", "x.here.example:PORT", "here.example.evil.example:PORT", "here-example:PORT"),
    *("xn--hre-cma.example:PORT", "evil.example:443"),
]


def one_line(answer: bytes) -> tuple[int, str]:
    """The status and the sentence of a no, which is its reason phrase and its body."""
    head, _, body = answer.partition(b"\r\n\r\n")
    version, status, phrase = head.split(b"\r\n")[0].split(b" ", 2)
    assert version == b"HTTP/1.1"
    assert body.decode().encode("ascii", "replace") == phrase + b"\n"
    return int(status), phrase.decode()


async def no_host(stream: trio.SocketStream) -> None:
    raise AssertionError("a host was reached")


async def refusal(folder: Path, request: bytes) -> tuple[int, str, list[dict[str, Any]]]:
    """What a request is refused with, and what the daemon was asked. The proxy serves the next one all the same."""
    async with open_desk(folder) as desk, open_host(no_host) as port, open_host(echo) as other:
        path = await desk.serve([named(f"{NAME}:{port}"), named(f"http://{NAME}:{port}"), named(f"{NAME}:{other}")])
        status, sentence = one_line(await ask(path, request.replace(b"PORT", str(port).encode())))
        async with await tunnel(path, f"{NAME}:{other}"):
            pass
        return status, sentence, desk.asked


@pytest.mark.parametrize("trick", MALFORMED)
async def test_what_can_be_read_in_two_ways_is_refused(tmp_path: Path, trick: str) -> None:
    request, told = MALFORMED[trick]
    status, sentence, asked = await refusal(tmp_path, request)
    assert status == 400
    assert told in sentence
    assert asked == []


@pytest.mark.parametrize("target", UNLISTED)
async def test_another_destination_is_refused_and_asked_for(tmp_path: Path, target: str) -> None:
    for request in (f"CONNECT {target} HTTP/1.1", f"GET http://{target}/ HTTP/1.1"):
        status, sentence, asked = await refusal(tmp_path, f"{request}\r\nHost: {NAME}:PORT\r\n\r\n".encode())
        assert status == 403
        assert sentence.startswith("cannot connect: ")
        assert sentence.endswith("is not in egress of agent.toml; asked the operator (approval 12)")
        assert len(asked) == 1


async def test_an_a_label_is_the_host_that_it_spells(tmp_path: Path) -> None:
    async with (
        open_host(echo) as port,
        open_desk(tmp_path, resolver_of({"xn--bcher-kva.example": ["127.0.0.1"]})) as desk,
    ):
        path = await desk.serve([named(f"xn--bcher-kva.example:{port}")])
        async with await tunnel(path, f"XN--Bcher-kva.example.:{port}"):
            pass


@pytest.mark.parametrize(
    ("addresses", "told"),
    [
        (["127.0.0.1"], "127.0.0.1 is a loopback address"),
        (["::1"], "::1 is a loopback address"),
        (["0.0.0.0"], "0.0.0.0 is an unspecified address"),
        (["::"], ":: is an unspecified address"),
        (["10.0.0.7"], "10.0.0.7 is a private address"),
        (["169.254.169.254"], "169.254.169.254 is an address of cloud metadata"),
        (["100.64.0.1"], "100.64.0.1 is a shared address"),
        (["fe80::1"], "fe80::1 is a link-local address"),
        (["fd00::1"], "fd00::1 is a private address"),
        (["::ffff:127.0.0.1"], "is a loopback address"),
        (["::ffff:10.0.0.7"], "is a private address"),
        (["64:ff9b::7f00:1"], "is a loopback address"),
        (["2002:7f00:1::"], "is an IPv4 address in an IPv6 one"),
        (["2001::1"], "is an IPv4 address in an IPv6 one"),
        (["255.255.255.255"], "is a broadcast address"),
        (["224.0.0.1"], "is a multicast address"),
        (["10.0.0.7", "192.168.0.1", "::1"], "10.0.0.7 is a private address"),
    ],
)
async def test_a_listed_name_does_not_lead_to_an_address_that_is_not_public(
    tmp_path: Path, addresses: list[str], told: str
) -> None:
    async with open_host(no_host) as port, open_desk(tmp_path, resolver_of({NAME: addresses})) as desk:
        path = await desk.serve([f"{NAME}:{port}", f"http://{NAME}:{port}"])
        for request in (f"CONNECT {NAME}:{port} HTTP/1.1", f"GET http://{NAME}:{port}/ HTTP/1.1"):
            status, sentence = one_line(await ask(path, f"{request}\r\nHost: x\r\n\r\n".encode()))
            assert (status, told in sentence) == (403, True), sentence
            ended = await desk.ended()
            assert (ended["verdict"], ended["address"]) == ("refused", None)
        assert desk.asked == []


async def test_of_several_addresses_only_those_that_may_be_are_connected_to(tmp_path: Path) -> None:
    async with open_host(no_host, "127.0.0.2") as port:
        (listener,) = await trio.open_tcp_listeners(port, host="127.0.0.3")
        async with (
            trio.open_nursery() as nursery,
            open_desk(tmp_path, resolver_of({NAME: ["127.0.0.2", "10.0.0.7", "127.0.0.3"]})) as desk,
        ):
            nursery.start_soon(trio.serve_listeners, echo, [listener])
            path = await desk.serve([{"to": f"{NAME}:{port}", "addresses": ["127.0.0.3"]}])
            async with await tunnel(path, f"{NAME}:{port}") as stream:
                await stream.send_eof()
                await read_all(stream)
            assert (await desk.ended())["address"] == "127.0.0.3"
            nursery.cancel_scope.cancel()


async def test_a_name_that_is_bound_anew_after_it_was_judged_leads_nowhere_else(tmp_path: Path) -> None:
    """It is resolved once for a connection, what was judged is connected to, and the next connection is judged anew."""
    answers = ["127.0.0.1", "127.0.0.2", "127.0.0.1"]

    async def rebound(host: str, port: int) -> list[Found]:
        return [(socket.AF_INET, (answers.pop(0), port))]

    async with open_host(Scripted(OK)) as port, open_desk(tmp_path, rebound) as desk:
        path = await desk.serve([{"to": f"http://{NAME}:{port}", "addresses": ["127.0.0.1"]}])
        request = f"GET http://{NAME}:{port}/ HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        assert await ask(path, request) == OK
        assert answers == ["127.0.0.2", "127.0.0.1"]
        assert b"127.0.0.2 is a loopback address" in await ask(path, request)
        assert answers == ["127.0.0.1"]


async def test_a_name_that_is_not_listed_is_never_looked_up(tmp_path: Path) -> None:
    """A look-up is a way out, too."""
    looked_up: list[str] = []

    async def noted(host: str, port: int) -> list[Found]:
        looked_up.append(host)
        return []

    async with open_desk(tmp_path, noted) as desk:
        path = await desk.serve(["*.example:443"])
        await ask(path, b"CONNECT secret.evil.test:443 HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = await ask(path, b"CONNECT a.example:443 HTTP/1.1\r\nHost: x\r\n\r\n")
    assert one_line(answer) == (502, "cannot connect to a.example:443: its name has no address")
    assert looked_up == ["a.example"]


async def test_the_hives_own_ports_are_refused_even_where_the_address_is_named(tmp_path: Path) -> None:
    async with open_desk(tmp_path) as desk, open_host(no_host) as port:
        await desk.channel.send({"op": "own_ports", "ports": [port]})
        path = await desk.serve([named(f"{NAME}:{port}"), f"127.0.0.1:{port}", f"http://127.0.0.9:{port}"])
        for request in (f"CONNECT {NAME}:{port}", f"CONNECT 127.0.0.1:{port}", f"GET http://127.0.0.9:{port}/"):
            status, sentence = one_line(await ask(path, f"{request} HTTP/1.1\r\nHost: x\r\n\r\n".encode()))
            assert status == 403
            assert sentence.endswith(f"port {port} of this machine is the hive's own")


async def test_a_method_that_is_not_the_destinations_is_refused(tmp_path: Path) -> None:
    async with open_desk(tmp_path) as desk, open_host(no_host) as port:
        path = await desk.serve([named(f"http://{NAME}:{port}")])
        request = f"POST http://{NAME}:{port}/ HTTP/1.1\r\nHost: x\r\nContent-Length: 3000000\r\n\r\n".encode()
        async with await dial(path) as stream, trio.open_nursery() as nursery:

            async def send() -> None:
                with pytest.raises(trio.BrokenResourceError):  # what nobody reads is not read without end
                    await stream.send_all(request + bytes(3_000_000))

            nursery.start_soon(send)
            status, sentence = one_line(await read_all(stream))
        assert status == 403
        assert "which has its GET, HEAD" in sentence


async def test_a_no_without_a_word_of_the_daemons_says_how_to_ask(tmp_path: Path, autojump_clock: Any) -> None:
    async with open_desk(tmp_path) as desk:
        desk.sentence = None
        path = await desk.serve([])
        answer = await ask(path, b"CONNECT evil.example:443 HTTP/1.1\r\nHost: x\r\n\r\n")
    assert one_line(answer)[1].endswith("agent.toml; ask the operator for it, or hm1nd to propose it")


async def test_a_sentence_is_one_line_whatever_is_in_it(tmp_path: Path) -> None:
    async with open_desk(tmp_path) as desk:
        desk.sentence = "asked\r\nX-Own: 1\r\n\r\n‹the operator› " + "x" * 1_000
        path = await desk.serve([])
        answer = await ask(path, b"CONNECT evil.example:443 HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b"\r\nX-Own" not in answer
    assert "asked X-Own: 1 ?the operator?" in one_line(answer)[1]


async def test_a_slow_head_is_left_and_holds_up_nobody(tmp_path: Path, autojump_clock: Any) -> None:
    async with open_desk(tmp_path) as desk:
        path = await desk.serve([], connections=2)
        async with await dial(path) as slow, await dial(path) as silent:
            await slow.send_all(b"CONNECT here.ex")
            status, sentence = one_line(await read_all(slow))
            assert (status, sentence) == (408, "cannot read the request: its head did not come within 30 s")
            assert await read_all(silent) == b""


async def test_an_agent_that_asks_without_end_waits_its_turn(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_desk(tmp_path) as desk:
        mine = await desk.serve([], requests_per_s=2.0, burst=3)
        others = await desk.serve([], agent="damocles", requests_per_s=2.0, burst=3)
        times = []
        for path in (*[mine] * 6, others):
            await ask(path, b"CONNECT evil.example:443 HTTP/1.1\r\nHost: x\r\n\r\n")
            times.append(round(autojump_clock.current_time(), 3))
    assert times == [0, 0, 0, 0.5, 1, 1.5, 1.5]


async def test_a_name_that_takes_too_long_is_told_as_that(tmp_path: Path, autojump_clock: Any) -> None:
    async def never(host: str, port: int) -> list[Found]:
        await trio.sleep_forever()
        raise AssertionError

    async with open_desk(tmp_path, never) as desk:
        path = await desk.serve(["a.example:443"])
        answer = await ask(path, b"CONNECT a.example:443 HTTP/1.1\r\nHost: x\r\n\r\n")
    assert one_line(answer) == (504, "cannot connect to a.example:443: it did not answer within 20 s")


async def test_hosts_that_cannot_be_reached_are_told_with_the_reason(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    async with open_desk(tmp_path) as desk:
        path = await desk.serve([named(f"{NAME}:{port}"), "unknown.example:443"])
        answers = [
            one_line(await ask(path, f"CONNECT {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode()))
            for target in (f"{NAME}:{port}", "unknown.example:443")
        ]
        assert answers == [
            (502, f"cannot connect to {NAME}:{port}: Connection refused"),
            (502, "cannot connect to unknown.example:443: its name cannot be resolved (Name or service not known)"),
        ]
        assert [(await desk.ended())["verdict"] for _ in answers] == ["failed", "failed"]


async def test_junk_at_random_costs_only_its_own_connection(tmp_path: Path) -> None:
    dice = random.Random(7)
    seeds = [request for request, _ in MALFORMED.values()]
    async with open_desk(tmp_path) as desk, open_host(echo) as port:
        path = await desk.serve([named(f"{NAME}:{port}")])
        for _ in range(150):
            junk = bytearray(dice.choice(seeds)[:300])
            for _ in range(dice.randrange(1, 6)):
                junk[dice.randrange(len(junk))] = dice.randrange(256)
            await ask(path, bytes(junk))
        async with await tunnel(path, f"{NAME}:{port}"):
            pass


@given(st.binary(max_size=200) | st.sampled_from([request for request, _ in MALFORMED.values()]))
def test_a_head_is_understood_or_refused_and_nothing_else(data: bytes) -> None:
    try:
        end = end_of_head(bytearray(data))
        if end is not None:
            parse_head(bytearray(data), end)
    except No as no:
        assert one_line(no.answer(with_body=True))[0] == 400
