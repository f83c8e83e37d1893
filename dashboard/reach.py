"""What an agent may reach and what it talked to, on its page."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from dashboard.rows import render
from hive_core.destinations import authority
from hive_core.hive import Hive
from hive_core.protocol.words import AgentName
from hive_core.services.charges import DAY_MS
from hive_core.services.connections import OTHERS
from hive_core.services.costs import Span
from hive_core.services.reach import reach

DAYS = 7
SHOWN = 20  # hosts, and refusals


async def reach_now(hive: Hive, name: AgentName) -> Markup:
    """The last days' hosts with the most bytes, and the newest refusals."""
    now_ms = hive.connections.now_ms
    span = Span(first_day=now_ms // DAY_MS - DAYS + 1)
    most, kept_s = hive.config.connections_kept, hive.config.history_kept_s
    found = await reach(hive.store, name, span, now_ms, most, kept_s)
    hosts, refusals = ([{**row, "where": _where(row)} for row in found[what]] for what in ("hosts", "refusals"))
    return render(
        "rows/reach.html",
        agent=name,
        days=DAYS,
        network=found["network"],
        may=found["may"],
        hosts=hosts[:SHOWN],
        refusals=refusals[:SHOWN],
        more=max(0, len(hosts) - SHOWN) + max(0, len(refusals) - SHOWN),
        total=found["total"],
    )


def _where(row: dict[str, Any]) -> str:
    return "several" if row["host"] == OTHERS else authority(row["host"], row["port"])
