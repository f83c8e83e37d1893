"""How results look in a terminal. What agents wrote is hostile: control characters are shown, not sent."""

from __future__ import annotations

import sys
import time

from hive_core.protocol.visible import named

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_COLOURS = {"red": "31", "green": "32", "amber": "33", "mauve": "35", "dim": "2", "bold": "1"}
_STATE_COLOURS = {"idle": "green", "thinking": "mauve", "tool": "mauve", "crashed": "red", "down": "dim"}


def paint(text: str, colour: str) -> str:
    return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m" if sys.stdout.isatty() else text


def safe(text: str) -> str:
    """Text whose control, direction, zero-width and blank characters are named; newlines and tabs stay."""
    return named(text)


def ago(at_ms: int) -> str:
    seconds = max(0, int(time.time() - at_ms / 1000))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def clock(at_ms: int) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at_ms / 1000))


def table(rows: list[list[str]], header: list[str]) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [paint("  ".join(cell.ljust(width) for cell, width in zip(header, widths, strict=True)).rstrip(), "dim")]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def agents(result: dict[str, Any]) -> str:
    rows = [
        [
            agent["name"],
            agent["state"] + (f" ({safe(agent['detail'])[:60]})" if agent["detail"] else ""),
            ago(agent["since_ms"]),
            str(agent["queued"]),
            f"{agent['program']} · {agent['model']}",
            "no sandbox" if agent["sandbox"] == "none" else agent["sandbox"],
            agent["page"],
        ]
        for agent in result["agents"]
    ]
    text = table(rows, ["agent", "state", "since", "queued", "program", "sandbox", "page"])
    if result["unsafe"]:
        text = paint("! agents run without a sandbox (--unsafe-no-sandbox)", "red") + "\n" + text
    return text


def message(row: dict[str, Any]) -> str:
    to = f" → {row['recipient']}" if "recipient" in row else ""
    reply = f" (answers {row['in_reply_to']})" if row["in_reply_to"] else ""
    mark = paint("new ", "amber") if row.get("unread") else ""
    head = f"{mark}{paint(str(row['id']), 'dim')} {clock(row['sent_at_ms'])} {paint(row['sender'] + to, 'bold')}{reply}"
    return head + "\n" + "\n".join(f"    {line}" for line in safe(row["body"]).splitlines())


def approval_line(row: dict[str, Any]) -> str:
    what = {"spawn": "new agent", "apply_commit": "change"}.get(row["kind"], row["kind"])
    return f"{paint('◆ ' + str(row['id']), 'amber')} {what} {paint(row['agent'], 'bold')}: {safe(row['reason'])}"


def approval(row: dict[str, Any]) -> str:
    lines = [approval_line(row), f"  asked by {row['requested_by']} {ago(row['requested_at_ms'])} ago; {row['state']}"]
    if row["note"]:
        lines.append(f"  note: {safe(row['note'])}")
    payload = row["payload"]
    for name, text in payload.get("files", {}).items():
        lines += [paint(f"  {name}", "bold"), *(f"    {line}" for line in safe(text).splitlines())]
    if "diff" in payload:
        lines.append(f"  commit {payload['sha']} on {payload['base'][:12]}")
        lines += [f"    {_diff_line(line)}" for line in safe(payload["diff"]).splitlines()]
    return "\n".join(lines)


def _diff_line(line: str) -> str:
    colour = {"+": "green", "-": "red", "@": "mauve"}.get(line[:1])
    return paint(line, colour) if colour else line


def event(row: dict[str, Any]) -> str:
    data = " ".join(f"{key}={safe(str(value))[:80]}" for key, value in row["data"].items() if value is not None)
    about = f" {row['agent']}" if row["agent"] and row["agent"] != row["actor"] else ""
    head = f"{paint(str(row['seq']), 'dim')} {clock(row['at_ms'])} {row['actor']}"
    return f"{head} {paint(row['kind'], 'mauve')}{about} {data}"


def status(result: dict[str, Any]) -> str:
    lines = [f"hyperhive {result['version']} · {result['dashboard']}"]
    if result["unsafe"]:
        lines.append(paint("! agents run without a sandbox (--unsafe-no-sandbox)", "red"))
    lines += [approval_line(row) for row in result["pending"]]
    if result["unread"]:
        lines.append(f"{result['unread']} unread: `hive inbox`")
    if not result["pending"] and not result["unread"]:
        lines.append("nothing waits for you")
    return "\n".join(lines)
