"""What was deployed to an agent: its log, who set what, and the way back."""

from __future__ import annotations

from hive_core.cli.client import Client
from hive_core.cli.output import emit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterator
    from typing import Any


def history(arguments: Namespace) -> None:
    result = Client().call("history", agent=arguments.agent, limit=arguments.limit)
    emit(arguments, result, "\n".join(line for row in result["deployments"] for line in _lines(row)))


def blame(arguments: Namespace) -> None:
    import json

    from hive_core.cli.show import safe

    result = Client().call("blame", agent=arguments.agent, key=arguments.key)
    value = result["value"]
    said = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    lines = [f"{safe(arguments.key)}: {safe(said)}", *_lines(result)]
    emit(arguments, result, "\n".join(lines))


def rollback(arguments: Namespace) -> int:
    """Show the card of the way back, and click on that: the operator has just asked for it, and by name."""
    from hive_core.cli.approvals import click, show_short

    client = Client()
    given = {key: value for key in ("to", "reason") if (value := getattr(arguments, key)) is not None}
    asked = client.call("request_rollback", agent=arguments.agent, **given)
    card = client.call("show", approval=asked["approval"])
    if not arguments.json:
        show_short([card])
    return click(arguments, [(card["id"], card["digest"])])


def _lines(row: dict[str, Any]) -> Iterator[str]:
    """When, which, who and how it was proven; below that why it failed, and what it was for."""
    from hive_core.cli.show import day, one_line, paint

    when = day(row["at_ms"]) if row["at_ms"] else "at the beginning"
    on_trial = row["state"] == "approved"
    which = row["tag"] or ("on trial" if on_trial else "newer inputs")
    if row["id"] and not which.endswith(f"/{row['id']}"):
        which += f" (approval {row['id']})"
    if row["what"] == "init_config":
        which += ", the configuration alone"
    who = f"rule {one_line(row['rule'])}, without a click," if row["rule"] else row["by"] or "nobody"
    if row["requested_by"] != who:
        who += f" for {row['requested_by']}"
    failed = row["state"] == "failed"
    parts = [
        paint(which, "red" if failed else "bold"),
        (row["sha"] or "")[:12],
        f"by {who}",
        one_line((row["note"] if on_trial else row["proof"]) or ""),
    ]
    yield f"{when}  {'  '.join(part for part in parts if part)}{paint(' ← runs', 'green') if row['runs'] else ''}"
    if failed:
        yield f"  {paint('failed', 'red')}: {one_line(row['note'] or '')}"
    if row["reason"]:
        yield f"  {one_line(row['reason'])}"
