"""The ledger: what calls to the model cost, counted at once in memory and written behind the calls.

A call counts from its beginning: by an estimate until the provider tells its tokens, by those until it ends, and then
as a charge. A turn counts by what was reserved for it until it has cost more or ends. So what runs side by side cannot
slip under a budget together: only the last call that began before one was spent can go over it, and it is cut.

A charge that is not on disk when the daemon is killed is lost, and so is a call that is under way then.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import trio

from hive_core.limits import Limits
from hive_core.prices import Prices
from hive_core.protocol.money import usd
from hive_core.protocol.words import AgentName
from hive_core.services.access import Access, Closed
from hive_core.services.budgets import THE_HIVE, Budget, Budgets, Change, Kind, midnight_after
from hive_core.services.charges import DAY_MS, ESTIMATED_OUTPUT, FREE_PATHS, Bill, Charge, bill, write_charges
from hive_core.services.turn_costs import TurnCost, TurnCosts
from hive_core.store.bus import TURN_ENDS
from hive_core.store.door import Store
from hive_core.store.errors import StoreBusy, StoreError
from hive_core.store.writer import Transaction
from hive_core.usage import Call

log = logging.getLogger(__name__)

SPENT = "spent"  # the bus topic: what is spent, or may be, changed
BATCH = 200  # charges of one transaction
LOOK_AGAIN_S = 30.0
DAYS_KEPT = 100  # the newest entries, whatever their dates: a clock that leapt may come back
BUSY_REST_S = 1.0
STOP_WITHIN_S = 2.0

Windows = Callable[[AgentName], Mapping[str, float] | None]  # "5h" and "7d" → the share that is used, where known


@dataclass(slots=True)
class _UnderWay:
    turn: TurnCost | None
    bill: Bill


class Ledger:
    """windows: how much of the account's windows an agent's credential has used, where that is known."""

    def __init__(
        self,
        store: Store,
        access: Access,
        prices: Prices,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.time,
        windows: Windows = lambda _: None,
    ) -> None:
        self.budgets = Budgets(store)
        self.prices = prices
        self.turns = TurnCosts(store, limits or Limits())
        self._store = store
        self._access = access
        self._clock = clock
        self.windows = windows
        self._totals: dict[str, int] = {}  # scope → micro-USD
        self._days: dict[int, dict[str, int]] = {}  # the same of each day that was seen
        self._under_way: dict[Call, _UnderWay] = {}
        self._of_calls: tuple[dict[str, int], dict[str, int]] = {}, {}  # what those cost so far, and may yet, by scope
        self._models: dict[str, str] = {}  # that its last call used
        self.moves = 0  # how often what is spent, or may be, has changed
        self._queue: list[Charge] = []
        self._writing = trio.Lock()
        self._closed: dict[AgentName, bool] = {}  # as `look` has found and told
        self._refused: set[AgentName] = set()  # who was told no since then
        access.add(self.reason)

    # -- what counts --------------------------------------------------------------------------------------------------

    @property
    def now_ms(self) -> int:
        return int(self._clock() * 1000)

    def spent(self, scope: str, kind: Kind) -> int:
        """Micro-USD: what is charged and what calls under way have cost so far."""
        sums = self._totals if kind == "total" else self._days.get(self.now_ms // DAY_MS, {})
        return sums.get(scope, 0) + self._of_calls[0].get(scope, 0)

    def used(self, budget: Budget) -> float | None:
        """In the budget's own unit; None of a window that nobody has told of."""
        if budget.window is None:
            return self.spent(budget.scope, budget.kind)
        # Of the hive's budget: of the credential that has used most.
        names = self._closed if budget.scope == THE_HIVE else (budget.scope,)
        told = (self._window(AgentName(name), budget.window) for name in names)
        return max((used for used in told if used is not None), default=None)

    def _window(self, agent: AgentName, window: str) -> float | None:
        """How much of a window is used, in percent."""
        used = (self.windows(agent) or {}).get(window)
        return None if used is None else round(100 * used, 2)

    def budget_rows(self) -> list[dict[str, Any]]:
        """Each budget as the operator sees it: {scope, kind, unit, amount, used, spent, warn_percent}."""
        return [
            {
                "scope": budget.scope,
                "kind": budget.kind,
                "unit": "percent" if budget.window else "micro_usd",
                "amount": budget.amount,
                "used": used if used is None else int(used),
                "spent": used is not None and used >= budget.amount,
                "warn_percent": budget.warn_percent,
            }
            for budget in self.budgets.all()
            for used in [self.used(budget)]
        ]

    def _expected(self, scope: str, kind: Kind) -> int:
        """As `spent`, with what calls under way may cost yet."""
        return self.spent(scope, kind) + self._of_calls[1].get(scope, 0)

    def _count_calls(self) -> None:
        """Sum up, by scope, what calls under way have cost so far and what they may cost yet."""
        so_far: dict[str, int] = {}
        may_yet: dict[str, int] = {}
        for call, way in self._under_way.items():
            if call.usage is None:
                sums, more = may_yet, way.bill.micro_usd
            else:
                sums, more = so_far, way.bill.micro_usd
                if way.bill.tokens["output"] is None:
                    _add(may_yet, call.agent, self.prices.cost(call.model, {"output": ESTIMATED_OUTPUT}).micro_usd)
            _add(sums, call.agent, more)
        self._of_calls = so_far, may_yet

    # -- what may go on -----------------------------------------------------------------------------------------------

    def reason(self, agent: AgentName) -> Closed | None:
        """That a budget is spent; of an agent between turns also that it does not hold another one."""
        closed = self._reason(agent, agent not in self.turns.running)
        self._closed.setdefault(agent, closed is not None)
        if closed is not None:
            self._refused.add(agent)
        return closed

    def to_reserve(self, agent: AgentName) -> int | None:
        """Micro-USD to set aside for a turn that begins; None when a budget does not hold that."""
        if self._reason(agent, True) is not None:
            self._refused.add(agent)
            return None
        return self.turns.reserve(agent)

    def _reason(self, agent: AgentName, between_turns: bool) -> Closed | None:
        found = [self._closed_by(budget, agent, between_turns) for budget in self.budgets.of(agent)]
        # Of several the one that opens last, and of those one that the operator alone can open.
        return max(filter(None, found), key=lambda one: (one.until_ms is None, one.until_ms or 0), default=None)

    def _closed_by(self, budget: Budget, agent: AgentName, between_turns: bool) -> Closed | None:
        if budget.window is not None:
            return budget.closed_at(self._window(agent, budget.window) or 0.0, self.now_ms)
        spent = self.spent(budget.scope, budget.kind)
        closed = budget.closed_at(spent, self.now_ms)
        if closed is not None or not between_turns:
            return closed
        reserved = self.turns.reserved(agent, self._of_calls[0]) if budget.scope == THE_HIVE else 0
        return budget.closed_for(agent, self.turns.next_cost(agent), spent, reserved, self.now_ms)

    def look(self) -> None:
        """Tell whose way to the model is another one now, and note which budgets there is something to say of."""
        opened = {name for name in self._refused if self._reason(name, name not in self.turns.running) is None}
        self._refused -= opened
        turned = set()
        for agent, before in self._closed.items():
            closed = self._reason(agent, agent not in self.turns.running) is not None
            if closed != before:
                self._closed[agent] = closed
                turned.add(agent)
        if opened or turned:
            self._access.changed(*sorted(opened | turned))

    def _moved(self) -> None:
        self.moves += 1
        self.look()
        self._store.bus.publish([SPENT])

    # -- the relay's calls --------------------------------------------------------------------------------------------

    def call_begins(self, call: Call) -> Closed | None:
        """Count a call from now on; or say why it has to wait for others that are under way."""
        for budget in self.budgets.of(call.agent) if call.path not in FREE_PATHS else ():
            if budget.window is None and self._expected(budget.scope, budget.kind) >= budget.amount:
                why = f"calls under way may cost all that {budget.name}, {usd(budget.amount)}, has left"
                return Closed("over_budget", f"{why}; try again when they have ended, or {budget.way_out}", status=429)
        self._under_way[call] = _UnderWay(self.turns.running.get(call.agent), self._bill(call))
        self._count_calls()
        return None

    def call_moved(self, call: Call) -> None:
        """The provider has told more of what a call takes."""
        self._under_way[call].bill = self._bill(call)
        self._count_calls()
        self._moved()

    def call_ended(self, call: Call) -> None:
        """Charge a call. It counts at once; its row is written a little later."""
        way = self._under_way.pop(call)
        self._count_calls()
        if call.reached:
            charge = Charge(self.now_ms, call.agent, way.turn.id if way.turn else None, call, self._bill(call))
            self._queue.append(charge)
            self._count(call.agent, charge.day, charge.bill.micro_usd)
            if call.model is not None:
                self._models[call.agent] = call.model
            if way.turn is not None:
                way.turn.charge(charge.bill, call.complete)
        self._moved()

    def _bill(self, call: Call) -> Bill:
        return bill(call, self.prices, self._models.get(call.agent))

    def _count(self, agent: str, day: int, micro_usd: int) -> None:
        for sums in (self._totals, self._days.setdefault(day, {})):
            _add(sums, agent, micro_usd)

    # -- turns --------------------------------------------------------------------------------------------------------

    def running(self, agent: AgentName) -> int | None:
        """The turn of an agent that runs."""
        turn = self.turns.running.get(agent)
        return None if turn is None else turn.id

    def turn_began(self, agent: AgentName, turn_id: int) -> None:
        """A turn has begun, or was found running; the same again changes nothing."""
        self.turns.began(agent, turn_id)

    def turn_ended(self, turn_id: int) -> None:
        """A turn has ended: calls that begin from now on belong to none, and its reservation is free."""
        if self.turns.ended(turn_id):
            self._moved()

    async def _follow_turns(self) -> None:
        with self._store.bus.listen(TURN_ENDS) as listener:
            while True:
                if await self.turns.find():
                    self._moved()
                with trio.move_on_after(LOOK_AGAIN_S):
                    await listener.wait()

    async def _settle(self) -> None:
        if over := self.turns.over({way.turn.id for way in self._under_way.values() if way.turn is not None}):
            await self.flush()
            await self.turns.settle(over)
            self._moved()

    # -- the database -------------------------------------------------------------------------------------------------

    async def load(self) -> None:
        """Go on as the daemon before was left."""
        await self.budgets.load()
        yesterday = self.now_ms // DAY_MS - 1
        for row in await self._store.rows("SELECT agent, sum(cost_micro_usd) AS cost FROM spend_days GROUP BY agent"):
            _add(self._totals, row["agent"], row["cost"])
        sql = "SELECT day, agent, sum(cost_micro_usd) AS cost FROM spend_days WHERE day >= ? GROUP BY day, agent"
        for row in await self._store.rows(sql, (yesterday,)):
            _add(self._days.setdefault(row["day"], {}), row["agent"], row["cost"])
        await self.turns.load()

    async def serve(self) -> None:
        """Write what is charged, settle turns that end, and open what a new day opens, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._follow_turns)
            with self._store.bus.listen(SPENT) as listener:
                today = self.now_ms // DAY_MS
                while True:
                    await self._settle()
                    await self.flush()
                    self.look()
                    if (day := self.now_ms // DAY_MS) != today:
                        today = day
                        while len(self._days) > DAYS_KEPT:
                            del self._days[next(iter(self._days))]
                        self._moved()
                    rest_s = (midnight_after(self.now_ms) - self.now_ms) / 1000
                    with trio.move_on_after(min(rest_s, LOOK_AGAIN_S)):
                        await listener.wait()

    async def flush(self) -> None:
        """Write every charge so far, and say what there is to say of budgets."""
        async with self._writing:
            while self._queue or self._to_tell():
                # Cancelled in between, nobody would know whether it was written.
                with trio.CancelScope(shield=True):
                    try:
                        await self._write()
                        continue
                    except StoreBusy as busy:
                        log.warning("%s", busy)
                await trio.sleep(BUSY_REST_S)

    async def aclose(self) -> None:
        """Write what is left, when no call can begin any more."""
        with trio.move_on_after(STOP_WITHIN_S, shield=True) as patience:
            try:
                await self.flush()
            except StoreError as exc:
                log.error("%d charges are lost: %s", len(self._queue), exc)
        if patience.cancelled_caught:
            log.error("%d charges are lost: the disk took no write", len(self._queue))

    def _to_tell(self) -> list[tuple[Budget, float]]:
        """Budgets of which there is something to say, as they are behind that, and how much of each is used."""
        today, used = self.now_ms // DAY_MS, [(budget, self.used(budget) or 0.0) for budget in self.budgets.all()]
        told = [(budget, budget.when_told(so_far, today), so_far) for budget, so_far in used]
        return [(after, so_far) for before, after, so_far in told if after is not before]

    async def _write(self) -> None:
        batch, to_tell = self._queue[:BATCH], self._to_tell()

        def write(tx: Transaction) -> None:
            write_charges(tx, batch)
            for budget, used in to_tell:
                self.budgets.tell(tx, budget, used)
            tx.wake(SPENT)

        await self._store.write(write)
        self.moves += 1
        del self._queue[: len(batch)]
        for budget, _ in to_tell:
            self.budgets.keep(budget)

    # -- what the operator asks ---------------------------------------------------------------------------------------

    async def set_budget(self, change: Change, actor: AgentName) -> None:
        """Set budgets. Whom that opens goes on by itself. Raises Refusal."""
        await self.budgets.set(change, actor)
        self._moved()

    async def remove_budget(self, scope: AgentName, kinds: Iterable[Kind], actor: AgentName) -> list[Kind]:
        """Remove budgets, as `Budgets.remove` does; whom that opens goes on by itself."""
        gone = await self.budgets.remove(scope, kinds, actor)
        self._moved()
        return gone

    async def look_again(self, agent: AgentName) -> None:
        """Know the budgets of an agent anew, which was destroyed or revived."""
        await self.budgets.look_again(agent)
        self._moved()


def _add(sums: dict[str, int], agent: str, micro_usd: int) -> None:
    """To the sums of an agent and of the hive."""
    for scope in (THE_HIVE, agent):
        sums[scope] = sums.get(scope, 0) + micro_usd
