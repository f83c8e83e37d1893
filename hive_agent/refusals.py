"""What the hive's proxy refused, for the model to read: where a tunnel was, curl and git show no more than a number.

The loopback heeds how the answer to a CONNECT begins. Behind each Bash call the program asks over its own stream, by a
hook, what is to be added to the result: that is what was refused meanwhile and does not stand in it.
"""

from __future__ import annotations

import re
from typing import Any

from hive_core.protocol.lines import decode, encode
from hive_core.protocol.refusal import Refusal

KEPT = 5  # the newest; each once
SENTENCE_LIMIT = 600
HOOK, BEGIN = "refusals", "hooks"
EVENTS = ("PostToolUse", "PostToolUseFailure")
# What tells the program, once and before its first turn, that it is to ask.
ASK_BEHIND_CALLS = encode(
    {
        "type": "control_request",
        "request_id": BEGIN,
        "request": {
            "subtype": "initialize",
            "hooks": {event: [{"matcher": "Bash", "hookCallbackIds": [HOOK]}] for event in EVENTS},
        },
    }
)
_CONTROL, _SEEN_WITHIN = b'"control_re', 40  # of the bytes of a line
_REFUSED = re.compile(rb"HTTP/1\.[01] [45][0-9]{2} ([^\r\n]+)")


class Refusals:
    """Those that the model was not told of yet."""

    def __init__(self) -> None:
        self._sentences: list[str] = []

    def heed(self, answer: bytes) -> None:
        """How the proxy's answer to a CONNECT begins."""
        if found := _REFUSED.match(answer):
            sentence = found[1].decode("utf-8", "replace")[:SENTENCE_LIMIT]
            others = [other for other in self._sentences if other != sentence]
            self._sentences = [*others, sentence][-KEPT:]

    def take(self, result: object = None) -> list[str]:
        """All of them but what a tool's result shows already; they are told then."""
        told, self._sentences = self._sentences, []
        shown = "" if result is None else encode({"result": result}).decode()
        return [sentence for sentence in told if sentence not in shown]

    def answer(self, line: bytes | Refusal) -> bytes | None:
        """What the program is told when it asks by that line of its stdout; nothing when it answers our own request.
        None of every other line."""
        if isinstance(line, Refusal) or _CONTROL not in line[:_SEEN_WITHIN]:
            return None
        try:
            event = decode(line)
        except Refusal:
            return None
        response, request = event.get("response"), event.get("request")
        if isinstance(response, dict) and response.get("request_id") == BEGIN:
            return b""
        if not isinstance(request, dict) or request.get("callback_id") != HOOK:
            return None
        told = {"subtype": "success", "request_id": event.get("request_id"), "response": self._behind(request)}
        return encode({"type": "control_response", "response": told})

    def _behind(self, request: dict[str, Any]) -> dict[str, Any]:
        given = request.get("input")
        given = given if isinstance(given, dict) else {}
        if not (told := self.take([given.get("tool_response"), given.get("error")])):
            return {}
        text = "\n".join(["The hive's proxy refused meanwhile:", *(f"- {sentence}" for sentence in told)])
        return {"hookSpecificOutput": {"hookEventName": given.get("hook_event_name"), "additionalContext": text}}
