"""How often one agent wrote to another within the last hour.

An index that answers this would add a page to the log for every message sent. The writer remembers it instead, by
minutes, and reads it from the messages once after a start: so the hour is one of 60 to 61 minutes. What a clock that
was set back has left in the future does not count until it is no longer that.
"""

from __future__ import annotations

from hive_core.protocol.words import OPERATOR, SYSTEM
from hive_core.store.writer import Transaction

MINUTE_MS = 60_000
MINUTES = 60
SILENT_MINUTES = 24 * MINUTES  # a pair is forgotten after: a clock that is ahead for a moment must not undo its rate
RECALLED = 200_000  # deliveries that are read after a start at most; older ones of that hour are not counted
_STATE = "rates"  # the hour in which the memo was cleared last; not there before anything was read

_TAKEN_BACK = "taken back"  # in the place of a recipient; no name has a space

Minutes = dict[int, int]  # minute → messages; replaced, never changed


def sent_lately(tx: Transaction, sender: str, recipient: str) -> int:
    """How many messages from `sender` to `recipient` count for its rate now, this transaction's included."""
    _look_back(tx)
    now = tx.now_ms // MINUTE_MS
    return sum(count for minute, count in _minutes(tx, sender, recipient).items() if now - MINUTES <= minute <= now)


def count_sent(tx: Transaction, sender: str, recipient: str) -> None:
    """Count a message that is sent now."""
    _look_back(tx)
    now = tx.now_ms // MINUTE_MS
    kept = _minutes(tx, sender, recipient)
    if len(kept) > 2 * MINUTES:
        kept = {minute: count for minute, count in kept.items() if minute >= now - MINUTES}
    tx.memo[_STATE, sender, recipient] = {**kept, now: kept.get(now, 0) + 1}


def count_taken_back(tx: Transaction, sender: str) -> None:
    """Count a message of `sender` that was held until it took it back now.

    It has cost what any other costs, and is kept as long: without this count a loop of asking and cancelling, or of
    sending and withdrawing, has no limit. It is not read from the messages after a start, which no agent can bring
    about.
    """
    count_sent(tx, sender, _TAKEN_BACK)


def taken_back_lately(tx: Transaction, sender: str) -> int:
    """How many held messages `sender` took back within the last hour."""
    return sent_lately(tx, sender, _TAKEN_BACK)


def _minutes(tx: Transaction, sender: str, recipient: str) -> Minutes:
    return tx.memo.get((_STATE, sender, recipient)) or {}


def _look_back(tx: Transaction) -> None:
    """Read the last hour if nothing is known yet; once an hour forget the pairs that are silent for a day."""
    hour = tx.now_ms // MINUTE_MS // MINUTES
    cleared = tx.memo.get(_STATE)
    if cleared == hour:
        return
    if cleared is None:
        _recall(tx)
    else:
        now = tx.now_ms // MINUTE_MS
        pairs = [key for key in tx.memo if isinstance(key, tuple) and key[0] == _STATE]
        tx.memo.update({key: None for key in pairs if max(tx.memo[key] or (0,)) < now - SILENT_MINUTES})
    tx.memo[_STATE] = hour


def _recall(tx: Transaction) -> None:
    given = {"minute": MINUTE_MS, "since": tx.now_ms - MINUTES * MINUTE_MS, "most": RECALLED}
    found: dict[tuple[str, str], Minutes] = {}
    for sender, recipient, minute, count in tx.execute(_SENT, given):
        if sender not in (OPERATOR, SYSTEM):
            found.setdefault((sender, recipient), {})[minute] = count
    tx.memo.update({(_STATE, *pair): minutes for pair, minutes in found.items()})


# message_blocks tells where the hour begins, up to the mark behind which nothing is noted yet.
_SENT = """
    SELECT sender, recipient, sent_at_ms / :minute AS minute, count(*) FROM (
        SELECT sender, recipient, sent_at_ms FROM deliveries WHERE message_id >= (
            SELECT coalesce(min(block) * 1024, (SELECT message_id FROM search_mark)) FROM message_blocks
            WHERE last_at_ms >= :since
        ) ORDER BY message_id DESC LIMIT :most
    ) WHERE sent_at_ms >= :since GROUP BY sender, recipient, minute
"""
