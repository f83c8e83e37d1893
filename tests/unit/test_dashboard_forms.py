"""What the operator's forms do, with the script and without it."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest
import trio

from dashboard.forms_read import DRAINED_BYTES, FORM_LIMIT_BYTES
from hive_core.protocol.words import MANAGER, AgentName
from tests.dashboards import OURS, browse, gate_open, hive_of, served
from tests.hives import PATIENCE_S, Services

SCRIPT = {**OURS, "Accept": "application/json"}


async def post(client: httpx2.AsyncClient, path: str, **fields: str) -> Any:
    """What the script's fetch gets."""
    answer = await client.post(path, headers=SCRIPT, data=fields)
    return answer.status_code, answer.json()


async def ask_for_argus(hive: Services) -> tuple[int, str]:
    answer = await hive.gate.spawn.request(MANAGER, AgentName("argus"), "You watch.", "two eyes")
    return answer["approval"], (await hive.approvals.get(answer["approval"])).digest


async def test_a_message_is_sent_as_the_operator(hive: Services) -> None:
    async with browse(hive_of(hive)) as client:
        status, said = await post(client, "/messages", to="iris", body="  hello\r\nthere  ", sender="hm1nd")
    assert (status, said) == (200, {"ok": True, "said": "message 1 is on its way to iris"})
    sent = await hive.broker.messages.one(1)
    assert sent is not None
    assert (sent["sender"], sent["recipient"], sent["body"]) == ("operator", "iris", "  hello\nthere  ")


async def test_a_reply_names_its_message(hive: Services) -> None:
    first = await hive.say("iris", "operator", "which one?")
    async with browse(hive_of(hive)) as client:
        await post(client, "/messages", to="iris", body="that one", in_reply_to=str(first))
        status, _ = await post(client, "/messages", to="iris", body="that one", in_reply_to="99")
    sent = await hive.broker.messages.one(2)
    assert sent is not None
    assert (sent["in_reply_to"], status) == (first, 404)


async def test_a_plain_form_goes_back_to_one_of_our_pages_and_nowhere_else(hive: Services) -> None:
    async with browse(hive_of(hive)) as client:
        for back, goes in (
            ("/", "/"),
            ("/agents/iris", "/agents/iris"),
            ("//evil.example", "/"),
            ("https://evil.example/", "/"),
            ("/agents/iris\r\nSet-Cookie: a=b", "/"),
            ("/agents/../sign-out", "/"),
        ):
            answer = await client.post("/messages", headers=OURS, data={"to": "iris", "body": "x", "back": back})
            assert (answer.status_code, answer.headers["location"]) == (303, goes)


async def test_a_plain_form_that_has_something_to_ask_asks_before_it_acts(hive: Services) -> None:
    house = hive_of(hive)
    fields = {"ask": "begin a <new> session?", "command": "new-session", "value": ""}
    async with browse(house) as client:
        before = await hive.kinds()
        asked = await client.post("/agents/iris/command", headers=OURS, data=fields)
        assert (asked.status_code, await hive.kinds()) == (200, before)
        for shown in (
            "begin a &lt;new&gt; session?",
            '<form method="post" action="/agents/iris/command">',
            '<input type="hidden" name="command" value="new-session">',
            '<a href="/agents/iris">no, go back</a>',
        ):
            assert shown in asked.text
        assert 'name="ask"' not in asked.text
        del fields["ask"]
        done = await client.post("/agents/iris/command", headers=OURS, data=fields)
        assert (done.status_code, done.headers["location"]) == (303, "/agents/iris")
        assert len(await hive.kinds()) > len(before)
        assert (await post(client, "/estop", ask="sure?"))[0] == 200, "the script has asked"
        assert house.freeze.since_ms is not None


async def test_estop_thaw_and_what_forgets_ask_without_the_script_too(hive: Services) -> None:
    house = hive_of(hive)
    async with browse(house) as client:
        for path in ("/", "/agents/iris"):
            page = (await client.get(path)).text
            assert 'action="/estop" data-fetch><input type="hidden" name="ask" value="stop the whole swarm?' in page
        assert 'name="ask" value="begin a new session? iris forgets' in page
        assert 'name="ask" value="cancel the turn of iris?' in page
        await post(client, "/estop", back="/")
        assert 'action="/thaw" data-fetch><input type="hidden" name="ask"' in (await client.get("/")).text


@pytest.mark.parametrize(
    ("fields", "status", "word"),
    [
        ({"to": "nobody", "body": "x"}, 404, "no agent has that name"),
        ({"to": "..", "body": "x"}, 400, "agent's name"),
        ({"to": "operator", "body": "x"}, 400, "reserved"),
        ({"body": "x"}, 400, "agent's name"),
        ({"to": "iris"}, 400, "must be a string"),
        ({"to": "iris", "body": "   "}, 400, "it is empty"),
        ({"to": "iris", "body": "a\0b"}, 400, "NUL"),
        ({"to": "iris", "body": "x" * FORM_LIMIT_BYTES}, 413, f"the limit is {FORM_LIMIT_BYTES:,}"),
        ({"to": "iris", "body": "x", "in_reply_to": "-1"}, 400, "positive whole number"),
        ({"to": "iris", "body": "x", "in_reply_to": "9" * 30}, 400, "positive whole number"),
    ],
)
async def test_a_form_that_cannot_be_taken_says_why(
    hive: Services, fields: dict[str, str], status: int, word: str
) -> None:
    async with browse(hive_of(hive)) as client:
        answered, said = await post(client, "/messages", **fields)
        assert (answered, word in said["error"]["message"]) == (status, True), said
        page = await client.post("/messages", headers=OURS, data=fields)
        assert (page.status_code, page.headers["content-type"]) == (status, "text/html; charset=utf-8")
    assert await hive.value("SELECT count(*) FROM messages") == 0


@pytest.mark.parametrize("size", [FORM_LIMIT_BYTES + 1, DRAINED_BYTES])
async def test_a_body_over_the_limit_is_refused_with_the_limit(hive: Services, size: int) -> None:
    async with browse(hive_of(hive)) as client:
        headers = {**SCRIPT, "Content-Type": "application/x-www-form-urlencoded"}
        answer = await client.post("/messages", headers=headers, content=b"x" * size)
    assert (answer.status_code, f"{FORM_LIMIT_BYTES:,}" in answer.json()["error"]["message"]) == (413, True)


async def test_a_body_that_does_not_end_is_answered_and_the_connection_closed(hive: Services) -> None:
    async with served(hive_of(hive)) as browser, await trio.open_tcp_stream("127.0.0.1", browser.port) as peer:
        kind = "application/x-www-form-urlencoded"
        headers = {**browser.headers, "Origin": f"http://{browser.headers['Host']}", "Content-Type": kind}
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        await peer.send_all(f"POST /messages HTTP/1.1\r\n{head}Content-Length: 99999999\r\n\r\n".encode())
        with trio.fail_after(PATIENCE_S):
            await peer.send_all(b"x" * (DRAINED_BYTES + 100_000))
            got = b""
            while data := await peer.receive_some():
                got += data
    assert got.startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    ("kind", "body", "status"),
    [
        ("text/plain", b"to=iris&body=x", 415),
        ("multipart/form-data", b"--x--", 400),
        ("application/json", b'{"to": "iris", "body": "x"}', 415),
        ("application/x-www-form-urlencoded", b"\xff\xfe", 400),
        ("application/x-www-form-urlencoded", b"to=iris&body=%ff", 400),
        ("application/x-www-form-urlencoded", b"&".join([b"a=b"] * 100), 400),
    ],
)
async def test_a_body_of_another_kind_is_refused(hive: Services, kind: str, body: bytes, status: int) -> None:
    async with browse(hive_of(hive)) as client:
        answer = await client.post("/messages", headers={**SCRIPT, "Content-Type": kind}, content=body)
        assert answer.status_code == status, answer.text
        # Files come with a message and with nothing else.
        files = {"Content-Type": "multipart/form-data; boundary=x"}
        assert (await client.post("/estop", headers={**SCRIPT, **files}, content=b"--x--")).status_code == 415


async def test_the_swarm_is_stopped_and_let_go_by_a_click(hive: Services) -> None:
    ours = hive_of(hive)
    async with browse(ours) as client:
        assert (await post(client, "/estop", back="/"))[0] == 200
        assert ours.freeze.since_ms is not None
        assert "TH4W" in (await client.get("/")).text
        assert (await post(client, "/thaw", back="/"))[0] == 200
        assert "TH4W" not in (await client.get("/agents/iris")).text
    assert ours.freeze.since_ms is None


async def test_approve_makes_the_agent_and_says_so(hive: Services) -> None:
    number, digest = await ask_for_argus(hive)
    ours = hive_of(hive)
    async with browse(ours) as client, gate_open(ours):
        assert await post(client, f"/approvals/{number}/approve", digest=digest) == (
            200,
            {"ok": True, "said": "approved: spawn argus"},
        )
        # A second click, or another tab, gets the same answer and does nothing more.
        status, _ = await post(client, f"/approvals/{number}/approve", digest=digest)
        assert status == 200
    assert (await hive.kinds()).count("agent_created") == 4  # argus and the three that were there
    assert (await hive.agents.get("argus")).settings is not None


async def test_approve_of_something_else_than_was_shown_is_refused(hive: Services) -> None:
    number, digest = await ask_for_argus(hive)
    ours = hive_of(hive)
    async with browse(ours) as client, gate_open(ours):
        for stale in ("0" * 64, digest[:-1], ""):
            status, said = await post(client, f"/approvals/{number}/approve", digest=stale)
            assert (status, said["error"]["code"]) == (409, "conflict")
            status, said = await post(client, f"/approvals/{number}/deny", digest=stale, reason="no")
            assert (status, said["error"]["code"]) == (409, "conflict")
    assert (await hive.approvals.get(number)).state == "pending"


async def test_deny_tells_the_reason_to_whoever_asked(hive: Services) -> None:
    number, digest = await ask_for_argus(hive)
    async with browse(hive_of(hive)) as client:
        status, said = await post(client, f"/approvals/{number}/deny", digest=digest, reason="")
        assert (status, "reason" in said["error"]["message"]) == (400, True)
        await post(client, f"/approvals/{number}/deny", digest=digest, reason="not today")
        status, _ = await post(client, f"/approvals/{number}/approve", digest=digest)
        assert status == 409
    assert "not today" in (await hive.broker.messages.newest("hm1nd"))[-1]["body"]


@pytest.mark.parametrize("number", ["0", "-1", "x", "99", "9" * 40, "١"])
async def test_an_approval_that_is_not_there_is_said_to_be_missing(hive: Services, number: str) -> None:
    async with browse(hive_of(hive)) as client:
        status, _ = await post(client, f"/approvals/{number}/approve", digest="x")
    assert status in (400, 404)
