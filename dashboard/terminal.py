"""One line of an agent program's stream, read into parts that a person can follow.

The lines are hostile input: anything may be of any type, so every look into one is guarded, and what is not understood
is shown as it came.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from dashboard.diff import Line, compare
from hive_core.protocol.visible import counted

SUMMARY_CHARACTERS = 160
PARTS_LIMIT = 40


@dataclass(frozen=True, slots=True)
class Part:
    """What one row of the terminal shows.

    kind    text, thinking, tool, answer, failure, init, end, failed_end, note or raw: the row's look
    title   the one line that is always there: a tool's name, a result's first line
    short   beside the title: what the tool is asked to do
    text    the rest, kept as it is
    diff    an edit, in place of text
    folded  whether the rest waits behind the title until it is opened
    """

    kind: str
    title: str = ""
    short: str = ""
    text: str = ""
    diff: list[Line] = field(default_factory=list)
    folded: bool = False


def read_line(line: str) -> list[Part]:
    """The parts of one line; never raises."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return [_raw("not JSON", line)]
    if not isinstance(event, dict):
        return [_raw("unknown", line)]
    parts = list(_parts(event))
    if len(parts) > PARTS_LIMIT:
        parts = [*parts[:PARTS_LIMIT], _raw(f"{len(parts) - PARTS_LIMIT} more parts", line)]
    return parts or [_raw(_word(event.get("type")) or "unknown", line)]


def _parts(event: dict[str, Any]) -> Iterator[Part]:
    match event.get("type"), event.get("subtype"):
        case "assistant" | "user" as speaker, _:
            yield from _content(speaker, event.get("message"))
        case "system", "init":
            yield _init(event)
        case "system", str(subtype):
            rest = {key: value for key, value in event.items() if key not in ("type", "subtype", "session_id", "uuid")}
            yield Part("note", subtype.replace("_", " "), short=_flat(rest))
        case "result", _:
            yield _end(event)
        case "rate_limit_event", _:
            yield Part("note", "rate limit", short=_flat(event.get("rate_limit_info", event)))
        case "hive", str(subtype):
            yield _note(subtype, event)


def _note(subtype: str, event: dict[str, Any]) -> Part:
    """A line of the harness's own: what the program said beside its stream, or what could not be kept of it."""
    rest = {key: value for key, value in event.items() if key not in ("type", "subtype", "text")}
    text = event.get("text")
    text = text if isinstance(text, str) else ""
    one_line = len(text) <= SUMMARY_CHARACTERS and "\n" not in text
    short = " ".join(word for word in (text if one_line else "", _flat(rest) if rest else "") if word)
    return Part("note", subtype.replace("_", " "), short=short, text="" if one_line else text)


def _content(speaker: str, message: object) -> Iterator[Part]:
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    for block in content if isinstance(content, list) else ():
        match block:
            case {"type": "text", "text": str(text)}:
                yield Part("text" if speaker == "assistant" else "prompt", text=text)
            case {"type": "thinking", "thinking": str(text)}:
                yield Part("thinking", "thinking", short=_first_line(text), text=text, folded=True)
            case {"type": "tool_use", "name": str(name)}:
                given = block.get("input")
                yield _tool(name, given if isinstance(given, dict) else {})
            case {"type": "tool_result"}:
                yield _answer(block)
            case _:
                yield Part("raw", _word(block.get("type")) if isinstance(block, dict) else "unknown", text=_flat(block))


def _tool(name: str, given: dict[str, Any]) -> Part:
    # mcp__hive__send is the hive's own tool: the prefix says nothing to a reader.
    title = name.removeprefix("mcp__").replace("__", " · ")
    match given:
        case {"command": str(command)}:
            return Part("tool", title, text=command) if "\n" in command else Part("tool", title, short=command)
        case {"file_path": str(path), "old_string": str(old), "new_string": str(new)}:
            return Part("tool", title, short=path, diff=compare(old, new))
        case {"file_path": str(path), "content": str(content)}:
            return Part("tool", title, short=path, diff=[Line("add", f"+{text}") for text in content.split("\n")])
        case {"file_path": str(path)}:
            return Part("tool", title, short=path)
        case {"pattern": str(pattern)}:
            return Part("tool", title, short=pattern)
        case {"to": str(recipient), "body": str(body)}:
            return Part("tool", title, short=f"→ {recipient}", text=body)
        case _:
            shown = _flat(given)
            return Part("tool", title, short=_first_line(shown), text=shown if len(shown) > SUMMARY_CHARACTERS else "")


def _answer(block: dict[str, Any]) -> Part:
    content = block.get("content")
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) else part for part in content]
        content = "\n".join(text if isinstance(text, str) else "[not text]" for text in texts)
    text = content if isinstance(content, str) else _flat(content)
    kind = "failure" if block.get("is_error") is True else "answer"
    first = _first_line(text) or "(nothing)"
    return Part(kind, first, text=text if text.strip() != first else "", folded=True)


def _init(event: dict[str, Any]) -> Part:
    tools = event.get("tools")
    words = [_word(event.get("model")), counted(len(tools), "tool") if isinstance(tools, list) else ""]
    words.append(f"session {_word(event.get('session_id'))[:8]}" if event.get("session_id") else "")
    servers = event.get("mcp_servers")
    for server in servers if isinstance(servers, list) else []:
        if isinstance(server, dict) and server.get("status") != "connected":
            words.append(f"without {_word(server.get('name'))}")
    return Part("init", "session", short=" · ".join(word for word in words if word))


def _end(event: dict[str, Any]) -> Part:
    failed = event.get("is_error") is True
    words = [_seconds(event.get("duration_ms")), tokens(event.get("usage")), _count(event.get("num_turns"), "steps")]
    status = event.get("api_error_status")
    words.append(f"status {_flat(status)}" if status else "")
    text = event.get("result")
    return Part(
        "failed_end" if failed else "end",
        "turn failed" if failed else "turn done",
        short=" · ".join(word for word in words if word),
        # What a good turn ends with was its last words, which stand above already.
        text=text if failed and isinstance(text, str) else "",
    )


def _seconds(value: object) -> str:
    return f"{value / 1000:.1f} s" if isinstance(value, int | float) and 0 <= value < 1e12 else ""


def _count(value: object, noun: str) -> str:
    return f"{value:,} {noun}" if isinstance(value, int) and 0 <= value < 10**12 else ""


def tokens(usage: object, unknown_calls: int = 0) -> str:
    """What a turn took and gave, as a few words; "" when it does not say, or counts none.

    Its counts by model go before its own, which leave out the calls that the program made by itself. Where the counts
    of some calls are not known, none of them is the whole.
    """
    if not isinstance(usage, dict):
        return ""
    models = usage.get("models")
    if isinstance(models, dict) and models:
        of_models = [one for one in models.values() if isinstance(one, dict)]
        taken = _sum(of_models, "inputTokens", "cacheCreationInputTokens", "cacheReadInputTokens")
        given = _sum(of_models, "outputTokens")
    else:
        taken = _sum([usage], "input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
        given = _sum([usage], "output_tokens")
    if unknown_calls:
        return f"{_at_least(taken)} in / {_at_least(given)} out"
    if not taken and not given:
        return ""  # a program that was cut in its first call counts none, and that one may have cost
    return " / ".join(word for word in (_count(taken, "in"), _count(given, "out")) if word)


def _at_least(count: int | None) -> str:
    return f"{count:,} + ?" if count and 0 < count < 10**12 else "?"


def _sum(counts: list[dict[str, Any]], *kinds: str) -> int | None:
    """None when nothing tells."""
    found = [value for one in counts for kind in kinds if type(value := one.get(kind)) is int]
    return sum(found) if found else None


def _raw(title: str, line: str) -> Part:
    return Part("raw", title, short=_first_line(line), text=line, folded=True)


def _word(value: object) -> str:
    return value[:60] if isinstance(value, str) else ""


def _flat(value: object) -> str:
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except (ValueError, RecursionError):
        return "…"


def _first_line(text: str) -> str:
    """The first line with something on it, short enough for one row."""
    first = text.lstrip().partition("\n")[0]
    return first if len(first) <= SUMMARY_CHARACTERS else f"{first[: SUMMARY_CHARACTERS - 1]}…"
