"""How approvals look in a terminal: what would be done, what that changes, and how far it is."""

from __future__ import annotations

from hive_core.cli.show import ago, approval_line, day, paint, safe
from hive_core.protocol.effect import WIDE, builds_line, effect_line

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

_STATES = {
    "pending": "waits for you",
    "approved": "approved, and under way",
    "done": "approved, and done",
    "failed": "failed",
    "denied": "denied",
    "cancelled": "taken back by whoever asked",
    "expired": "expired: nobody decided it in time",
}
_COLOURS = {"+": "green", "-": "red", "@": "mauve"}


def approval(row: dict[str, Any]) -> str:
    return "\n".join([approval_line(row), *_facts(row), *effect(row), *_payload(row["payload"])])


def _facts(row: dict[str, Any]) -> Iterator[str]:
    yield f"  asked by {row['requested_by']} {ago(row['requested_at_ms'])} ago; {_STATES[row['state']]}{_whereby(row)}"
    if row["state"] == "pending":
        yield f"  expires {day(row['expires_at_ms'])}"
        yield paint(f"  what is shown has the hash {row['digest']}", "dim")
    if row["state"] == "approved" and row["step"]:
        yield f"  {step(row)}"
    if row["proof"]:
        yield f"  proof: {safe(row['proof'])}"
    if row["note"]:
        yield f"  note: {safe(row['note'])}".replace("\n", "\n    ")


def _whereby(row: dict[str, Any]) -> str:
    """Who decided it, when, and from where."""
    if row["rule"]:
        return f" by rule {safe(row['rule'])} at {day(row['resolved_at_ms'])}, without a click"
    if row["resolved_by"] is None:
        return ""
    door = f" from {safe(row['resolved_from'])}" if row["resolved_from"] else ""
    return f" by {row['resolved_by']}{door} at {day(row['resolved_at_ms'])}"


def step(row: dict[str, Any]) -> str:
    """What one that is under way waits for."""
    return f"{safe(row['step'])}, for {ago(row['step_at_ms'])}"


def effect(row: dict[str, Any]) -> Iterator[str]:
    """What it changes; what widens is marked, and comes first."""
    if (told := row["effect"]) is None:
        return
    yield paint("  effect", "bold")
    for line in told["lines"]:
        text = safe(effect_line(line)).replace("\n", " ")
        yield f"    {paint('▲ widens', 'red')}  {text}" if line["weight"] == WIDE else f"    {text}"
    for text in told["unknown"]:
        yield f"    {paint('? unknown', 'amber')}  {safe(text)}"
    if not told["lines"] and not told["unknown"]:
        yield "    none on settings, prompt or files"
    if builds := builds_line(told):
        yield paint(f"    {safe(builds)}", "dim")


def _payload(payload: dict[str, Any]) -> Iterator[str]:
    for name, text in payload.get("files", {}).items():
        yield paint(f"  {name}", "bold")
        yield from (f"    {line}" for line in safe(text).splitlines())
    if "text" in payload:
        yield paint("  what it is told", "bold")
        yield from (f"    {line}" for line in safe(payload["text"]).splitlines())
    if "diff" in payload:
        yield f"  commit {payload['sha']} on {payload['base'][:12]}"
        yield from (f"    {_diff_line(line)}" for line in safe(payload["diff"]).splitlines())


def _diff_line(line: str) -> str:
    colour = _COLOURS.get(line[:1])
    return paint(line, colour) if colour else line
