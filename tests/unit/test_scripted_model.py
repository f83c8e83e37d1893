"""The scripted model answers as the real service does, and remembers what it was asked."""

from __future__ import annotations

import http.client
import json
from typing import Any

import pytest

from tests.processes import PATIENCE_S
from tests.scripted_model import Request, ScriptedModel, fail, say, tool

TOOLS = [{"name": "Bash", "description": "", "input_schema": {"type": "object"}}]


def ask(
    model: ScriptedModel, text: str = "hi", method: str = "POST", path: str = "/v1/messages?beta=true", **body: Any
) -> tuple[int, dict[str, str], str]:
    message = {"role": "user", "content": [{"type": "text", "text": text}]}
    form = {"model": "sonnet", "stream": True, "tools": TOOLS, "messages": [message], **body}
    connection = http.client.HTTPConnection(model.base_url.removeprefix("http://"), timeout=PATIENCE_S)
    try:
        connection.request(method, path, json.dumps(form) if method == "POST" else None, {"x-api-key": "k"})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read().decode()
    finally:
        connection.close()


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]


def test_a_reply_is_streamed_block_by_block() -> None:
    with ScriptedModel([say("hello", tool("Bash", command="ls"))]) as model:
        status, headers, text = ask(model)
    assert (status, headers["content-type"]) == (200, "text/event-stream")
    told = events(text)
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert [event["type"] for event in told] == ["message_start", *block, *block, "message_delta", "message_stop"]
    assert told[2]["delta"] == {"type": "text_delta", "text": "hello"}
    assert json.loads(told[5]["delta"]["partial_json"]) == {"command": "ls"}
    assert told[7]["delta"]["stop_reason"] == "tool_use"


def test_a_request_without_stream_gets_one_message() -> None:
    with ScriptedModel(["hello"]) as model:
        _, _, text = ask(model, stream=False)
    message = json.loads(text)
    assert (message["content"], message["stop_reason"]) == ([{"type": "text", "text": "hello"}], "end_turn")


def test_tool_calls_get_ids_that_differ() -> None:
    with ScriptedModel([say(tool("Bash")), say(tool("Bash"))]) as model:
        ids = [events(ask(model)[2])[1]["content_block"]["id"] for _ in range(2)]
    assert len(set(ids)) == 2


def test_a_failure_has_its_status_form_and_headers() -> None:
    with ScriptedModel([fail(429, "slow down", retry_after="60")]) as model:
        status, headers, text = ask(model)
    assert (status, headers["retry-after"], headers["x-should-retry"]) == (429, "60", "false")
    assert json.loads(text) == {"type": "error", "error": {"type": "rate_limit_error", "message": "slow down"}}


def test_a_cut_stream_ends_without_its_end() -> None:
    with ScriptedModel([say("hello", cut_after=2)]) as model, pytest.raises(http.client.IncompleteRead) as caught:
        ask(model)
    assert [event["type"] for event in events(caught.value.partial.decode())] == [
        "message_start",
        "content_block_start",
    ]


def test_the_answer_function_sees_the_conversation() -> None:
    seen: list[Request] = []

    def answer(request: Request) -> str:
        seen.append(request)
        return "ok"

    result = {
        "type": "tool_result",
        "tool_use_id": "t1",
        "content": [{"type": "text", "text": "out"}],
        "is_error": True,
    }
    messages = [
        {"role": "user", "content": "<system-reminder>not said</system-reminder>"},
        {"role": "user", "content": "the task"},
        {"role": "assistant", "content": []},
        {"role": "user", "content": [result, {"type": "text", "text": "<system-reminder>x</system-reminder>"}]},
    ]
    with ScriptedModel(answer) as model:
        ask(model, messages=messages, system=[{"type": "text", "text": "be iris"}])
    (request,) = seen
    assert (request.last_user_text, request.system, request.model, request.tools) == (
        "the task",
        "be iris",
        "sonnet",
        ["Bash"],
    )
    assert [(back.tool_use_id, back.text, back.is_error) for back in request.tool_results] == [("t1", "out", True)]
    assert request.headers["x-api-key"] == "k"


def test_side_requests_consume_no_answer_of_a_list() -> None:
    with ScriptedModel(["for the turn"]) as model:
        assert ask(model, method="HEAD", path="/")[0] == 200
        assert "ok" in ask(model, tools=[])[2]
        assert json.loads(ask(model, path="/v1/messages/count_tokens")[2])["input_tokens"] > 0
        assert ask(model, method="GET", path="/other")[0] == 404
        assert "for the turn" in ask(model)[2]
    assert [request.is_side for request in model.requests] == [True, True, True, True, False]
    assert len(model.turns) == 1


def test_a_script_that_fails_answers_500_and_fails_the_test() -> None:
    def use_it() -> None:
        with ScriptedModel(["one"]) as model:
            ask(model)
            assert ask(model, "two")[0] == 500

    with pytest.raises(AssertionError, match="no answer left for 'two'"):
        use_it()


def test_a_connection_that_is_kept_alive_does_not_hold_the_end() -> None:
    with ScriptedModel(["one"]) as model:
        connection = http.client.HTTPConnection(model.base_url.removeprefix("http://"), timeout=PATIENCE_S)
        connection.request("HEAD", "/")
        connection.getresponse().read()
    connection.close()
