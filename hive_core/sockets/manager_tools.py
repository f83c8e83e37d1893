"""The tools that hm1nd has besides everybody's: it runs the swarm with them, and asks the operator for changes.

Each does what the operator's verb of the same name does, in hm1nd's name. Its socket is the right to them.
"""

from __future__ import annotations

from hive_core.hive import Hive
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import MANAGER, AgentName, parse_agent_name, parse_commit_sha
from hive_core.sockets import forms, told
from hive_core.sockets.told import Result
from hive_core.sockets.tool import Key, tool


class ManagerTools:
    def __init__(self, hive: Hive) -> None:
        self._hive = hive

    # -- what the operator has to approve -----------------------------------------------------------------------------

    @tool("Ask for a new agent.", forms.SpawnArguments, forms.RequestResult, told.requested)
    async def request_spawn(self, given: forms.SpawnArguments, key: Key) -> Result:
        name = parse_agent_name(given.name)
        return await self._hive.gate.spawn.request(
            MANAGER, name, given.persona, given.reason, key, icon=given.icon, toolkit=given.toolkit
        )

    @tool(
        "Ask for a new agent's config alone.",
        forms.InitArguments,
        forms.RequestResult,
        told.requested,
    )
    async def request_init_config(self, given: forms.InitArguments, key: Key) -> Result:
        name = parse_agent_name(given.name)
        return await self._hive.gate.init_config.request(MANAGER, name, given.persona, given.reason, key)

    @tool(
        "Ask to run an agent on a commit.",
        forms.ApplyArguments,
        forms.RequestResult,
        told.requested,
    )
    async def request_apply_commit(self, given: forms.ApplyArguments, key: Key) -> Result:
        name, sha = parse_agent_name(given.agent), parse_commit_sha(given.sha)
        return await self._hive.gate.apply_commit.request(MANAGER, name, sha, given.reason, key)

    @tool("Ask to lock newer inputs.", forms.ReasonArguments, forms.RequestResult, told.requested)
    async def request_update_meta_inputs(self, given: forms.ReasonArguments, key: Key) -> Result:
        return await self._hive.gate.update_meta_inputs.request(MANAGER, given.reason, key)

    @tool("Ask to prompt an agent by a clock.", forms.ScheduleArguments, forms.RequestResult, told.requested)
    async def request_schedule_prompt(self, given: forms.ScheduleArguments, key: Key) -> Result:
        return await self._hive.schedule_prompt.request(MANAGER, given.model_dump(), key)

    @tool("Ask to raise a budget.", forms.BudgetArguments, forms.RequestResult, told.requested)
    async def request_raise_budget(self, given: forms.BudgetArguments, key: Key) -> Result:
        return await self._hive.raise_budget.request(MANAGER, given.model_dump(), key)

    @tool("Ask for an agent's end.", forms.DestroyArguments, forms.RequestResult, told.requested)
    async def request_destroy(self, given: forms.DestroyArguments, key: Key) -> Result:
        return await self._hive.destroy.request(MANAGER, parse_agent_name(given.agent), given.reason, key)

    @tool("Take back a request.", forms.CancelRequestArguments, forms.RequestResult, told.taken_back)
    async def cancel_request(self, given: forms.CancelRequestArguments, _: Key) -> Result:
        await self._hive.gate.cancel(given.approval, given.reason, MANAGER)
        return {"approval": given.approval}

    # -- what it may do -----------------------------------------------------------------------------------------------

    @tool("End an agent, keep it down.", forms.AgentArguments, forms.AgentResult, told.killed, destructive=True)
    async def kill(self, given: forms.AgentArguments, _: Key) -> Result:
        name = _another(given, "kill")
        await self._hive.reconciler.kill(name, MANAGER)
        return {"agent": name}

    @tool("Start an agent.", forms.AgentArguments, forms.AgentResult, told.started)
    async def start(self, given: forms.AgentArguments, _: Key) -> Result:
        name = _another(given, "start")
        await self._hive.agents.want(name, "up", MANAGER)
        return {"agent": name}

    @tool("Start an agent anew.", forms.AgentArguments, forms.AgentResult, told.restarted)
    async def restart(self, given: forms.AgentArguments, _: Key) -> Result:
        name = _another(given, "restart")
        await self._hive.reconciler.restart(name, MANAGER)
        return {"agent": name}

    @tool("Replace an outdated agent.", forms.AgentArguments, forms.UpdateResult, told.updated)
    async def update(self, given: forms.AgentArguments, _: Key) -> Result:
        name = _another(given, "update")
        return {"agent": name, "replaced": await self._hive.reconciler.updates.update(name, MANAGER)}

    @tool("What an agent printed last.", forms.LogsArguments, forms.LogsResult, told.logs, read_only=True)
    async def get_logs(self, given: forms.LogsArguments, _: Key) -> Result:
        name = parse_agent_name(given.agent)
        return {"agent": name, "lines": await self._hive.reconciler.logs(name, given.lines)}

    @tool(
        "What waits in the whole hive.",
        forms.NoArguments,
        forms.HiveLooseEndsResult,
        told.hive_loose_ends,
        read_only=True,
    )
    async def hive_loose_ends(self, _: forms.NoArguments, __: Key) -> Result:
        return await self._hive.loose_ends.of_all()


def _another(given: forms.AgentArguments, deed: str) -> AgentName:
    """Whom a tool is used on. Raises Refusal for hm1nd itself."""
    name = parse_agent_name(given.agent)
    if name == MANAGER:
        raise Refusal("refused", f"cannot {deed} {name}: the manager does not {deed} itself; ask the operator")
    return name
