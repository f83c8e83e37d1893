"""The gate: nothing changes without a commit and a click.

A request becomes a card; approve is one transaction; carrying it out is a step of its own that can be done again, so
a daemon that dies in between finishes it when it starts. Whoever asked is told of every end. What the kinds of changes
do is in kinds/.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Collection, Sequence
from contextlib import AsyncExitStack

import trio
from jinja2 import Environment

from hive_core.git.repos import Repos
from hive_core.limits import Limits
from hive_core.policy_rules import Rule
from hive_core.procedures.cards import Cards
from hive_core.procedures.deployments import Deployments
from hive_core.procedures.kinds.apply_commit import ApplyCommit
from hive_core.procedures.kinds.egress import Egress
from hive_core.procedures.kinds.init_config import InitConfig
from hive_core.procedures.kinds.kind import Asking, Kind
from hive_core.procedures.kinds.spawn import Spawn
from hive_core.procedures.kinds.update_meta_inputs import UpdateMetaInputs
from hive_core.procedures.repo_upkeep import RepoUpkeep
from hive_core.procedures.walk import Walk
from hive_core.protocol.container_id import container_id
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import (
    MANAGER,
    NOTE_LIMIT_BYTES,
    OPERATOR,
    SYSTEM,
    AgentName,
    CommitSha,
    MessageBody,
    parse_text,
)
from hive_core.services.agents import Agents, set_deployed
from hive_core.services.approvals import Approval, Approvals, note_step, settle
from hive_core.services.deploy_log import DeployLog
from hive_core.services.notices import Field, notice
from hive_core.services.policy import Policy
from hive_core.services.post import put_message
from hive_core.services.request_room import count_request_taken_back
from hive_core.services.systems import note_deployed
from hive_core.services.under_way import check_alone, ground
from hive_core.store.bus import APPROVED, DEPLOYED, WANTED
from hive_core.store.door import Store
from hive_core.store.errors import StoreError
from hive_core.store.writer import Transaction

log = logging.getLogger(__name__)
_AWAY_S = 5.0
_FREE = "gate_free"  # the bus topic: an agent was mended
_OTHER_ENDS = {
    "denied": "it was denied",
    "cancelled": "whoever asked for it took it back",
    "expired": "it has expired; let it be asked for again",
}


class Gate:
    def __init__(
        self,
        store: Store,
        agents: Agents,
        approvals: Approvals,
        repos: Repos,
        deployments: Deployments,
        walk: Walk,
        templates: Environment,
        limits: Limits,
        *,
        default_program: str,
        default_model: str,
        policy: Sequence[Rule] = (),
        host_network: Collection[str] | None = None,
    ) -> None:
        """host_network: whom the helper gives the host's network; None: there is no helper."""
        self._store = store
        self._agents = agents
        self._approvals = approvals
        self._repos = repos
        self._deployments = deployments
        self.walk = walk
        self._mended: dict[AgentName, str] = {}  # the commit of each agent that was looked at
        self._unmended: set[AgentName] = set()  # of whom that failed
        self._away = False  # what has their containers did not answer: it is asked again
        self._busy: set[str] = set()  # the containers, by id, of whose agents something is carried out or mended
        self.policy = Policy(store, policy, agents.access)
        asking = self.asking = Asking(store, limits, self.policy.rule_for)
        self.spawn = Spawn(
            asking,
            agents,
            repos,
            deployments,
            walk,
            templates,
            default_program=default_program,
            default_model=default_model,
        )
        self.init_config = InitConfig(self.spawn, repos)
        self.update_meta_inputs = UpdateMetaInputs(asking, deployments, self._mend_all)
        self.deploy_log = DeployLog(store, repos)
        self.apply_commit = ApplyCommit(
            asking, agents, repos, deployments, walk, self.spawn, self.deploy_log, host_network
        )
        self.egress = Egress(asking, repos, self.apply_commit)
        self.upkeep = RepoUpkeep(store, agents, repos)
        self.kinds: dict[str, Kind] = {}
        self.add(self.spawn, self.init_config, self.apply_commit, self.egress, self.update_meta_inputs)
        self.cards = Cards(store, approvals, lambda approval: self.kinds[approval.kind], self._fail, self._close)
        approvals.expired = self._tell_expired

    def add(self, *kinds: Kind) -> None:
        """More kinds: all are there before anything is carried out."""
        self.kinds.update({each.kind: each for each in kinds})

    async def load(self) -> None:
        """Know what a daemon before has left half done."""
        await self.walk.load()
        for name in {approval.agent for approval in await self._approvals.approved()}:
            with contextlib.suppress(Refusal):  # where that is its own trouble, the walk finds it
                await self.upkeep.mend(name)  # what a git left that was killed with it would fail the approval

    async def ensure_manager(self, prompt: str) -> None:
        """Create hm1nd if it is missing: the one agent that needs no approval, since it asks for all others."""
        known = await self._store.row("SELECT 1 FROM agents WHERE name = ?", (MANAGER,))
        try:
            await self._create_manager(prompt)
        except (Refusal, OSError) as exc:
            if known is None:
                raise
            # It can write in its own proposed repository, and so break it: that must not keep the others down.
            log.error("the repositories of %s are not as they should be: %s", MANAGER, exc)

    async def _create_manager(self, prompt: str) -> None:
        sha = await self._repos.create(MANAGER, self.spawn.files(MANAGER, "manages this hive", prompt))
        settings = await self._repos.read(MANAGER, sha)

        def write(tx: Transaction) -> None:
            if tx.execute("SELECT 1 FROM agents WHERE name = ?", (MANAGER,)).fetchone() is None:
                self._agents.create(tx, MANAGER, SYSTEM)
                set_deployed(tx, MANAGER, sha, settings)

        await self._store.write(write)

    # -- the operator's word ------------------------------------------------------------------------------------------

    async def approve(
        self,
        approval_id: int,
        shown_digest: str,
        actor: str,
        origin: str | None = None,
        patience_s: float | None = None,
    ) -> Approval:
        """The operator's click on what was shown; return once it is carried out (done or failed).

        Idempotent: approving what is approved already waits for the same end. Raises Refusal("conflict") when it was
        decided otherwise, when what would be done is not what was shown: the card shows it then; or while another
        approval changes its agent. Cancelling it takes no click back.

        origin: the door that the click came through.
        patience_s: after so long return it as it is then, approved and under way.
        """
        approval = await self._approvals.get(approval_id)
        cannot = f"cannot approve {approval_id}"
        if shown_digest != approval.digest:
            raise Refusal("conflict", f"{cannot}: it is not what you were shown; look at it again and approve that")
        moved = f"{cannot}: {approval.agent} was changed meanwhile, and it would do something else than you were shown"
        moved += "; look at it again and approve that"
        before = None
        if approval.state == "pending":
            before = await self._store.write(lambda tx: _ground_of_one_alone(tx, approval))
            if await self.cards.look_again(approval):
                raise Refusal("conflict", moved)

        def write(tx: Transaction) -> None:
            sql = "SELECT state, digest, resolved_by, note, expires_at_ms FROM approvals WHERE id = ?"
            row = tx.execute(sql, (approval_id,)).fetchone()
            if row["digest"] != shown_digest:
                raise Refusal("conflict", f"{cannot}: it is not what you were shown; look at it again and approve that")
            if row["state"] == "failed" and row["resolved_by"] == SYSTEM:  # before anybody approved it
                raise Refusal("conflict", f"{cannot} any more: {row['note']}")
            # The hive's clock may be half a minute late, or have slept with the machine.
            end = "expired" if row["state"] == "pending" and row["expires_at_ms"] <= tx.now_ms else row["state"]
            if end in _OTHER_ENDS:
                raise Refusal("conflict", f"{cannot}: {_OTHER_ENDS[end]}")
            if row["state"] == "pending":
                if _ground_of_one_alone(tx, approval) != before:  # another one came to its end since that look
                    raise Refusal("conflict", moved)
                settle(tx, approval, "approved", None, actor, origin)
                tx.wake(APPROVED)

        await self._store.write(write)
        with trio.move_on_after(math.inf if patience_s is None else patience_s):
            return await self._approvals.wait_settled(approval_id)
        return await self._approvals.get(approval_id)

    async def deny(self, approval_id: int, given_reason: object, actor: str, origin: str | None = None) -> Approval:
        """The operator's no, with the reason that the requester reads. Denying twice is fine."""
        reason = parse_text(given_reason, "reason", NOTE_LIMIT_BYTES)
        return await self._withdraw(approval_id, "denied", reason, actor, origin)

    async def cancel(self, approval_id: int, given_reason: object, actor: AgentName) -> Approval:
        """Take a request back that nobody decided yet; whoever made it may, and nobody else. Twice is fine.

        Raises Refusal: "not_found", also for somebody else's, and "conflict" for one that was decided.
        """
        reason = parse_text(given_reason, "reason", NOTE_LIMIT_BYTES)
        if (await self._approvals.get(approval_id)).requested_by != actor:
            raise Refusal("not_found", f"cannot cancel approval {approval_id}: you have not asked for it")
        return await self._withdraw(approval_id, "cancelled", reason, actor, None)

    async def _withdraw(self, approval_id: int, end: str, reason: str, actor: str, origin: str | None) -> Approval:
        approval = await self._approvals.get(approval_id)
        if approval.state != end:

            def write(tx: Transaction) -> None:
                sql = "SELECT 1 FROM approvals WHERE id = ? AND state = ?"
                if tx.execute(sql, (approval_id, end)).fetchone() is None:
                    self._end(tx, approval, end, reason, actor, origin)
                    if end == "cancelled":
                        count_request_taken_back(tx, actor)

            await self._store.write(write)
            await self._close(approval)
        return await self._approvals.get(approval_id)

    def _end(
        self, tx: Transaction, approval: Approval, end: str, note: str | None, actor: str, origin: str | None = None
    ) -> None:
        """Move an approval to its end, and tell whoever asked for it."""
        settle(tx, approval, end, note, actor, origin)
        self._tell(tx, approval, end, note)

    def _fail(self, tx: Transaction, approval: Approval, why: str) -> None:
        self._end(tx, approval, "failed", why, SYSTEM)

    def _tell_expired(self, tx: Transaction, approval: Approval, why: str) -> None:
        self._tell(tx, approval, "expired", f"{why}; ask again if it is still wanted")

    def _tell(
        self,
        tx: Transaction,
        approval: Approval,
        end: str,
        reason: str | None,
        proof: str | None = None,
        told: MessageBody | None = None,
    ) -> None:
        """One message to whoever asked, unless that was the operator or the hive itself, or it was taken back. told: in
        place of ours."""
        if approval.requested_by in (OPERATOR, SYSTEM) or end == "cancelled":
            return
        about: dict[str, Field] = {"approval": approval.id, "what": approval.kind, "agent": approval.agent}
        sql = "SELECT payload ->> 'sha' FROM approvals WHERE id = ?"  # a wish's may have been made anew since
        if sha := tx.execute(sql, (approval.id,)).fetchone()[0]:
            tag = {"approved": "deployed", "denied": "denied", "failed": "failed"}.get(end)
            about |= {"sha": sha, "tag": tag and f"{tag}/{approval.id}"}
        whereby = f" by rule {approval.rule}, without a click" if approval.rule and end == "approved" else ""
        text = f"approval {approval.id}, {self.kinds[approval.kind].title(approval)}: {end}{whereby}"
        body = notice("approval_resolved", text, **about, state=end, rule=approval.rule, proof=proof, reason=reason)
        put_message(tx, SYSTEM, approval.requested_by, told or body)

    async def _close(self, approval: Approval) -> None:
        """What a kind does about an approval of which nothing is to be done any more."""
        try:
            await self.kinds[approval.kind].closed(await self._approvals.get(approval.id))
        except (Refusal, OSError) as exc:  # its repository may have gone with its agent
            log.warning("approval %d of %s is not noted in full: %s", approval.id, approval.agent, exc)

    # -- carrying out -------------------------------------------------------------------------------------------------

    async def serve(self) -> None:
        """Carry out what is approved, also what was approved before the daemon started: of an agent one after the
        other, and of several at the same time. Beside that mend what is deployed, an agent at a time, and show anew
        what waits."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._serve_mending)
            nursery.start_soon(self.cards.serve)
            with self._store.bus.listen(APPROVED, _FREE) as listener:
                while True:
                    for approval in await self._approvals.approved():
                        if (container := container_id(approval.agent)) not in self._busy:
                            self._busy.add(container)
                            nursery.start_soon(self._carry_out_next, approval)
                    await listener.wait()

    async def _carry_out_next(self, approval: Approval) -> None:
        try:
            # It was listed a moment ago, and whoever worked on it then may have come to the end since.
            if (await self._approvals.get(approval.id)).state == "approved":
                await self._carry_out(approval)
        finally:
            self._busy.discard(container_id(approval.agent))
            self._store.bus.publish([APPROVED])

    async def _serve_mending(self) -> None:
        with self._store.bus.listen(APPROVED, DEPLOYED) as listener:
            while True:
                if not await self._mend_some():
                    with trio.move_on_after(_AWAY_S if self._away else math.inf):
                        await listener.wait()
                    self._away = False
                    # What could not be mended may be possible now: another was built, a tombstone's files are back.
                    for name in self._unmended:
                        self._mended.pop(name, None)
                    self._unmended.clear()

    def hindrance(self, name: AgentName) -> str | None:
        """Why what is deployed of an agent may not be started now, or None."""
        return self._deployments.hindrance(name)

    def _mend_all(self) -> None:
        """Look at every agent again: what they are built from is something else."""
        self._mended.clear()
        self._store.bus.publish([DEPLOYED])

    async def _mend_some(self) -> bool:
        """Mend what was not looked at yet; False when nothing is left. It ends after each agent that takes its time.

        Of whom something is carried out, or is about to be, is looked at after that.
        """
        approved = {approval.agent for approval in await self._approvals.approved()}
        agents = {agent.name: agent.deployed_sha for agent in await self._agents.all()}
        for name in self._mended.keys() - agents.keys():
            del self._mended[name]
            self._deployments.forget(name)
        for name, sha in agents.items():
            container = container_id(name)
            if sha is None or self._mended.get(name) == sha or name in approved or container in self._busy:
                continue
            self._mended[name] = sha
            self._busy.add(container)
            try:
                if await self._mend(name, CommitSha(sha)):
                    return True
            finally:
                self._busy.discard(container)
                self._store.bus.publish([_FREE])
        return False

    async def _mend(self, name: AgentName, sha: CommitSha) -> bool:
        """Mend what is deployed of one agent; False when there was nothing to do."""
        hindered = self._deployments.hindrance(name)
        done = True
        try:
            async with AsyncExitStack() as held:
                deployed = await self._deployments.mend(name, sha, held)
                if deployed is not None:
                    await self._store.insist(lambda tx: note_deployed(tx, name, sha, deployed))
        except StoreError:
            raise
        except Exception as exc:
            # Its own trouble, which its state shows: approvals and other agents go on.
            away = isinstance(exc, Refusal) and exc.code == "unavailable"
            level = logging.INFO if away else logging.ERROR
            log.log(level, "what %s runs on is not as it was deployed: %s", name, exc, extra={"agent": name})
            self._unmended.add(name)
            self._away |= away
        else:
            done = deployed is not None
        if self._deployments.hindrance(name) != hindered:
            self._store.bus.publish([WANTED])
        return done

    async def _carry_out(self, approval: Approval) -> None:
        async def step(word: str) -> None:
            await self._store.insist(lambda tx: note_step(tx, approval, word))

        try:
            done = await self.kinds[approval.kind].carry_out(approval, step)

            def write(tx: Transaction) -> None:
                done.write(tx)
                settle(tx, approval, "done", None, SYSTEM, proof=done.proof)
                self._tell(tx, approval, "approved", None, done.proof, done.told)

            async with done.held:
                await self._store.insist(write)
        except StoreError:
            raise
        except Exception as exc:
            # Whatever a repository does to the libraries that read it ends this approval, not the daemon.
            reason = str(exc) if isinstance(exc, Refusal | OSError) else f"{type(exc).__name__}: {exc}"
            log.warning("approval %d of %s failed: %s", approval.id, approval.agent, reason)
            self._mended.pop(approval.agent, None)
            self.walk.end(approval.agent)
            await self._store.insist(lambda tx: self._fail(tx, approval, reason))
            await self._close(approval)


def _ground_of_one_alone(tx: Transaction, approval: Approval) -> str | None:
    """What its agent runs on; of one beside which nothing is carried out. Raises Refusal("conflict")."""
    check_alone(tx, approval)  # what would be done is not known before
    return ground(tx, approval)
