"""The walk of an approved change: built beside what runs, taken at the turn's edge, proven, and settled; or taken back.

Until it is settled main of the applied repository is what the agent had before. So whatever step a daemon dies at, the
next one begins the walk anew, and knows what to go back to.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import TypeVar

import trio

from hive_core.effects import derivation_of
from hive_core.git.agent_locks import AgentLocks
from hive_core.git.repos import Repos
from hive_core.procedures.deployments import Change, Deployments, insist_that_it_stays, is_leaving
from hive_core.procedures.kinds.kind import Done, Step
from hive_core.procedures.reconcile import Reconciler
from hive_core.procedures.supervise import AWAY_REST_S
from hive_core.procedures.trials import Trial, Unhealthy, is_healthy
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName, CommitSha
from hive_core.services.approvals import COMMITS, Approval, note_proof
from hive_core.services.container_states import forgive
from hive_core.services.systems import Deployed, deployed_now, note_deployed
from hive_core.store.door import Store
from hive_core.store.writer import Transaction

log = logging.getLogger(__name__)
BUILDING, WAITING, PROVING = "building", "waiting for its turn to end", "proving"
RETURNING, FINISHING = "going back", "finishing"
T = TypeVar("T")


class Walk:
    def __init__(
        self, store: Store, repos: Repos, deployments: Deployments, locks: AgentLocks, reconciler: Reconciler
    ) -> None:
        self._store = store
        self._repos = repos
        self._deployments = deployments
        self._locks = locks
        self._reconciler = reconciler

    async def load(self) -> None:
        """Let nobody take a turn on what a daemon before had not proven when it died."""
        for row in await self._store.rows(_ON_TRIAL):
            self._reconciler.on_trial.add(AgentName(row["agent"]))

    def end(self, name: AgentName) -> None:
        """Nothing of an agent is tried any more."""
        self._reconciler.end_trial(name)

    async def revive(self, name: AgentName) -> None:
        """Let an agent that was destroyed while a change of it was tried run on what it had before, when it is revived.
        Its repositories are there again. Raises Refusal when they cannot be read."""
        if (row := await self._store.row(_TRIED, (name,))) is not None:
            base = CommitSha(row["base"])
            deployed = Deployed(await self._repos.read(name, base))  # where it is built, that is mended then
            await self._store.insist(lambda tx: note_deployed(tx, name, base, deployed))

    async def begin(
        self, change: Change, create: Callable[[Transaction], None], step: Step, shown: str
    ) -> tuple[AsyncExitStack, str]:
        """Let a new agent run on its first commit. It stays also when it does not come up: it is what was asked for,
        there is nothing to go back to, and it is seen to as any agent that crashes.

        create: makes its row
        shown: see Deployments.build

        Gives how it was proven, and what keeps it from its first turn, and its destruction away, until it is closed.
        """
        name, sha = change.agent, change.sha
        if change.base is not None:  # another commit may have made the agent since this one was approved
            await self._repos.check_main(name, sha, change.base)
        await step(BUILDING)
        deployed = await self._deployments.build(name, sha, shown)
        async with AsyncExitStack() as held:
            async with self._locks.of(name):
                await self._deployments.take(name, deployed)
                await self._deployments.settle(change)
                self._reconciler.on_trial.add(name)
                held.callback(self._reconciler.end_trial, name)

                def write(tx: Transaction) -> bool:
                    if tx.execute("SELECT 1 FROM agents WHERE name = ? AND deployed_sha = ?", (name, sha)).fetchone():
                        return False
                    create(tx)
                    note_deployed(tx, name, sha, deployed)
                    return True

                is_new = await self._store.insist(write)
            await step(PROVING)
            try:
                trial = await held.enter_async_context(self._reconciler.trial(name))
                if not is_new:  # a daemon before died when it proved it, and may have begun it
                    await self._insist(change, PROVING, step, trial.begin_anew)
                proof = await trial.prove(deployed.settings)
            except Unhealthy as refusal:
                proof = f"unhealthy: {refusal.why}"
            await held.enter_async_context(self._locks.of(name))
            await insist_that_it_stays(self._store, name)
            return held.pop_all(), proof

    async def carry_out(self, approval: Approval, sha: CommitSha, base: CommitSha, step: Step) -> Done:
        """Let an agent run on a commit of its applied repository in the place of base, where main is.

        Raises when that comes to nothing; then it runs on base as before.
        """
        name, change = approval.agent, Change(approval.agent, approval.id, sha, base)
        try:
            await insist_that_it_stays(self._store, name)
            await self._repos.check_main(name, sha, base)
            is_settled = await self._repos.main(name) == sha
            if not is_settled:
                await step(BUILDING)
                built = await self._deployments.build(name, sha, derivation_of(approval.effect))
                await step(WAITING)
        except Exception:
            await self._go_back(change, step)
            await insist_that_it_stays(self._store, name)  # else its repository may be gone, and that is why
            raise
        if is_settled:
            return await self._insist(change, FINISHING, step, partial(self._finish, change, approval))
        async with self._reconciler.trial(name) as trial:
            try:
                proof = await self._try(change, built, trial, step)
                await self._store.insist(lambda tx: _note(tx, approval, proof))
                return await self._settle(change, proof)
            except Exception:
                await self._go_back(change, step, trial)
                await insist_that_it_stays(self._store, name)
                raise

    async def _try(self, change: Change, built: Deployed, trial: Trial, step: Step) -> str:
        former, had = await deployed_now(self._store, change.agent)
        async with trial.at_rest(), self._locks.of(change.agent):
            await insist_that_it_stays(self._store, change.agent)
            await self._deployments.take(change.agent, built)
            await self._store.insist(lambda tx: note_deployed(tx, change.agent, change.sha, built))
        await step(PROVING)
        return await trial.prove(had.settings if former == change.base else None)

    async def _settle(self, change: Change, proof: str) -> Done:
        async with AsyncExitStack() as held:
            await held.enter_async_context(self._locks.of(change.agent))
            await insist_that_it_stays(self._store, change.agent)
            await self._deployments.settle(change)
            return Done(lambda tx: None, proof, held.pop_all())

    async def _finish(self, change: Change, approval: Approval) -> Done:
        """It was proven, and a daemon died when it was settled: what is left is to say so."""
        sha, had = await deployed_now(self._store, change.agent)
        built = had if sha == change.sha else await self._deployments.build(change.agent, change.sha)
        async with AsyncExitStack() as held:
            await held.enter_async_context(self._locks.of(change.agent))
            await insist_that_it_stays(self._store, change.agent)
            await self._deployments.take(change.agent, built)
            await self._deployments.settle(change)
            self._reconciler.end_trial(change.agent)
            kept = held.pop_all()
        return Done(lambda tx: note_deployed(tx, change.agent, change.sha, built), approval.proof, kept)

    async def _go_back(self, change: Change, step: Step, trial: Trial | None = None) -> None:
        """Let the agent run on what it had, if a try has changed that; until then it takes no turn."""
        with suppress(Refusal, OSError):  # it was destroyed meanwhile
            await self._insist(change, RETURNING, step, partial(self._take_back, change, step, trial))

    async def _take_back(self, change: Change, step: Step, trial: Trial | None) -> None:
        name, base = change.agent, change.base
        assert base is not None
        sha, had = await deployed_now(self._store, name)
        is_as_before = sha != change.sha and (sha != base or await self._deployments.has(name, had))
        if is_as_before or await is_leaving(self._store, name):
            self._reconciler.end_trial(name)
            return
        await step(RETURNING)
        former = had if sha == base else await self._deployments.build(name, base)
        async with AsyncExitStack() as stack:
            if trial is None:
                trial = await stack.enter_async_context(self._reconciler.trial(name))
            async with trial.back(), self._locks.of(name):
                await insist_that_it_stays(self._store, name)
                await self._deployments.take(name, former)
                await self._store.insist(lambda tx: note_deployed(tx, name, base, former))

    async def _insist(self, change: Change, word: str, step: Step, attempt: Callable[[], Awaitable[T]]) -> T:
        """Do again what cannot be done now and must not stay half done. Raises only where the agent is destroyed."""
        said = ""
        while True:
            try:
                return await attempt()
            except (Refusal, OSError) as exc:
                if await is_leaving(self._store, change.agent):
                    raise
                if said != (said := str(exc)):
                    log.error(
                        "%s: %s, which is tried again: %s", change.agent, word, said, extra={"agent": change.agent}
                    )
                await step(f"{word}, which is tried again: {exc}")
            await trio.sleep(AWAY_REST_S)


def _note(tx: Transaction, approval: Approval, proof: str) -> None:
    note_proof(tx, approval, proof)
    if is_healthy(proof):
        forgive(tx, approval.agent)  # what it crashed of before is another's


_ON_TRIAL = f"""
    SELECT approvals.agent FROM approvals INDEXED BY approvals_approved
    JOIN agents ON agents.name = approvals.agent AND agents.deployed_sha = approvals.payload ->> 'sha'
    WHERE approvals.state = 'approved' AND approvals.kind IN {COMMITS} AND approvals.proof IS NULL
    UNION
    SELECT approvals.agent FROM approvals INDEXED BY approvals_approved
    JOIN agents ON agents.name = approvals.agent
    WHERE approvals.state = 'approved' AND approvals.kind = 'spawn'
"""
# The newest change to the commit that is in an agent's row, where that did not come to stay.
_TRIED = f"""
    SELECT base FROM (
        SELECT approvals.id, state, approvals.payload ->> 'base' AS base
        FROM agents CROSS JOIN approvals INDEXED BY approvals_of ON approvals.agent = agents.name
        WHERE agents.name = ? AND kind IN {COMMITS} AND approvals.payload ->> 'sha' = agents.deployed_sha
        ORDER BY approvals.id DESC LIMIT 1
    ) WHERE state IN ('approved', 'failed')
"""
