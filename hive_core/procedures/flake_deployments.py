"""Deployments of containers that are built from their agent's commit: built beside what runs, from a flake with their
agent alone, so that no build waits for another; switched to; and told of in the meta flake, whose log is theirs."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import trio

from hive_core.config import Config
from hive_core.containers.choice import Choice
from hive_core.containers.driver import Driver, Systems
from hive_core.effects import Effect, Line, prompt_lines
from hive_core.effects_of_settings import settings_lines
from hive_core.extras import NONE
from hive_core.flakes.building import make_meta_flake, make_nix
from hive_core.flakes.effects_of_systems import (
    NO_CLOSURE,
    brought_lines,
    closure_lines,
    packages_that_come,
    system_lines,
)
from hive_core.flakes.flakes import Evaluated, MetaFlake
from hive_core.git.agent_locks import AgentLocks
from hive_core.git.commit_contents import Contents, named_extras
from hive_core.git.proposals import Proposal
from hive_core.git.repos import Repos, harness_settings
from hive_core.limits import Limits
from hive_core.procedures.deployments import (
    Change,
    Deployments,
    NoDeployments,
    PlainDeployments,
    contents_before,
    insist_that_it_stays,
    keep_extras,
    lines_of_files,
)
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName, CommitSha, StorePath
from hive_core.services.systems import Deployed, System, built_commits, system_of
from hive_core.settings import AgentSettings
from hive_core.store.door import Store

log = logging.getLogger(__name__)
CHECKS_WAITING = 4
EVALUATED_KEPT = 16  # some 200 KiB each, of a whole NixOS
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
        self._settled: set[AgentName] = set()  # whose rows may not be written yet

    def files(self, name: AgentName, description: str, packages: Sequence[str] = ()) -> Mapping[str, str]:
        return self._meta.agent_files(name, description, packages)

    @property
    def inputs(self) -> str:
        return hashlib.sha256(self._meta.inputs.encode()).hexdigest()[:16]

    async def check(self, name: AgentName, proposal: Proposal) -> Effect:
        async with self._turn_to_check(f"{proposal.sha[:12]} of {name}"):
            after = await self._evaluated(name, proposal.sha)
            unknown: list[str] = []
            try:
                before = await self._evaluated(name, proposal.base)
            except Refusal as refusal:  # by another release, which took what this one does not
                before, unknown = None, [f"what {name} has now: {refusal.message}"]
            told, untold = await self._system_lines(name, proposal, before, after) if before else ([], [])
        files_before, more = await contents_before(self._repos, name, proposal.base)
        files_after = await self._repos.contents(name, proposal.sha)
        _insist_on_one_network(proposal.sha, files_after.settings, after.settings)
        settings = settings_lines(before.settings if before else None, after.settings)
        prompt = prompt_lines(before.persona if before else None, after.persona)
        read = _read_as_they_are(files_before, files_after, settings, prompt)
        had = (
            named_extras(proposal.base, before.settings, files_before.extra_files) if before and files_before else NONE
        )
        has = named_extras(proposal.sha, after.settings, files_after.extra_files)
        lines = [*settings, *prompt, *lines_of_files(files_before, files_after, read, (had, has)), *told]
        former = before.derivation if before else ""
        return Effect(lines, unknown + more + untold, self.inputs, after.derivation, former)

    async def _system_lines(
        self, name: AgentName, proposal: Proposal, before: Evaluated, after: Evaluated
    ) -> tuple[list[Line], list[str]]:
        """What the systems of two commits differ in, and what is unknown."""
        told, untold = system_lines(before.facts, after.facts)
        if before.derivation == after.derivation:
            return told, untold
        had, has = [await self._meta.closure(one.system) for one in (before, after)]
        if any(line.what == "packages" for line in told) and await self._meta.differs_by_packages(
            name, proposal.base, proposal.sha, after.derivation
        ):
            # NixOS writes other files and units for other packages: they say no more than these do.
            told = [line for line in told if line.what == "packages" or line.wide]
            if has is None:
                come = packages_that_come(before.facts, after.facts)
                brought = await self._meta.closure(*{path for package in come for path in package.paths})
                more, less = brought_lines(had, come, brought)
                return told + more, untold + less
        # By something that is no fact of ours, where there is none.
        told = told or [Line("system", "as it is", "built otherwise")]
        more, less = closure_lines(had, has)
        return told + more, untold + less

    async def check_new(self, name: AgentName, files: Mapping[str, str]) -> Effect:
        async with self._turn_to_check(f"the new agent {name}"):
            after = await self._meta.evaluate_files(name, files)
            plain = {**files, "agent.nix": self._meta.agent_files(name, "")["agent.nix"]}
            before = after if plain == files else await self._meta.evaluate_files(name, plain)
            closure = await self._meta.closure(after.system)
        lines, unknown = system_lines(before.facts, after.facts)
        if before.facts.packages is not None:
            lines.append(Line("packages", None, f"the {len(before.facts.packages)} that every agent has"))
        told, untold = closure_lines(NO_CLOSURE, closure)
        return Effect(lines + told, unknown + untold, self.inputs, after.derivation)

    @asynccontextmanager
    async def _turn_to_check(self, what: str) -> AsyncIterator[None]:
        """One after the other. Raises Refusal("unavailable") when too many wait."""
        if (waiting := self._checking.statistics().tasks_waiting) >= CHECKS_WAITING:
            why = f"{waiting} others wait to be evaluated; ask again in a minute"
            raise Refusal("unavailable", f"cannot check {what}: {why}")
        async with self._checking:
            yield

    async def _evaluated(self, name: AgentName, sha: CommitSha) -> Evaluated:
        """What a commit is evaluated to: the same for as long as it is built from the same. Its derivation may be
        cleaned out of the store meanwhile."""
        key = (name, sha, self._meta.inputs)
        if (found := self._known.pop(key, None)) is None:
            await self._repos.pin(name, sha)
            found = await self._meta.evaluate(name, sha)
            if found.settings.network != "private":
                _insist_on_one_network(sha, (await self._repos.contents(name, sha)).settings, found.settings)
        self._known[key] = found
        while len(self._known) > EVALUATED_KEPT:
            del self._known[next(iter(self._known))]
        return found

    async def build(self, name: AgentName, sha: CommitSha, shown: str = "") -> Deployed:
        await self._repos.pin(name, sha)
        async with self._evaluating:
            found = await self._evaluated(name, sha)
        _insist_on_what_was_shown(name, found, shown)
        path = await self._systems.current(name)
        if path is None or found.system != path:  # it says so itself, and keeps what it has if that is not so
            async with self._building:
                path = await self._built(name, sha, found)
        extras = NONE
        if found.settings.skills or found.settings.plugins:
            extras = named_extras(sha, found.settings, (await self._repos.contents(name, sha)).extra_files)
        told = harness_settings(found.settings, found.persona, extras)
        return Deployed(told, System(sha, path, self._meta.inputs), extras)

    async def _built(self, name: AgentName, sha: CommitSha, found: Evaluated) -> StorePath:
        try:
            path = await self._systems.build(name, found.derivation)
        except Refusal as refusal:
            if refusal.code != "not_found":
                raise
            self._known.pop((name, sha, self._meta.inputs), None)
            again = await self._evaluated(name, sha)
            _insist_on_what_was_shown(name, again, found.derivation)
            path = await self._systems.build(name, found.derivation)
        if path != found.system:  # of which the card has told
            why = f"agent.nix says that it is {found.system}, and it is {path}; leave system.build to NixOS"
            raise Refusal("refused", f"cannot use the system of {name}: {why}")
        return path

    async def has(self, name: AgentName, deployed: Deployed) -> bool:
        return deployed.system is not None and deployed.system.path == await self._systems.current(name)

    async def take(self, name: AgentName, deployed: Deployed) -> None:
        await self._repos.put_extras(name, deployed.extras)
        if not await self.has(name, deployed):
            assert deployed.system is not None
            await self._systems.switch(name, deployed.system.path)
        self._hindrances[name] = ""

    async def settle(self, change: Change) -> None:
        if change.base is not None:
            await self._repos.deploy(change.agent, change.number, change.sha, change.base)
        self._settled.add(change.agent)
        await self._log(
            change.agent,
            f"deployed/{change.number if change.base else 0}",
            f"Deployment: {change.sha} of {change.agent} by approval {change.number}",
        )

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
            await keep_extras(self._store, self._repos, self._locks, name, partial(self.build, name, sha))
            return None
        try:
            deployed = await self.build(name, sha)
            async with AsyncExitStack() as lock:
                await lock.enter_async_context(self._locks.of(name))
                await insist_that_it_stays(self._store, name)
                was_taken = await self.has(name, deployed)
                await self.take(name, deployed)
                held.push_async_exit(lock.pop_all())
        except Exception as exc:
            if current is None:
                way_out = "it is tried again when something is deployed, and when the daemon starts"
                self._hindrances[name] = f"its container cannot be built: {exc}; {way_out}"
            raise
        await self._log(name, f"{sha[:12]} again", if_other=was_taken)
        return deployed

    async def look_at_inputs(self) -> tuple[Mapping[str, str], Mapping[str, str]]:
        return await self._meta.look_at_inputs()

    async def lock_inputs(self, wanted: Mapping[str, str]) -> None:
        async with self._settling:
            await self._meta.lock_inputs(wanted)

    def hindrance(self, name: AgentName) -> str | None:
        return self._hindrances.get(name, _NOT_YET) or None

    def forget(self, name: AgentName) -> None:
        self._hindrances.pop(name, None)
        self._settled.discard(name)

    async def _log(self, name: AgentName, what: str, once: str = "", *, if_other: bool = False) -> None:
        """Commit the meta flake with what is deployed, which is the log of all deployments.

        once: a line behind the message, by which it is known whether a daemon before, which died before it could write
        its rows, has told of this already
        if_other: commit only a flake that is another
        """
        try:
            async with self._settling:
                # By their repositories: what a row names may be on trial, or may not be written yet.
                built = await built_commits(self._store)
                self._settled -= built.keys()
                commits = {name: await self._repos.main(name), **built}
                for each in {*commits, *self._settled}:
                    with contextlib.suppress(Refusal):  # one whose repository is broken keeps no other from it
                        commits[each] = await self._repos.main(each)
                message = f"{name}: {what}"
                if once and (if_other := await self._meta.tells(once)):
                    message = f"{name} is in the flake again"  # another agent's commit may have been without it
                elif once:
                    message += f"\n\n{once}"
                async with self._meta.staged(self._meta.render(commits), message, if_other=if_other):
                    pass
        except (Refusal, OSError) as exc:
            # The log lacks a line, and the next one who stages has its flake right.
            log.error("the meta flake was not committed: %s", exc, extra={"agent": name})


def _insist_on_what_was_shown(name: AgentName, found: Evaluated, shown: str) -> None:
    if shown and found.derivation != shown:
        why = "nixpkgs or hyperhive are others than when it was shown, and make another system of it; ask for it again"
        raise Refusal("conflict", f"cannot build {name}: {why}")


def _insist_on_one_network(sha: CommitSha, written: AgentSettings, evaluated: AgentSettings) -> None:
    """Raise Refusal where agent.nix makes another network of what agent.toml says: by other inputs it could change
    without an approval, and by another sandbox."""
    if written.network != evaluated.network:
        why = f"agent.toml says network = {written.network}, and agent.nix makes it {evaluated.network}"
        raise Refusal("refused", f"cannot use {sha[:12]}: {why}; let agent.toml alone say it")


def _read_as_they_are(
    before: Contents | None, after: Contents, settings: Sequence[Line], prompt: Sequence[Line]
) -> set[str]:
    """Those of agent.toml and CLAUDE.md whose change these lines tell whole. What agent.nix does not read waits in its
    file for the day on which another sandbox does, so a card passes over no change of it."""
    if before is None:
        return set()
    told = {
        "agent.toml": settings_lines(before.settings, after.settings) == settings,
        "CLAUDE.md": prompt_lines(before.prompt, after.prompt) == prompt,
    }
    return {name for name, whole in told.items() if whole}


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
