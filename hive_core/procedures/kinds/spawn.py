"""A new agent: its first files, as its card shows them. payload: {"files": {name: text}}."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

from jinja2 import Environment

from hive_core.agents import Agents, check_free
from hive_core.approvals import Approval, Request, Shown, digest_of
from hive_core.effects import Effect, Line, prompt_lines
from hive_core.effects_of_settings import settings_lines
from hive_core.notices import notice, tell_manager
from hive_core.post import put_message
from hive_core.procedures.deployments import Change, Deployments
from hive_core.procedures.kinds.kind import Asking, Done, Step
from hive_core.procedures.walk import Walk
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import (
    MANAGER,
    NOTE_LIMIT_BYTES,
    OPERATOR,
    PERSONA_LIMIT_BYTES,
    SYSTEM,
    AgentName,
    CommitSha,
    MessageBody,
    parse_text,
)
from hive_core.repos import Repos
from hive_core.settings import parse_agent_toml
from hive_core.store.writer import Transaction
from hive_core.systems import note_deployed


class Spawn:
    kind = "spawn"

    def __init__(
        self,
        asking: Asking,
        agents: Agents,
        repos: Repos,
        deployments: Deployments,
        walk: Walk,
        templates: Environment,
        *,
        default_program: str,
        default_model: str,
    ) -> None:
        self._asking = asking
        self._agents = agents
        self._repos = repos
        self._deployments = deployments
        self._walk = walk
        self._templates = templates
        self._defaults = {"program": default_program, "model": default_model}

    async def request(
        self,
        requested_by: AgentName,
        name: AgentName,
        given_persona: object,
        given_reason: object,
        key: str | None = None,
    ) -> dict[str, Any]:
        """Ask for a new agent; `{"approval": id}`. Raises Refusal when the name is taken or a text is malformed."""
        persona = parse_text(given_persona, "persona", PERSONA_LIMIT_BYTES - 2048)
        reason = parse_text(given_reason, "reason", NOTE_LIMIT_BYTES)
        prompt = self._templates.get_template("CLAUDE.md.j2").render(name=name, persona=persona)
        shown = _shown(self.files(name, "", prompt))

        def make(tx: Transaction) -> Request:
            check_free(tx, name, "ask for")
            sql = """
                SELECT id FROM approvals
                WHERE kind = 'spawn' AND agent = ? AND state IN ('pending', 'approved') AND digest != ?
            """
            if row := tx.execute(sql, (name, digest_of("spawn", name, shown))).fetchone():
                raise Refusal("refused", f"cannot ask for {name}: approval {row['id']} asks for it already and waits")
            return Request("spawn", name, requested_by, reason, shown)

        return await self._asking.put(requested_by, key, "request_spawn", name, make)

    def files(self, name: AgentName, description: str, prompt: str) -> dict[str, str]:
        """What a new agent's first commit holds."""
        toml = self._templates.get_template("agent.toml.j2").render(**self._defaults, description=description)
        return {"agent.toml": toml, "CLAUDE.md": prompt, **self._deployments.files(name, description)}

    def title(self, approval: Approval) -> str:
        return f"the new agent {approval.agent}"

    async def show_now(self, approval: Approval) -> Shown:
        return Shown(approval.payload, approval.effect)

    async def carry_out(self, approval: Approval, step: Step) -> Done:
        # What an earlier try left behind under this name began with other files than the card shows.
        sha = await self._repos.create(approval.agent, approval.payload["files"], replace=True)
        async with AsyncExitStack() as held:
            deployed = await self._walk.begin(Change(approval.agent, approval.id, sha, None), held)

            def write(tx: Transaction) -> None:
                self._agents.create(tx, approval.agent, approval.requested_by)
                note_deployed(tx, approval.agent, sha, deployed)
                put_message(tx, SYSTEM, approval.agent, _welcome(approval))
                if approval.requested_by != MANAGER:
                    tell_manager(tx, _spawned(approval, sha))

            return Done(write, held=held.pop_all())

    async def closed(self, approval: Approval) -> None:
        pass


def _welcome(approval: Approval) -> MessageBody:
    asker = approval.requested_by
    text = f"Welcome to the hive, {approval.agent}. {asker} asked for you and the operator approved it. "
    text += "Introduce yourself to the operator in one sentence"
    text += "" if asker == OPERATOR else f". Then tell {asker} that you are ready"
    return notice("welcome", text, agent=approval.agent, requested_by=asker, reason=approval.reason)


def _spawned(approval: Approval, sha: CommitSha) -> MessageBody:
    return notice(
        "spawned",
        f"{approval.agent} was created",
        agent=approval.agent,
        approval=approval.id,
        requested_by=approval.requested_by,
        sha=sha,
    )


def _shown(files: dict[str, str]) -> Shown:
    lines = settings_lines(None, parse_agent_toml(files["agent.toml"].encode()))
    lines += [Line("budget", None, "none of its own; the hive's holds"), *prompt_lines(None, files["CLAUDE.md"])]
    unknown = ["packages: agent.nix is evaluated when this is approved"] if "agent.nix" in files else []
    return Shown({"files": files}, Effect(lines, unknown).to_wire())
