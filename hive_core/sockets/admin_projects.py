"""The operator's verbs about projects, on host.sock. No answer carries a credential."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from hive_core.hive import Hive
from hive_core.protocol.words import OPERATOR, parse_project_name

Args = dict[str, Any]
Verbs = dict[str, tuple[Callable[[Args], Awaitable[Any]], set[str]]]
_CREDENTIALS = ("key", "token", "host_key")


def project_verbs(hive: Hive) -> Verbs:
    """verb → (what answers it, the arguments it takes)."""

    async def projects(_: Args) -> Any:
        listings = await hive.mirrors.projects.listings()
        return {
            "projects": [
                {**row.to_wire(), "agents": sorted(who for who, its in listings.items() if row.name in names(its))}
                for row in await hive.mirrors.projects.all()
            ]
        }

    def names(listed: Any) -> set[str]:
        return {one.name for one in listed}

    async def add(args: Args) -> Any:
        given = {key: args[key] for key in _CREDENTIALS if args.get(key) is not None}
        name = parse_project_name(args.get("project"))
        return (await hive.mirrors.add(name, args.get("source"), given, OPERATOR)).to_wire()

    async def fetch(args: Args) -> Any:
        return (await hive.mirrors.fetch(parse_project_name(args.get("project")))).to_wire()

    async def remove(args: Args) -> Any:
        name = parse_project_name(args.get("project"))
        await hive.mirrors.remove(name, OPERATOR)
        await hive.forges.tidy()
        return {"project": name}

    return {
        "projects": (projects, set()),
        "project_add": (add, {"project", "source", *_CREDENTIALS}),
        "project_fetch": (fetch, {"project"}),
        "project_remove": (remove, {"project"}),
    }
