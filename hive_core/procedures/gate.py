"""The gate: nothing changes without a commit and a click.

A request becomes a card; approve is one transaction; carrying it out is a step of its own that can be done again, so
a daemon that dies in between finishes it when it starts. Whoever asked is told of every end.
"""

from __future__ import annotations

import logging

from jinja2 import Environment

from hive_core.agents import Agents, check_free, set_deployed
from hive_core.approvals import Approval, Approvals, digest_of, put_request, settle
from hive_core.post import no_room, put_message
from hive_core.procedures.deployments import Change, Deployments
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.visible import quoted
from hive_core.protocol.words import (
    INLINE_LIMIT_BYTES,
    MANAGER,
    NOTE_LIMIT_BYTES,
    OPERATOR,
    PERSONA_LIMIT_BYTES,
    SYSTEM,
    AgentName,
    CommitSha,
    parse_body,
    parse_text,
)
from hive_core.repos import Repos
from hive_core.store.bus import APPROVED, DEPLOYED, WANTED
from hive_core.store.door import Store
from hive_core.store.schema import StoreError
from hive_core.store.writer import Transaction
from hive_core.systems import note_deployed
from hive_core.tool_calls import first_answer, once

log = logging.getLogger(__name__)


class Gate:
    def __init__(
        self,
        store: Store,
        agents: Agents,
        approvals: Approvals,
        repos: Repos,
        deployments: Deployments,
        templates: Environment,
        *,
        default_program: str,
        default_model: str,
    ) -> None:
        self._store = store
        self._agents = agents
        self._approvals = approvals
        self._repos = repos
        self._deployments = deployments
        self._templates = templates
        self._mended: dict[AgentName, str] = {}  # the commit of each agent that was looked at
        self._unmended: set[AgentName] = set()  # of whom that failed
        self._defaults = {"program": default_program, "model": default_model}

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
        sha = await self._repos.create(MANAGER, self._files(MANAGER, "manages this hive", prompt))
        settings = await self._repos.read(MANAGER, sha)

        def write(tx: Transaction) -> None:
            if tx.execute("SELECT 1 FROM agents WHERE name = ?", (MANAGER,)).fetchone() is None:
                self._agents.create(tx, MANAGER, SYSTEM)
                set_deployed(tx, MANAGER, sha, settings)

        await self._store.write(write)

    async def request_spawn(
        self,
        requested_by: AgentName,
        name: AgentName,
        given_persona: object,
        given_reason: object,
        key: str | None = None,
    ) -> dict[str, int]:
        """Ask for a new agent; `{"approval": id}`. Raises Refusal when the name is taken or a text is malformed."""
        persona = parse_text(given_persona, "persona", PERSONA_LIMIT_BYTES - 2048)
        reason = parse_text(given_reason, "reason", NOTE_LIMIT_BYTES)
        prompt = self._templates.get_template("CLAUDE.md.j2").render(name=name, persona=persona)
        payload = {"files": self._files(name, "", prompt)}

        def ask(tx: Transaction) -> dict[str, int]:
            check_free(tx, name, "ask for")
            digest = digest_of("spawn", name, payload)
            sql = """
                SELECT id FROM approvals
                WHERE kind = 'spawn' AND agent = ? AND state IN ('pending', 'approved') AND digest != ?
            """
            if row := tx.execute(sql, (name, digest)).fetchone():
                raise Refusal("refused", f"cannot ask for {name}: approval {row['id']} asks for it already and waits")
            if tx.short:
                raise no_room(f"ask for {name}")
            return {"approval": put_request(tx, "spawn", name, requested_by, reason, payload)}

        return await self._store.write(lambda tx: once(tx, requested_by, key, "request_spawn", lambda: ask(tx)))

    async def request_apply_commit(
        self, requested_by: AgentName, name: AgentName, sha: CommitSha, given_reason: object, key: str | None = None
    ) -> dict[str, int]:
        """Ask to run an agent on a commit of its proposed repository; `{"approval": id}`.

        The commit is fetched and checked first: a request that cannot be deployed leaves no approval.
        """
        reason = parse_text(given_reason, "reason", NOTE_LIMIT_BYTES)
        await self._agents.get(name)
        tool = f"request_apply_commit {name} {sha}"
        answer = await self._store.write(lambda tx: first_answer(tx, requested_by, key, tool))
        if answer is None:
            proposal = await self._repos.fetch(name, sha)
            await self._deployments.check(name, proposal)
            payload = {"sha": proposal.sha, "base": proposal.base, "diff": proposal.diff}

            def ask(tx: Transaction) -> dict[str, int]:
                if tx.short:
                    raise no_room(f"ask for a commit of {name}")
                return {"approval": put_request(tx, "apply_commit", name, requested_by, reason, payload)}

            answer = await self._store.write(lambda tx: once(tx, requested_by, key, tool, lambda: ask(tx)))
        await self._repos.tag(name, f"proposal/{answer['approval']}", sha)
        return answer

    async def deny(self, approval_id: int, given_reason: object, actor: str) -> Approval:
        """The operator's no, with the reason that the requester reads. Denying twice is fine."""
        reason = parse_text(given_reason, "reason", NOTE_LIMIT_BYTES)
        approval = await self._approvals.get(approval_id)
        if approval.state != "denied":

            def write(tx: Transaction) -> None:
                sql = "SELECT 1 FROM approvals WHERE id = ? AND state = 'denied'"
                if tx.execute(sql, (approval_id,)).fetchone() is None:
                    settle(tx, approval, "denied", reason, actor)
                    _tell(tx, approval, "denied", reason)

            await self._store.write(write)
            if approval.kind == "apply_commit":
                sha = CommitSha(approval.payload["sha"])
                await self._repos.tag(approval.agent, f"denied/{approval_id}", sha, reason)
        return await self._approvals.get(approval_id)

    async def serve(self) -> None:
        """Carry out what is approved, also what was approved before the daemon started; and mend between two of those
        what is deployed, an agent at a time."""
        with self._store.bus.listen(APPROVED, DEPLOYED) as listener:
            while True:
                for approval in await self._approvals.approved():
                    await self._carry_out(approval)
                if not await self._mend_some():
                    await listener.wait()
                    # What could not be mended may be possible now: another was built, a tombstone's files are back.
                    for name in self._unmended:
                        self._mended.pop(name, None)
                    self._unmended.clear()

    def hindrance(self, name: AgentName) -> str | None:
        """Why what is deployed of an agent may not be started now, or None."""
        return self._deployments.hindrance(name)

    async def _mend_some(self) -> bool:
        """Mend what was not looked at yet; False when nothing is left. It ends after each agent that takes its time."""
        agents = {agent.name: agent.deployed_sha for agent in await self._agents.all()}
        for name in self._mended.keys() - agents.keys():
            del self._mended[name]
            self._deployments.forget(name)
        for name, sha in agents.items():
            if sha is not None and self._mended.get(name) != sha:
                self._mended[name] = sha
                if await self._mend(name, CommitSha(sha)):
                    return True
        return False

    async def _mend(self, name: AgentName, sha: CommitSha) -> bool:
        """Mend what is deployed of one agent; False when there was nothing to do."""
        hindered = self._deployments.hindrance(name)
        done = True
        try:
            deployed = await self._deployments.mend(name, sha)
        except StoreError:
            raise
        except Exception as exc:
            # Its own trouble, which its state shows: approvals and other agents go on.
            log.error("what %s runs on is not as it was deployed: %s", name, exc, extra={"agent": name})
            self._unmended.add(name)
        else:
            done = deployed is not None
            if deployed is not None:
                await self._store.insist(lambda tx: note_deployed(tx, name, sha, deployed))
        if self._deployments.hindrance(name) != hindered:
            self._store.bus.publish([WANTED])
        return done

    async def _carry_out(self, approval: Approval) -> None:
        try:
            if approval.kind == "spawn":
                await self._spawn(approval)
            else:
                await self._apply(approval)
        except StoreError:
            raise
        except Exception as exc:
            # Whatever a repository does to the libraries that read it ends this approval, not the daemon.
            reason = str(exc) if isinstance(exc, Refusal | OSError) else f"{type(exc).__name__}: {exc}"
            log.warning("approval %d of %s failed: %s", approval.id, approval.agent, reason)
            self._mended.pop(approval.agent, None)

            def fail(tx: Transaction) -> None:
                settle(tx, approval, "failed", reason, SYSTEM)
                # What failed is told in words of libraries, which quote what agents wrote.
                _tell(tx, approval, "failed", quoted(reason))

            await self._store.insist(fail)

    async def _spawn(self, approval: Approval) -> None:
        # What an earlier try left behind under this name began with other files than the card shows.
        sha = await self._repos.create(approval.agent, approval.payload["files"], replace=True)
        deployed = await self._deployments.carry_out(Change(approval.agent, approval.id, sha, None))
        welcome = self._templates.get_template("welcome.j2").render(approval=approval, reason=quoted(approval.reason))

        def write(tx: Transaction) -> None:
            self._agents.create(tx, approval.agent, approval.requested_by)
            note_deployed(tx, approval.agent, sha, deployed)
            put_message(tx, SYSTEM, approval.agent, parse_body(welcome))
            settle(tx, approval, "done", None, SYSTEM)
            _tell(tx, approval, "approved", None)

        await self._store.insist(write)

    async def _apply(self, approval: Approval) -> None:
        sha, base = CommitSha(approval.payload["sha"]), CommitSha(approval.payload["base"])
        deployed = await self._deployments.carry_out(Change(approval.agent, approval.id, sha, base))

        def write(tx: Transaction) -> None:
            note_deployed(tx, approval.agent, sha, deployed)
            settle(tx, approval, "done", None, SYSTEM)
            _tell(tx, approval, "approved", None)

        await self._store.insist(write)

    def _files(self, name: AgentName, description: str, prompt: str) -> dict[str, str]:
        toml = self._templates.get_template("agent.toml.j2").render(**self._defaults, description=description)
        return {"agent.toml": toml, "CLAUDE.md": prompt, **self._deployments.files(name, description)}


def _tell(tx: Transaction, approval: Approval, end: str, reason: str | None) -> None:
    """One message to whoever asked, unless the operator did."""
    if approval.requested_by == OPERATOR:
        return
    what = {
        "spawn": f"the new agent {approval.agent}",
        "apply_commit": f"commit {approval.payload.get('sha', '')} for {approval.agent}",
    }[approval.kind]
    text = f"approval_resolved: approval {approval.id}, {what}: {end}."
    if reason:
        text += f" The reason: {reason}"
    put_message(tx, SYSTEM, approval.requested_by, parse_body(text[: INLINE_LIMIT_BYTES // 4]))
