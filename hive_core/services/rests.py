"""What becomes of a message when its turn ends, how long it rests then, and who wakes its agent after that."""

from __future__ import annotations

from typing import NamedTuple

from hive_core.limits import Limits
from hive_core.services.access import Closed
from hive_core.store.bus import RESTING, mail
from hive_core.store.writer import Transaction

REST_MOST_S = 3600.0  # where doubling ends
# Turns of a message that calls of its own cut short, with a limit or a refusal, before other mail goes before it.
OWN_TRIES = 2
# Whether a queued delivery may be leased at :now, with `far_ms` as :far.
IS_DUE = "(attempts = 0 OR available_at_ms <= :now OR available_at_ms > :now + :far)"


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
            rest_s = min(limits.backoff_s * 2 ** min(failures, 30), _most_s(limits.backoff_s))
            return Settled("queued", failures + 1, rest_s * (0.5 + chance))


def own_rest_s(closed: Closed | None, attempts: int, limits: Limits, chance: float, now_ms: int) -> float:
    """How long a message rests whose own calls close the way to the model again and again, though others' work.

    It is counted from the way's opening, and grows: a request that is too large for the account's tokens per minute
    would else close it for all agents at each opening. Any other message goes on when the way opens.
    """
    if closed is None or closed.own != 1 or attempts <= OWN_TRIES:
        return 0.0
    opens_s = max(0, (closed.until_ms or now_ms) - now_ms) / 1000
    rest_s: float = min(
        limits.provider_rest_s * 2 ** min(attempts - OWN_TRIES - 1, 30), _most_s(limits.provider_rest_s)
    )
    return opens_s + rest_s * (0.5 + chance)


def _most_s(first_s: float) -> float:
    return max(first_s, REST_MOST_S)


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
