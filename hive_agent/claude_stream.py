"""Claude Code's stream: what its events say of a turn, its state, its session, its errors and its cost."""

from __future__ import annotations

import time
from typing import Any

from hive_agent.claude_errors import WAITING, describe_exit, error_sentence, reason_of, shortened
from hive_agent.claude_usage import context, number, summed_usage, tokens_of, whole_number
from hive_agent.runner import Activity, Ending
from hive_agent.turn_lines import hive_line
from hive_core.protocol.harness import STREAM_LINE_LIMIT_BYTES
from hive_core.protocol.lines import decode, encode
from hive_core.protocol.refusal import Refusal

# Tools that wait for a person. They are not among `--tools`; a call all the same will never be answered.
INTERACTIVE = frozenset({"AskUserQuestion", "ExitPlanMode", "EnterPlanMode"})
DENIED = "nobody can answer here: go on without it, or ask with the hive's tools"
NO_TOOLS = "the hive's tools could not be reached from the turn"
THINKING = Activity("thinking")
DETAIL_LIMIT = 60  # characters of what stands beside a state
SESSION_LIMIT = 64  # of a session's number
SYNTHETIC = "<synthetic>"  # the model of a message that the program wrote itself


class Report:
    """Reads along one turn's output: gives each line the form in which it is passed on, and knows the ending.

    before   the last result of the turns that the same process took before
    window   the tokens that fit into the model's context, where agent.toml says so
    """

    def __init__(self, before: dict[str, Any] | None = None, window: int | None = None) -> None:
        self.result: dict[str, Any] | None = None
        self.session: str | None = None
        self.activity = Activity("starting")
        self.tools: dict[str, str] = {}  # the calls that have no result yet: their ids and names
        self.repeats = 0  # how often the last call was made in a row, with the same arguments and the same answer
        self.replies: list[bytes] = []  # what the program has to be told; whoever tells it empties the list
        self.malformed = 0
        self.began = False
        self.has_tools = True
        self.connected: set[str] = set()  # its servers of tools, by their names
        self.limited_until_ms: int | None = None
        self.compacted: str | None = None  # how a compaction ended: "success", or why it failed
        self._before = before or {}
        self._window = window
        self._tokens = 0
        self._model = ""
        self._last_call: object = None
        self._last_answer: object = None
        self._api_error: str | None = None
        self._last_stderr: str | None = None

    def read_stdout(self, line: bytes | Refusal) -> str:
        if isinstance(line, Refusal):
            return hive_line("line_too_long", error=line.message)
        text = line.decode("utf-8", "replace")
        try:
            self._take(decode(line))
        except Refusal as refusal:
            self.malformed += 1
            return hive_line("malformed", text=text[:2000], error=refusal.message, count=self.malformed)
        if len(line) > STREAM_LINE_LIMIT_BYTES:
            return hive_line("line_too_long", bytes=len(line))
        return text

    def read_stderr(self, line: bytes | Refusal) -> str:
        text = line.message if isinstance(line, Refusal) else line.decode("utf-8", "replace")
        if text.strip():
            self._last_stderr = text.strip()
        return hive_line("stderr", text=text[:4000])

    @property
    def session_lost(self) -> bool:
        """The session to resume is unknown: the program ended before it began."""
        errors = self.result.get("errors") if self.result else None
        told = " ".join(str(error) for error in errors) if isinstance(errors, list) else ""
        return not self.began and ("No conversation found" in told or "--resume requires a valid session" in told)

    @property
    def worked(self) -> bool:
        """Whether it has called a tool: what that did stays done."""
        return self._last_call is not None

    @property
    def asks(self) -> bool:
        """Whether it waits for a person, who is not there."""
        return any(name in INTERACTIVE for name in self.tools.values())

    def ending(self, exit_code: int | None) -> Ending:
        """`exit_code` is None for a program that goes on after its result, or was killed because it did not end."""
        if self.result is None:
            reason = "stuck" if exit_code is None else "crashed"
            return self._failed(reason, self._last_stderr or describe_exit(exit_code))
        if self.result.get("is_error"):
            return self._failed(reason_of(self.result, self._api_error), error_sentence(self.result))
        if exit_code not in (0, None):
            return self._failed("crashed", self._last_stderr or describe_exit(exit_code))
        if not self.has_tools:
            # It could not answer anybody, so nobody may take the message for handled.
            return self._failed("no_tools", NO_TOOLS)
        return Ending("done", self.session, None, self.usage(), context=self.context())

    def usage(self) -> dict[str, Any] | None:
        return summed_usage(self.result, self._before) if self.result is not None else None

    def context(self) -> Any:
        """How full the session was at the end: protocol.harness.Context, None when nobody said."""
        return context(self._tokens, self._model, self.result, self._window)

    def _failed(self, reason: str, error: str) -> Ending:
        return Ending(
            "waiting" if reason in WAITING else "failed",
            self.session,
            shortened(error),
            self.usage(),
            reason=reason,
            limited_until_ms=self.limited_until_ms if reason == "rate_limited" else None,
            context=self.context(),
        )

    def _take(self, event: dict[str, Any]) -> None:
        match event.get("type"):
            case "system":
                self._take_system(event)
            case "assistant":
                self._take_answer(event)
            case "user":
                for block in _blocks(event, "tool_result"):
                    self.tools.pop(str(block.get("tool_use_id")), None)
                    if block.get("content") != self._last_answer:
                        self.repeats = min(self.repeats, 1)
                    self._last_answer = block.get("content")
                self._show_tool()
            case "rate_limit_event":
                self._take_limit(event.get("rate_limit_info"))
            case "control_request":
                self.replies.append(denial(event))
            case "result":
                self.result = event

    def _take_system(self, event: dict[str, Any]) -> None:
        match event.get("subtype"):
            case "init":
                self.began = True
                session = text_or_none(event.get("session_id"))
                self.session = session if session and len(session) <= SESSION_LIMIT else None
                self.connected = connected(event.get("mcp_servers"))
                self.has_tools = "hive" in self.connected
                self.activity = THINKING
            case "status":
                self.activity = Activity("compacting") if event.get("status") == "compacting" else THINKING
                if (told := event.get("compact_result")) is not None:
                    self.compacted = shortened(str(event.get("compact_error") or told))
            case "compact_boundary":
                told = event.get("compact_metadata")
                self._tokens = whole_number(told.get("post_tokens")) if isinstance(told, dict) else 0
                self.compacted = "success"
            case "api_retry":
                limited = event.get("error_status") == 429
                delay_ms = number(event.get("retry_delay_ms"))
                until_ms = None if delay_ms is None else _now_ms() + int(delay_ms)
                tries = f"attempt {event.get('attempt')} of {event.get('max_retries')}"
                self.activity = Activity("rate_limited" if limited else "overloaded", tries[:DETAIL_LIMIT], until_ms)

    def _take_answer(self, event: dict[str, Any]) -> None:
        self._api_error = text_or_none(event.get("error"))
        message = event.get("message")
        model = text_or_none(message.get("model")) if isinstance(message, dict) else None
        # What a sub-agent was told does not stand in this context.
        if model != SYNTHETIC and event.get("parent_tool_use_id") is None and (tokens := tokens_of(message)):
            self._tokens, self._model = tokens, model or ""
        for block in _blocks(event, "tool_use"):
            self._note_call(block)
        self._show_tool()

    def _take_limit(self, told: object) -> None:
        if not isinstance(told, dict) or told.get("status") != "rejected":
            return
        resets_at_s = number(told.get("resetsAt"))
        self.limited_until_ms = None if resets_at_s is None else int(resets_at_s * 1000)
        self.activity = Activity(
            "rate_limited", str(told.get("rateLimitType") or "")[:DETAIL_LIMIT], self.limited_until_ms
        )

    def _note_call(self, block: dict[str, Any]) -> None:
        call = block.get("name"), block.get("input")
        self.repeats = self.repeats + 1 if call == self._last_call else 1
        self._last_call = call
        self.tools[str(block.get("id"))] = str(block.get("name"))[:DETAIL_LIMIT]

    def _show_tool(self) -> None:
        names = list(self.tools.values())
        self.activity = Activity("tool", names[-1]) if names else THINKING


def denial(request: dict[str, Any]) -> bytes:
    """The answer to what the program asks of a person: no, at once."""
    asked = request.get("request")
    if isinstance(asked, dict) and asked.get("subtype") == "can_use_tool":
        told: dict[str, Any] = {"subtype": "success", "response": {"behavior": "deny", "message": DENIED}}
    else:
        told = {"subtype": "error", "error": DENIED}
    return encode({"type": "control_response", "response": {**told, "request_id": request.get("request_id")}})


def connected(servers: object) -> set[str]:
    """The MCP servers that are there, as the stream's list says."""
    found = [server for server in servers if isinstance(server, dict)] if isinstance(servers, list) else []
    return {str(server.get("name")) for server in found if server.get("status") == "connected"}


def _blocks(event: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """The blocks of that kind in an event's message, whatever shape it has."""
    message = event.get("message")
    content = message.get("content") if isinstance(message, dict) else None
    found = content if isinstance(content, list) else []
    return [block for block in found if isinstance(block, dict) and block.get("type") == kind]


def begins_turn(line: bytes | Refusal) -> bool:
    """Whether a line is of a turn: an answer, a tool's result, or the `init` that stands before them."""
    try:
        event = decode(line) if isinstance(line, bytes) else {}
    except Refusal:
        return False
    kind = event.get("type")
    return kind in ("assistant", "user", "result", "stream_event") or (
        kind == "system" and event.get("subtype") == "init"
    )


def text_or_none(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _now_ms() -> int:
    return int(time.time() * 1000)
