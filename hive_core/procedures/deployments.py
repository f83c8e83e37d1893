"""How a commit becomes what an agent runs on: the part of the gate's walk that differs with what agents run in."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from hive_core.effects import Effect, Line, file_lines, prompt_lines, text_lines
from hive_core.effects_of_extras import extras_lines
from hive_core.effects_of_settings import settings_lines
from hive_core.extras import NONE, Extras
from hive_core.git.agent_locks import AgentLocks
from hive_core.git.commit_contents import FILES, Contents
from hive_core.git.proposals import Proposal
from hive_core.git.repos import Repos, harness_settings
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName, CommitSha
from hive_core.services.systems import Deployed, deployed_now, system_of
from hive_core.store.door import Store

_STAYS = """
    SELECT 1 FROM (SELECT name FROM agents UNION ALL SELECT name FROM configured)
    WHERE name = ? AND name NOT IN (SELECT name FROM tombstones WHERE state = 'destroying')
"""


@dataclass(frozen=True, slots=True)
class Change:
    """What was approved: an agent's commit, as deployed/NUMBER.

    base   what main of its applied repository was when it was asked for; None is a new agent's first commit
    """

    agent: AgentName
    number: int
    sha: CommitSha
    base: CommitSha | None


class Deployments(Protocol):
    """Every step can be done again: a daemon that dies in one is followed by one that begins it anew.

    A change is built, taken by its agent, which is at rest then, and settled once that has come up with it. Until it is
    settled the agent can take again what it had before. Who lets one take, or settles, holds the agent's lock.
    """

    def files(self, name: AgentName, description: str, packages: Sequence[str] = ()) -> Mapping[str, str]:
        """What a new agent's first commit holds besides agent.toml and CLAUDE.md, where packages can be had."""

    @property
    def inputs(self) -> str:
        """A mark of what is built from besides commits; empty where nothing is built. An effect has it too."""

    async def check(self, name: AgentName, proposal: Proposal) -> Effect:
        """What a proposal would change. Raises Refusal when it could not be deployed; nothing is changed, and nothing
        that runs touched."""

    async def check_new(self, name: AgentName, files: Mapping[str, str]) -> Effect:
        """What a new agent with these files would have, besides what they say themselves. Raises as `check`."""

    async def build(self, name: AgentName, sha: CommitSha, shown: str = "") -> Deployed:
        """Make of a commit what is made of it here; nothing that runs is touched. Raises when that is impossible.

        shown: the derivation that was told of when it was approved; it has to be that, where there is one
        """

    async def has(self, name: AgentName, deployed: Deployed) -> bool:
        """Whether an agent is started on this already, all but the rows."""

    async def take(self, name: AgentName, deployed: Deployed) -> None:
        """Let an agent be started on this from now on, all but the rows. Raises when that is impossible."""

    async def settle(self, change: Change) -> None:
        """What was taken stays: main of the applied repository moves, and the log tells of it.

        Raises when main cannot move, and then all is as it was.
        """

    async def mend(self, name: AgentName, sha: CommitSha, held: AsyncExitStack) -> Deployed | None:
        """Make of the commit that is deployed what has to be made of it here, where a daemon that died, one of another
        release or with another sandbox left it otherwise; None when all is well. Raises when that is impossible, also
        because the agent was destroyed meanwhile.

        held: is given what keeps a destruction away until it is closed: after the rows
        """

    async def look_at_inputs(self) -> tuple[Mapping[str, str], Mapping[str, str]]:
        """The revision of each input that agents are built from, as it is locked, and as it would be if it was locked
        now; nothing is changed. Raises Refusal where nothing is built from inputs."""

    async def lock_inputs(self, wanted: Mapping[str, str]) -> None:
        """Lock the inputs anew, which have these revisions then: `mend` builds each agent from them. Done already is
        fine. Raises Refusal when they would have others."""

    def hindrance(self, name: AgentName) -> str | None:
        """Why an agent may not be started now, or None."""

    def forget(self, name: AgentName) -> None:
        """There is no such agent any more."""


async def contents_before(repos: Repos, name: AgentName, base: CommitSha) -> tuple[Contents | None, list[str]]:
    """What a commit that runs holds; or None, and what is unknown then."""
    try:
        return await repos.contents(name, base), []
    except Refusal as refusal:  # deployed by another release, which took what this one does not
        return None, [f"what {name} has now: {refusal.message}"]


def lines_of_files(
    before: Contents | None,
    after: Contents,
    besides: Collection[str] = FILES,
    extras: tuple[Extras, Extras] | None = None,
) -> list[Line]:
    """What comes, goes and changes of a commit's files, besides those that are told by what they say.

    extras: the skills and plugins before and after, where others are loaded than agent.toml names
    """
    had, has = extras or (before.extras if before else NONE, after.extras)
    module = text_lines("agent.nix", before.module if before else None, after.module)
    told = (*besides, "agent.nix", *had.files, *has.files)
    return module + extras_lines(had, has) + file_lines(before.files if before else {}, after.files, told)


async def keep_extras(
    store: Store, repos: Repos, locks: AgentLocks, name: AgentName, find: Callable[[], Awaitable[Deployed]]
) -> None:
    """Have the skills and plugins of what is deployed lie where the agent's container sees them, and no others.

    find: reads them from the commit, where they are missing
    """
    _, had = await deployed_now(store, name)
    digest = had.settings.get("extras", {}).get("digest")
    if digest is not None and not await repos.has_extras(name, digest):
        found = await find()
        async with locks.of(name):
            await insist_that_it_stays(store, name)
            await repos.put_extras(name, found.extras)
    await repos.keep_extras(name, digest)


async def effect_of_files(repos: Repos, name: AgentName, proposal: Proposal) -> Effect:
    """What a commit changes by its agent.toml and its CLAUDE.md, and which files it brings besides."""
    before, unknown = await contents_before(repos, name, proposal.base)
    after = await repos.contents(name, proposal.sha)
    lines = settings_lines(before.settings if before else None, after.settings)
    lines += prompt_lines(before.prompt if before else None, after.prompt)
    lines += lines_of_files(before, after)
    if "agent.nix" in after.files:
        unknown.append("packages: there is an agent.nix, which is not built in this sandbox")
    return Effect(lines, unknown)


class PlainDeployments:
    """Of containers that know no commit: its agent.toml and CLAUDE.md reach the harness with its next turn."""

    def __init__(self, store: Store, repos: Repos, locks: AgentLocks, sandbox: str) -> None:
        self._store = store
        self._repos = repos
        self._locks = locks
        self._sandbox = sandbox

    def files(self, name: AgentName, description: str, packages: Sequence[str] = ()) -> Mapping[str, str]:
        return {}

    @property
    def inputs(self) -> str:
        return ""

    async def check(self, name: AgentName, proposal: Proposal) -> Effect:
        if "agent.nix" in proposal.changed:
            raise Refusal(
                "refused",
                f"cannot apply {proposal.sha[:12]}: it changes agent.nix, and only containers of "
                f'sandbox = "nixos-container" are built from it (here it is {self._sandbox}); '
                "change agent.toml or CLAUDE.md",
            )
        return await effect_of_files(self._repos, name, proposal)

    async def check_new(self, name: AgentName, files: Mapping[str, str]) -> Effect:
        return Effect()

    async def build(self, name: AgentName, sha: CommitSha, shown: str = "") -> Deployed:
        found = await self._repos.contents(name, sha)
        return Deployed(harness_settings(found.settings, found.prompt, found.extras), extras=found.extras)

    async def has(self, name: AgentName, deployed: Deployed) -> bool:
        return True

    async def take(self, name: AgentName, deployed: Deployed) -> None:
        await self._repos.put_extras(name, deployed.extras)

    async def settle(self, change: Change) -> None:
        if change.base is not None:
            await self._repos.deploy(change.agent, change.number, change.sha, change.base)

    async def mend(self, name: AgentName, sha: CommitSha, held: AsyncExitStack) -> Deployed | None:
        await keep_extras(self._store, self._repos, self._locks, name, partial(self.build, name, sha))
        if await system_of(self._store, name) is None:
            return None
        await held.enter_async_context(self._locks.of(name))
        await insist_that_it_stays(self._store, name)
        return await self.build(name, sha)

    async def look_at_inputs(self) -> tuple[Mapping[str, str], Mapping[str, str]]:
        why = f'only containers of sandbox = "nixos-container" are built from inputs (here it is {self._sandbox})'
        raise Refusal("refused", f"cannot update the inputs: {why}")

    async def lock_inputs(self, wanted: Mapping[str, str]) -> None:
        await self.look_at_inputs()

    def hindrance(self, name: AgentName) -> str | None:
        return None

    def forget(self, name: AgentName) -> None:
        pass


class NoDeployments:
    """Of a hive whose containers cannot be built here: what is deployed stays, and nothing new is."""

    def __init__(self, trouble: str) -> None:
        self._trouble = trouble

    def files(self, name: AgentName, description: str, packages: Sequence[str] = ()) -> Mapping[str, str]:
        return {}

    @property
    def inputs(self) -> str:
        return ""

    async def check(self, name: AgentName, proposal: Proposal) -> Effect:
        raise Refusal("unavailable", f"cannot check {proposal.sha[:12]}: {self._trouble}")

    async def check_new(self, name: AgentName, files: Mapping[str, str]) -> Effect:
        return Effect()

    async def build(self, name: AgentName, sha: CommitSha, shown: str = "") -> Deployed:
        raise Refusal("unavailable", f"cannot build {name}: {self._trouble}")

    async def has(self, name: AgentName, deployed: Deployed) -> bool:
        return True

    async def take(self, name: AgentName, deployed: Deployed) -> None:
        raise Refusal("unavailable", f"cannot switch {name}: {self._trouble}")

    async def settle(self, change: Change) -> None:
        raise Refusal("unavailable", f"cannot deploy {change.agent}: {self._trouble}")

    async def mend(self, name: AgentName, sha: CommitSha, held: AsyncExitStack) -> Deployed | None:
        return None

    async def look_at_inputs(self) -> tuple[Mapping[str, str], Mapping[str, str]]:
        raise Refusal("unavailable", f"cannot update the inputs: {self._trouble}")

    async def lock_inputs(self, wanted: Mapping[str, str]) -> None:
        await self.look_at_inputs()

    def hindrance(self, name: AgentName) -> str | None:
        return self._trouble

    def forget(self, name: AgentName) -> None:
        pass


async def is_leaving(store: Store, name: AgentName) -> bool:
    """Whether an agent is being destroyed, or was. Who holds its lock can rely on it."""
    return await store.row(_STAYS, (name,)) is None


async def insist_that_it_stays(store: Store, name: AgentName) -> None:
    """Raise Refusal("conflict") for such an agent."""
    if await is_leaving(store, name):
        raise Refusal("conflict", f"cannot deploy {name}: it was destroyed meanwhile")
