"""Deployments of containers that are built from their agent's commit: built beside what runs, staged in the meta flake,
switched, committed. Until main of the applied repository moves, whatever goes wrong leaves all as it was."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from functools import partial

import trio

from hive_core.agent_locks import AgentLocks
from hive_core.building import make_meta_flake, make_nix
from hive_core.commit_contents import FILES
from hive_core.config import Config
from hive_core.containers.choice import Choice
from hive_core.containers.driver import Driver, Systems
from hive_core.effects import Effect, file_lines, prompt_lines
from hive_core.effects_of_settings import settings_lines
from hive_core.effects_of_systems import closure_lines, system_lines
from hive_core.flakes import Evaluated, MetaFlake
from hive_core.limits import Limits
from hive_core.procedures.deployments import (
    Change,
    Deployments,
    NoDeployments,
    PlainDeployments,
    contents_before,
    insist_that_it_stays,
)
from hive_core.proposals import Proposal
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName, CommitSha, StorePath
from hive_core.repos import Repos, harness_settings
from hive_core.store.door import Store
from hive_core.systems import Deployed, System, built_commits, system_of

log = logging.getLogger(__name__)
CHECKS_WAITING = 4
EVALUATED_KEPT = 64
_NOT_YET = "its container is being built"


class FlakeDeployments:
    """builds_at_once: how many are built at the same time. What needs no build waits for none."""

    def __init__(
        self,
        store: Store,
        repos: Repos,
        locks: AgentLocks,
        meta: MetaFlake,
        systems: Systems,
        builds_at_once: int = Limits().builds_at_once,
    ) -> None:
        self._store = store
        self._repos = repos
        self._locks = locks
        self._meta = meta
        self._systems = systems
        self._hindrances: dict[AgentName, str] = {}  # of those that were looked at: "" may start
        self._known: dict[tuple[AgentName, CommitSha, str], Evaluated] = {}  # the longest unused first
        # One at a time, since each may take all its memory and all its time; what is approved waits for none of them.
        self._checking = trio.Lock()
        self._evaluating = trio.CapacityLimiter(builds_at_once)
        self._building = trio.CapacityLimiter(builds_at_once)
        self._settling = trio.Lock()

    def files(self, name: AgentName, description: str) -> Mapping[str, str]:
        return self._meta.agent_files(name, description)

    async def check(self, name: AgentName, proposal: Proposal) -> Effect:
        if (waiting := self._checking.statistics().tasks_waiting) >= CHECKS_WAITING:
            why = f"{waiting} others wait to be evaluated; ask again in a minute"
            raise Refusal("unavailable", f"cannot check {proposal.sha[:12]} of {name}: {why}")
        async with self._checking:
            after = await self._evaluated(name, proposal.sha)
            unknown: list[str] = []
            try:
                before = await self._evaluated(name, proposal.base)
            except Refusal as refusal:  # by another release, which took what this one does not
                before, unknown = None, [f"what {name} has now: {refusal.message}"]
            closures = [await self._meta.closure(one.system) if one else None for one in (before, after)]
        files_before, more = await contents_before(self._repos, name, proposal.base)
        files_after = await self._repos.contents(name, proposal.sha)
        lines = settings_lines(before.settings if before else None, after.settings)
        lines += prompt_lines(before.persona if before else None, after.persona)
        lines += file_lines(files_before.files if files_before else {}, files_after.files, FILES)
        unknown += more
        if before is not None and before.system != after.system:
            for told, untold in (system_lines(before.facts, after.facts), closure_lines(*closures)):
                lines += told
                unknown += untold
        return Effect(lines, unknown)

    async def _evaluated(self, name: AgentName, sha: CommitSha) -> Evaluated:
        """What a commit is evaluated to: the same for as long as it is built from the same."""
        key = (name, sha, self._meta.inputs)
        if (found := self._known.pop(key, None)) is None:
            await self._repos.pin(name, sha)
            found = await self._meta.evaluate(name, sha)
        self._known[key] = found
        while len(self._known) > EVALUATED_KEPT:
            del self._known[next(iter(self._known))]
        return found

    async def carry_out(self, change: Change, held: AsyncExitStack) -> Deployed:
        name, sha, base = change.agent, change.sha, change.base
        settle: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint  # main begins at the first commit
        if base is not None:
            await self._repos.check_main(name, sha, base)
            settle = partial(self._repos.deploy, name, change.number, sha, base)
        message = f"{name}: deployed/{change.number if base else 0}"
        return await self._make(name, sha, message, settle, held, is_new=base is None)

    async def mend(self, name: AgentName, sha: CommitSha, held: AsyncExitStack) -> Deployed | None:
        known = await system_of(self._store, name)
        try:
            current = await self._systems.current(name)
        except Refusal as refusal:
            if self.hindrance(name) is not None:
                self._hindrances[name] = refusal.message
            raise
        if current is not None:
            self._hindrances[name] = ""  # what it has is good enough until it has what it should
        if known is not None and (known.sha, known.path, known.inputs) == (sha, current, self._meta.inputs):
            return None
        try:
            return await self._make(name, sha, f"{name}: {sha[:12]} again", trio.lowlevel.checkpoint, held)
        except Exception as exc:
            if current is None:
                way_out = "it is tried again when something is deployed, and when the daemon starts"
                self._hindrances[name] = f"its container cannot be built: {exc}; {way_out}"
            raise

    def hindrance(self, name: AgentName) -> str | None:
        return self._hindrances.get(name, _NOT_YET) or None

    def forget(self, name: AgentName) -> None:
        self._hindrances.pop(name, None)

    async def _make(
        self,
        name: AgentName,
        sha: CommitSha,
        message: str,
        settle: Callable[[], Awaitable[None]],
        held: AsyncExitStack,
        is_new: bool = False,
    ) -> Deployed:
        """Build a commit, and make it the agent's; `settle` is the point after which it stays.

        is_new: it is no agent yet. One that was one, and is none any more when it is built, is given no container.

        All of it can be done again: what is built is there already, and a switch to what is current is none.
        """
        before = await self._before(name)
        settled = False
        try:
            await self._repos.pin(name, sha)
            async with self._evaluating:
                found = await self._meta.evaluate(name, sha)
            path = await self._systems.current(name)
            if path is None or found.system != path:  # it says so itself, and keeps what it has if that is not so
                async with self._building, self._meta.alone(name, sha) as url:
                    path = await self._systems.build(name, url)
            # What is staged names the commits of all as the rows have them: so the next waits for those of this one.
            async with AsyncExitStack() as locks:
                await locks.enter_async_context(self._settling)
                await locks.enter_async_context(self._locks.of(name))
                if not is_new:
                    await insist_that_it_stays(self._store, name)
                try:
                    async with self._meta.staged(await self._flake_with(name, sha), message):
                        if path != await self._systems.current(name):
                            await self._systems.switch(name, path)
                        await settle()
                        settled = True
                except Exception as exc:
                    if not settled:
                        raise
                    # The log lacks a line, and the next one who stages has its flake right.
                    log.error("the meta flake was not committed: %s", exc, extra={"agent": name})
                held.push_async_exit(locks.pop_all())
        except Exception:
            if not settled:
                await self._go_back(name, before, is_new)
            raise
        self._hindrances[name] = ""
        return Deployed(harness_settings(found.settings, found.persona), System(sha, path, self._meta.inputs))

    async def _flake_with(self, name: AgentName, sha: CommitSha) -> str:
        return self._meta.render({**await built_commits(self._store), name: sha})

    async def _before(self, name: AgentName) -> StorePath | None:
        """What the agent has if this comes to nothing. What it has now may be what a daemon switched to that died
        then."""
        known = await system_of(self._store, name)
        return known.path if known is not None else await self._systems.current(name)

    async def _go_back(self, name: AgentName, before: StorePath | None, is_new: bool) -> None:
        try:
            async with self._locks.of(name):
                if before is None or before == await self._systems.current(name):
                    return
                if not is_new:
                    await insist_that_it_stays(self._store, name)
                await self._systems.switch(name, before)
        except (Refusal, OSError) as exc:
            log.error("%s could not be given its former system %s: %s", name, before, exc, extra={"agent": name})


async def make_deployments(
    config: Config, choice: Choice, store: Store, repos: Repos, locks: AgentLocks, driver: Driver
) -> Deployments:
    """What the sandbox that is set asks for. Raises Refusal when the meta flake's repository cannot be used."""
    if config.sandbox != "nixos-container" or config.unsafe_no_sandbox:
        return PlainDeployments(store, repos, locks, "none" if config.unsafe_no_sandbox else config.sandbox)
    if choice.trouble is not None or not isinstance(driver, Systems):
        return NoDeployments(choice.trouble or "its driver has no systems")
    meta = make_meta_flake(config, make_nix(config))
    await meta.open()
    return FlakeDeployments(store, repos, locks, meta, driver, config.builds_at_once)
