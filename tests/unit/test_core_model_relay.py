from __future__ import annotations

import gc
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import h11
import httpx2
import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from hive_core.credentials import Credential
from hive_core.protocol.words import AgentName
from hive_core.services.access import Access, Closed
from hive_core.sockets import model, request_body
from hive_core.sockets.http import serve_asgi
from hive_core.sockets.model import ModelRelay, passed_headers
from hive_core.sockets.unix import listen_unix
from hive_core.store.bus import Bus
from hive_core.usage import Call as Ended
from tests.hives import PATIENCE_S

KEY = Credential("api_key", "ANTHROPIC_API_KEY", "sk-real")
PLACEHOLDER = "placeholder-of-the-agent"


@dataclass
class Call:
    """One request as the provider got it, and the means to answer it."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes
    stream: trio.SocketStream

    def values(self, name: str) -> list[str]:
        return [value for header, value in self.headers if header == name]

    async def say(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def wait_hung_up(self) -> None:
        try:
            while await self.stream.receive_some():
                pass
        except trio.BrokenResourceError:
            pass


async def plain_answer(call: Call) -> None:
    await call.say(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}")


@dataclass
class Provider:
    """A model provider on loopback that answers as the test says and remembers what it was asked."""

    answer: Callable[[Call], Awaitable[None]] = plain_answer
    calls: list[Call] = field(default_factory=list)

    async def serve_one(self, stream: trio.SocketStream) -> None:
        connection = h11.Connection(h11.SERVER)
        request, body = None, b""
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                data = await stream.receive_some()
                if not data:
                    return
                connection.receive_data(data)
            elif isinstance(event, h11.Request):
                request = event
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            else:
                break
        assert request is not None
        headers = [(name.decode(), value.decode()) for name, value in request.headers]
        call = Call(request.method.decode(), request.target.decode(), headers, body, stream)
        self.calls.append(call)
        async with stream:
            await self.answer(call)


@dataclass
class Bench:
    """An agent's model.sock before a provider."""

    provider: Provider
    relay: ModelRelay
    path: Path
    calls: trio.MemoryReceiveChannel[Ended]
    access: Access
    answers: list[tuple[str, int, httpx2.Headers]]
    credential: Credential | None = KEY
    closed: Closed | None = None
    full: Closed | None = None
    begun: list[int] = field(default_factory=list)
    moved: list[dict[str, int]] = field(default_factory=list)

    async def ended(self) -> Ended:
        """The call that was told of next."""
        with trio.fail_after(PATIENCE_S):
            return await self.calls.receive()

    async def heard(self) -> dict[str, int] | None:
        """The usage that was told next."""
        return (await self.ended()).usage

    def close(self, closed: Closed | None) -> None:
        self.closed = closed
        self.access.changed()

    @property
    def heard_nothing(self) -> bool:
        return self.calls.statistics().current_buffer_used == 0

    @asynccontextmanager
    async def agent(self) -> AsyncIterator[httpx2.AsyncClient]:
        """An HTTP client inside the container."""
        transport = httpx2.AsyncHTTPTransport(uds=str(self.path))
        async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1:9", timeout=PATIENCE_S) as client:
            yield client

    async def post(self, path: str = "/v1/messages", **options: Any) -> httpx2.Response:
        async with self.agent() as client:
            return await client.post(path, **options)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    provider = Provider()
    tell, told = trio.open_memory_channel[Ended](100)
    access = Access(Bus(), [lambda _: bench.closed])
    answers: list[tuple[str, int, httpx2.Headers]] = []

    async with trio.open_nursery() as nursery, httpx2.AsyncClient(timeout=PATIENCE_S, trust_env=False) as client:
        listeners = await nursery.start(partial(trio.serve_tcp, provider.serve_one, 0, host="127.0.0.1"))
        port = listeners[0].socket.getsockname()[1]
        relay = ModelRelay(
            AgentName("iris"),
            client,
            f"http://127.0.0.1:{port}",
            access,
            lambda: bench.credential,
            lambda credential, status, headers: answers.append((credential.name, status, headers)),
            lambda call: tell.send_nowait(call) if call.reached else None,
            lambda call: bench.begun.append(call.request_bytes) or bench.full,  # type: ignore[func-returns-value]
            lambda call: bench.moved.append(dict(call.usage or {})),
        )
        path = tmp_path / "model.sock"
        bench = Bench(provider, relay, path, told, access, answers)
        nursery.start_soon(serve_asgi, relay, listen_unix(path))
        with trio.fail_after(3 * PATIENCE_S):
            yield bench
        nursery.cancel_scope.cancel()


# -- the request ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("credential", "header", "value"),
    [
        (KEY, "x-api-key", "sk-real"),
        (Credential("oauth_token", "file", "oauth-real"), "authorization", "Bearer oauth-real"),
    ],
)
async def test_the_credential_takes_the_place_of_every_placeholder(
    bench: Bench, credential: Credential, header: str, value: str
) -> None:
    bench.credential = credential
    sent = {"X-Api-Key": PLACEHOLDER, "Authorization": f"Bearer {PLACEHOLDER}", "Proxy-Authorization": PLACEHOLDER}
    assert (await bench.post(headers=sent, content=b"{}")).status_code == 200
    (call,) = bench.provider.calls
    assert call.values(header) == [value]
    assert not any(PLACEHOLDER in value for _, value in call.headers)
    assert {name for name, _ in call.headers if name in ("x-api-key", "authorization")} == {header}


async def test_a_token_goes_with_the_beta_without_which_it_would_be_refused(bench: Bench) -> None:
    bench.credential = Credential("oauth_token", "file", "oauth-real")
    await bench.post(headers={"anthropic-beta": "a,b"}, content=b"{}")
    assert bench.provider.calls[0].values("anthropic-beta") == ["a,b", "oauth-2025-04-20"]


async def test_what_the_agent_says_of_itself_passes_and_what_is_between_two_hops_does_not(bench: Bench) -> None:
    sent = {
        "anthropic-version": "2023-06-01",
        "anthropic-beta": "a,b",
        "user-agent": "claude-cli/9",
        "content-type": "application/json",
        "connection": "keep-alive, X-Secret-Hop",
        "x-secret-hop": "1",
        "keep-alive": "timeout=5",
        "te": "trailers",
        "upgrade": "h2c",
        "accept-encoding": "gzip, br",
        "expect": "100-continue",
        "host": "127.0.0.1:9",
    }
    await bench.post(headers=sent, content=b"{}")
    headers = dict(bench.provider.calls[0].headers)
    for name in ("anthropic-version", "anthropic-beta", "user-agent", "content-type"):
        assert headers[name] == sent[name]
    assert headers["host"] == bench.relay.base_url.removeprefix("http://")
    assert headers["accept-encoding"] == "identity"
    for name in ("x-secret-hop", "te", "upgrade", "expect", "keep-alive"):
        assert name not in headers


async def test_no_header_of_the_relays_own_library_is_added(bench: Bench) -> None:
    lines = b"POST /v1/messages HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}"
    async with await trio.open_unix_socket(str(bench.path)) as stream:
        await stream.send_all(lines)
        await stream.receive_some()
    assert {name for name, _ in bench.provider.calls[0].headers} == {
        "host",
        "content-length",
        "accept-encoding",
        "x-api-key",
    }


async def test_a_query_and_a_body_of_any_bytes_arrive_as_they_were_sent(bench: Bench) -> None:
    body = bytes(range(256)) * 3000
    await bench.post("/v1/messages?beta=true&x=%20%2F", content=body)
    (call,) = bench.provider.calls
    assert (call.method, call.target) == ("POST", "/v1/messages?beta=true&x=%20%2F")
    assert call.body == body
    assert call.values("content-length") == [str(len(body))]


async def test_a_body_of_unknown_length_arrives_whole(bench: Bench) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for n in range(20):
            yield bytes([n]) * 1000

    await bench.post(content=pieces())
    (call,) = bench.provider.calls
    assert call.body == b"".join(bytes([n]) * 1000 for n in range(20))
    assert call.values("transfer-encoding") == ["chunked"]


@pytest.mark.parametrize("announced", [True, False])
async def test_a_body_over_the_limit_is_refused_with_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, announced: bool
) -> None:
    for module in (model, request_body):
        monkeypatch.setattr(module, "BODY_LIMIT_BYTES", 1000)

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b"x" * 100

    answer = await bench.post(content=b"x" * 1001 if announced else pieces())
    assert answer.status_code == 413
    assert "1,000 bytes" in answer.json()["error"]["message"]


async def test_one_agents_cookies_are_not_sent_for_another(bench: Bench) -> None:
    async def bakes(call: Call) -> None:
        await call.say(b"HTTP/1.1 200 OK\r\nset-cookie: who=iris; Path=/\r\ncontent-length: 2\r\n\r\n{}")

    bench.provider.answer = bakes
    await bench.post(content=b"{}")
    await bench.post(content=b"{}")
    assert [call.values("cookie") for call in bench.provider.calls] == [[], []]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", "/v1/messages"),
        ("PUT", "/v1/messages"),
        ("DELETE", "/v1/messages"),
        ("HEAD", "/v1/messages"),
        ("POST", "/"),
        ("POST", "/v1/messages/"),
        ("POST", "/v1/messages/../files"),
        ("POST", "//v1/messages"),
        ("POST", "/V1/MESSAGES"),
        ("POST", "/v1/messages/batches"),
        ("POST", "/v1/complete"),
        ("GET", "/v1/models"),
        ("GET", "/v1/organizations/api_keys"),
        ("POST", "/v1/files\x1b[31m"),
        ("POST", "/" + "x" * 5000),
    ],
)
async def test_what_the_program_does_not_use_is_refused_with_a_sentence_and_goes_nowhere(
    bench: Bench, method: str, path: str
) -> None:
    raw = path.encode().replace(b"\x1b", b"%1b").replace(b"[", b"%5b")
    async with await trio.open_unix_socket(str(bench.path)) as stream:
        await stream.send_all(method.encode() + b" " + raw + b" HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        answer = b"".join([data async for data in stream])
    assert answer.startswith(b"HTTP/1.1 403")
    if method != "HEAD":
        body = json.loads(answer.partition(b"\r\n\r\n")[2])
        assert body["error"]["type"] == "permission_error"
        assert f"does not pass {method} " in body["error"]["message"]
        assert len(body["error"]["message"]) < 200
    assert bench.provider.calls == []


async def test_the_programs_probe_is_answered_by_the_relay_itself(bench: Bench) -> None:
    async with bench.agent() as client:
        assert (await client.head("/")).status_code == 200
    assert bench.provider.calls == []


async def test_tokens_may_be_counted(bench: Bench) -> None:
    assert (await bench.post("/v1/messages/count_tokens", content=b"{}")).status_code == 200
    assert bench.provider.calls[0].target == "/v1/messages/count_tokens"


@pytest.mark.parametrize(("status", "told"), [(429, False), (529, False), (200, False), (401, True), (403, True)])
async def test_how_often_tokens_may_be_counted_says_nothing_of_how_often_the_model_may_be_called(
    bench: Bench, status: int, told: bool
) -> None:
    async def answers(call: Call) -> None:
        await call.say(f"HTTP/1.1 {status} X\r\ncontent-length: 2\r\n\r\n{{}}".encode())

    bench.provider.answer = answers
    assert (await bench.post("/v1/messages/count_tokens", content=b"{}")).status_code == status
    assert bool(bench.answers) == told
    await bench.post(content=b"{}")
    assert len(bench.answers) == 1 + told


# -- when it cannot be ------------------------------------------------------------------------------------------------


PAUSED = Closed("paused", "iris is paused by the operator")


async def test_while_its_way_is_closed_an_agent_is_told_why_and_the_provider_hears_nothing(bench: Bench) -> None:
    bench.close(PAUSED)
    answer = await bench.post(content=b"{}")
    assert (answer.status_code, answer.json()["error"]["message"]) == (503, PAUSED.sentence)
    assert answer.headers["x-should-retry"] == "false"
    assert (bench.provider.calls, bench.heard_nothing) == ([], True)
    bench.close(None)
    assert (await bench.post(content=b"{}")).status_code == 200


async def test_a_reason_answers_with_its_own_status(bench: Bench) -> None:
    bench.close(Closed("needs_login", "no credential works", status=401))
    answer = await bench.post(content=b"{}")
    assert (answer.status_code, answer.json()["error"]["type"]) == (401, "authentication_error")


@pytest.mark.parametrize("moment", ["before the answer", "in the answer"])
async def test_a_call_under_way_is_cut_when_the_way_closes(bench: Bench, moment: str) -> None:
    asked, ended = trio.Event(), trio.Event()

    async def goes_on(call: Call) -> None:
        if moment == "in the answer":
            await call.say(STREAM_HEAD + chunk(EVENTS[0]))
        asked.set()
        await call.wait_hung_up()
        ended.set()

    async def close() -> None:
        await asked.wait()
        bench.access.changed()  # that something else changed cuts nothing
        await trio.testing.wait_all_tasks_blocked()
        assert not ended.is_set()
        bench.close(PAUSED)

    bench.provider.answer = goes_on
    async with trio.open_nursery() as nursery:
        nursery.start_soon(close)
        if moment == "in the answer":
            with pytest.raises(httpx2.RemoteProtocolError):
                await bench.post(content=b"{}")
        else:
            answer = await bench.post(content=b"{}")
            assert (answer.status_code, answer.json()["error"]["message"]) == (503, PAUSED.sentence)
        await ended.wait()
    call = await bench.ended()
    status, usage = (
        (200, {"input_tokens": 25, "estimated_output_tokens": 1}) if moment == "in the answer" else (0, None)
    )
    assert (call.status, call.usage, call.complete, call.request_bytes) == (status, usage, False, 2)


async def test_an_answer_that_came_whole_and_was_cut_before_it_was_passed_on_is_not_complete(bench: Bench) -> None:
    async def streams(call: Call) -> None:
        await call.say(STREAM_HEAD + b"".join(chunk(event) for event in EVENTS) + b"0\r\n\r\n")

    bench.provider.answer = streams
    bench.relay.call_moved = lambda _: bench.close(PAUSED)  # as a budget does that is spent by it
    for _ in range(20):
        bench.close(None)
        try:
            whole = (await bench.post(content=b"{}")).status_code == 200
        except httpx2.RemoteProtocolError:
            whole = False
        assert not (await bench.ended()).complete or whole


async def test_outside_any_turn_no_call_passes_and_it_is_told(bench: Bench) -> None:
    tried = []

    async def unleased() -> None:
        await trio.lowlevel.checkpoint()
        tried.append("iris")

    bench.relay.turn, bench.relay.unleased = lambda: None, unleased
    answer = await bench.post(content=b"{}")
    assert (answer.status_code, answer.headers["x-should-retry"]) == (403, "false")
    assert "no turn of iris runs" in answer.json()["error"]["message"]
    assert (bench.provider.calls, bench.heard_nothing, tried) == ([], True, ["iris"])
    async with bench.agent() as client:
        assert (await client.head("/")).status_code == 200
    bench.relay.turn = lambda: 7
    assert (await bench.post(content=b"{}")).status_code == 200


async def test_the_status_and_the_headers_of_each_answer_are_told(bench: Bench) -> None:
    async def answers(call: Call) -> None:
        await call.say(b"HTTP/1.1 429 Too Many Requests\r\nretry-after: 7\r\ncontent-length: 0\r\n\r\n")

    bench.provider.answer = answers
    await bench.post(content=b"{}")
    ((credential, status, headers),) = bench.answers
    assert (credential, status, headers["retry-after"]) == ("default", 429, "7")
    assert (await bench.ended()).status == 429


async def test_without_a_credential_the_answer_says_how_to_give_one(bench: Bench) -> None:
    bench.credential = None
    answer = await bench.post(content=b"{}", headers={"x-api-key": PLACEHOLDER})
    assert answer.status_code == 401
    assert "no credential" in answer.json()["error"]["message"]
    assert bench.provider.calls == []


async def test_a_provider_that_is_down_is_502_and_the_credential_is_not_told(bench: Bench) -> None:
    bench.relay.base_url = "http://127.0.0.1:1"
    answer = await bench.post(content=b"{}")
    assert answer.status_code == 502
    assert "cannot be reached" in answer.json()["error"]["message"]
    assert "sk-real" not in answer.text


async def test_a_provider_that_hangs_up_without_an_answer_is_502(bench: Bench) -> None:
    async def leaves(call: Call) -> None:
        pass

    bench.provider.answer = leaves
    assert (await bench.post(content=b"{}")).status_code == 502
    assert len(bench.provider.calls) == 1, "on a connection of its own the work may have begun"


async def leaves_at_the_next_call(call: Call, read_bytes: int = 65_536) -> None:
    """The connection is kept, and closed when another call comes on it. Of that some bytes are read."""
    await plain_answer(call)
    assert await call.stream.receive_some(read_bytes)


# What is not read when a connection is closed resets it.
@pytest.mark.parametrize("read_bytes", [65_536, 1])
async def test_a_call_that_meets_the_end_of_a_kept_connection_goes_out_once_more(bench: Bench, read_bytes: int) -> None:
    bench.provider.answer = partial(leaves_at_the_next_call, read_bytes=read_bytes)

    async def pieces() -> AsyncIterator[bytes]:
        for piece in (b"{", b"1", b"}"):
            yield piece

    for content in (b"first", b"whole", pieces()):
        assert (await bench.post(content=content)).status_code == 200
    assert [call.body for call in bench.provider.calls] == [b"first", b"whole", b"{1}"]
    for _ in range(3):
        assert (await bench.ended()).complete
    assert len(bench.answers) == 3


async def test_a_call_that_meets_the_end_of_every_kept_connection_goes_out_over_a_fresh_one(bench: Bench) -> None:
    both = trio.Event()

    async def answers_two_at_once(call: Call) -> None:
        if len(bench.provider.calls) == 2:
            both.set()
        await both.wait()
        await leaves_at_the_next_call(call)

    bench.provider.answer = answers_two_at_once
    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(partial(bench.post, content=b"{}"))
    assert (await bench.post(content=b"third")).status_code == 200
    assert [call.body for call in bench.provider.calls] == [b"{}", b"{}", b"third"]


@pytest.mark.parametrize(("bound", "value"), [("AT_ONCE_S", 0.0), ("KEPT_BYTES", 1)])
async def test_a_call_whose_work_may_have_begun_or_whose_body_is_gone_does_not_go_out_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, bound: str, value: float
) -> None:
    monkeypatch.setattr(request_body, bound, value)
    bench.provider.answer = leaves_at_the_next_call
    assert (await bench.post(content=b"{}")).status_code == 200
    assert (await bench.post(content=b"{}")).status_code == 502
    assert len(bench.provider.calls) == 1


async def test_a_call_goes_out_once_more_and_no_more(bench: Bench) -> None:
    async def answers_once(call: Call) -> None:
        if len(bench.provider.calls) == 1:
            await leaves_at_the_next_call(call)

    bench.provider.answer = answers_once
    assert (await bench.post(content=b"{}")).status_code == 200
    assert (await bench.post(content=b"{}")).status_code == 502
    assert len(bench.provider.calls) == 2


@pytest.mark.parametrize("status", [400, 401, 429, 529])
async def test_an_error_of_the_provider_passes_with_its_headers_and_bytes(bench: Bench, status: int) -> None:
    body = b'{"type":"error","error":{"type":"rate_limit_error"}}'

    async def errs(call: Call) -> None:
        await call.say(
            f"HTTP/1.1 {status} No\r\nretry-after: 7\r\nx-should-retry: false\r\n"
            f"anthropic-ratelimit-unified-reset: 123\r\ncontent-length: {len(body)}\r\n\r\n".encode()
            + body
        )

    bench.provider.answer = errs
    answer = await bench.post(content=b"{}")
    assert (answer.status_code, answer.content) == (status, body)
    assert [
        answer.headers[name] for name in ("retry-after", "x-should-retry", "anthropic-ratelimit-unified-reset")
    ] == ["7", "false", "123"]


async def test_a_redirect_is_the_agents_to_see_and_the_credential_does_not_follow_it(bench: Bench) -> None:
    async def redirects(call: Call) -> None:
        await call.say(
            f"HTTP/1.1 307 Go\r\nlocation: {bench.relay.base_url}/v1/messages\r\ncontent-length: 0\r\n\r\n".encode()
        )

    bench.provider.answer = redirects
    assert (await bench.post(content=b"{}", follow_redirects=False)).status_code == 307
    assert len(bench.provider.calls) == 1


# -- the answer -------------------------------------------------------------------------------------------------------

EVENTS = [
    b"event: message_start\n"
    b'data: {"type":"message_start","message":{"model":"claude-x","usage":{"input_tokens":25,"output_tokens":1}}}\n\n',
    'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"text":"é😀 \\"usage\\""}}\n\n'.encode(),
    b'event: message_delta\ndata: {"type":"message_delta","usage":{"output_tokens":15}}\n\n',
    b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
]
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


async def test_a_chunk_arrives_before_the_answer_ends_and_its_usage_is_told_at_the_end(bench: Bench) -> None:
    seen = [trio.Event() for _ in EVENTS]

    async def streams(call: Call) -> None:
        await call.say(STREAM_HEAD)
        for event, arrived in zip(EVENTS, seen, strict=True):
            await call.say(chunk(event))
            await arrived.wait()  # the next comes only when this one has arrived
        await call.say(b"0\r\n\r\n")

    bench.provider.answer = streams
    got = b""
    async with bench.agent() as client, client.stream("POST", "/v1/messages", content=b"{}") as answer:
        assert answer.headers["content-type"] == "text/event-stream"
        assert bench.heard_nothing
        async for piece in answer.aiter_raw():
            got += piece
            for n, arrived in enumerate(seen):
                if got.startswith(b"".join(EVENTS[: n + 1])):
                    arrived.set()
    assert got == b"".join(EVENTS)
    call = await bench.ended()
    assert call.usage == {"input_tokens": 25, "output_tokens": 15}
    assert (call.model, call.status, call.complete) == ("claude-x", 200, True)


async def test_an_answer_of_any_bytes_passes_as_it_is(bench: Bench) -> None:
    body = bytes(range(256)) * 2000

    async def answers(call: Call) -> None:
        await call.say(
            b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\nconnection: x-hop\r\nx-hop: 1\r\nkeep-alive: 5\r\n"
            + f"content-length: {len(body)}\r\n\r\n".encode()
            + body
        )

    bench.provider.answer = answers
    async with bench.agent() as client, client.stream("POST", "/v1/messages", content=b"{}") as answer:
        got = b"".join([piece async for piece in answer.aiter_raw()])
        assert answer.headers["content-encoding"] == "gzip"
        assert "x-hop" not in answer.headers
        assert "keep-alive" not in answer.headers
    assert got == body
    assert await bench.heard() is None


async def test_the_usage_of_a_whole_answer_is_told(bench: Bench) -> None:
    body = json.dumps(
        {"usage": {"input_tokens": 3, "output_tokens": 4, "service_tier": "standard"}}, indent=None
    ).encode()

    async def answers(call: Call) -> None:
        await call.say(f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)

    bench.provider.answer = answers
    await bench.post(content=b"{}")
    assert await bench.heard() == {"input_tokens": 3, "output_tokens": 4}


async def test_a_stream_that_is_cut_reaches_the_agent_cut_and_what_it_cost_is_told(bench: Bench) -> None:
    async def cuts(call: Call) -> None:
        await call.say(STREAM_HEAD + chunk(EVENTS[0]) + b"ff\r\nhalf")

    bench.provider.answer = cuts
    with pytest.raises(httpx2.RemoteProtocolError):
        await bench.post(content=b"{}")
    assert await bench.heard() == {"input_tokens": 25, "estimated_output_tokens": 1}
    bench.provider.answer = plain_answer
    assert (await bench.post(content=b"{}")).status_code == 200


async def test_a_call_that_has_to_wait_for_others_is_refused_so_that_its_program_tries_again(bench: Bench) -> None:
    bench.full = Closed("over_budget", "calls under way may cost all that is left", status=429)
    answer = await bench.post(content=b"{}")
    assert (answer.status_code, answer.json()["error"]["message"]) == (429, bench.full.sentence)
    assert "x-should-retry" not in answer.headers
    assert not bench.provider.calls
    assert bench.heard_nothing
    bench.full = None
    assert (await bench.post(content=b"{}")).status_code == 200


async def test_a_call_begins_with_the_size_that_it_announces_or_the_largest_and_ends_with_its_own(bench: Bench) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"{"
        yield b"}"

    for content in (b"{}", pieces()):
        await bench.post(content=content)
        assert (await bench.ended()).request_bytes == 2
    assert bench.begun == [2, model.BODY_LIMIT_BYTES]


async def test_what_the_answer_tells_of_its_tokens_is_passed_on_before_it_ends(bench: Bench) -> None:
    async def streams(call: Call) -> None:
        await call.say(STREAM_HEAD + chunk(EVENTS[0]))
        while len(bench.moved) < 1:
            await trio.testing.wait_all_tasks_blocked()
        await call.say(b"".join(chunk(event) for event in EVENTS[1:]) + b"0\r\n\r\n")

    bench.provider.answer = streams
    await bench.post(content=b"{}")
    assert bench.moved == [
        {"input_tokens": 25, "estimated_output_tokens": 1},
        {"input_tokens": 25, "output_tokens": 15},
    ]


@pytest.mark.parametrize("moment", ["before the answer", "in the answer"])
async def test_an_agent_that_hangs_up_ends_the_call_at_the_provider(bench: Bench, moment: str) -> None:
    asked, ended = trio.Event(), trio.Event()

    async def goes_on(call: Call) -> None:
        if moment == "in the answer":
            await call.say(STREAM_HEAD + chunk(EVENTS[0]))
        asked.set()
        await call.wait_hung_up()
        ended.set()

    bench.provider.answer = goes_on
    async with await trio.open_unix_socket(str(bench.path)) as stream:
        await stream.send_all(b"POST /v1/messages HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}")
        await asked.wait()
        if moment == "in the answer":
            await stream.receive_some()
    with trio.fail_after(PATIENCE_S):
        await ended.wait()
    bench.provider.answer = plain_answer
    assert (await bench.post(content=b"{}")).status_code == 200
    cut = {"input_tokens": 25, "estimated_output_tokens": 1} if moment == "in the answer" else None
    assert await bench.heard() == cut
    assert await bench.heard() is None
    assert bench.heard_nothing


async def test_an_agent_that_hangs_up_in_the_middle_of_its_request_harms_nobody(bench: Bench) -> None:
    async with await trio.open_unix_socket(str(bench.path)) as stream:
        await stream.send_all(b"POST /v1/messages HTTP/1.1\r\nhost: x\r\ncontent-length: 2000\r\n\r\n{")
    assert (await bench.post(content=b"{}")).status_code == 200


@pytest.mark.parametrize("length", ["2", "0" * 20 + "2"])
async def test_a_request_whose_announced_bytes_have_come_is_a_call_though_its_stream_is_left_open(
    bench: Bench, length: str
) -> None:
    asked = trio.Event()

    async def goes_on(call: Call) -> None:
        asked.set()
        await call.wait_hung_up()

    async def left_open() -> AsyncIterator[bytes]:
        yield b"{}"
        await trio.sleep_forever()

    bench.provider.answer = goes_on
    transport = httpx2.AsyncHTTPTransport(uds=str(bench.path), http1=False, http2=True)  # where a length ends nothing
    async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1:9") as client:
        headers = {"content-length": length}
        with trio.fail_after(PATIENCE_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(client.post, "/v1/messages", content=left_open(), headers=headers))
                await asked.wait()
                nursery.cancel_scope.cancel()
    assert (await bench.ended()).reached, "the provider works on it, and charges it"


# -- pure parts -------------------------------------------------------------------------------------------------------


names = st.sampled_from(
    ["Connection", "TE", "X-A", "x-a", "Keep-Alive", "Host", "X-API-Key", "Trailer", "Accept", "X-B"]
)


@settings(deadline=None)
@given(st.lists(st.tuples(names, st.sampled_from(["x-a", "X-B, x-a", "close", ""]))))
def test_only_end_to_end_headers_that_are_not_replaced_pass_in_their_order(headers: list[tuple[str, str]]) -> None:
    raw = [(name.encode(), value.encode()) for name, value in headers]
    named = {
        word.strip().lower()
        for name, value in headers
        if name == "Connection"
        for word in value.split(",")
        if word.strip()
    }
    gone = {"connection", "te", "keep-alive", "trailer", "host", "x-api-key"} | named
    wanted = [(name.encode(), value.encode()) for name, value in headers if name.lower() not in gone]
    assert passed_headers(raw, frozenset({"host", "x-api-key"})) == wanted


# -- junk, and limits -------------------------------------------------------------------------------------------------

GOOD = b"POST /v1/messages HTTP/1.1\r\nHost: x\r\nx-api-key: placeholder\r\nContent-Length: 2\r\n\r\n{}"


def junk(random: Random) -> bytes:
    """Bytes of any kind, or a good request with some of its bytes changed, dropped or said twice."""
    if random.random() < 0.3:
        return random.randbytes(random.randrange(1, 2000))
    data = bytearray(GOOD)
    for _ in range(random.randrange(1, 6)):
        at = random.randrange(len(data))
        match random.randrange(3):
            case 0:
                data[at] = random.randrange(256)
            case 1:
                del data[at : at + random.randrange(1, 12)]
            case _:
                data[at:at] = data[: random.randrange(len(data))]
    return bytes(data)


# The library's own inner stream is left to the garbage collector when an answer is not read to its end; the connection
# is closed all the same.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <async_generator object PoolByteStream")
@pytest.mark.parametrize("seed", range(8))
async def test_generated_junk_reaches_no_other_place_and_the_next_request_is_answered(bench: Bench, seed: int) -> None:
    random = Random(seed)
    for _ in range(12):
        async with await trio.open_unix_socket(str(bench.path)) as stream:
            try:
                await stream.send_all(junk(random))
                await stream.send_eof()
                while await stream.receive_some():
                    pass
            except trio.BrokenResourceError:
                pass
    assert {call.target.partition("?")[0] for call in bench.provider.calls} <= {
        "/v1/messages",
        "/v1/messages/count_tokens",
    }
    assert all(call.values("x-api-key") == ["sk-real"] for call in bench.provider.calls)
    async with bench.agent() as client:
        assert (await client.head("/")).status_code == 200
    gc.collect()  # what is left is warned of here, not in another test


async def test_one_agents_calls_at_a_time_are_limited_and_the_refusal_names_the_limit(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "CALLS_LIMIT", 1)
    arrived, go_on = trio.Event(), trio.Event()

    async def held(call: Call) -> None:
        arrived.set()
        await go_on.wait()
        await plain_answer(call)

    bench.provider.answer = held
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.post)
        await arrived.wait()
        refused = await bench.post()
        assert refused.status_code == 429
        assert "1 calls of iris" in refused.json()["error"]["message"]
        go_on.set()
    bench.provider.answer = plain_answer
    assert (await bench.post()).status_code == 200


async def test_a_credential_that_is_no_header_is_never_quoted(bench: Bench) -> None:
    bench.credential = Credential("api_key", "x", "sk-canary\nsecond")
    answer = await bench.post()
    assert answer.status_code == 502
    assert "canary" not in answer.text
