"""A commit of an agent's proposed repository, to run it on. payload: {"sha", "base", "diff"}, and
"creates" where it is the first that an agent to be runs on.

base is what main of the applied repository is: what the agent runs on.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from hive_core.effects import Effect, derivation_of, says_the_same
from hive_core.git.proposals import Proposal
from hive_core.git.repos import Repos
from hive_core.policy_rules import OF_SYSTEMS
from hive_core.procedures.deployments import Deployments
from hive_core.procedures.kinds.kind import Asking, Done, Step
from hive_core.procedures.kinds.spawn import Spawn
from hive_core.procedures.walk import Walk
from hive_core.protocol.effect import WIDE, is_for_itself
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import (
    MANAGER,
    NOTE_LIMIT_BYTES,
    OPERATOR,
    AgentName,
    CommitSha,
    MessageBody,
    parse_agent_name,
    parse_deployed_tag,
    parse_text,
)
from hive_core.services.agents import Agents
from hive_core.services.approvals import Approval, Request, Shown
from hive_core.services.configured import is_configured
from hive_core.services.deploy_log import DeployLog
from hive_core.services.notices import notice, tell_manager
from hive_core.services.refused_requests import noting_a_refusal
from hive_core.services.tool_calls import first_answer
from hive_core.store.writer import Transaction

WAITING_LIMIT = 50  # of one agent
OURS = ("back", "to")  # in the payload of a commit that the daemon made, which the manager does not have
BASES = ("running", "approved", "previous")


class ApplyCommit:
    kind = "apply_commit"

    def __init__(
        self,
        asking: Asking,
        agents: Agents,
        repos: Repos,
        deployments: Deployments,
        walk: Walk,
        spawn: Spawn,
        deploy_log: DeployLog,
        host_network: Collection[str] | None = None,
    ) -> None:
        """host_network: whom the helper gives the host's network; None: there is no helper."""
        self._asking = asking
        self._agents = agents
        self._repos = repos
        self._deployments = deployments
        self._walk = walk
        self._spawn = spawn
        self._log = deploy_log
        self._host_network = host_network

    async def request(
        self, requested_by: AgentName, name: AgentName, sha: CommitSha, given_reason: object, key: str | None = None
    ) -> dict[str, Any]:
        """Ask to run an agent on a commit of its proposed repository; `{"approval": id}`.

        The commit is fetched and checked first: a request that cannot be deployed leaves no approval, and neither does
        one for a commit that waits already.
        """
        reason = parse_text(given_reason, "reason", NOTE_LIMIT_BYTES)
        await self._insist_that_it_is_there(name)
        tool = f"request_apply_commit {name} {sha}"
        answer = await self._asking.store.write(lambda tx: first_answer(tx, requested_by, key, tool))
        if answer is None:
            with self._repos.holding(name, sha):
                fetch = partial(self._repos.fetch, name, sha)
                answer = await self._ask(requested_by, name, sha, reason, key, tool, fetch)
        await self._repos.tag(name, f"proposal/{answer['approval']}", sha)
        return answer

    async def _ask(
        self,
        requested_by: AgentName,
        name: AgentName,
        sha: CommitSha,
        reason: str,
        key: str | None,
        tool: str,
        look: Callable[[], Awaitable[Proposal]],
        **more: str,
    ) -> dict[str, Any]:
        await self._asking.store.write(lambda tx: _check_waiting(tx, name, sha))  # before anything is fetched
        creates = await is_configured(self._asking.store, name)
        if creates and sha == await self._repos.main(name):
            why = f"it is what {name} was seeded with; commit a change of it, or ask for a new agent {name}"
            raise Refusal("refused", f"cannot apply {sha[:12]}: {why}")
        proposal = await look()
        found = await self.look_at(name, proposal, creates)
        shown = found._replace(payload={**found.payload, **more})

        def make(tx: Transaction) -> Request:
            _check_waiting(tx, name, sha)
            return Request(self.kind, name, requested_by, reason, shown)

        return await self._asking.put(requested_by, key, tool, f"a commit of {name}", make)

    async def look_at(self, name: AgentName, proposal: Proposal, creates: bool = False) -> Shown:
        """What a card shows of a commit. Raises Refusal when it cannot be deployed, or not by an approval of its."""
        shown = _shown(proposal, await self._deployments.check(name, proposal), creates)
        if is_for_itself(shown.effect):
            self._insist_on_nothing_else(name, proposal, shown)
        return shown

    def _insist_on_nothing_else(self, name: AgentName, proposal: Proposal, shown: Shown) -> None:
        """Raise Refusal for a commit that gives an agent the host's network and does more, or that cannot give it."""
        cannot = f"cannot apply {proposal.sha[:12]}: it gives {name} the host's network"
        if "creates" in shown.payload:
            why = 'a new agent begins with network = "private"; ask for the other once it runs'
            raise Refusal("refused", f"{cannot}, and {why}")
        lines = (shown.effect or {})["lines"]
        # What a system is built to for it is no other change.
        if others := sorted({line["what"] for line in lines} - {"network", *OF_SYSTEMS}):
            why = f"that is approved by itself, and this changes {', '.join(others)} too"
            raise Refusal("refused", f"{cannot}: {why}; propose a commit that changes network in agent.toml alone")
        if self._host_network is not None and name not in self._host_network:
            why = f"the helper's own configuration does not list {name} in host_network"
            raise Refusal("refused", f"{cannot}: {why}; list it there as root, and start helper and daemon again")

    async def ask_back(self, given: Mapping[str, object]) -> dict[str, Any]:
        """As request_back, of words as they came: `agent`, `to` (else what it ran on before) and `reason`. One that is
        refused leaves one event."""
        async with noting_a_refusal(self._asking.store, OPERATOR, self.kind, given):
            name, to = parse_agent_name(given.get("agent")), given.get("to")
            tag = await self._log.former(name) if to is None else parse_deployed_tag(to)
            return await self.request_back(name, tag, given.get("reason"))

    async def request_back(self, name: AgentName, tag: str, given_reason: object = None) -> dict[str, Any]:
        """The operator asks to run an agent on the files that it had at deployed/ID again; `{"approval": id}`.

        They come in a commit of their own behind main: what was approved later does not come back unseen.
        """
        reason = f"back to {tag}"
        if given_reason is not None:
            reason += f": {parse_text(given_reason, 'reason', NOTE_LIMIT_BYTES)}"
        await self._agents.get(name)
        sha = await self._repos.commit_back(name, tag)
        with self._repos.holding(name, sha):
            look = partial(self._repos.look_again, name, sha)
            answer = await self._ask(OPERATOR, name, sha, reason, None, "rollback", look, back=tag)
        await self._repos.tag(name, f"proposal/{answer['approval']}", sha)
        return answer

    async def _insist_that_it_is_there(self, name: AgentName) -> None:
        """Raise Refusal when it is neither an agent nor the configuration of one to be."""
        if not await is_configured(self._asking.store, name):
            await self._agents.get(name)

    async def expand(self, name: AgentName, given: object) -> CommitSha:
        """What people call a commit of an agent's proposed repository, as its whole id. Raises Refusal."""
        await self._insist_that_it_is_there(name)
        return await self._repos.expand(name, given)

    async def diff(self, approval: Approval, against: str) -> dict[str, str]:
        """`{"base", "sha", "diff"}`: the commit of an approval against another base than its card's.

        against: one of BASES. Raises Refusal when there is no such base.
        """
        sha = CommitSha(approval.payload["sha"])
        base = await self._base(approval, against)
        return {"base": base, "sha": sha, "diff": await self._repos.diff(approval.agent, base, sha)}

    async def _base(self, approval: Approval, against: str) -> CommitSha:
        if against == "running":
            return await self._repos.main(approval.agent)
        approved = against == "approved"
        found = await self._log.proposed_before(approval.agent, approval.id, approved=approved)
        if found is None:
            none = "no commit was approved" if approved else "no commit was proposed"
            why = f"{none} for {approval.agent} before it; --against running shows what it changes"
            raise Refusal("not_found", f"cannot compare approval {approval.id}: {why}")
        return found

    def title(self, approval: Approval) -> str:
        back = f", back to {approval.payload['back']}," if "back" in approval.payload else ""
        new = "the new agent " if "creates" in approval.payload else ""
        return f"commit {approval.payload['sha']}{back} for {new}{approval.agent}"

    async def show_now(self, approval: Approval) -> Shown:
        proposal = await self._repos.look_again(approval.agent, CommitSha(approval.payload["sha"]))
        creates = await is_configured(self._asking.store, approval.agent)
        as_it_is = Shown(approval.payload, approval.effect)
        is_moved = proposal.base != approval.payload["base"] or creates != ("creates" in approval.payload)
        if not is_moved and (approval.effect or {}).get("inputs", "") == self._deployments.inputs:
            return as_it_is
        shown = await self.look_at(approval.agent, proposal, creates)
        shown.payload.update((key, approval.payload[key]) for key in OURS if key in approval.payload)
        # Built from other inputs it may come to the same.
        return as_it_is if not is_moved and says_the_same(shown.effect, approval.effect) else shown

    async def carry_out(self, approval: Approval, step: Step) -> Done:
        sha, base = CommitSha(approval.payload["sha"]), CommitSha(approval.payload["base"])
        with suppress(Refusal):  # the next daemon sets it; what the repository cannot do otherwise is seen in the walk
            await self._repos.tag(approval.agent, f"approved/{approval.id}", sha)
        if "creates" in approval.payload:
            # A daemon before that moved main had built what was shown.
            shown = "" if await self._repos.main(approval.agent) == sha else derivation_of(approval.effect)
            return await self._spawn.begin(approval, sha, base, step, shown)
        done = await self._walk.carry_out(approval, sha, base, step)
        if any(key in approval.payload for key in OURS):
            with suppress(Refusal):  # the manager can do without, where it has put something in the way
                await self._repos.hand_over(approval.agent)

        def write(tx: Transaction) -> None:
            done.write(tx)
            if approval.requested_by != MANAGER:
                tell_manager(tx, _rebuilt(approval, sha))

        return done._replace(write=write)

    async def closed(self, approval: Approval) -> None:
        if approval.state in ("denied", "failed"):
            sha = CommitSha(approval.payload["sha"])
            await self._repos.tag(approval.agent, f"{approval.state}/{approval.id}", sha, approval.note or "")


def _check_waiting(tx: Transaction, name: AgentName, sha: CommitSha) -> None:
    """Raise Refusal when a commit waits for its approval already, or is being deployed, or too many wait."""
    sql = """
        SELECT id FROM approvals INDEXED BY approvals_commits
        WHERE kind = 'apply_commit' AND agent = ? AND json_extract(payload, '$.sha') = ?
          AND state IN ('pending', 'approved')
    """
    if row := tx.execute(sql, (name, sha)).fetchone():
        raise Refusal("refused", f"cannot ask for {sha[:12]}: approval {row['id']} asks for it already and waits")
    sql = """
        SELECT count(*) FROM approvals INDEXED BY approvals_open
        WHERE kind = 'apply_commit' AND agent = ? AND state IN ('pending', 'approved')
    """
    (waiting,) = tx.execute(sql, (name,)).fetchone()
    if waiting >= WAITING_LIMIT:
        why = f"{waiting} commits of {name} wait already; let the operator decide them first"
        raise Refusal("refused", f"cannot ask for {sha[:12]}: {why}")


def _rebuilt(approval: Approval, sha: CommitSha) -> MessageBody:
    sentence = f"{approval.agent} runs on {sha[:12]}"
    fetch = f"what you propose next is to begin there: `git fetch /agents/{approval.agent}/deployed.bundle main`"
    if back := approval.payload.get("back"):
        sentence += f", with the files of {back} again; {fetch}"
    if "to" in approval.payload:
        sentence += f", by which it reaches what it tried to; {fetch}"
    return notice(
        "rebuilt",
        sentence,
        agent=approval.agent,
        approval=approval.id,
        requested_by=approval.requested_by,
        sha=sha,
        tag=f"deployed/{approval.id}",
    )


def _shown(proposal: Proposal, effect: Effect, creates: bool) -> Shown:
    payload = {"sha": proposal.sha, "base": proposal.base, "diff": proposal.diff}
    told = effect.to_wire()
    if creates:
        line = {"what": "agent", "before": None, "after": "a new one, which is started", "weight": WIDE}
        return Shown({**payload, "creates": True}, {**told, "lines": [line, *told["lines"]]})
    return Shown(payload, told)
