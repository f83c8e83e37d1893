"""A destination that an agent wished to reach, by trying, and that its agent.toml does not name. payload: {"to": the
entry, as agent.toml would have it, "sha", "base", "diff"}.

The daemon itself makes the commit that adds the entry, on what the agent runs on; from there on it is as every other.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import trio

from hive_core.destinations import find_range, is_private_name, meant_address, parse_address
from hive_core.egress_edit import WAY_OUT, add_to_egress
from hive_core.egress_rules import READING, Rule, wanted
from hive_core.git.agent_locks import AgentLocks
from hive_core.git.repos import Repos
from hive_core.procedures.kinds.apply_commit import ApplyCommit
from hive_core.procedures.kinds.kind import Asking, Done, Step
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName, CommitSha
from hive_core.services.absent import no_such_agent
from hive_core.services.approvals import WISH, Approval, Request, Shown, remake
from hive_core.store.writer import Transaction

WAITING_LIMIT = 5  # wishes of one agent, before the operator has decided some
DAY_LIMIT = 20
REST_MS = 24 * 3600 * 1000  # before a wish that was not fulfilled is asked again
FAILED_REST_S = 60.0
TOLD = "you are told when it is decided"


class _Failed(NamedTuple):
    """A wish that could not be put before the operator: on what the agent ran, and until when the next one can not
    either, since each try is an evaluation that others wait for."""

    base: CommitSha
    until: float  # of trio's clock
    refusal: Refusal


class Egress:
    kind = WISH

    def __init__(self, asking: Asking, repos: Repos, apply_commit: ApplyCommit) -> None:
        self._asking = asking
        self._repos = repos
        self._apply = apply_commit
        self._locks = AgentLocks()
        self._failed: dict[AgentName, _Failed] = {}

    async def wish(self, name: AgentName, how: str, host: str, port: int) -> str:
        """Put before the operator what an agent tried to reach, unless that is there, or was decided not long ago.

        What becomes of it, as a clause for the agent's program: "asked the operator (approval 12)". Raises Refusal.
        """
        if needless := _needless(host):
            return needless
        entry = wanted(how, host, port)
        async with self._locks.of(name):  # of many at once the first one asks
            if known := await self._asking.store.write(lambda tx: _known(tx, name, entry)):
                return known
            base = await self._repos.main(name)
            failed = self._failed.get(name)
            if failed and failed.base == base and trio.current_time() < failed.until:
                raise Refusal(failed.refusal.code, failed.refusal.message)
            try:
                asked = await self._put(name, entry)
            except Refusal as refusal:
                self._failed[name] = _Failed(base, trio.current_time() + FAILED_REST_S, refusal)
                raise
            self._failed.pop(name, None)
        return f"asked the operator (approval {asked['approval']}); {TOLD}"

    async def _put(self, name: AgentName, entry: Rule) -> dict[str, Any]:
        sha = await self._commit(name, entry)
        with self._repos.holding(name, sha):
            shown = await self._shown(name, sha, entry)

            def make(tx: Transaction) -> Request:
                if tx.execute("SELECT 1 FROM agents WHERE name = ?", (name,)).fetchone() is None:
                    raise no_such_agent(tx, name)
                return Request(self.kind, name, name, f"{name} wants {_told(entry)}, which it tried to reach", shown)

            asked = await self._asking.put(name, None, self.kind, f"a destination of {name}", make)
        await self._repos.tag(name, f"proposal/{asked['approval']}", sha)
        return asked

    async def _commit(self, name: AgentName, entry: Rule) -> CommitSha:
        edit = partial(add_to_egress, entry=entry)
        return await self._repos.commit_edit(name, "agent.toml", edit, f"Let {name} reach {entry.to}")

    async def _shown(self, name: AgentName, sha: CommitSha, entry: Rule) -> Shown:
        shown = await self._apply.look_at(name, await self._repos.look_again(name, sha))
        if not any(line["what"] == "egress" and line["after"] for line in (shown.effect or {})["lines"]):
            why = f"its agent.nix does not take egress from agent.toml; {WAY_OUT}"
            raise Refusal("refused", f"cannot let {name} reach {entry.to}: {why}")
        return Shown({"to": entry.written(), **shown.payload}, shown.effect)

    def title(self, approval: Approval) -> str:
        return f"{approval.agent} wants {_told(_entry(approval))}"

    async def show_now(self, approval: Approval) -> Shown:
        while True:
            main = await self._repos.main(approval.agent)
            try:
                return await self._show_on(main, approval)
            except Refusal:
                if await self._repos.main(approval.agent) == main:
                    raise
                # Another wish came to its end meanwhile, and this one is to be told on what it left.

    async def _show_on(self, main: CommitSha, approval: Approval) -> Shown:
        name, entry = approval.agent, _entry(approval)
        if main == approval.payload["base"]:
            return await self._apply.show_now(approval)
        sha = await self._commit(name, entry)
        with self._repos.holding(name, sha):
            return await self._shown(name, sha, entry)

    async def carry_out(self, approval: Approval, step: Step) -> Done:
        """As every commit; behind another that was approved before it its own is made anew, and does the same."""
        name, entry = approval.agent, _entry(approval)
        if await self._repos.main(name) in (approval.payload["base"], approval.payload["sha"]):
            return await self._apply.carry_out(approval, step)
        sha = await self._commit(name, entry)
        with self._repos.holding(name, sha):
            shown = await self._shown(name, sha, entry)
            await self._asking.store.write(lambda tx: remake(tx, approval, shown))
            return await self._apply.carry_out(replace(approval, payload=shown.payload, effect=shown.effect), step)

    async def closed(self, approval: Approval) -> None:
        await self._apply.closed(approval)


def _needless(host: str) -> str | None:
    """Why no entry by which a host alone is named would let anybody reach it, and what would; None where one may."""
    if (address := parse_address(host)) is None:
        if not is_private_name(host):
            return None
        where = 'addresses = ["127.0.0.1"]' if host.endswith("localhost") else "the `addresses` that it has"
        return f"it is no public name, and needs an entry with {where}; {WAY_OUT}"
    if find_range(address) is not None:
        return f"it is no public address; {WAY_OUT}"
    # No entry can name one as it is spelled for a translator.
    return None if (meant := meant_address(address)) == address else f"it stands for {meant}; ask for that"


def _told(entry: Rule) -> str:
    """A wish in a line, with the method where it is not to read: "POST http://example.org"."""
    return " ".join([*(method for method in entry.methods if method not in READING), entry.to])


def _entry(approval: Approval) -> Rule:
    return _parse(approval.payload["to"])


def _parse(to: str | dict[str, Any]) -> Rule:
    return Rule.model_validate({"to": to} if isinstance(to, str) else to)


def _known(tx: Transaction, name: AgentName, entry: Rule) -> str | None:
    """What is to be said of a wish that is not asked for now; None: it is."""
    rows = [dict(row) for row in tx.execute(_WISHES, (name, tx.now_ms - REST_MS)).fetchall()]
    same = [row for row in rows if _parse(json.loads(row["to"])) == entry]
    for row in same:
        if row["state"] == "pending":
            return f"the operator is asked already (approval {row['id']}); {TOLD}"
        if row["state"] == "approved":
            return f"the operator lets it (approval {row['id']}), which is being carried out; {TOLD}"
        if row["state"] == "denied":
            return f"the operator denied it (approval {row['id']}): {row['note'] or 'without a reason'}"
        if row["state"] != "done":
            return f"the operator was asked not long ago (approval {row['id']}, {row['state']}); {WAY_OUT}"
    waiting = sum(row["state"] == "pending" for row in rows)
    if waiting >= WAITING_LIMIT:
        return f"{waiting} wishes of yours wait for the operator already; try again when some are decided"
    if sum(row["requested_at_ms"] > tx.now_ms - REST_MS for row in rows) >= DAY_LIMIT:
        return f"you wished for {DAY_LIMIT} destinations within a day; {WAY_OUT}"
    return None


_WISHES = """
    SELECT id, state, note, requested_at_ms, payload -> '$.to' AS "to" FROM approvals INDEXED BY approvals_of
    WHERE agent = ?1 AND kind = 'egress'
      AND requested_at_ms >= (SELECT created_at_ms FROM agents WHERE name = ?1)
      AND (state IN ('pending', 'approved') OR requested_at_ms > ?2 OR resolved_at_ms > ?2)
    ORDER BY id DESC
"""
