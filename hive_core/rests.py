"""What becomes of a message when its turn ends, how long it rests then, and who wakes its agent after that."""

from __future__ import annotations

from typing import NamedTuple

from hive_core.limits import Limits
from hive_core.store.bus import RESTING, mail
from hive_core.store.writer import Transaction

REST_MOST_S = 3600.0  # where doubling ends


class Settled(NamedTuple):
    state: str
    failures: int
    rest_s: float


def settle(turn_state: str, failures: int, limits: Limits, chance: float, final: bool = False) -> Settled:
    """What becomes of a delivery when its turn ends. `chance`, 0 to 1, spreads the rests by half of each.

    final: another turn would fail as this one did
    """
    match turn_state:
        case "done" | "cancelled":
            return Settled("acked", failures, 0.0)
        case "waiting":
            return Settled("queued", failures, provider_rest_s(limits, chance))
        case _ if final or failures + 1 >= limits.tries:
            return Settled("dead", failures + 1, 0.0)
        case "lost" if failures == 0:
            return Settled("queued", 1, 0.0)
        case _:
            rest_s = min(limits.backoff_s * 2 ** min(failures, 30), max(limits.backoff_s, REST_MOST_S))
            return Settled("queued", failures + 1, rest_s * (0.5 + chance))


def provider_rest_s(limits: Limits, chance: float) -> float:
    return limits.provider_rest_s * (0.5 + chance)


def far_ms(limits: Limits) -> float:
    """No rest of a message is longer: what is due later was put back before the clock was set back, and is due now."""
    return max(limits.provider_rest_s, limits.backoff_s, REST_MOST_S) * 1500


def agent_far_ms(limits: Limits) -> float:
    return limits.provider_rest_s * 1500


class Rests:
    """What rests, for the hive's clock: an agent is woken when it has rested, or one of its messages has."""

    topic = RESTING

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()

    def next_after(self, tx: Transaction) -> int | None:
        sql = """
            SELECT min(at_ms) FROM (
                SELECT min(available_at_ms) AS at_ms FROM deliveries
                WHERE state = 'queued' AND attempts > 0 AND available_at_ms > :now
                UNION ALL SELECT min(rests_until_ms) FROM agents WHERE rests_until_ms > :now
            )
        """
        at: int | None = tx.execute(sql, {"now": tx.now_ms}).fetchone()[0]
        return at

    def fire(self, tx: Transaction) -> None:
        sql = """
            SELECT recipient FROM deliveries INDEXED BY deliveries_resting
            WHERE state = 'queued' AND attempts > 0 AND (available_at_ms <= :now OR available_at_ms > :now + :far)
            UNION SELECT name FROM agents WHERE rests_until_ms <= :now OR rests_until_ms > :now + :agent_far
        """
        given = {"now": tx.now_ms, "far": far_ms(self._limits), "agent_far": agent_far_ms(self._limits)}
        for row in tx.execute(sql, given).fetchall():
            tx.wake(mail(row["recipient"]))
