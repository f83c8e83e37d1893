"""The operator's verbs about projects, on host.sock. No answer carries a credential."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import trio

from hive_core.hive import Hive
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import OPERATOR, ProjectName, parse_project_name
from hive_core.services.projects import Registered

Args = dict[str, Any]
Verbs = dict[str, tuple[Callable[[Args], Awaitable[Any]], set[str]]]
Tell = Callable[[Any], Awaitable[None]]
Streams = dict[str, tuple[Callable[[Args, Tell], Awaitable[None]], set[str]]]
_CREDENTIALS = ("key", "token", "host_key")
PROGRESS_S = 2.0  # between two words on how far a fetch is


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

    async def remove(args: Args) -> Any:
        name = parse_project_name(args.get("project"))
        await hive.mirrors.remove(name, OPERATOR)
        await hive.forges.tidy()
        return {"project": name}

    return {
        "projects": (projects, set()),
        "project_remove": (remove, {"project"}),
    }


def project_streams(hive: Hive) -> Streams:
    """What takes as long as its repository is large: `arrived_bytes` now and then, and the project at the end."""

    async def add(args: Args, tell: Tell) -> None:
        given = {key: args[key] for key in _CREDENTIALS if args.get(key) is not None}
        name = parse_project_name(args.get("project"))
        await followed(name, lambda: hive.mirrors.add(name, args.get("source"), given, OPERATOR), tell)

    async def fetch(args: Args, tell: Tell) -> None:
        name = parse_project_name(args.get("project"))
        await followed(name, lambda: hive.mirrors.fetch(name), tell)

    async def followed(name: ProjectName, deed: Callable[[], Awaitable[Registered]], tell: Tell) -> None:
        refused: Refusal | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tell_progress, name, tell)
            try:
                done = await deed()
            except Refusal as refusal:  # it is no group of one
                refused = refusal
            nursery.cancel_scope.cancel()
        if refused is not None:
            raise refused
        await tell(done.to_wire())

    async def tell_progress(name: ProjectName, tell: Tell) -> None:
        with suppress(trio.BrokenResourceError):  # it goes on, whether anybody looks or not
            while True:
                await trio.sleep(PROGRESS_S)
                await tell({"arrived_bytes": await trio.to_thread.run_sync(hive.mirrors.arrived_bytes, name)})

    return {
        "project_add": (add, {"project", "source", *_CREDENTIALS}),
        "project_fetch": (fetch, {"project"}),
    }
