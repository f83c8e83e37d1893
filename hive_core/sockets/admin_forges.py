"""The operator's verbs about forges, on host.sock. No answer carries a token."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from hive_core.hive import Hive
from hive_core.protocol.words import parse_id, parse_project_name

Args = dict[str, Any]
Verbs = dict[str, tuple[Callable[[Args], Awaitable[Any]], set[str]]]


def forge_verbs(hive: Hive) -> Verbs:
    """verb → (what answers it, the arguments it takes)."""

    async def add(args: Args) -> Any:
        given = (args.get(key) for key in ("kind", "url", "repository", "token"))
        return await hive.forges.add(parse_project_name(args.get("project")), *given)

    async def check(args: Args) -> Any:
        return await hive.forges.check(parse_project_name(args.get("project")))

    async def rehearse(args: Args) -> Any:
        number = parse_id(args.get("number"), "an issue or pull request")
        return await hive.forges.rehearse(parse_project_name(args.get("project")), number)

    async def remove(args: Args) -> Any:
        project = parse_project_name(args.get("project"))
        await hive.forges.remove(project)
        return {"project": project}

    async def rows(_: Args) -> Any:
        return {"forges": await hive.forges.rows()}

    return {
        "forges": (rows, set()),
        "forge_add": (add, {"project", "kind", "url", "repository", "token"}),
        "forge_check": (check, {"project"}),
        "forge_rehearse": (rehearse, {"project", "number"}),
        "forge_remove": (remove, {"project"}),
    }
