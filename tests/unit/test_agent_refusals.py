"""What the proxy refused reaches the model: heeded on the loopback, told behind the call in which it was."""

from __future__ import annotations

import json
from typing import Any

from hive_agent.refusals import ASK_BEHIND_CALLS, KEPT, Refusals

SENTENCE = "cannot connect: git.lan:443 is not in egress of agent.toml; ask the operator"
REFUSED = f"HTTP/1.1 403 {SENTENCE}\r\nContent-Type: text/plain\r\n\r\n".encode()


def ask(refusals: Refusals, **given: Any) -> Any:
    """What the program is told behind a call of Bash."""
    hook = {"subtype": "hook_callback", "callback_id": "refusals", "input": {"hook_event_name": "PostToolUse", **given}}
    line = json.dumps({"type": "control_request", "request_id": "r1", "request": hook})
    told = json.loads(refusals.answer(line.encode()) or b"")["response"]
    assert (told["subtype"], told["request_id"]) == ("success", "r1")
    return told["response"]


def test_what_was_refused_is_told_once_behind_the_call() -> None:
    refusals = Refusals()
    assert ask(refusals) == {}
    refusals.heed(REFUSED)
    refusals.heed(REFUSED)
    context = f"The hive's proxy refused meanwhile:\n- {SENTENCE}"
    told = ask(refusals, tool_response={"stdout": "", "stderr": "curl: (56) CONNECT tunnel failed, response 403"})
    assert told == {"hookSpecificOutput": {"hookEventName": "PostToolUse", "additionalContext": context}}
    assert ask(refusals) == {}


def test_what_a_result_shows_already_is_not_told_again() -> None:
    for shown in ({"tool_response": {"stderr": f"ProxyError: {SENTENCE}"}}, {"error": f"Exit code 1\n{SENTENCE}"}):
        refusals = Refusals()
        refusals.heed(REFUSED)
        assert ask(refusals, **shown) == {}


def test_no_more_than_the_newest_few_are_kept_and_what_passes_is_none() -> None:
    refusals = Refusals()
    refusals.heed(b"HTTP/1.1 200 Connection established\r\n\r\n")
    refusals.heed(b"\x16\x03\x01 something else")
    for number in range(KEPT + 3):
        refusals.heed(b"HTTP/1.1 403 no %d\r\n\r\n" % number)
    assert refusals.take() == [f"no {number}" for number in range(3, KEPT + 3)]


def test_other_lines_are_left_to_whoever_reads_the_stream() -> None:
    refusals = Refusals()
    begun = json.loads(ASK_BEHIND_CALLS)["request_id"]
    answered = {"type": "control_response", "response": {"subtype": "success", "request_id": begun}}
    assert refusals.answer(json.dumps(answered).encode()) == b""
    for other in (
        b'{"type":"control_request","request_id":"x","request":{"subtype":"can_use_tool"}}',
        b'{"type":"control_response","response":{"subtype":"success","request_id":"interrupt"}}',
        b'{"type":"control_request","request":7}',
        b'{"type":"control_request"',
        b'{"type":"assistant"}',
    ):
        assert refusals.answer(other) is None
