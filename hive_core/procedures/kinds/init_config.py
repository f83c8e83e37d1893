"""The repositories of an agent to be, to be shaped before anything runs. payload: as that of spawn.

What is committed there afterwards and approved as an apply_commit creates the agent and starts it.
"""

from __future__ import annotations

from typing import Any

from hive_core.git.repos import Repos
from hive_core.procedures.kinds.kind import Done, Step
from hive_core.procedures.kinds.spawn import Spawn
from hive_core.protocol.words import AgentName
from hive_core.services.agents import check_free
from hive_core.services.approvals import Approval, Shown
from hive_core.services.configured import note_configured
from hive_core.services.notices import notice
from hive_core.store.writer import Transaction


class InitConfig:
    kind = "init_config"

    def __init__(self, spawn: Spawn, repos: Repos) -> None:
        self._spawn = spawn
        self._repos = repos

    async def request(
        self,
        requested_by: AgentName,
        name: AgentName,
        persona: object,
        reason: object,
        key: str | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """Ask for the repositories of an agent to be; `{"approval": id}`. As Spawn.request."""
        return await self._spawn.request(requested_by, name, persona, reason, key, kind=self.kind, **more)

    def title(self, approval: Approval) -> str:
        return f"the configuration of an agent to be, {approval.agent}"

    async def show_now(self, approval: Approval) -> Shown:
        return await self._spawn.show_now(approval)

    async def carry_out(self, approval: Approval, step: Step) -> Done:
        name, asker = approval.agent, approval.requested_by
        await self._spawn.insist_that_it_is_free(name)
        sha = await self._repos.create(name, approval.payload["files"], replace=True)

        def write(tx: Transaction) -> None:
            check_free(tx, name, "configure")
            note_configured(tx, name, sha, asker, approval.payload.get("icon"))

        text = f"{name} can be shaped in /agents/{name}/config; a commit there that is approved creates it"
        told = notice("config_ready", text, approval=approval.id, agent=name, sha=sha)
        return Done(write, told=told)

    async def closed(self, approval: Approval) -> None:
        pass
