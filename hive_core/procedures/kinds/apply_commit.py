"""A commit of an agent's proposed repository, to run it on. payload: {"sha", "base", "diff"}.

base is what main of the applied repository is: what the agent runs on.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

from hive_core.agents import Agents
from hive_core.approvals import Approval, Request, Shown
from hive_core.procedures.deployments import Change, Deployments
from hive_core.procedures.kinds.kind import Asking, Done, Step
from hive_core.proposals import Proposal
from hive_core.protocol.words import NOTE_LIMIT_BYTES, AgentName, CommitSha, parse_text
from hive_core.repos import Repos
from hive_core.store.writer import Transaction
from hive_core.systems import note_deployed
from hive_core.tool_calls import first_answer


class ApplyCommit:
    kind = "apply_commit"

    def __init__(self, asking: Asking, agents: Agents, repos: Repos, deployments: Deployments) -> None:
        self._asking = asking
        self._agents = agents
        self._repos = repos
        self._deployments = deployments

    async def request(
        self, requested_by: AgentName, name: AgentName, sha: CommitSha, given_reason: object, key: str | None = None
    ) -> dict[str, Any]:
        """Ask to run an agent on a commit of its proposed repository; `{"approval": id}`.

        The commit is fetched and checked first: a request that cannot be deployed leaves no approval.
        """
        reason = parse_text(given_reason, "reason", NOTE_LIMIT_BYTES)
        await self._agents.get(name)
        tool = f"request_apply_commit {name} {sha}"
        answer = await self._asking.store.write(lambda tx: first_answer(tx, requested_by, key, tool))
        if answer is None:
            proposal = await self._repos.fetch(name, sha)
            await self._deployments.check(name, proposal)
            request = Request("apply_commit", name, requested_by, reason, _shown(proposal))
            answer = await self._asking.put(requested_by, key, tool, f"a commit of {name}", lambda tx: request)
        await self._repos.tag(name, f"proposal/{answer['approval']}", sha)
        return answer

    def title(self, approval: Approval) -> str:
        return f"commit {approval.payload['sha']} for {approval.agent}"

    async def show_now(self, approval: Approval) -> Shown:
        proposal = await self._repos.look_again(approval.agent, CommitSha(approval.payload["sha"]))
        if proposal.base == approval.payload["base"]:
            return Shown(approval.payload, approval.effect)
        await self._deployments.check(approval.agent, proposal)
        return _shown(proposal)

    async def carry_out(self, approval: Approval, step: Step) -> Done:
        sha, base = CommitSha(approval.payload["sha"]), CommitSha(approval.payload["base"])
        async with AsyncExitStack() as held:
            deployed = await self._deployments.carry_out(Change(approval.agent, approval.id, sha, base), held)

            def write(tx: Transaction) -> None:
                note_deployed(tx, approval.agent, sha, deployed)

            return Done(write, held=held.pop_all())

    async def closed(self, approval: Approval) -> None:
        if approval.state == "denied":
            sha = CommitSha(approval.payload["sha"])
            await self._repos.tag(approval.agent, f"denied/{approval.id}", sha, approval.note or "")


def _shown(proposal: Proposal) -> Shown:
    return Shown({"sha": proposal.sha, "base": proposal.base, "diff": proposal.diff})
