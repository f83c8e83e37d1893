"""What an agent runs on is changed by one approval at a time: until that is over, no other one of it is approved."""

from __future__ import annotations

from hive_core.protocol.refusal import Refusal
from hive_core.services.approvals import WISH, Approval
from hive_core.store.writer import Transaction

_APART = ("raise_budget", "schedule_prompt")  # kinds that say nothing of what an agent runs on
_BESIDE = (*_APART, WISH)  # nor is what they do another thing once it has changed: they are carried out in turn
_OF_ALL = {"update_meta_inputs": "what every agent is built from", "claude": "the program of every agent"}


def in_the_way(tx: Transaction, kind: str, agent: str, besides: int = 0) -> str | None:
    """Why nothing of a kind may be approved for an agent now, or None. besides: an approval that is no hindrance."""
    if row := tx.execute(_MOVING, (agent,)).fetchone():
        doing = "destroyed" if row["state"] == "destroying" else "revived"
        return f"{agent} is being {doing}; look at it again when that is over"
    if kind in _APART or (row := tx.execute(_UNDER_WAY, (besides, agent, kind)).fetchone()) is None:
        return None
    what = _OF_ALL.get(row["kind"], row["agent"])
    step = f" ({row['step']})" if row["step"] else ""
    return f"approval {row['id']} changes {what} now{step}; once that is over this is shown anew, approve it then"


def check_alone(tx: Transaction, approval: Approval) -> None:
    """Raise Refusal("conflict") where something else has to come to its end before this can be approved."""
    if why := in_the_way(tx, approval.kind, approval.agent, approval.id):
        raise Refusal("conflict", f"cannot approve {approval.id}: {why}")


def ground(tx: Transaction, approval: Approval) -> str | None:
    """What an approval was shown against in any case: the commit that its agent runs on, where that counts for it."""
    if approval.kind in _BESIDE:
        return None
    row = tx.execute("SELECT deployed_sha FROM agents WHERE name = ?", (approval.agent,)).fetchone()
    return None if row is None else row["deployed_sha"]


_MOVING = "SELECT state FROM tombstones WHERE name = ? AND state IN ('destroying', 'reviving')"
_UNDER_WAY = f"""
    SELECT id, kind, agent, step FROM approvals INDEXED BY approvals_approved
    WHERE state = 'approved' AND id != ?1 AND kind NOT IN {_APART}
      AND (agent = ?2 AND NOT (kind = '{WISH}' AND ?3 = '{WISH}') OR kind IN {(*_OF_ALL,)} OR ?3 IN {(*_OF_ALL,)})
    ORDER BY id LIMIT 1
"""
