"""Claude Code's stream: what its events say of a turn, its session, its errors and its cost."""

from __future__ import annotations

from typing import Any

from hive_agent.runner import Ending
from hive_agent.turn_lines import hive_line
from hive_core.protocol.harness import STREAM_LINE_LIMIT_BYTES
from hive_core.protocol.lines import decode
from hive_core.protocol.refusal import Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hive_core.protocol.harness import Outcome

# Errors that are not the turn's own fault: no login, no credit, an overloaded or unreachable provider.
WAITING_ERRORS = frozenset({"authentication_failed", "billing_error", "rate_limit", "server_error", "overloaded"})
WAITING_STATUSES = frozenset({401, 402, 403, 408, 429})
ERROR_LIMIT = 500
# In a process that takes many turns these count all of them, and `usage` the last one alone.
_COUNTED = ("inputTokens", "outputTokens", "cacheReadInputTokens", "cacheCreationInputTokens", "webSearchRequests")


class Report:
    """Reads along one turn's output: gives each line the form in which it is passed on, and knows the ending.

    before   the last result of the turns that the same process took before
    """

    def __init__(self, before: dict[str, Any] | None = None) -> None:
        self.result: dict[str, Any] | None = None
        self.session: str | None = None
        self._before = before or {}
        self.tools: dict[str, str] = {}  # the calls that have no result yet: their ids and names
        self.repeats = 0  # how often the last call was made in a row, with the same arguments and the same answer
        self._last_call: object = None
        self._last_answer: object = None
        self._api_error: str | None = None
        self._last_stderr: str | None = None
        self.began = False
        self.has_tools = True

    def read_stdout(self, line: bytes | Refusal) -> str:
        if isinstance(line, Refusal):
            return hive_line("line_too_long", error=line.message)
        text = line.decode("utf-8", "replace")
        try:
            self._take(decode(line))
        except Refusal as refusal:
            return hive_line("malformed", text=text[:2000], error=refusal.message)
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

    def ending(self, exit_code: int | None) -> Ending:
        """`exit_code` is None for a program that goes on after its result, or was killed because it did not end."""
        if self.result is None:
            return Ending("failed", self.session, shortened(self._last_stderr or describe_exit(exit_code)))
        usage = summed_usage(self.result, self._before)
        if self.result.get("is_error"):
            return Ending(self._error_outcome(), self.session, shortened(error_sentence(self.result)), usage)
        if exit_code not in (0, None):
            return Ending("failed", self.session, shortened(self._last_stderr or describe_exit(exit_code)), usage)
        if not self.has_tools:
            # It could not answer anybody, so nobody may take the message for handled.
            return Ending("waiting", self.session, "the hive's tools could not be reached from the turn", usage)
        return Ending("done", self.session, None, usage)

    def _take(self, event: dict[str, Any]) -> None:
        match event.get("type"):
            case "system" if event.get("subtype") == "init":
                self.began = True
                self.session = text_or_none(event.get("session_id"))
                self.has_tools = hive_connected(event.get("mcp_servers"))
            case "assistant":
                self._api_error = text_or_none(event.get("error"))
                for block in _blocks(event, "tool_use"):
                    self._note_call(block)
            case "user":
                for block in _blocks(event, "tool_result"):
                    self.tools.pop(str(block.get("tool_use_id")), None)
                    if block.get("content") != self._last_answer:
                        self.repeats = min(self.repeats, 1)
                    self._last_answer = block.get("content")
            case "result":
                self.result = event

    def _note_call(self, block: dict[str, Any]) -> None:
        call = block.get("name"), block.get("input")
        self.repeats = self.repeats + 1 if call == self._last_call else 1
        self._last_call = call
        self.tools[str(block.get("id"))] = str(block.get("name"))

    def _error_outcome(self) -> Outcome:
        assert self.result is not None
        status = self.result.get("api_error_status")
        not_its_fault = self._api_error in WAITING_ERRORS
        if isinstance(status, int):
            not_its_fault = not_its_fault or status in WAITING_STATUSES or status >= 500
        return "waiting" if not_its_fault else "failed"


def hive_connected(servers: object) -> bool:
    """Whether the stream's list of MCP servers says that the hive's own is there."""
    found = [server for server in servers if isinstance(server, dict)] if isinstance(servers, list) else []
    return any(server.get("name") == "hive" and server.get("status") == "connected" for server in found)


def error_sentence(result: dict[str, Any]) -> str:
    errors = result.get("errors")
    if isinstance(errors, list) and errors:
        return str(errors[0])
    return str(result.get("result") or result.get("subtype") or "the program gave no reason")


def summed_usage(result: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """What the turn took: of what its process counts over all its turns, what was not there `before`."""
    usage = result.get("usage")
    tokens = usage if isinstance(usage, dict) else {}
    kinds = ("input_tokens", "output_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
    return {
        **{kind: whole_number(tokens.get(kind)) for kind in kinds},
        "cost_usd": _more(result, before, "total_cost_usd"),
        "num_turns": result.get("num_turns"),
        "duration_ms": result.get("duration_ms"),
        "models": _models(result.get("modelUsage"), before.get("modelUsage")),
    }


def _models(now: object, before: object) -> dict[str, Any] | None:
    """What each model that was used took."""
    if not isinstance(now, dict):
        return None
    earlier = before if isinstance(before, dict) else {}
    models = {}
    for name, told in now.items():
        if isinstance(told, dict):
            was = earlier.get(name)
            was = was if isinstance(was, dict) else {}
            more = {key: _more(told, was, key) for key in (*_COUNTED, "costUSD") if key in told}
            if any(more.values()):
                models[name] = {**told, **more}
    return models


def _more(now: dict[str, Any], before: dict[str, Any], key: str) -> float | int | None:
    """How much more there is of it now; None where nothing is known."""
    value, was = now.get(key), before.get(key, 0)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    was = was if isinstance(was, int | float) else 0
    return round(value - was, 10) if isinstance(value, float) or isinstance(was, float) else value - was


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


def describe_exit(exit_code: int | None) -> str:
    if exit_code is None:
        return "the program closed its output before its result and did not end"
    if exit_code < 0:
        return f"the program was ended by signal {-exit_code} before its result"
    return f"the program ended with exit code {exit_code} before its result"


def shortened(text: str) -> str:
    return text if len(text) <= ERROR_LIMIT else text[: ERROR_LIMIT - 1] + "…"


def text_or_none(value: object) -> str | None:
    return value if isinstance(value, str) else None


def whole_number(value: object) -> int:
    return value if isinstance(value, int) else 0
