"""A new agent: its first files, as its card shows them. payload: {"files": {name: text}}."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jinja2 import Environment

from hive_core.effects import Effect, Line, derivation_of, prompt_lines, says_the_same
from hive_core.effects_of_settings import settings_lines
from hive_core.git.repos import Repos
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
from hive_core.services.agents import Agents, check_free
from hive_core.services.approvals import Approval, Request, Shown, digest_of
from hive_core.services.configured import forget_configured
from hive_core.services.notices import notice, tell_manager
from hive_core.services.post import put_message
from hive_core.services.profiles import parse_icon
from hive_core.services.tool_calls import first_answer
from hive_core.settings import parse_agent_toml
from hive_core.store.writer import Transaction
from hive_core.toolkits import Toolkit, parse_toolkit


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
        *,
        icon: object = None,
        toolkit: object = None,
        kind: str = "spawn",
    ) -> dict[str, Any]:
        """Ask for a new agent, or (init_config) for its repositories alone; `{"approval": id}`.

        toolkit: one of toolkits.toml. Raises Refusal when the name is taken or a word is malformed.
        """
        reason = parse_text(given_reason, "reason", NOTE_LIMIT_BYTES)
        tool = f"request_{kind}"
        files, besides = self._files_of(name, given_persona, icon, toolkit)

        def first(tx: Transaction) -> dict[str, Any] | None:
            if (answer := first_answer(tx, requested_by, key, tool)) is None:
                check_free(tx, name, "ask for")  # before anything is evaluated
            return answer

        if (answer := await self._asking.store.write(first)) is not None:
            return answer
        shown = Shown({"files": files, **besides}, (await self._effect(name, files, besides, toolkit)).to_wire())

        def make(tx: Transaction) -> Request:
            check_free(tx, name, "ask for")
            sql = """
                SELECT id FROM approvals INDEXED BY approvals_of
                WHERE agent = ? AND kind IN ('spawn', 'init_config') AND state IN ('pending', 'approved')
                  AND digest != ?
            """
            if row := tx.execute(sql, (name, digest_of(kind, name, shown))).fetchone():
                raise Refusal("refused", f"cannot ask for {name}: approval {row['id']} asks for it already and waits")
            return Request(kind, name, requested_by, reason, shown)

        return await self._asking.put(requested_by, key, tool, name, make)

    def _files_of(
        self, name: AgentName, given_persona: object, icon: object, toolkit: object
    ) -> tuple[dict[str, str], dict[str, str]]:
        """The files of a new agent, and what its card's payload has besides."""
        persona = parse_text(given_persona, "persona", PERSONA_LIMIT_BYTES - 2048)
        prompt = self._templates.get_template("CLAUDE.md.j2").render(name=name, persona=persona)
        files = self.files(name, "", prompt, parse_toolkit(toolkit))
        return files, {} if icon is None else {"icon": parse_icon(icon)}

    async def _effect(
        self, name: AgentName, files: Mapping[str, str], besides: Mapping[str, str], toolkit: object = None
    ) -> Effect:
        lines = [Line("icon", None, besides["icon"])] if "icon" in besides else []
        lines += settings_lines(None, parse_agent_toml(files["agent.toml"].encode()))
        lines += [Line("budget", None, "the hive's alone"), *prompt_lines(None, files["CLAUDE.md"])]
        unknown = []
        if "agent.nix" not in files and (packages := parse_toolkit(toolkit).packages):
            unknown.append(f"packages: {', '.join(packages)} are not installed in this sandbox; it has the host's")
        found = await self._deployments.check_new(name, files)
        return replace(found, lines=[*lines, *found.lines], unknown=[*unknown, *found.unknown])

    def files(self, name: AgentName, description: str, prompt: str, kit: Toolkit = Toolkit()) -> dict[str, str]:  # noqa: B008
        """What a new agent's first commit holds."""
        given = {**self._defaults, "description": description, "tools": kit.tools}
        toml = self._templates.get_template("agent.toml.j2").render(given)
        return {"agent.toml": toml, "CLAUDE.md": prompt, **self._deployments.files(name, description, kit.packages)}

    def title(self, approval: Approval) -> str:
        return f"the new agent {approval.agent}"

    async def show_now(self, approval: Approval) -> Shown:
        await self.insist_that_it_is_free(approval.agent)
        as_it_is = Shown(approval.payload, approval.effect)
        if (approval.effect or {}).get("inputs", "") == self._deployments.inputs:
            return as_it_is
        effect = (await self._effect(approval.agent, approval.payload["files"], approval.payload)).to_wire()
        return as_it_is if says_the_same(effect, approval.effect) else Shown(approval.payload, effect)

    async def carry_out(self, approval: Approval, step: Step) -> Done:
        shown = ""
        if (sha := await self._begun(approval)) is None:
            shown = derivation_of(approval.effect)
            await self.insist_that_it_is_free(approval.agent)
            # What an earlier try left behind under this name began with other files than the card shows.
            sha = await self._repos.create(approval.agent, approval.payload["files"], replace=True)
        return await self.begin(approval, sha, None, step, shown)

    async def _begun(self, approval: Approval) -> CommitSha | None:
        """The first commit of the agent that this made under a daemon that died when it proved it."""
        sql = "SELECT deployed_sha FROM agents WHERE name = ? AND created_at_ms >= ?"
        row = await self._asking.store.row(sql, (approval.agent, approval.resolved_at_ms))
        if row is None or row["deployed_sha"] != await self._repos.tagged(approval.agent, "deployed/0"):
            return None
        return CommitSha(row["deployed_sha"])

    async def insist_that_it_is_free(self, name: AgentName) -> None:
        """Raise Refusal when an agent has the name by now: its repositories must not be made anew."""
        await self._asking.store.write(lambda tx: check_free(tx, name, "make the repositories of"))

    async def begin(self, approval: Approval, sha: CommitSha, base: CommitSha | None, step: Step, shown: str) -> Done:
        """Let a new agent be started on a commit. base: where main of its applied repository is, if not there.

        shown: see Deployments.build
        """

        def create(tx: Transaction) -> None:
            icon = tx.execute("SELECT icon FROM configured WHERE name = ?", (approval.agent,)).fetchone()
            forget_configured(tx, approval.agent)
            self._agents.create(tx, approval.agent, approval.requested_by)
            sign = approval.payload.get("icon") or (icon and icon["icon"])
            tx.execute("UPDATE agents SET icon = ? WHERE name = ?", (sign, approval.agent))

        change = Change(approval.agent, approval.id, sha, base)
        held, proof = await self._walk.begin(change, create, step, shown)

        def write(tx: Transaction) -> None:
            put_message(tx, SYSTEM, approval.agent, _welcome(approval))
            if approval.requested_by != MANAGER:
                tell_manager(tx, _spawned(approval, sha))

        return Done(write, proof, held)

    async def closed(self, approval: Approval) -> None:
        pass


def _welcome(approval: Approval) -> MessageBody:
    asker = approval.requested_by
    text = f"Welcome to the hive, {approval.agent}. {asker} asked for you and the operator approved it. "
    text += "Choose your pronouns with set_profile. Introduce yourself to the operator in one sentence"
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
