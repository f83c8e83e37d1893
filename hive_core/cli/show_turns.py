"""How turns look in a terminal. What a program printed is hostile: control characters are shown, not sent."""

from __future__ import annotations

import json

from hive_core.cli.show import day, paint, safe
from hive_core.protocol.visible import counted

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

_COLOURS = {"done": "green", "failed": "red", "lost": "red", "running": "mauve", "waiting": "amber", "cancelled": "dim"}
WIDTH = 160


def row(turn: dict[str, Any]) -> str:
    """One turn as one line."""
    state = paint(turn["state"], _COLOURS[turn["state"]])
    words = [f"{turn['turn']}", day(turn["started_at_ms"]), paint(turn["agent"], "bold"), state]
    if turn["ended_at_ms"]:
        words.append(f"{(turn['ended_at_ms'] - turn['started_at_ms']) / 1000:.1f} s")
    words += [f"message {turn['message']}"] if turn["message"] else []
    words += [turn["errand"].replace("_", " ")] if turn["errand"] else []
    about = "~" if turn["estimated_micro_usd"] else ""
    words += [f"{about}${turn['cost_micro_usd'] / 1e6:.4f}"] if turn["cost_micro_usd"] is not None else []
    words += [_short(turn["error"])] if turn["error"] else []
    return "  ".join(words)


def whole(turn: dict[str, Any]) -> str:
    """A turn: what it was given, its stream, how it ended, and what it sent."""
    lines = [row(turn)]
    if given := turn["given"]:
        settings, session = given["settings"], given["session"]
        lines.append(f"given: {settings['program']} · {settings['model']} · session {safe(session or 'new')}")
        if message := given["message"]:
            head = f"message {message['id']} of {message['sender']}, attempt {message['attempt']}"
            lines.append(f"  {head}, {given['waiting']} more waiting")
            lines += [f"  | {line}" for line in safe(message.get("body", "")).splitlines()]
    lines += [paint(f"not there: {safe(missing)}", "amber") for missing in turn["missing"]]
    lines.append(f"stream: {counted(turn['lines'], 'line')}")
    lines += [f"  {text}" for line in turn["stream"] for text in readable(line["line"])]
    ended = f"ended: {turn['state']}"
    lines.append(f"{ended}: {safe(turn['error'])}" if turn["error"] else ended)
    for sent in turn["sent"]:
        lines.append(f"sent: message {sent['message']} to {', '.join(sent['recipients'])}: {_short(sent['body'])}")
    return "\n".join(lines)


def replayed(found: dict[str, Any]) -> str:
    lines = []
    for difference in found["differences"]:
        lines.append(paint(difference["what"], "amber"))
        lines += [f"  {word:9}{safe(str(difference[word]))}" for word in ("recorded", "now")]
    if found["differences"] and any(one["what"] == "prompt" for one in found["differences"]):
        lines += ["the prompt now:", *(f"  | {line}" for line in safe(found["prompt"]).splitlines())]
    if found["missing"]:
        lines.append(paint("the record is not whole, so it may differ for that alone:", "amber"))
        lines += [f"  not there: {safe(missing)}" for missing in found["missing"]]
    same = f"turn {found['turn']} would go the same way now"
    return "\n".join(
        [*lines, paint(same, "green")] if found["same"] else [*lines, f"turn {found['turn']} would differ"]
    )


def readable(line: str) -> Iterator[str]:
    """A line of the stream as a person reads it."""
    try:
        event = json.loads(line)
        found = list(_parts(event))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        found = [line]
    for text in found:
        yield _short(text)


def _parts(event: dict[str, Any]) -> Iterator[str]:
    kind, subtype = event.get("type"), event.get("subtype")
    if kind in ("assistant", "user"):
        content = event["message"]["content"]
        for block in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            yield _block(block)
    elif kind == "result":
        yield f"result: {subtype} {event.get('result') or event.get('errors') or ''}"
    else:
        rest = {key: value for key, value in event.items() if key not in ("type", "subtype", "uuid", "session_id")}
        yield f"{kind}/{subtype} {json.dumps(rest, ensure_ascii=False)}"


def _block(block: dict[str, Any]) -> str:
    match block["type"]:
        case "text" | "thinking" as kind:
            return f"{kind}: {block[kind]}"
        case "tool_use":
            return f"tool: {block['name']} {json.dumps(block.get('input'), ensure_ascii=False)}"
        case "tool_result":
            content = block.get("content")
            text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
            return f"{'failure' if block.get('is_error') else 'answer'}: {text}"
        case other:
            return f"{other}: {json.dumps(block, ensure_ascii=False)}"


def _short(text: str) -> str:
    line = " ".join(safe(text).split())
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…"
