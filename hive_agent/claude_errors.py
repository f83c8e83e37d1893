"""Why a turn of Claude Code did not end well: by the fields of its events, never by what a model says."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# Not the turn's own fault: no login, no credit, an overloaded or unreachable provider.
WAITING = frozenset({"rate_limited", "overloaded", "authentication", "billing", "no_tools", "no_program"})
# `terminal_reason` of a result. blocking_limit: the program itself sees that the next request would be too long.
_TOO_LONG = frozenset({"prompt_too_long", "blocking_limit"})
# `error` of the last message.
_BY_ERROR = {
    "rate_limit": "rate_limited",
    "overloaded": "overloaded",
    "server_error": "overloaded",
    "authentication_failed": "authentication",
    "oauth_org_not_allowed": "authentication",
    "billing_error": "billing",
}
_BY_STATUS = {
    401: "authentication",
    402: "billing",
    403: "authentication",
    408: "overloaded",
    413: "prompt_too_long",
    429: "rate_limited",
}
ERROR_LIMIT = 500


def reason_of(result: dict[str, Any], api_error: str | None) -> str:
    """One of protocol.harness.REASONS for a result that is an error; `api_error` is its last message's."""
    status = result.get("api_error_status")
    if str(result.get("terminal_reason")) in _TOO_LONG:
        return "prompt_too_long"
    if result.get("stop_reason") == "refusal":
        return "refusal"
    if api_error in _BY_ERROR:
        return _BY_ERROR[api_error]
    if isinstance(status, int) and not isinstance(status, bool):
        return _BY_STATUS.get(status) or ("overloaded" if status >= 500 else "error")
    return "error"


def error_sentence(result: dict[str, Any]) -> str:
    errors = result.get("errors")
    if isinstance(errors, list) and errors:
        return str(errors[0])
    return str(result.get("result") or result.get("subtype") or "the program gave no reason")


def describe_exit(exit_code: int | None) -> str:
    if exit_code is None:
        return "the program closed its output before its result and did not end"
    if exit_code < 0:
        return f"the program was ended by signal {-exit_code} before its result"
    return f"the program ended with exit code {exit_code} before its result"


def shortened(text: str) -> str:
    return text if len(text) <= ERROR_LIMIT else text[: ERROR_LIMIT - 1] + "…"
