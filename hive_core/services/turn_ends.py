"""How a turn ended, and what that leaves behind on its agent's row: its session, how full that is, its next errand."""

from __future__ import annotations

from typing import NamedTuple

from hive_core.protocol.harness import COMPACT_AT_PERCENT
from hive_core.services.access import Closed
from hive_core.store.bus import RESTING
from hive_core.store.writer import Transaction

# Turns with messages between two errands that a full context sets: one that frees nothing must not come again at once.
ERRAND_EVERY = 5


class Told(NamedTuple):
    """What a harness tells of a turn's end besides its outcome: claims, checked for their form alone."""

    reason: str | None = None  # one of protocol.harness.REASONS, or the state of what closed the way
    limited_until_ms: int | None = None
    context_tokens: int | None = None
    context_window: int | None = None
    session_lost: bool = False


class TurnEnd(NamedTuple):
    outcome: str
    error: str | None = None
    usage: object = None
    session: str | None = None
    on_purpose: bool = False  # by whoever ended the agent or closed its way: nothing to rest from
    closed: Closed | None = None  # what had closed its way
    told: Told = Told()
    too_full: bool = False  # its session has to be compacted


def too_full(told: Told, at_percent: int | None) -> bool:
    """Whether a turn's end is above the watermark, `at_percent` of the window; None for the default, 0 for none."""
    percent = COMPACT_AT_PERCENT if at_percent is None else at_percent
    if not told.context_tokens or not told.context_window or not percent:
        return False
    return told.context_tokens * 100 >= told.context_window * percent


def end_seat(tx: Transaction, agent: str, turn_id: int, end: TurnEnd, rest_s: float, behind: bool = False) -> None:
    """Note on the agent's row what its turn left behind. behind: what it waits for goes behind other mail.

    A limit that its program was told of is shown and no more: the hive's own relay sees when it ends, and holds back
    all agents on the same credential until then.
    """
    waits = end.outcome == "waiting" and not end.on_purpose
    given = {
        "agent": agent,
        "turn": turn_id,
        "session": end.session or None,
        "rests_until": tx.now_ms + int(rest_s * 1000) if waits else None,
        "now": tx.now_ms,
        "tokens": end.told.context_tokens,
        "window": end.told.context_window,
        "kept": end.outcome == "waiting",
        "behind": behind,
        "due": "save_and_compact" if end.too_full else None,
        "every": ERRAND_EVERY,
    }
    tx.execute(_END_SEAT, given)
    if waits:
        tx.wake(RESTING)


_IS_ERRAND = "(SELECT errand IS NOT NULL FROM turns WHERE id = :turn)"
# An errand that had to wait is kept, behind mail; of any other end there is no second try. Where the way to the model
# was closed it does not rest, and is behind mail all the same: it may be what closes the way each time.
_END_SEAT = f"""
    UPDATE agents SET
        session = iif(new_session_turn >= :turn, session, coalesce(:session, session)),
        context_tokens = iif(new_session_turn >= :turn, NULL, coalesce(:tokens, context_tokens)),
        context_window = coalesce(:window, context_window),
        rests_until_ms = coalesce(:rests_until, iif(:kept AND (:behind OR {_IS_ERRAND}), :now, NULL)),
        errand = iif({_IS_ERRAND} AND NOT :kept, NULL, coalesce(errand, :due)),
        errand_by = iif(errand IS NULL, 'system', errand_by),
        errand_rest = iif({_IS_ERRAND} AND NOT :kept, :every, max(0, errand_rest - 1))
    WHERE name = :agent
"""
