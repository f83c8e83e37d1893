"""Approvals: what waits for the operator's click, bound to exactly what was shown.

pending ──▶ approved ──▶ done or failed
   ├──▶ denied by the operator, cancelled by whoever asked, expired at its instant
   └──▶ failed, when it cannot be carried out any more

Each step is one transaction with its event.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from hive_core.protocol.refusal import Refusal
from hive_core.protocol.visible import instant, lasting
from hive_core.protocol.words import OPERATOR, SYSTEM, AgentName
from hive_core.store.bus import APPROVED, EVENTS
from hive_core.store.door import Store
from hive_core.store.writer import Transaction

TOPIC = "approvals"  # published when the instant of an expiry may have changed
WISH = "egress"
COMMITS = ("apply_commit", WISH)  # kinds whose payload has a commit, and the base that it was made on
POLICY = "policy"  # who decided, and the door, of what passed by a rule
BATCH = 100  # that expire in one transaction
_BEGINS = {  # end of a step → where it may begin
    "approved": ("pending",),
    "denied": ("pending",),
    "cancelled": ("pending",),
    "expired": ("pending",),
    "done": ("approved",),
    "failed": ("pending", "approved"),
}

_DEEDS = {"approved": "approve", "denied": "deny", "cancelled": "cancel"}  # else the end of one that is under way


@dataclass(frozen=True, slots=True)
class Approval:
    """
    payload        what will be done, whole; each kind's own: see hive_core/procedures/kinds
    effect         what that changes, as the card shows it; None where a kind shows nothing beside its payload
    step           how far it is carried out while it is approved, since step_at_ms
    proof          of one that is done: "healthy", or "unproven" and why
    resolved_from  the door that the click came through; "policy" where there was none
    rule           of the policy, where it passed without a click
    """

    id: int
    kind: str
    agent: AgentName
    requested_by: AgentName
    reason: str
    payload: dict[str, Any]
    effect: dict[str, Any] | None
    digest: str
    state: str
    step: str | None
    step_at_ms: int | None
    proof: str | None
    note: str | None
    requested_at_ms: int
    expires_at_ms: int
    resolved_at_ms: int | None
    resolved_by: str | None
    resolved_from: str | None
    rule: str | None

    def to_wire(self) -> dict[str, Any]:
        return asdict(self)


class Shown(NamedTuple):
    """What a card shows, and a click is bound to."""

    payload: dict[str, Any]
    effect: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """What somebody asks the operator for."""

    kind: str
    agent: AgentName
    requested_by: AgentName
    reason: str
    shown: Shown


RuleFor = Callable[[Transaction, Request], str | None]
Check = Callable[[Transaction, Request], None]


def digest_of(kind: str, agent: str, shown: Shown) -> str:
    """What a click is bound to: changes when anything that is shown changes. A wish is bound by what it does: its
    commit is made anew on whatever its agent runs on."""
    payload, effect = shown
    if kind == WISH:
        payload = {"to": payload["to"]}
        effect = effect and {"lines": effect["lines"], "unknown": effect["unknown"]}
    parts = [kind, agent, payload] + ([] if effect is None else [effect])
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def from_row(row: sqlite3.Row) -> Approval:
    effect = None if row["effect"] is None else json.loads(row["effect"])
    return Approval(**{**dict(row), "payload": json.loads(row["payload"]), "effect": effect})


def put_request(
    tx: Transaction,
    request: Request,
    expires_s: float,
    rule_for: RuleFor = lambda tx, request: None,
    check_room: Check = lambda tx, request: None,
) -> int:
    """Put a card before the operator; the same request while one is open is that card. Returns its id.

    rule_for: the rule of the policy by which it passes, or None. It is asked once: a card that waits goes on waiting.
    check_room: raises Refusal where no more of whoever asks may wait. Raises Refusal too for an agent whose request
    the operator has made already: of that one it would hear nothing.
    """
    kind, agent, shown = request.kind, request.agent, request.shown
    digest = digest_of(kind, agent, shown)
    if known := _open(tx, kind, agent, digest):
        _insist_that_it_hears(tx, known, request)
        return known
    rule = rule_for(tx, request)
    if rule is None:
        check_room(tx, request)
    cursor = tx.execute(
        "INSERT INTO approvals (kind, agent, requested_by, reason, payload, effect, digest, state, requested_at_ms,"
        " expires_at_ms) VALUES (?, ?, ?, ?, ?, ?, ?, 'pending', ?, ?)",
        (
            kind,
            agent,
            request.requested_by,
            request.reason,
            *stored(shown),
            digest,
            tx.now_ms,
            tx.now_ms + int(expires_s * 1000),
        ),
    )
    assert cursor.lastrowid is not None
    tx.emit("approval_requested", request.requested_by, agent, approval=cursor.lastrowid, what=kind)
    if rule is not None:
        card = from_row(tx.execute("SELECT * FROM approvals WHERE id = ?", (cursor.lastrowid,)).fetchone())
        settle(tx, card, "approved", None, POLICY, POLICY, rule=rule)
        tx.wake(APPROVED)
    tx.wake(TOPIC)
    return cursor.lastrowid


def show_again(tx: Transaction, approval: Approval, shown: Shown) -> None:
    """What would be done is not what was shown: the card shows it, and a click on the card before counts for nothing.

    Raises Refusal("conflict") when the approval is not pending any more, or another card shows that already.
    """
    digest = digest_of(approval.kind, approval.agent, shown)
    other = _open(tx, approval.kind, approval.agent, digest)
    if other == approval.id and digest != approval.digest:
        return  # another click has found that out, and the card shows it
    if other not in (None, approval.id):
        why = f"it would do what approval {other} does, which is open too; deny this one"
        raise Refusal("conflict", f"cannot approve {approval.id}: {why}")
    changed = tx.execute(
        "UPDATE approvals SET payload = ?, effect = ?, digest = ? WHERE id = ? AND state = 'pending'",
        (*stored(shown), digest, approval.id),
    ).rowcount
    if changed != 1:
        raise _is_elsewhere(tx, approval, "approve")
    tx.emit("approval_changed", approval.requested_by, approval.agent, approval=approval.id, what=approval.kind)


def settle(
    tx: Transaction,
    approval: Approval,
    state: str,
    note: str | None,
    actor: str,
    origin: str | None = None,
    proof: str | None = None,
    rule: str | None = None,
) -> None:
    """Move an approval on. Raises Refusal("conflict") when it is not where the step begins.

    origin: the door that the operator's word came through.
    rule: of the policy, by which it passes without a word of his
    """
    begins = ", ".join(f"'{each}'" for each in _BEGINS[state])
    changed = tx.execute(
        f"""
        UPDATE approvals SET state = ?, proof = ?, step = NULL, step_at_ms = NULL, note = coalesce(?, note),
          resolved_by = coalesce(resolved_by, ?), resolved_from = coalesce(resolved_from, ?),
          resolved_at_ms = coalesce(resolved_at_ms, ?),
          rule = coalesce(rule, ?)
        WHERE id = ? AND state IN ({begins})
        """,
        (state, proof, note, actor, origin, tx.now_ms, rule, approval.id),
    ).rowcount
    if changed != 1:
        raise _is_elsewhere(tx, approval, _DEEDS.get(state, "end"))
    told = {"approval": approval.id, "what": approval.kind, "note": note}
    if origin is not None:
        told["origin"] = origin
    if rule is not None:
        told["rule"] = rule
    tx.emit(f"approval_{state}", actor, approval.agent, None, **told)
    tx.wake(TOPIC)


def note_step(tx: Transaction, approval: Approval, step: str) -> None:
    """Show how far an approval is carried out."""
    sql = "UPDATE approvals SET step = ?, step_at_ms = ? WHERE id = ? AND state = 'approved' AND step IS NOT ?"
    if tx.execute(sql, (step, tx.now_ms, approval.id, step)).rowcount:
        tx.emit("approval_step", approval.requested_by, approval.agent, approval=approval.id, step=step)


def remake(tx: Transaction, approval: Approval, shown: Shown) -> None:
    """What is carried out of an approved one from now on, since its agent runs on something else than when it was asked
    for. Raises Refusal("conflict") where that is not what was approved."""
    if digest_of(approval.kind, approval.agent, shown) != approval.digest:
        why = f"{approval.agent} was changed meanwhile, and it would do something else than was approved"
        raise Refusal("conflict", f"cannot carry out approval {approval.id}: {why}")
    sql = "UPDATE approvals SET payload = ?, effect = ? WHERE id = ? AND state = 'approved'"
    tx.execute(sql, (*stored(shown), approval.id))


def _open(tx: Transaction, kind: str, agent: str, digest: str) -> int | None:
    """The card that shows this and was not carried out yet."""
    sql = "SELECT id FROM approvals WHERE kind = ? AND agent = ? AND digest = ? AND state IN ('pending', 'approved')"
    row = tx.execute(sql, (kind, agent, digest)).fetchone()
    return None if row is None else int(row["id"])


def _insist_that_it_hears(tx: Transaction, number: int, request: Request) -> None:
    (asker,) = tx.execute("SELECT requested_by FROM approvals WHERE id = ?", (number,)).fetchone()
    if request.requested_by not in (asker, OPERATOR):
        why = f"approval {number}, which {asker} asked for, is the same and is not carried out yet"
        raise Refusal("refused", f"cannot ask for it: {why}")


def note_proof(tx: Transaction, approval: Approval, proof: str) -> None:
    """Keep how an approval was proven until it is done, also by the next daemon."""
    tx.execute("UPDATE approvals SET proof = ? WHERE id = ? AND state = 'approved'", (proof, approval.id))


def stored(shown: Shown) -> tuple[str, str | None]:
    """Payload and effect, as they stand in their row."""
    effect = None if shown.effect is None else json.dumps(shown.effect, ensure_ascii=False)
    return json.dumps(shown.payload, ensure_ascii=False), effect


def _is_elsewhere(tx: Transaction, approval: Approval, deed: str) -> Refusal:
    now = tx.execute("SELECT state FROM approvals WHERE id = ?", (approval.id,)).fetchone()["state"]
    why = {"pending": "it waits still", "approved": "it is approved, and under way"}.get(now, f"it is {now} already")
    if now in ("approved", "done") and approval.kind in COMMITS:
        why += f"; `hive rollback {approval.agent}` takes it back once it is done"
    return Refusal("conflict", f"cannot {deed} approval {approval.id}: {why}")


class Approvals:
    """expired: tells whoever asked for one why nobody's word ended it; called in the transaction that ends it."""

    topic = TOPIC

    def __init__(self, store: Store) -> None:
        self._store = store
        self.expired: Callable[[Transaction, Approval, str], None] = lambda tx, approval, why: None

    async def get(self, approval_id: int) -> Approval:
        """One approval. Raises Refusal("not_found")."""
        row = await self._store.row("SELECT * FROM approvals WHERE id = ?", (approval_id,))
        if row is None:
            raise Refusal("not_found", f"cannot find approval {approval_id}; `hive pending` shows what waits")
        return from_row(row)

    async def pending(self) -> list[Approval]:
        """What waits for the operator, oldest first."""
        return await self._all("INDEXED BY approvals_pending WHERE state = 'pending' ORDER BY id")

    async def approved(self) -> list[Approval]:
        """What is approved and not carried out yet: what is under way first, then in the order of the clicks."""
        order = "step IS NULL, resolved_at_ms, id"
        return await self._all(f"INDEXED BY approvals_approved WHERE state = 'approved' ORDER BY {order}")

    async def outdated(self) -> list[Approval]:
        """What waits and was told against something else than there is now, of agents of which nothing is under way."""
        return [from_row(row) for row in await self._store.rows(_OUTDATED)]

    async def recent(self, limit: int = 20) -> list[Approval]:
        """The newest that are resolved, newest first."""
        return await self._all("INDEXED BY approvals_resolved WHERE state != 'pending' ORDER BY id DESC LIMIT ?", limit)

    async def of(self, agent: AgentName, limit: int = 100) -> list[Approval]:
        """The newest that are about an agent, newest first."""
        return await self._all("INDEXED BY approvals_of WHERE agent = ? ORDER BY id DESC LIMIT ?", agent, limit)

    async def wait_settled(self, approval_id: int) -> Approval:
        """An approval once it is not being carried out."""
        with self._store.bus.listen(EVENTS) as listener:
            while (approval := await self.get(approval_id)).state == "approved":
                await listener.wait()
            return approval

    async def _all(self, clauses: str, *values: object) -> list[Approval]:
        return [from_row(row) for row in await self._store.rows(f"SELECT * FROM approvals {clauses}", values)]

    # -- the clock's --------------------------------------------------------------------------------------------------

    def fire(self, tx: Transaction) -> None:
        """End what nobody decided in time. What was asked for at an instant that the clock has still to reach, so
        before it was set back, waits as long as ever from now."""
        tx.execute(_SET_BACK, {"now": tx.now_ms})
        for row in tx.execute(_OVER, (tx.now_ms, BATCH)).fetchall():
            approval = from_row(row)
            limit_s, asked = (approval.expires_at_ms - approval.requested_at_ms) / 1000, approval.requested_at_ms
            why = f"nobody decided it within {lasting(limit_s)} (approval_ttl_s); it was asked for at {instant(asked)}"
            settle(tx, approval, "expired", why, SYSTEM)
            self.expired(tx, approval, why)

    def next_after(self, tx: Transaction) -> int | None:
        sql = "SELECT min(expires_at_ms) FROM approvals INDEXED BY approvals_expiring WHERE state = 'pending'"
        at: int | None = tx.execute(sql).fetchone()[0]
        return at


_SET_BACK = """
    UPDATE approvals INDEXED BY approvals_pending
    SET expires_at_ms = expires_at_ms - requested_at_ms + :now, requested_at_ms = :now
    WHERE state = 'pending' AND requested_at_ms > :now
"""
_OVER = """
    SELECT * FROM approvals INDEXED BY approvals_expiring
    WHERE state = 'pending' AND expires_at_ms <= ? ORDER BY expires_at_ms, id LIMIT ?
"""
_OUTDATED = f"""
    SELECT waiting.* FROM approvals AS waiting INDEXED BY approvals_pending
    JOIN (SELECT name, deployed_sha AS sha, 1 AS is_agent FROM agents UNION ALL SELECT name, sha, 0 FROM configured)
      AS now ON now.name = waiting.agent
    WHERE state = 'pending'
      AND CASE WHEN kind IN {COMMITS} THEN payload ->> 'base' != sha
               WHEN kind IN ('spawn', 'init_config') THEN is_agent END
      AND agent NOT IN (SELECT agent FROM approvals INDEXED BY approvals_approved WHERE state = 'approved')
    ORDER BY waiting.id
"""
