"""Agents to be: their repositories are there to be shaped, and nothing of them runs yet."""

from __future__ import annotations

from markupsafe import Markup

from dashboard.rows import render
from hive_core.hive import Hive
from hive_core.services.configured import all_configured


async def configured_rows(hive: Hive) -> dict[str, Markup]:
    """Target → row, by name."""
    return {
        f"configured-{one['name']}": render("rows/configured.html", one=one) for one in await all_configured(hive.store)
    }
