from __future__ import annotations

import json
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from hive_core.protocol.lines import LINE_LIMIT_BYTES
from hive_core.protocol.visible import hides
from hive_core.protocol.words import BODY_LIMIT_BYTES, MANAGER, OPERATOR, AgentName
from hive_core.services.background import Work
from hive_core.services.question_words import Ask
from hive_core.services.reminders import When
from hive_core.sockets.agent import SEARCHES_LIMIT, WAITS_LIMIT, serve_agent
from tests.hives import PATIENCE_S, Services, connect, held_writer, run_in_hive, serve, wait_until
from tests.tools import Program, desk_for, program

IRIS = AgentName("iris")
EVERYBODYS = {
    *("send", "recv", "read_body", "whoami", "list_agents", "search_messages", "ask", "answer", "remind", "cancel"),
    *("loose_ends", "set_profile", "set_status"),
}
MANAGERS = {
    *("request_init_config", "request_spawn", "request_apply_commit", "request_schedule_prompt"),
    *("request_update_meta_inputs", "request_raise_budget", "request_destroy", "cancel_request"),
    *("kill", "start", "restart", "update", "get_logs", "hive_loose_ends"),
}


@pytest.fixture
async def door(hive: Services, tmp_path: Path) -> AsyncIterator[Path]:
    """iris's mcp.sock."""
    async with serve(tmp_path / "iris.sock", partial(serve_agent, desk_for(hive, "iris"))) as path:
        yield path


@pytest.fixture
async def managers_door(hive: Services, tmp_path: Path) -> AsyncIterator[Path]:
    async with serve(tmp_path / "hm1nd.sock", partial(serve_agent, desk_for(hive, "hm1nd"))) as path:
        yield path


async def begin_turn(hive: Services, agent: str = "iris") -> None:
    await hive.say("operator", agent, "begin")
    await hive.broker.lease(AgentName(agent))


async def test_an_agent_has_its_tools_and_the_manager_has_more(door: Path, managers_door: Path) -> None:
    for path, names in ((door, EVERYBODYS), (managers_door, EVERYBODYS | MANAGERS)):
        async with program(path) as client:
            tools = await client.tools()
            assert {tool["name"] for tool in tools} == names
            assert all(tool["description"] for tool in tools)


async def test_what_tools_take_is_told_without_a_word_that_does_not_help_to_call_them(managers_door: Path) -> None:
    """It is in every request to the model."""
    async with program(managers_door) as manager:
        told = json.dumps([tool["inputSchema"] for tool in await manager.tools()])
        for needless in ("title", "null", str(2**63), "exclusiveM", "pattern", "Length", "additionalProperties"):
            assert needless not in told
        assert len(told) < 5_000
        answer = await manager.call("send", to="iris", body="hello", in_reply_to=None, key=None)
    assert answer == {"message": 1}


async def test_the_server_says_who_it_is(door: Path) -> None:
    async with connect(door) as peer:
        result = await Program(peer.stream).greet()
    assert result["serverInfo"]["name"] == "hyperhive"
    assert "tools" in result["capabilities"]


async def test_the_sender_is_the_socket(hive: Services, door: Path) -> None:
    async with program(door) as client:
        assert await client.call("whoami") == {"name": "iris", "role": "agent"}
        sent = await client.call("send", to="damocles", body="hello")
        assert "unknown key" in await client.refusal("send", to="damocles", body="hello", sender="hm1nd")
    assert (await hive.broker.messages.one(sent["message"]) or {})["sender"] == "iris"


@pytest.fixture
async def work(hive: Services, tmp_path: Path) -> AsyncIterator[Path]:
    """hm1nd's mcp.sock in a turn, with mail, and something of each kind that a tool can tell of."""
    for body in ("begin", "first line\nsecond \u202e line", "last"):
        await hive.say("iris", "hm1nd", body)
    await hive.say("hm1nd", "iris", "a note")
    await hive.questions.ask(AgentName("iris"), Ask(MANAGER, "red or blue?", ("red", "blue")))
    await hive.questions.ask(MANAGER, Ask(OPERATOR, "May I?"))
    await hive.reminders.remind(MANAGER, When(after_s=600), "look again")
    await hive.sql("UPDATE deliveries SET state = 'dead', note = 'it broke' WHERE recipient = 'iris'")
    turn = (await hive.broker.lease(MANAGER)).turn.id
    await hive.background.tell(MANAGER, Work("a1", "running", turn, "make test", "", "/state/background/a1.log"))
    (hive.state_dir / "processes").mkdir()
    (hive.state_dir / "processes" / "iris.log").write_text("first\nsecond \u202e\n")

    async with serve(tmp_path / "hm1nd.sock", partial(serve_agent, desk_for(hive, "hm1nd"))) as path:
        yield path


# Each tool's arguments, and what its text has to say of its answer.
CALLS: list[tuple[str, dict[str, Any], list[str]]] = [
    (
        "loose_ends",
        {},
        ["question 1", '"red or blue?"', '"blue"', "question 2", '"look again"', "unread", '"make test"', "message 4"],
    ),
    ("recv", {}, ["message: 2", "from: iris", "> first line\n> second ⟨U+202E⟩ line\n", "message: 3", "> last\n"]),
    ("recv", {}, ["messages: 0"]),
    ("send", {"to": "iris", "body": "hi"}, ["sent as message 7"]),
    ("read_body", {"id": 2}, ["> first line\n> second ⟨U+202E⟩ line", "ends here"]),
    ("whoami", {}, ["hm1nd", "the manager"]),
    ("set_profile", {"pronouns": "they/them", "icon": "🦉"}, ['pronouns "they/them"', 'icon "🦉"']),
    ("set_status", {"text": 'about "it"'}, [r'"about \"it\""']),
    ("list_agents", {}, ["iris: starting, 1 queued", r'"about \"it\""']),
    ("search_messages", {"text": "second"}, ["message 2 from iris to hm1nd", '"first line second']),
    ("search_messages", {"limit": 1}, ["cursor=7"]),
    ("search_messages", {"text": "nowhere"}, ["nothing was found"]),
    ("answer", {"question": 1, "choices": ["red"]}, ["question 1", "message 8"]),
    ("ask", {"to": "iris", "question": "well?"}, ["question 3", "message 9"]),
    ("remind", {"body": "x", "at": "2027-01-31T08:30:00+01:00"}, ["reminder 2", "2027-01-31 07:30:00 UTC"]),
    ("cancel", {"kind": "reminder", "id": 2}, ["reminder 2"]),
    ("cancel", {"kind": "question", "id": 3}, ["question 3", "nobody got it"]),
    ("cancel", {"kind": "thread", "id": 7}, ["thread 7", "taken back: 1", "too late: 0"]),
    ("request_spawn", {"name": "argus", "persona": "You watch.", "reason": "eyes"}, ["approval 1"]),
    (
        "hive_loose_ends",
        {},
        ["approval 1 (spawn argus), asked for by hm1nd: pending", "hm1nd asks operator", "it broke"],
    ),
    ("cancel_request", {"approval": 1, "reason": "not needed"}, ["approval 1"]),
    ("kill", {"agent": "iris"}, ["iris", "stays down"]),
    ("start", {"agent": "iris"}, ["iris is started"]),
    ("get_logs", {"agent": "iris"}, ["the last 2 lines of iris", "> first", "> second ⟨U+202E⟩"]),
]
# Of those that need agents that run, and of what else is asked for: test_core_manager_tools.py, test_core_kinds_*.py.
ELSEWHERE = {"restart", "update", *(tool for tool in MANAGERS if tool.startswith("request_"))} - {"request_spawn"}


def closed(schema: Any) -> Any:
    """The schema with no property beside those that it names."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    more = {"additionalProperties": False} if "properties" in schema else {}
    return {key: closed(part) for key, part in schema.items()} | more


async def test_each_tool_answers_as_its_schema_says_and_in_words_that_hold_all_a_model_needs(work: Path) -> None:
    async with program(work) as client:
        schemas = {tool["name"]: closed(tool["outputSchema"]) for tool in await client.tools()}
        assert {name for name, _, _ in CALLS} == set(schemas) - ELSEWHERE
        for name, arguments, words in CALLS:
            result = await client.result(name, **arguments)
            assert not result.get("isError"), result
            jsonschema.validate(result["structuredContent"], schemas[name])
            (content,) = result["content"]
            for word in words:
                assert word in content["text"]
            assert not hides(content["text"])
            assert not content["text"].startswith("{")


async def test_what_a_tool_takes_and_answers_is_told_without_titles_that_repeat_names(door: Path) -> None:
    async with program(door) as client:
        for tool in await client.tools():
            for schema in (tool["inputSchema"], tool["outputSchema"]):
                assert schema["type"] == "object"
                parts = [schema, *schema.get("$defs", {}).values()]
                assert not [field for part in parts for field in part["properties"].values() if "title" in field]


async def test_an_agent_cannot_call_what_only_the_manager_has(hive: Services, door: Path) -> None:
    async with program(door) as client:
        for tool in MANAGERS:
            assert "the tools are send, recv" in await client.refusal(tool, agent="damocles")
    assert (await hive.agents.get("damocles")).wanted == "up"
    assert await hive.approvals.pending() == []


@pytest.mark.parametrize(
    ("tool", "arguments", "cause"),
    [
        ("fly", {}, "the tools are send, recv"),
        ("send", {"to": "iris"}, "body: "),
        ("send", {"to": "..", "body": "hi"}, "cannot use '..'"),
        ("send", {"to": "a/b", "body": "hi"}, "cannot use 'a/b'"),
        ("send", {"to": "a" * 300, "body": "hi"}, "characters"),
        ("send", {"to": "argus", "body": "hi"}, "cannot send to argus"),
        ("send", {"to": "system", "body": "hi"}, "reserved"),
        ("send", {"to": "damocles", "body": "x" * (512 * 1024 + 1)}, "limit is 524,288"),
        ("send", {"to": "damocles", "body": "  "}, "empty"),
        ("send", {"to": "damocles", "body": "a\0b"}, "NUL"),
        ("send", {"to": "damocles", "body": 7}, "body: "),
        ("send", {"to": "damocles", "body": "hi", "in_reply_to": 77}, "message 77"),
        ("send", {"to": "damocles", "body": "hi", "in_reply_to": 0}, "in_reply_to"),
        ("send", {"to": "damocles", "body": "hi", "in_reply_to": 2**63}, "in_reply_to"),
        ("send", {"to": "damocles", "body": "hi", "in_reply_to": 10**300}, "in_reply_to"),
        ("recv", {"wait_seconds": -1}, "wait_seconds"),
        ("recv", {"wait_seconds": 181}, "wait_seconds"),
        ("recv", {"max": 0}, "max"),
        ("recv", {"max": 33}, "max"),
        ("recv", {}, "no turn runs"),
        ("whoami", {"name": "iris"}, "unknown key"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_a_call_that_cannot_be_is_an_error_of_the_tool_with_its_cause(
    hive: Services, door: Path, tool: str, arguments: dict[str, Any], cause: str
) -> None:
    async with program(door) as client:
        assert cause in await client.refusal(tool, **arguments)
    assert await hive.value("SELECT count(*) FROM messages") == 0


async def test_a_call_with_the_same_tool_use_id_counts_once_on_any_connection(hive: Services, door: Path) -> None:
    async with program(door) as client:
        first = await client.call("send", "toolu_1", to="damocles", body="hello")
        assert await client.call("send", "toolu_1", to="damocles", body="hello") == first
    async with program(door) as client:
        assert await client.call("send", "toolu_1", to="damocles", body="hello") == first
        assert await client.call("send", "toolu_2", to="damocles", body="hello") != first
    assert await hive.value("SELECT count(*) FROM messages") == 2


@pytest.mark.parametrize(
    ("tool", "first", "second"),
    [
        ("send", {"to": "iris", "body": "hello"}, {"body": "other"}),
        ("recv", {}, {"max": 1}),
        ("ask", {"to": "iris", "question": "well?"}, {"question": "what?"}),
        ("answer", {"question": 1, "choices": ["red"]}, {"choices": ["blue"]}),
        ("remind", {"body": "x", "after_s": 60}, {"after_s": 61}),
        ("request_spawn", {"name": "argus", "persona": "You watch.", "reason": "eyes"}, {"reason": "ears"}),
    ],
)
@pytest.mark.parametrize("by_use", [True, False])
async def test_a_key_with_other_arguments_is_refused_and_says_so(
    work: Path, tool: str, first: dict[str, Any], second: dict[str, Any], by_use: bool
) -> None:
    use, key = ("toolu_1", {}) if by_use else (None, {"key": "k"})
    async with program(work) as client:
        answer = await client.call(tool, use, **first, **key)
        said = await client.refusal(tool, use, **{**first, **second}, **key)
        assert said.startswith("cannot use this key for this ")
        assert "give each " in said
        assert await client.call(tool, use, **dict(reversed(first.items())), **key) == answer


async def test_calls_that_wait_are_bounded_for_an_agent_whatever_its_connections_and_others_go_on(
    hive: Services, door: Path
) -> None:
    await hive.say("operator", "iris", "go")
    await hive.broker.lease(AgentName("iris"))
    async with program(door) as first, program(door) as second:
        for _ in range(WAITS_LIMIT):
            await first.begin("tools/call", name="recv", arguments={"wait_seconds": 60})
        assert (await first.request("ping"))["result"] == {}
        said = await second.refusal("recv", wait_seconds=60)
        assert said.startswith(f"cannot call recv: {WAITS_LIMIT} calls of iris wait already")
        assert (await second.call("whoami"))["name"] == "iris"


async def test_searches_of_an_agent_that_wait_are_bounded_and_another_agents_are_not_counted(
    hive: Services, door: Path, managers_door: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = trio.Event()

    async def slow(*_: object) -> dict[str, Any]:
        await go_on.wait()
        return {"messages": [], "next_cursor": None}

    monkeypatch.setattr("hive_core.services.archive.Archive.search", slow)
    async with program(door) as iris, program(managers_door) as manager:
        for _ in range(SEARCHES_LIMIT):
            await iris.begin("tools/call", name="search_messages", arguments={"text": "word"})
        assert (await iris.request("ping"))["result"] == {}
        said = await iris.refusal("search_messages", text="word")
        assert said.startswith(f"cannot search: {SEARCHES_LIMIT} searches of iris wait already")
        await manager.begin("tools/call", name="search_messages", arguments={"text": "word"})
        go_on.set()
        assert (await manager.read())["result"]["structuredContent"]["messages"] == []
        for _ in range(SEARCHES_LIMIT):
            await iris.read()
        assert not (await iris.result("search_messages", text="word")).get("isError")


async def test_no_more_requests_of_a_connection_are_taken_in_than_its_limit(
    hive: Services, door: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is a task and its answer: a program that asks without end would make the daemon grow without end."""
    monkeypatch.setattr("hive_core.sockets.rpc.IN_FLIGHT_LIMIT", 3)
    numbers = range(50, 60)
    async with program(door) as client, trio.open_nursery() as nursery:
        async with held_writer(hive.store, nursery):
            for number in numbers:
                call = {"name": "send", "arguments": {"to": "damocles", "body": f"{number}"}}
                await client.send({"jsonrpc": "2.0", "id": number, "method": "tools/call", "params": call})
            await trio.testing.wait_all_tasks_blocked(0.05)
            writer: Any = hive.store.write.__self__  # type: ignore[attr-defined]
            assert len(writer._queued) == 3
        assert sorted([(await client.read())["id"] for _ in numbers]) == list(numbers)


async def test_a_request_that_its_client_takes_back_makes_room_for_another(
    hive: Services, door: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hive_core.sockets.rpc.IN_FLIGHT_LIMIT", 1)
    await begin_turn(hive)
    async with program(door) as client:
        for _ in range(3):
            await client.begin("tools/call", name="recv", arguments={"wait_seconds": 60})
            gone = {"requestId": client.number}
            await client.send({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": gone})
        assert (await client.request("ping"))["result"] == {}


async def test_a_key_that_the_agent_chose_holds_whatever_the_id_of_the_call(hive: Services, door: Path) -> None:
    """Its message may come again, and then the same call has another id."""
    async with program(door) as client:
        first = await client.call("send", "toolu_1", to="damocles", body="hello", key="k")
        assert await client.call("send", "toolu_2", to="damocles", body="hello", key="k") == first
        refused = await client.result("send", to="damocles", body="hello", key="a\0b")
        assert refused["isError"]


@pytest.mark.parametrize("key", ["", "x" * 201, "a\0b", 7, None, ["a"], {"a": 1}])
async def test_a_tool_use_id_that_is_none_is_ignored(hive: Services, door: Path, key: object) -> None:
    async with program(door) as client:
        for _ in range(2):
            result = await client.result("send", key, to="damocles", body="hello")
            assert not result.get("isError"), result
    assert await hive.value("SELECT count(*) FROM messages") == 2


async def test_the_same_spawn_asked_for_twice_with_one_id_is_one_card(hive: Services, managers_door: Path) -> None:
    async with program(managers_door) as client:
        wish = {"name": "argus", "persona": "You watch.", "reason": "eyes"}
        first = await client.call("request_spawn", "toolu_1", **wish)
        assert await client.call("request_spawn", "toolu_1", **wish) == first
        assert await client.call("request_spawn", "toolu_2", **wish) == first
        assert "approval 1 asks for it already" in await client.refusal(
            "request_spawn", **{**wish, "persona": "Other."}
        )
        assert "an agent of that name exists" in await client.refusal("request_spawn", **{**wish, "name": "iris"})
        assert "reserved" in await client.refusal("request_spawn", **{**wish, "name": "operator"})
    assert [(card.agent, card.requested_by) for card in await hive.approvals.pending()] == [("argus", "hm1nd")]


async def test_mail_is_received_in_a_turn_and_waited_for(hive: Services, door: Path) -> None:
    await begin_turn(hive)
    async with program(door) as client:
        assert (await client.call("recv"))["messages"] == []
        await client.begin("tools/call", name="recv", arguments={"wait_seconds": 100})
        await trio.testing.wait_all_tasks_blocked()
        await hive.say("hm1nd", "iris", "hello")
        got = (await client.read())["result"]["structuredContent"]
        assert [(m["body"], m["sender"]) for m in got["messages"]] == [("hello", "hm1nd")]


async def test_other_calls_are_answered_while_one_waits(hive: Services, door: Path) -> None:
    await begin_turn(hive)
    async with program(door) as client:
        await client.begin("tools/call", name="recv", arguments={"wait_seconds": 100})
        await trio.testing.wait_all_tasks_blocked()
        assert (await client.call("whoami"))["name"] == "iris"


async def test_a_recv_whose_client_hung_up_takes_no_mail(hive: Services, door: Path) -> None:
    await begin_turn(hive)
    async with program(door) as client:
        await client.begin("tools/call", name="recv", arguments={"wait_seconds": 100})
        await trio.testing.wait_all_tasks_blocked()
    await trio.testing.wait_all_tasks_blocked()
    message = await hive.say("hm1nd", "iris", "hello")
    await trio.testing.wait_all_tasks_blocked()
    assert await hive.value("SELECT state FROM deliveries WHERE message_id = ?", message) == "queued"


async def test_a_recv_that_was_cancelled_takes_no_mail(hive: Services, door: Path) -> None:
    await begin_turn(hive)
    async with program(door) as client:
        await client.begin("tools/call", name="recv", arguments={"wait_seconds": 100})
        await trio.testing.wait_all_tasks_blocked()
        await client.send(
            {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": client.number}}
        )
        await trio.testing.wait_all_tasks_blocked()
        message = await hive.say("hm1nd", "iris", "hello")
        await trio.testing.wait_all_tasks_blocked()
        assert await hive.value("SELECT state FROM deliveries WHERE message_id = ?", message) == "queued"
        await client.begin("tools/call", name="whoami", arguments={})
        while (await client.read()).get("id") != client.number:
            pass


@asynccontextmanager
async def commit_that_waits(hive: Services, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[trio.Event]:
    """A disk whose next sync takes as long as the block runs; the event is set when it has begun."""
    worker = hive.store.write.__self__._worker  # type: ignore[attr-defined]
    run, begun, ends = worker.run, trio.Event(), trio.Event()

    async def run_slowly(work: Callable[[], object]) -> object:
        done = await run(work)
        begun.set()
        await ends.wait()
        return done

    with monkeypatch.context() as patched:
        patched.setattr(worker, "run", run_slowly)
        try:
            yield begun
        finally:
            ends.set()


@pytest.mark.parametrize("use", [None, "toolu_1"])
@pytest.mark.parametrize("acks", ["before", "after"])
async def test_what_a_recv_has_taken_whose_client_cancelled_it_waits_again(
    hive: Services, door: Path, monkeypatch: pytest.MonkeyPatch, use: str | None, acks: str
) -> None:
    """Also when the end of its turn is on its way to the disk already: nobody saw the mail."""
    await begin_turn(hive)
    lease = await hive.broker.lease(IRIS, await hive.value("SELECT fence FROM turns"))
    message = await hive.say("hm1nd", "iris", "hello")
    meta = {} if use is None else {"_meta": {"claudecode/toolUseId": use}}
    async with program(door) as client, trio.open_nursery() as nursery:
        async with commit_that_waits(hive, monkeypatch) as begun:
            await client.begin("tools/call", name="recv", arguments={}, **meta)
            await begun.wait()
            if acks == "before":
                nursery.start_soon(hive.broker.ack, IRIS, lease.turn, "done")
                await trio.testing.wait_all_tasks_blocked()
            await client.send(
                {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": client.number}}
            )
            await trio.testing.wait_all_tasks_blocked()
        await wait_until(hive.store, lambda: hive.value("SELECT 1 FROM events WHERE kind = 'message_put_back'"))
        await hive.broker.ack(IRIS, lease.turn, "done")
    assert (await hive.states())[message] == "queued"
    again = await hive.broker.lease(IRIS)
    assert (again.message["id"], again.message["attempt"]) == (message, 1)
    assert await hive.broker.ack(IRIS, again.turn, "done")
    assert (await hive.states())[message] == "acked"


async def test_what_a_recv_has_taken_whose_connection_broke_is_the_answer_of_the_same_call_sent_again(
    hive: Services, door: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await begin_turn(hive)
    message = await hive.say("hm1nd", "iris", "hello")
    async with commit_that_waits(hive, monkeypatch) as begun:
        async with program(door) as client:
            meta = {"claudecode/toolUseId": "toolu_1"}
            await client.begin("tools/call", name="recv", arguments={}, _meta=meta)
            await begun.wait()
        await trio.testing.wait_all_tasks_blocked()
    async with program(door) as client:
        assert [m["id"] for m in (await client.call("recv", "toolu_1"))["messages"]] == [message]
    assert "message_put_back" not in await hive.kinds()


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"junk\n", -32700),
        (b"\xff\xfe\n", -32700),
        (b"[]\n", -32700),
        (b"7\n", -32700),
        (b"null\n", -32700),
        (b"{}\n", -32700),
        (b'{"jsonrpc":"2.0","id":1}\n', -32700),
        (b"[" * 100_000 + b"\n", -32700),
        (b"x" * (LINE_LIMIT_BYTES + 1) + b"\n", -32700),
    ],
    ids=lambda value: repr(value)[:30],
)
async def test_a_junk_line_is_answered_with_an_error_and_the_connection_survives(
    door: Path, data: bytes, code: int
) -> None:
    async with program(door) as client:
        await client.send_bytes(data)
        answer = await client.read()
        # A caller that gave its number waits for that one.
        number = 1 if b'"id":1' in data else None
        assert (answer["jsonrpc"], answer["id"], answer["error"]["code"]) == ("2.0", number, code)
        assert len(answer["error"]["message"]) < 500
        assert (await client.call("whoami"))["name"] == "iris"


@pytest.mark.parametrize("method", ["fly", "resources/list", "prompts/get"])
async def test_an_unknown_method_is_an_error_of_the_protocol_and_the_connection_survives(
    door: Path, method: str
) -> None:
    async with program(door) as client:
        assert "error" in await client.request(method)
        assert (await client.call("whoami"))["name"] == "iris"


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"junk", "it is not JSON (Expecting value: line 1 column 1 (char 0)); "),
        (b"\xff", "byte 0 is not UTF-8; "),
        (b"[]", "it holds a list, and an object is needed"),
        (b'{"jsonrpc":"2.0","id":1,"method":7}', 'it needs "jsonrpc": "2.0", a method that is text'),
        (b'{"jsonrpc":"2.0","id":1,"method":"ping","params":[]}', "params, if any, that are an object"),
        (b'{"jsonrpc":"2.0","id":' + b"9" * 5000 + b',"method":"ping"}', "a number in it has more than 4,300 digits; "),
        (
            b'{"jsonrpc":"2.0","id":1,"method":"ping","params":{"a":' + b"[" * 300 + b"]" * 300 + b"}}",
            "recursion limit",
        ),
        (b'{"jsonrpc":"2.0","id":1,"method":"\\ud800"}', "hex escape"),
        (b"x" * (LINE_LIMIT_BYTES + 1), f"the limit of {LINE_LIMIT_BYTES:,} bytes; send less in one line"),
    ],
    ids=lambda value: repr(value)[:30],
)
async def test_a_junk_line_is_told_what_is_wrong_with_it_in_the_words_of_the_house(
    door: Path, data: bytes, cause: str
) -> None:
    async with program(door) as client:
        await client.send_bytes(data + b"\n")
        said = (await client.read())["error"]["message"]
    assert said.startswith("cannot read the line")
    assert cause in said
    for foreign in ("the file", "Invalid JSON", "sys.", "JSONRPC", "Input should"):
        assert foreign not in said


async def test_a_request_before_initialize_is_told_to_send_that_first(door: Path) -> None:
    async with connect(door) as peer:
        client = Program(peer.stream)
        for method, params in (("tools/list", {}), ("tools/call", {"name": "whoami", "arguments": {}})):
            error = (await client.request(method, **params))["error"]
            assert (
                error["message"] == f"cannot answer {method}: this connection is not initialized; send initialize first"
            )
        assert (await client.request("ping"))["result"] == {}
        await client.greet()
        assert (await client.call("whoami"))["name"] == "iris"


async def test_a_request_whose_params_are_wrong_is_told_which(door: Path) -> None:
    async with program(door) as client:
        error = (await client.request("tools/call", arguments={}))["error"]
        assert error["code"] == -32602
        assert error["message"].startswith("cannot answer tools/call: ")
        assert "name: it is missing" in error["message"]
        assert (await client.call("whoami"))["name"] == "iris"


@pytest.mark.parametrize("greeted", [True, False])
@pytest.mark.parametrize("number", [None, 1.5, True, [], {}])
async def test_a_request_whose_id_is_none_is_answered_with_that(door: Path, number: object, greeted: bool) -> None:
    async with connect(door) as peer:
        client = Program(peer.stream)
        if greeted:
            await client.greet()
        answer = await client.ask({"jsonrpc": "2.0", "id": number, "method": "tools/list"})
        assert (answer["id"], answer["error"]["code"]) == (None, -32600)
        assert (
            "a request needs one that is a whole number or text, a notification has none" in answer["error"]["message"]
        )
        assert (await client.request("ping"))["result"] == {}


async def test_a_body_of_just_its_limit_is_taken_however_json_spells_it(hive: Services, door: Path) -> None:
    spelled = r"\u0041" * BODY_LIMIT_BYTES  # an A takes six bytes; no spelling of one byte is longer
    call = '{"jsonrpc":"2.0","id":5,"method":"tools/call","params":{"name":"send","arguments":{"to":"damocles","body":"'
    async with program(door) as client:
        await client.send_bytes(f'{call}{spelled}"}}}}}}\n'.encode())
        answer = await client.read()
    assert not answer["result"].get("isError"), answer
    assert await hive.value("SELECT body_bytes FROM messages") == BODY_LIMIT_BYTES


async def test_half_a_line_and_a_hang_up_does_nothing(hive: Services, door: Path) -> None:
    call = {"name": "send", "arguments": {"to": "damocles", "body": "hi"}}
    line = json.dumps({"jsonrpc": "2.0", "id": 9, "method": "tools/call", "params": call}).encode()
    async with program(door) as client:
        await client.send_bytes(line)
    async with program(door) as client:
        assert (await client.call("whoami"))["name"] == "iris"
    assert await hive.value("SELECT count(*) FROM messages") == 0


async def test_half_a_line_of_a_program_that_still_reads_is_answered_with_its_cause_then_the_end(door: Path) -> None:
    async with program(door) as client:
        await client.send_bytes(b'{"jsonrpc": "2.0"')
        await client.stream.send_eof()
        answer = await client.read()
        assert (answer["jsonrpc"], answer["id"], answer["error"]["code"]) == ("2.0", None, -32700)
        assert "its newline is missing after 17 bytes" in answer["error"]["message"]
        with pytest.raises(trio.EndOfChannel):
            await client.read()


async def test_half_a_line_of_a_program_that_is_gone_logs_nothing(door: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with program(door) as client:
        await client.send_bytes(b'{"jsonrpc": "2.0"')
    async with program(door) as client:
        assert (await client.call("whoami"))["name"] == "iris"
    assert caplog.messages == []


async def test_a_character_split_across_two_writes_arrives_whole(hive: Services, door: Path) -> None:
    call = {"name": "send", "arguments": {"to": "damocles", "body": "é😀"}}
    message = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": call}
    line = json.dumps(message, ensure_ascii=False).encode() + b"\n"
    cut = line.index("😀".encode()) + 1
    async with program(door) as client:
        await client.send_bytes(line[:cut])
        await trio.testing.wait_all_tasks_blocked()
        await client.send_bytes(line[cut:])
        await client.read()
    assert (await hive.broker.messages.newest())[0]["body"] == "é😀"


JUNK = st.one_of(
    st.binary(max_size=60),
    st.dictionaries(
        st.sampled_from(["jsonrpc", "id", "method", "params", "result", "error"]),
        st.sampled_from(["2.0", "tools/call", "tools/list", "initialize", "ping"])
        | st.none()
        | st.integers()
        | st.booleans()
        | st.text(max_size=5)
        | st.fixed_dictionaries({"name": st.sampled_from(["whoami", "fly", ""]), "arguments": st.just({}) | st.none()}),
        max_size=6,
    ).map(lambda obj: json.dumps(obj).encode()),
)


@settings(deadline=None, max_examples=20)
@given(st.lists(JUNK, max_size=15), st.booleans())
def test_after_any_junk_the_next_call_is_answered(junk: list[bytes], greeted: bool) -> None:
    async def check(hive: Services) -> None:
        with tempfile.TemporaryDirectory() as folder:
            handler = partial(serve_agent, desk_for(hive, "iris"))
            async with serve(Path(folder) / "mcp.sock", handler) as door:
                async with connect(door) as peer:
                    client = Program(peer.stream)
                    if greeted:
                        await client.greet()
                    async with trio.open_nursery() as nursery:
                        lines = b"".join(line.replace(b"\n", b" ") + b"\n" for line in junk)
                        nursery.start_soon(
                            client.send_bytes, lines + b'{"jsonrpc":"2.0","id":"last","method":"ping"}\n'
                        )
                        while (await client.read()).get("id") != "last":
                            pass
                async with program(door) as client:
                    assert (await client.call("whoami"))["name"] == "iris"

    run_in_hive(check, "iris")


async def test_a_recv_that_waits_says_so_to_whoever_asked_to_be_told(hive: Services, tmp_path: Path) -> None:
    await hive.say("hm1nd", "iris", "first")
    await hive.broker.lease(AgentName("iris"))
    handler = partial(serve_agent, desk_for(hive, "iris"), progress_every_s=0.01)
    async with serve(tmp_path / "iris.sock", handler) as door, connect(door) as peer:
        client = Program(peer.stream)
        await client.greet()
        call = {"name": "recv", "arguments": {"wait_seconds": PATIENCE_S}, "_meta": {"progressToken": "p"}}
        await client.send({"jsonrpc": "2.0", "id": 77, "method": "tools/call", "params": call})
        told = [await client.read() for _ in range(3)]
        assert [line["method"] for line in told] == ["notifications/progress"] * 3
        assert [line["params"]["progress"] for line in told] == [1, 2, 3]
        assert told[0]["params"]["progressToken"] == "p"
        await hive.say("hm1nd", "iris", "second")
        while (line := await client.read()).get("id") != 77:
            assert line["method"] == "notifications/progress"
        assert [m["body"] for m in line["result"]["structuredContent"]["messages"]] == ["second"]


@pytest.mark.parametrize("asked", [True, False])
async def test_a_hang_up_while_a_recv_waits_leaves_no_task_behind(
    hive: Services, tmp_path: Path, asked: bool, caplog: pytest.LogCaptureFixture
) -> None:
    await begin_turn(hive)
    handler = partial(serve_agent, desk_for(hive, "iris"), progress_every_s=0.01)
    async with serve(tmp_path / "iris.sock", handler) as door:
        await trio.testing.wait_all_tasks_blocked()
        before = trio.lowlevel.current_statistics().tasks_living
        async with program(door) as client:
            meta = {"_meta": {"progressToken": "p"}} if asked else {}
            await client.begin("tools/call", name="recv", arguments={"wait_seconds": 100}, **meta)
            if asked:
                assert (await client.read())["method"] == "notifications/progress"
            await trio.testing.wait_all_tasks_blocked()
            assert trio.lowlevel.current_statistics().tasks_living > before
        with trio.fail_after(PATIENCE_S):
            while trio.lowlevel.current_statistics().tasks_living > before:
                await trio.testing.wait_all_tasks_blocked()
    assert caplog.messages == []
