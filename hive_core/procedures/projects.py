"""Projects on the host: their mirrors are fetched, lent to the agents that list them, and looked after.

Of what git does with one mirror's refs there is one thing at a time: a fetch, or what a push ends with.
"""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import trio

from hive_core.git.mirrors import (
    Fetched,
    Lent,
    Mirror,
    MirrorLimits,
    clear_fetch,
    clear_leavings,
    export,
    exported,
    packed_bytes,
    read_refs,
    remove,
    withdraw,
)
from hive_core.git.project_keys import KEY, KNOWN_HOSTS, TOKEN, ProjectKeys, parse_host_key, parse_key, parse_token
from hive_core.git.remotes import Access, Source, parse_source
from hive_core.git.sterile_git import GitFailed
from hive_core.limits import Limits
from hive_core.protocol.paths import explain
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName, ProjectName
from hive_core.services.forges import no_such_project
from hive_core.services.projects import PROJECTS, Projects, Registered, taken
from hive_core.store.bus import DEPLOYED, WANTED
from hive_core.store.door import Store
from hive_core.store.errors import StoreError

log = logging.getLogger(__name__)
T = TypeVar("T")
FRESH_S = 30.0  # after a fetch, in which no turn asks for another
WAIT_S = 10.0  # that the begin of a turn waits for a fetch
FETCHES_AT_ONCE = 3
TROUBLE_LIMIT = 300


class ProjectMirrors:
    """Every mirror of the hive. `serve` has to run for `fresh`."""

    def __init__(self, store: Store, limits: Limits, state_dir: Path) -> None:
        self.projects = Projects(store)
        self._store = store
        self._limits = MirrorLimits(limits.project_bytes, limits.project_fetch_s)
        self._folder = state_dir / "mirrors"
        self._agents = state_dir / "agents"
        self.keys = ProjectKeys(state_dir)
        self._fetching = trio.Semaphore(FETCHES_AT_ONCE)
        self._locks: dict[ProjectName, trio.Lock] = {}
        self._exporting = trio.Lock()
        self._under_way: dict[ProjectName, trio.Event] = {}
        self._fetched_s: dict[ProjectName, float] = {}
        self._nursery: trio.Nursery | None = None

    def path(self, name: ProjectName) -> Path:
        """Where the mirror is."""
        return self._folder / f"{name}.git"

    def arrived_bytes(self, name: ProjectName) -> int:
        """What there is of its mirror now, with what is under way."""
        with contextlib.suppress(FileNotFoundError):
            return sum(file.stat().st_size for file in (self.path(name) / "objects" / "pack").iterdir())
        return 0

    @asynccontextmanager
    async def alone(self, name: ProjectName, within_s: float = math.inf) -> AsyncIterator[bool]:
        """While nothing else moves the refs of this mirror; False where it was not to be had within that time."""
        lock = self._locks.setdefault(name, trio.Lock())
        with trio.move_on_after(within_s) as waited:
            await lock.acquire()
        try:
            yield not waited.cancelled_caught
        finally:
            if not waited.cancelled_caught:
                lock.release()

    def mirror(self, registered: Registered) -> Mirror:
        """The mirror and its way to the source, for threads of trio's. Raises GitFailed without its credential."""
        return self._mirror(registered.name, self.keys.access(registered.name, parse_source(registered.source)))

    def _mirror(self, name: ProjectName, access: Access) -> Mirror:
        return Mirror(self.path(name), name, access, self._limits, trio.from_thread.check_cancelled)

    # -- the operator's -----------------------------------------------------------------------------------------------

    async def add(self, name: ProjectName, raw: object, given: dict[str, object], actor: str) -> Registered:
        """Register a repository, once its mirror is whole; or give one another credential, once its server takes that.

        given: key, token and host_key, each may be absent. Raises Refusal; then all is as it was, but for another
        credential that its server took before the fetch with it failed.
        """
        source = parse_source(raw)
        files = _credential_files(source, given)
        kind = next((kind for suffix, kind in ((KEY, "key"), (TOKEN, "token")) if suffix in files), "none")
        async with self.alone(name):
            if (found := await self.projects.find(name)) is None:
                try:
                    branch, size = await _in_thread("add", name, lambda: self._make(name, source, files))
                    await self.projects.add(name, source.text, kind, branch, size, actor)
                except BaseException:
                    with trio.CancelScope(shield=True):
                        await trio.to_thread.run_sync(self._forget, name)
                    raise
                self._fetched_s[name] = trio.current_time()
            elif found.source == source.text and kind != "none":
                await _in_thread("reach", name, lambda: self._renew(name, source, files))
                await self.projects.renew(name, kind, actor)
            else:
                raise taken(name)
        return await (self.projects.get(name) if found is None else self.fetch(name))

    async def fetch(self, name: ProjectName) -> Registered:
        """Fetch it now, and let its first branch be the source's. Raises Refusal when that cannot be done."""
        await self.projects.get(name)
        await self._fetch(name, with_head=True)
        return await self.projects.get(name)

    async def remove(self, name: ProjectName, actor: str) -> None:
        """Forget it, its mirror and its credential. Raises Refusal while an agent lists it."""
        async with self.alone(name):
            await self.projects.remove(name, actor)
            await _in_thread("remove", name, lambda: self._forget(name))

    def _make(self, name: ProjectName, source: Source, files: dict[str, str]) -> tuple[str, int]:
        self._forget(name)  # what a daemon that died left of another try
        for suffix, text in files.items():
            self.keys.put(name, suffix, text)
        mirror = self._mirror(name, self.keys.access(name, source))
        mirror.make()
        if source.kind == "ssh" and KNOWN_HOSTS not in files:
            mirror.meet()
        mirror.fetch()
        mirror.follow_head()
        return mirror.head(), packed_bytes(mirror.path)

    def _renew(self, name: ProjectName, source: Source, files: dict[str, str]) -> None:
        former = self.keys.read(name)
        try:
            for suffix, text in files.items():
                self.keys.put(name, suffix, text)
            mirror = self._mirror(name, self.keys.access(name, source))
            mirror.make()
            if source.kind == "ssh" and KNOWN_HOSTS not in {*files, *former}:
                mirror.meet()
            mirror.follow_head()
        except BaseException:
            self.keys.remove(name, kept=former)  # which a full disk takes as little as the others
            for suffix, text in former.items():
                self.keys.put(name, suffix, text)
            raise

    def _forget(self, name: ProjectName) -> None:
        remove(self.path(name))
        self.keys.remove(name)

    # -- fetching ------------------------------------------------------------------------------------------------------

    async def fresh(self, names: list[ProjectName]) -> dict[ProjectName, str]:
        """Have these mirrors fetched, unless they were a moment ago; wait for that, but not for long.

        Returns why some are not fresh, in a sentence. The fetch goes on behind it.
        """
        for name in names:
            last_s = self._fetched_s.get(name, -FRESH_S)
            if name not in self._under_way and self._nursery is not None and trio.current_time() - last_s >= FRESH_S:
                self._nursery.start_soon(self._fetch_beside, name)
                self._under_way[name] = trio.Event()
        with trio.move_on_after(WAIT_S):
            for event in [self._under_way[name] for name in names if name in self._under_way]:
                await event.wait()
        rows = {row.name: row for row in await self.projects.all()}
        told: dict[ProjectName, str] = {}
        for name in names:
            if (row := rows.get(name)) is None:
                told[name] = no_such_project(name).message
            elif name in self._under_way:
                told[name] = f"{name} is still being fetched from {row.source}"
            elif row.trouble:
                told[name] = f"{name} could not be fetched from {row.source}: {row.trouble}"
        return told

    async def of(self, agent: AgentName) -> list[dict[str, Any]]:
        """The projects of an agent, fresh, as protocol.harness.ProjectState."""
        listed = await self.projects.listed_by(agent)
        troubles = await self.fresh([ProjectName(one.name) for one in listed])
        registered = {row.name for row in await self.projects.all()}
        await self._lend_missing(agent, {ProjectName(one.name) for one in listed} & registered)
        states = []
        for one in listed:
            name = ProjectName(one.name)
            told = {"branch": one.branch, "push": one.pushes(agent), "trouble": troubles.get(name)}
            states.append({"name": name, "path": one.place, **told})
        return states

    async def _fetch_beside(self, name: ProjectName) -> None:
        try:
            await self._fetch(name)
        except Refusal as refusal:
            log.warning("%s", refusal.message, extra={"project": name})
        except StoreError:
            raise
        except Exception as exc:
            # What a repository holds is its own trouble, also where nobody has thought of it.
            log.exception("cannot fetch %s", name, extra={"project": name})
            await self.projects.note_trouble(name, f"{type(exc).__name__}: {exc}"[:TROUBLE_LIMIT])
        finally:
            self._under_way.pop(name).set()

    async def _fetch(self, name: ProjectName, with_head: bool = False) -> None:
        """Raises Refusal, which is written down with the project."""

        def fetch() -> tuple[Fetched, str, int]:
            mirror = self.mirror(found)
            is_new = not mirror.path.exists()  # as behind a backup that was restored
            mirror.make()
            try:
                fetched = mirror.fetch()
            except GitFailed:
                clear_fetch(mirror.path)  # it may have been killed
                raise
            if with_head or is_new or not mirror.has_head():
                mirror.follow_head()
            return fetched, mirror.head(), packed_bytes(mirror.path)

        async with self.alone(name), self._fetching:  # who waits for a push keeps no other project waiting
            if (row := await self.projects.find(name)) is None:
                return
            found = row
            self._fetched_s[name] = trio.current_time()
            try:
                fetched, branch, size = await _in_thread("fetch", name, fetch)
            except Refusal as refusal:
                await self.projects.note_trouble(name, refusal.message.partition(": ")[2] or refusal.message)
                raise
            if fetched.kept_back:
                log.warning("of %s these stay away: %s", name, fetched.kept_back, extra={"project": name})
            await self.projects.note_fetched(name, fetched.moved, branch, size)
        if fetched.moved or fetched.repacked:
            await self.lend(name)

    # -- what agents borrow --------------------------------------------------------------------------------------------

    async def lend(self, *only: ProjectName) -> None:
        """Let every agent have what it lists of these mirrors, or of all, and no other. Trouble is logged."""
        async with self._exporting:
            refs: dict[ProjectName, Lent] = {}
            registered = {row.name for row in await self.projects.all()}
            for agent, listed in (await self.projects.listings()).items():
                wanted = {ProjectName(one.name) for one in listed} & registered
                await self._lend(agent, wanted, set(only), refs)

    async def _lend_missing(self, agent: AgentName, wanted: set[ProjectName]) -> None:
        """Lend what was not lent yet: without it a first clone would be a copy of all there is."""
        folder = self._agents / agent / "mirrors"

        def find_missing() -> set[ProjectName]:
            return {name for name in wanted if not (folder / name / "HEAD").exists()}  # which comes last

        if missing := await trio.to_thread.run_sync(find_missing):
            async with self._exporting:
                await self._lend(agent, wanted, missing, {})

    async def _lend(
        self, agent: AgentName, wanted: set[ProjectName], only: set[ProjectName], refs: dict[ProjectName, Lent]
    ) -> None:
        folder = self._agents / agent / "mirrors"

        def lend() -> None:
            if not folder.parent.is_dir():
                return  # it was never started, or is being destroyed
            folder.mkdir(mode=0o700, exist_ok=True)
            for name in wanted & only if only else wanted:
                if self.path(name).is_dir():
                    if name not in refs:
                        refs[name] = read_refs(self.path(name))
                    export(self.path(name), folder / name, refs[name])
            for other in list(exported(folder)):
                if other not in wanted:
                    withdraw(folder, other)

        if not wanted and not folder.is_dir():
            return
        try:
            await _in_thread("lend", ProjectName(f"to {agent}"), lend)
        except Refusal as refusal:
            log.error("%s", refusal.message, extra={"agent": agent})

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Clear up what a daemon that died left; then lend what is listed, whenever that changes. Until cancelled.

        Nothing else may be asked for before it has started.
        """
        await trio.to_thread.run_sync(self._clear, {row.name for row in await self.projects.all()})
        with self._store.bus.listen(DEPLOYED, WANTED, PROJECTS) as listener:
            async with trio.open_nursery() as self._nursery:
                task_status.started()
                seen: Any = None
                while True:
                    rows = await self.projects.all(), await self.projects.listings()
                    listed = {row.name for row in rows[0]}, rows[1]
                    if listed != seen:
                        await self.lend()
                        seen = listed
                    await listener.wait()

    def _clear(self, known: set[ProjectName]) -> None:
        with contextlib.suppress(FileNotFoundError):
            for entry in list(self._folder.iterdir()):
                if entry.name.removesuffix(".git") in known:
                    clear_leavings(entry)
                elif entry.name != HOOKS:
                    shutil.rmtree(entry, ignore_errors=True)
        for name in self.keys.names():
            if name not in known:
                self.keys.remove(ProjectName(name))


HOOKS = ".hooks"


def _credential_files(source: Source, given: dict[str, object]) -> dict[str, str]:
    """What is written of a credential, by the ends of the files' names. Raises Refusal for what does not fit."""
    key, token, host_key = (given.get(name) for name in ("key", "token", "host_key"))
    if (key is not None or host_key is not None) and source.kind != "ssh":
        raise Refusal("usage", "cannot use a key for this repository: keys are for ssh; give --token, or nothing")
    if token is not None and source.kind != "http":
        raise Refusal("usage", "cannot use a token for this repository: tokens are for https; give --key, or nothing")
    if source.kind == "ssh" and key is None:
        raise Refusal("usage", "cannot use this repository without a key: give --key FILE; the hive has no other")
    if token is not None and source.text.startswith("http:") and source.host not in ("localhost", "127.0.0.1", "::1"):
        raise Refusal("usage", "cannot send a token over http, where everybody on the way reads it; use https")
    files = {KEY: parse_key(key)} if key is not None else {}
    files |= {TOKEN: parse_token(token) + "\n"} if token is not None else {}
    return files | ({KNOWN_HOSTS: parse_host_key(host_key, source.host, source.port)} if host_key is not None else {})


async def _in_thread(deed: str, name: ProjectName, function: Callable[[], T]) -> T:
    """Run what blocks; what git or the system says becomes a Refusal that says why."""
    try:
        return await trio.to_thread.run_sync(function)
    except (GitFailed, OSError) as exc:
        why = explain(exc) if isinstance(exc, OSError) else str(exc)
        raise Refusal("unavailable", f"cannot {deed} {name}: {why}") from exc
