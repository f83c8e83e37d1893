"""What turns cost: reserved when they begin, charged while they run, settled when they and their calls have ended."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import trio

from hive_core.limits import Limits
from hive_core.protocol.words import SYSTEM, AgentName
from hive_core.services.charges import Bill, Tokens
from hive_core.services.usage_compared import compare
from hive_core.store.door import Store
from hive_core.store.writer import Transaction

BEGINS_WITHIN_S = 10.0  # a reservation whose turn has not begun by then is for a turn that never will
TURNS_REMEMBERED = 5  # of an agent: the dearest of them is what the next one may cost


@dataclass(slots=True)
class TurnCost:
    """A turn that runs, or has ended and has calls under way."""

    id: int
    agent: AgentName
    reserved: int
    cost: int = 0
    seen: dict[bool, list[Tokens]] = field(default_factory=lambda: {True: [], False: []})  # of calls: whole, cut
    whole: bool = True  # the daemon has seen it from its beginning
    ended: bool = False

    def charge(self, bill: Bill, complete: bool) -> None:
        self.cost += bill.micro_usd
        self.seen[complete].append(bill.tokens)


class TurnCosts:
    """running: agent → its turn that runs."""

    def __init__(self, store: Store, limits: Limits) -> None:
        self._store = store
        self._limits = limits
        self.running: dict[str, TurnCost] = {}
        self._turns: dict[int, TurnCost] = {}
        self._promised: dict[str, tuple[int, float]] = {}  # reserved for a turn that is about to begin, and when
        self._lately: dict[str, deque[int]] = {}  # what the last turns of an agent cost

    def next_cost(self, agent: str) -> int:
        """What the next turn of an agent may cost: as the dearest of its last ones, within bounds."""
        least, most = self._limits.reserve_least_micro_usd, self._limits.reserve_most_micro_usd
        return min(max(least, *self._lately.get(agent, (0,))), most)

    def reserve(self, agent: str) -> int:
        """Set that aside for a turn that is about to begin."""
        amount = self.next_cost(agent)
        self._promised[agent] = (amount, trio.current_time())
        return amount

    def reserved(self, but: str, under_way: Mapping[str, int]) -> int:
        """What is reserved for turns and not spent by them, but for those of one agent.

        under_way: agent → what its calls under way have cost so far
        """
        now = trio.current_time()
        self._promised = {name: one for name, one in self._promised.items() if now - one[1] < BEGINS_WITHIN_S}
        left = {name: amount for name, (amount, _) in self._promised.items()}
        for name, turn in self.running.items():
            left[name] = max(0, turn.reserved - turn.cost - under_way.get(name, 0))
        return sum(left.values()) - left.get(but, 0)

    def began(self, agent: AgentName, turn_id: int) -> None:
        """A turn has begun, or was found running; the same again changes nothing."""
        reserved, _ = self._promised.pop(agent, (0, 0.0))
        if turn_id not in self._turns:
            self._turns[turn_id] = TurnCost(turn_id, agent, reserved)
        self.running[agent] = self._turns[turn_id]

    def ended(self, turn_id: int) -> bool:
        """A turn has ended: calls that begin from now on belong to none. Whether that is news."""
        turn = self._turns.get(turn_id)
        if turn is None or turn.ended:
            return False
        turn.ended = True
        if self.running.get(turn.agent) is turn:
            del self.running[turn.agent]
        return True

    async def load(self) -> None:
        """Go on as the daemon before was left."""
        for row in await self._store.rows(_LATELY, (TURNS_REMEMBERED,)):
            self._remember(row["agent"], row["cost"])
        await self.find()

    async def find(self) -> bool:
        """Take over from the database which turns run, where nobody told so before. Whether any has ended."""
        known = set(self._turns)  # those were on disk before it is read, so one that does not run there has ended
        sql = "SELECT id, agent, reserved_micro_usd, cost_micro_usd FROM turns INDEXED BY turns_running"
        rows = {row["id"]: row for row in await self._store.rows(f"{sql} WHERE state = 'running'")}
        news = [self.ended(turn_id) for turn_id in known - rows.keys()]
        for turn_id in rows.keys() - self._turns.keys() - known:
            row = rows[turn_id]
            turn = TurnCost(turn_id, row["agent"], row["reserved_micro_usd"], row["cost_micro_usd"] or 0, whole=False)
            self._turns[turn_id] = turn
            self.running.setdefault(turn.agent, turn)
        return any(news)

    def over(self, busy: set[int]) -> list[TurnCost]:
        """Those that have ended, as have their calls: all but the `busy`."""
        return [turn for turn in self._turns.values() if turn.ended and turn.id not in busy]

    async def settle(self, over: Iterable[TurnCost]) -> None:
        """Of turns that are over, and whose charges are written: remember the cost, compare the counts, and say so."""
        sql = "SELECT id, state, usage FROM turns WHERE id IN (SELECT value FROM json_each(?))"
        rows = {row["id"]: row for row in await self._store.rows(sql, (json.dumps([turn.id for turn in over]),))}
        events: list[tuple[str, AgentName, dict[str, Any]]] = []
        for turn in over:
            row = rows.get(turn.id)
            if turn.whole and row is not None:
                told = json.loads(row["usage"]) if row["usage"] else None
                if difference := compare(told, turn.seen[True], turn.seen[False], row["state"] == "done"):
                    events.append(("usage_differs", turn.agent, {"turn": turn.id, **difference}))
            if any(turn.seen.values()):
                told_of = {"turn": turn.id, "reserved_micro_usd": turn.reserved, "cost_micro_usd": turn.cost}
                events.append(("turn_settled", turn.agent, told_of))
            self._remember(turn.agent, turn.cost)
            del self._turns[turn.id]
        if events:
            await self._store.insist(partial(_tell, events=events))

    def _remember(self, agent: str, cost: int) -> None:
        self._lately.setdefault(agent, deque(maxlen=TURNS_REMEMBERED)).append(cost)


def _tell(tx: Transaction, events: Iterable[tuple[str, AgentName, dict[str, Any]]]) -> None:
    for kind, agent, data in events:
        tx.emit(kind, SYSTEM, agent, **data)


# The newest turns of each agent, oldest first.
_LATELY = """
    SELECT agent, cost_micro_usd AS cost FROM agents JOIN turns t ON t.id IN (
        SELECT id FROM turns WHERE agent = name AND state != 'running' ORDER BY id DESC LIMIT ?
    ) WHERE cost_micro_usd IS NOT NULL ORDER BY t.id
"""
