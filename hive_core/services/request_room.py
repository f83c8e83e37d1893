"""How many requests of one agent may wait for the operator at a time: all of them stand on one page, whole."""

from __future__ import annotations

from hive_core.limits import Limits
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.visible import counted, mib
from hive_core.protocol.words import OPERATOR
from hive_core.services.approvals import Request, stored
from hive_core.services.rates import count_sent, sent_lately
from hive_core.store.writer import Transaction

_TAKEN_BACK = "requests taken back"  # in the place of a recipient; no name has a space
_SIZES = "sizes of requests"


def count_request_taken_back(tx: Transaction, asker: str) -> None:
    """Count a request that is taken back now: without this a loop of asking and cancelling would have no limit."""
    count_sent(tx, asker, _TAKEN_BACK)


def check_request_room(tx: Transaction, request: Request, limits: Limits) -> None:
    """Raise Refusal when too many requests of whoever asks wait already, or take too much. The operator may ask on."""
    asker = request.requested_by
    if asker == OPERATOR:
        return
    sizes = _sizes(tx, asker)
    waiting, size = len(sizes), sum(sizes.values())
    back = sent_lately(tx, asker, _TAKEN_BACK)
    cannot = (
        f"cannot ask for it: {counted(waiting, 'request')} of {asker} {'waits' if waiting == 1 else 'wait'} already"
    )
    if waiting + back >= limits.request_depth:
        known, way_out = "", "are decided"
        if back:
            known, way_out = f", {back} that it took back within the last hour count too,", "are decided or an hour old"
        why = f"{known} and the limit is {limits.request_depth:,} (request_depth); wait until some {way_out}"
        raise Refusal("refused", f"{cannot}{why}")
    size += sum(len(part.encode()) for part in stored(request.shown) if part is not None)
    if size > limits.request_quota_bytes:
        why = f"with this one they take {mib(size)}, and the limit is {mib(limits.request_quota_bytes)}"
        raise Refusal("refused", f"{cannot}; {why} (request_quota_bytes); ask for less, or wait until some are decided")


def _sizes(tx: Transaction, asker: str) -> dict[int, int]:
    """The bytes of each card of theirs that waits. To measure one it has to be read, so that is remembered."""
    known = tx.memo.get((_SIZES, asker)) or {}
    numbers = [row["id"] for row in tx.execute(_WAITING, (asker,)).fetchall()]
    sizes = {number: known.get(number) or tx.execute(_BYTES, (number,)).fetchone()[0] for number in numbers}
    tx.memo[_SIZES, asker] = sizes
    return sizes


_WAITING = "SELECT id FROM approvals INDEXED BY approvals_pending WHERE state = 'pending' AND requested_by = ?"
_BYTES = """
    SELECT length(CAST(payload AS BLOB)) + coalesce(length(CAST(effect AS BLOB)), 0) FROM approvals WHERE id = ?
"""
