"""The forges of the hive's projects: registered when they answer, opened with their tokens, removed with them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx2
import trio

from hive_core.forge.adapter import Forge, open_forge
from hive_core.forge.api import Quiet
from hive_core.forge.tokens import Tokens, parse_token
from hive_core.forge.words import Place, Thread, parse_place
from hive_core.lanes import Lane, News, asks_for_files, lane_of, may_take
from hive_core.protocol.paths import explain
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import ProjectName
from hive_core.services.forges import Registered, all_forges, forge_of, put_forge, remove_forge
from hive_core.store.door import Store

log = logging.getLogger(__name__)


class Forges:
    def __init__(
        self, store: Store, state_dir: Path, lanes: Sequence[Lane] = (), client: httpx2.AsyncClient | None = None
    ) -> None:
        """client: to ask with; None opens one when it is needed."""
        self.store = store
        self._lanes = lanes
        self._tokens = Tokens(state_dir)
        self._client = client
        self._quiet = Quiet()
        self._changes = trio.Lock()

    def open(self, forge: Registered) -> Forge:
        """Raises Refusal("refused") when its token is gone."""
        return self._open(forge.place, self._tokens.get(forge.project, forge.place))

    def _open(self, place: Place, token: str) -> Forge:
        if self._client is None:  # few hives have a forge: its certificates are not read before there is one
            self._client = httpx2.AsyncClient(follow_redirects=False, trust_env=True)
        return open_forge(self._client, place, token, self._quiet)

    async def aclose(self) -> None:
        if self._client is not None:
            client, self._client = self._client, None
            await client.aclose()

    async def add(self, project: ProjectName, kind: object, url: object, repository: object, token: object) -> Any:
        """Register the forge of a project, in the place of the one it had: what `check` answers.

        It is asked first. Raises Refusal, and then all is as it was.
        """
        place, secret = parse_place(kind, url, repository), parse_token(token)
        told = await _ask(self._open(place, secret))
        async with self._changes:
            before = next((one.place for one in await all_forges(self.store) if one.project == project), None)
            try:
                self._tokens.put(project, place, secret)
                await self.store.write(lambda tx: put_forge(tx, project, place, told["login"]))
            except OSError as exc:
                raise Refusal("failed", f"cannot store the token: {exc.strerror}; nothing has changed") from None
            except BaseException:
                if before != place:
                    self._tokens.keep_only(project, before)
                raise
            self._tokens.keep_only(project, place)
        return {"project": project, **told}

    async def remove(self, project: ProjectName) -> None:
        """Raises Refusal("not_found")."""
        async with self._changes:
            await self.store.write(lambda tx: remove_forge(tx, project))
            self._tokens.keep_only(project, None)

    async def tidy(self) -> None:
        """Remove the tokens of forges that are gone, also with their projects, or with a daemon that died meanwhile."""
        async with self._changes:
            projects = {forge.project for forge in await all_forges(self.store)}
            try:
                self._tokens.keep_those_of(projects)
            except OSError as exc:
                log.error("cannot remove the tokens of forges that are gone: %s", explain(exc))

    async def check(self, project: ProjectName) -> dict[str, Any]:
        """Ask a forge: {"project", "login", "default_branch", "unread"}; nothing there changes. Raises Refusal."""
        forge = await forge_of(self.store, project)
        return {"project": project, **await _ask(self.open(forge), forge.added_at_ms)}

    async def rehearse(self, project: ProjectName, number: int) -> dict[str, Any]:
        """Which lane would tell of a thread as it is now: {"project", "number", "kind", "lane", "agents"}; nobody does.

        lane None: none would. Raises Refusal.
        """
        forge = await forge_of(self.store, project)
        ours = self.open(forge)
        thread = await ours.thread(number)
        lane = await choose_lane(self._lanes, project, ours, thread)
        told = {"lane": lane.name if lane else None, "agents": lane.agents if lane else []}
        return {"project": project, "number": number, "kind": thread.kind, **told}

    async def rows(self) -> list[dict[str, Any]]:
        """Each forge, with the names of the lanes that may tell of it: without one nobody looks."""
        return [
            {**forge.to_wire(), "lanes": [lane.name for lane in self._lanes if may_take([lane], forge.project)]}
            for forge in await all_forges(self.store)
        ]


async def choose_lane(lanes: Sequence[Lane], project: ProjectName, forge: Forge, thread: Thread) -> Lane | None:
    """The lane that tells of a thread; the forge is asked for the changed files where that depends on them."""
    news = News(project, thread.kind, thread.labels)
    if asks_for_files(lanes, news):
        news = news._replace(files=await forge.files(thread.number))
    return lane_of(lanes, news)


async def _ask(forge: Forge, since_ms: int = 0) -> dict[str, Any]:
    """All that is needed of a token is tried, but writing."""
    login, branch = await forge.login(), await forge.default_branch()
    unread = await forge.unread(since_ms)
    return {"login": login, "default_branch": branch, "unread": len(unread.notifications)}
