"""What the witness of a run keeps of the way to the model: who may not call it now, and what each call has cost.

It knows of both from what the provider answered and what the operator was told, never from the services that are held
against it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hive_core.services.breaker import LOOK_AGAIN_S
from hive_core.services.budgets import THE_HIVE
from hive_core.services.charges import DAY_MS
from hive_core.services.turn_costs import BEGINS_WITHIN_S
from hive_core.usage import Call
from tests.simulation.provider import INPUT_MICRO_USD, OUTPUT_MICRO_USD
from tests.simulation.weather import Weather

if TYPE_CHECKING:
    from tests.simulation.host import Daemon

NEVER = 2**62
ROUND_MS = 2  # an instant is told in seconds


@dataclass(slots=True)
class Shut:
    """No turn of anybody in `scope` begins between the two instants. why: the credential, the stop, or a budget."""

    why: str
    scope: str
    since_ms: int
    until_ms: int = NEVER

    def holds(self, agent: str, at_ms: int) -> bool:
        return self.scope in (THE_HIVE, agent) and self.since_ms < at_ms < self.until_ms - ROUND_MS


@dataclass(frozen=True, slots=True)
class Made:
    """A call that has ended. micro_usd: None where it was cut, and so is estimated."""

    at_ms: int
    agent: str
    turn: int
    micro_usd: int | None


@dataclass(slots=True)
class _Sums:
    """Micro-USD that are spent at least, by scope: in all, and by day."""

    total: dict[str, int] = field(default_factory=dict)
    days: dict[tuple[str, int], int] = field(default_factory=dict)

    def add(self, agent: str, day: int, micro_usd: int) -> None:
        for scope in (THE_HIVE, agent):
            self.total[scope] = self.total.get(scope, 0) + micro_usd
            self.days[scope, day] = self.days.get((scope, day), 0) + micro_usd


class Books:
    """exact: the clock on the wall and the swarm's are one, so that an instant says which call is meant."""

    def __init__(
        self,
        db: sqlite3.Connection,
        weather: Weather,
        now_ms: Callable[[], int],
        broken: Callable[[str], Exception],
        exact: bool,
    ) -> None:
        self._db = db
        self._now_ms = now_ms
        self._broken = broken
        self._exact = exact
        self._limits = weather.limits
        again_s = LOOK_AGAIN_S if weather.lost_wakes else 0.0
        self._patience_ms = int((again_s + weather.prompt_s + 1.0) * 1000) if exact else NEVER
        self._shut: list[Shut] = []
        self._budgets: dict[tuple[str, str], int] = {}  # (scope, kind) → amount
        self._sums = _Sums()
        self._made: dict[tuple[str, int], Made] = {}  # by agent and instant
        self._before: dict[tuple[str, int], Made] = {}  # when a daemon died: they may have been lost with it
        self._under_way: dict[Call, int] = {}
        self._reserved_ms = 0
        self._last_charge = 0
        self._last_turn = 0

    # -- the way to the model -----------------------------------------------------------------------------------------

    def stopped(self) -> None:
        """The operator's stop was answered."""
        self._close("the stop", THE_HIVE)

    def lets_go(self) -> None:
        """The operator is about to let the swarm go on."""
        self._open("the stop")

    def resumes(self) -> None:
        """The operator is about to try the credential."""
        self._open("the credential")

    def provider_said(self, before: dict[str, Any], status: int, headers: dict[str, str]) -> None:
        """An answer that was told to the breaker. before: the credential's row as it was then."""
        if status == 200:
            return
        now_ms = self._now_ms()
        rests = (before["until_ms"] or 0) > now_ms
        again = rests and before["state"] == ("refused" if status == 401 else "limited")
        if rests and not again:
            self._open("the credential")  # it was limited and is refused, or the other way round, and rests for that
        if (told := headers.get("retry-after")) is not None:
            self._close("the credential", THE_HIVE, now_ms + int(float(told) * 1000))
        elif not again:
            # For half at least of what the configuration says.
            rest_s = self._limits.refused_rest_s if status == 401 else self._limits.limit_rest_s
            self._close("the credential", THE_HIVE, now_ms + int(rest_s * 500))

    def _close(self, why: str, scope: str, until_ms: int = NEVER) -> None:
        self._shut.append(Shut(why, scope, self._now_ms(), until_ms))

    def _open(self, why: str, scope: str = THE_HIVE, at_ms: int | None = None) -> None:
        at_ms = self._now_ms() if at_ms is None else at_ms
        for shut in self._shut:
            if (shut.why, shut.scope) == (why, scope):
                shut.until_ms = min(shut.until_ms, at_ms)

    def _holds(self, agent: str, at_ms: int) -> Shut | None:
        return next((shut for shut in self._shut if shut.holds(agent, at_ms)), None)

    def _look_at_turns(self) -> None:
        sql = "SELECT id, agent, started_at_ms FROM turns WHERE id > ? ORDER BY id"
        for turn, agent, started_at_ms in self._db.execute(sql, (self._last_turn,)).fetchall():
            self._last_turn = turn
            if self._exact and (shut := self._holds(agent, started_at_ms)):
                raise self._broken(f"turn {turn} of {agent} began while {shut.why} kept it from the model")
        now_ms = self._now_ms()
        self._shut = [shut for shut in self._shut if shut.until_ms > now_ms]

    # -- budgets ------------------------------------------------------------------------------------------------------

    def budget_set(self, scope: str, kind: str, amount: int) -> None:
        """It was answered."""
        self._budgets[scope, kind] = amount
        self._look_at_budgets()

    def budget_goes(self, scope: str, kind: str) -> None:
        """The operator is about to change or remove it."""
        self._budgets.pop((scope, kind), None)
        self._open(f"the budget {kind}", scope)

    def _look_at_budgets(self) -> None:
        now_ms = self._now_ms()
        for (scope, kind), amount in self._budgets.items():
            day = now_ms // DAY_MS
            used = self._sums.total.get(scope, 0) if kind == "total" else self._sums.days.get((scope, day), 0)
            why = f"the budget {kind}"
            if used >= amount and not any(
                (shut.why, shut.scope) == (why, scope) and shut.until_ms > now_ms for shut in self._shut
            ):
                self._close(why, scope, (day + 1) * DAY_MS if kind == "day" else NEVER)

    def reserved(self) -> None:
        """Something was set aside for a turn."""
        self._reserved_ms = self._now_ms()

    # -- calls --------------------------------------------------------------------------------------------------------

    def call_begins(self, call: Call, turn: int, running: int) -> None:
        """The ledger has let a call of an agent's `turn` pass, and counts it for the one that is `running`."""
        self._under_way[call] = turn
        if turn != running:
            raise self._broken(f"a call of turn {turn} of {call.agent} is charged to turn {running}")
        if self._exact and (shut := self._holds(call.agent, self._now_ms())):
            raise self._broken(f"a call of {call.agent} passed while {shut.why} kept it from the model")

    def call_ended(self, call: Call, lives: bool) -> None:
        """The ledger knows its end, where the daemon `lives`; else nobody does."""
        turn, now_ms, usage = self._under_way.pop(call), self._now_ms(), call.usage or {}
        if not lives:
            return
        micro_usd = None
        if call.status >= 400:
            micro_usd = 0
        elif call.complete:
            micro_usd = usage["input_tokens"] * INPUT_MICRO_USD + usage["output_tokens"] * OUTPUT_MICRO_USD
        self._made[call.agent, now_ms] = Made(now_ms, call.agent, turn, micro_usd)
        self._sums.add(call.agent, now_ms // DAY_MS, micro_usd or 0)
        self._look_at_budgets()

    def _look_at_charges(self) -> None:
        """Each call is charged once, at its price, to its turn; and soon."""
        sql = "SELECT id, at_ms, agent, turn_id, cost_micro_usd, complete FROM charges WHERE id > ? ORDER BY id"
        for row in self._db.execute(sql, (self._last_charge,)).fetchall():
            self._last_charge = row["id"]
            key = row["agent"], row["at_ms"]
            made = self._made.pop(key, None) or self._before.pop(key, None)
            if made is None:
                raise self._broken(f"charge {row['id']} of {row['agent']} is for no call, or for one a second time")
            if row["turn_id"] != made.turn or made.micro_usd not in (None, row["cost_micro_usd"]):
                told = f"turn {made.turn} and cost {made.micro_usd}"
                raise self._broken(f"charge {row['id']} is {tuple(row)}, and its call was of {told}")
        due_ms = self._now_ms() - self._patience_ms
        for made in self._made.values():
            if made.at_ms < due_ms:
                raise self._broken(f"a call of turn {made.turn} of {made.agent} is not charged")
            break  # in the order of their ends

    def daemon_died(self) -> None:
        """What it had in memory alone is gone."""
        if not self._exact:
            return
        self._look_at_charges()
        now_ms = self._now_ms()
        self._before = self._made
        self._made = {}
        for shut in self._shut:
            if shut.why == "the credential" and shut.since_ms > now_ms - self._patience_ms:
                shut.until_ms = min(shut.until_ms, now_ms)

    def daemon_began(self) -> None:
        """It goes on with what is on disk."""
        self._sums = _Sums()
        for day, agent, micro_usd in self._db.execute(
            "SELECT day, agent, sum(cost_micro_usd) FROM spend_days GROUP BY day, agent"
        ).fetchall():
            self._sums.add(agent, day, micro_usd)
        held = {(f"the budget {kind}", scope): (scope, kind) for scope, kind in self._budgets}
        for shut in [shut for shut in self._shut if (shut.why, shut.scope) in held]:
            self._open(shut.why, shut.scope)
        self._look_at_budgets()

    # -- looks --------------------------------------------------------------------------------------------------------

    def look(self, daemon: Daemon | None) -> None:
        """All that can be said now."""
        self._look_at_turns()
        if not self._exact:
            return
        self._look_at_charges()
        if daemon is None:
            return
        self._look_at_the_sum(daemon)
        self._look_for_reservations(daemon)

    def _look_at_the_sum(self, daemon: Daemon) -> None:
        if self._made or self._under_way:
            return
        (charged,) = self._db.execute("SELECT coalesce(sum(cost_micro_usd), 0) FROM spend_days").fetchone()
        if (spent := daemon.ledger.spent(THE_HIVE, "total")) != charged:
            raise self._broken(f"{charged} is charged and the budgets hold {spent} against it")

    def _look_for_reservations(self, daemon: Daemon) -> None:
        due_ms, ended_just_now = self._now_ms() - self._patience_ms, False
        for agent, turn in daemon.ledger.turns.running.items():
            sql = "SELECT ended_at_ms FROM turns WHERE id = ? AND state != 'running'"
            row = self._db.execute(sql, (turn.id,)).fetchone()
            if row is not None and row["ended_at_ms"] < due_ms:
                raise self._broken(f"turn {turn.id} of {agent} is over and its reservation is kept")
            ended_just_now = ended_just_now or row is not None
        if ended_just_now or self._now_ms() - self._reserved_ms < (BEGINS_WITHIN_S + 1) * 1000:
            return  # it may not have been heard of yet, or a turn may be about to begin
        running = self._db.execute("SELECT 1 FROM turns WHERE state = 'running'").fetchone()
        if running is None and (left := daemon.ledger.turns.reserved("", {})):
            raise self._broken(f"{left} micro-USD are reserved and no turn runs")
