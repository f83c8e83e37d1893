"""What was deployed to an agent: its log, who set what, and the way back."""

from __future__ import annotations

from hive_core.cli.client import Client
from hive_core.cli.output import emit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from typing import Any


def history(arguments: Namespace) -> None:
    result = Client().call("history", agent=arguments.agent, limit=arguments.limit)
    emit(arguments, result, "\n".join(map(_line, result["deployments"])))


def blame(arguments: Namespace) -> None:
    from hive_core.cli.show import safe

    result = Client().call("blame", agent=arguments.agent, key=arguments.key)
    emit(arguments, result, f"{safe(arguments.key)}: {safe(str(result['value']))}\n{_line(result)}")


def rollback(arguments: Namespace) -> int:
    from hive_core.cli.approvals import approve

    given = {key: value for key in ("to", "reason") if (value := getattr(arguments, key)) is not None}
    asked = Client().call("request_rollback", agent=arguments.agent, **given)
    arguments.approval, arguments.digest = [asked["approval"]], None
    return approve(arguments)


def _line(row: dict[str, Any]) -> str:
    """When, which, who, how it was proven, and what it was for."""
    import time

    from hive_core.cli.show import safe

    when = "at the beginning"
    if row["at_ms"]:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["at_ms"] / 1000))
    mark = " ← runs" if row["runs"] else ""
    who = f"rule {safe(row['rule'])}, without a click," if row["rule"] else row["by"] or "nobody"
    if row["requested_by"] != who:
        who += f" for {row['requested_by']}"
    found = row["proof"] if row["state"] == "done" else f"failed: {row['note']}"
    parts = [row["tag"], (row["sha"] or "")[:12], f"by {who}", safe(found or ""), safe(row["reason"])]
    return f"{when}  {'  '.join(part for part in parts if part)}{mark}"
