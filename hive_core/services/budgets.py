"""Budgets: how much the hive, or one agent, may spend in a day or in all, or use of the account's windows.

A day is one of UTC. What is asked here is asked before each call and each turn, so it is answered from memory, which is
changed behind each commit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import trio

from hive_core.protocol.money import parse_usd, usd
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import EVERYONE, MANAGER, SYSTEM, AgentName, MessageBody, parse_agent_name, shown
from hive_core.services.absent import no_such_agent
from hive_core.services.access import Closed
from hive_core.services.charges import DAY_MS
from hive_core.services.notices import notice
from hive_core.services.post import Cause, put_message
from hive_core.store.door import Store
from hive_core.store.writer import Transaction

THE_HIVE = EVERYONE  # the scope that every agent is in
_SELECT = "SELECT scope, kind, amount, warn_percent, warned_day, spent_day FROM budgets"
Kind = Literal["day", "total", "window_5h", "window_7d"]
KINDS: tuple[Kind, ...] = ("day", "total", "window_5h", "window_7d")
WINDOWS: dict[str, str] = {"window_5h": "5h", "window_7d": "7d"}


@dataclass(frozen=True, slots=True)
class Budget:
    """amount: micro-USD, or percent of one of the account's windows."""

    scope: AgentName
    kind: Kind
    amount: int
    warn_percent: int
    warned_day: int | None = None
    spent_day: int | None = None

    @property
    def name(self) -> str:
        """As a sentence has it."""
        whose = "the hive" if self.scope == THE_HIVE else self.scope
        span = {"day": "for a day", "total": "in total"}.get(self.kind)
        return f"the budget of {whose} {span or f'of the {self.window} window'}"

    @property
    def window(self) -> str | None:
        return WINDOWS.get(self.kind)

    def shown(self, amount: float) -> str:
        return f"{amount:.0f} %" if self.window else usd(int(amount))

    @property
    def way_out(self) -> str:
        """How the operator raises it."""
        whose = "hive" if self.scope == THE_HIVE else self.scope
        unit = "PERCENT" if self.window else "USD"
        return f"the operator can raise it: `hive budget set {whose} --{self.kind.replace('_', '-')} {unit}`"

    def closed_at(self, used: float, now_ms: int) -> Closed | None:
        """Why nothing more may be used, where all is."""
        if used < self.amount:
            return None
        if self.window is not None:
            why = f"the account's {self.window} window is used to {used:.0f} % and {self.name} ends at {self.amount} %"
            return Closed("over_budget", f"{why}; it goes on with the next window, or {self.way_out}")
        return self._closed(f"{self.name}, {usd(self.amount)}, is spent ({usd(int(used))})", now_ms)

    def closed_for(self, agent: AgentName, next_turn: int, spent: int, reserved: int, now_ms: int) -> Closed | None:
        """Why no turn of an agent may begin, where what it may cost does not fit beside what others have reserved.

        One that may cost more than the whole budget begins when all of that is left.
        """
        left, needed = self.amount - spent - reserved, min(next_turn, self.amount)
        if needed <= left:
            return None
        others = f" beside {usd(reserved)} for turns that run" if reserved else ""
        why = f"{self.name}, {usd(self.amount)}, has {usd(left)} left{others}"
        return self._closed(f"{why}, and {agent}'s next turn may take {usd(needed)}", now_ms)

    def _closed(self, why: str, now_ms: int) -> Closed:
        if self.kind != "day":
            return Closed("over_budget", f"{why}; {self.way_out}")
        return Closed("over_budget", f"{why}; it goes on at midnight UTC, or {self.way_out}", midnight_after(now_ms))

    def when_told(self, used: float, today: int) -> Budget:
        """The budget behind what has to be said of it now: each of the two once a day. Else itself."""
        if used >= self.amount and self.spent_day != today:
            return replace(self, warned_day=today, spent_day=today)
        if used * 100 >= self.amount * self.warn_percent and self.warned_day != today:
            return replace(self, warned_day=today)
        return self


@dataclass(frozen=True, slots=True)
class Change:
    """Amounts by kind to set for one scope, as an operator asked."""

    scope: AgentName
    amounts: Mapping[Kind, int]
    warn_percent: int


def parse_scope(raw: object) -> AgentName:
    """`hive`, or an agent's name. Raises Refusal("usage")."""
    return THE_HIVE if raw in ("hive", THE_HIVE) else parse_agent_name(raw)


def parse_change(args: Mapping[str, Any], warn_percent: int) -> Change:
    """From `scope`, `warn_percent` and an amount for each kind, as text. Raises Refusal("usage")."""
    amounts: dict[Kind, int] = {}
    for kind in KINDS:
        if (raw := args.get(kind)) is not None:
            what = f"the budget {kind.replace('_', '-')}"
            amounts[kind] = _percent(raw, what) if kind in WINDOWS else parse_usd(raw, what)
    if not amounts:
        options = ", ".join(f"--{kind.replace('_', '-')}" for kind in KINDS)
        raise Refusal("usage", f"cannot set a budget without an amount: give one or more of {options}")
    raw = args.get("warn_percent")
    return Change(parse_scope(args.get("scope")), amounts, warn_percent if raw is None else _percent(raw, "--warn"))


def parse_kinds(raw: object) -> tuple[Kind, ...]:
    """Kinds of budgets; all when none is named. Raises Refusal("usage")."""
    if raw is None or raw == []:
        return KINDS
    kinds = tuple(kind for kind in KINDS if isinstance(raw, list) and kind in raw)
    if not isinstance(raw, list) or len(kinds) != len(raw):
        raise Refusal("usage", f"cannot use {shown(raw)} as kinds of budgets: give a list of {', '.join(KINDS)}")
    return kinds


def _percent(raw: object, what: str) -> int:
    number = int(raw) if isinstance(raw, str) and raw.isascii() and raw.isdigit() and len(raw) <= 3 else raw
    if type(number) is not int or not 1 <= number <= 100:
        raise Refusal("usage", f"cannot use {shown(raw)} as {what}: give a whole number of percent from 1 to 100")
    return number


class Budgets:
    """The budgets, in the database and in memory."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._kept: dict[tuple[AgentName, Kind], Budget] = {}

    async def load(self) -> None:
        self._keep(Budget(*row) for row in await self._store.rows(_SELECT))

    def all(self) -> list[Budget]:
        """Those of the hive first, then by agent."""
        return sorted(self._kept.values(), key=lambda one: (one.scope != THE_HIVE, one.scope, KINDS.index(one.kind)))

    def of(self, agent: AgentName) -> list[Budget]:
        """Those that hold for an agent."""
        if not self._kept:
            return []  # as mostly, and asked for every agent whenever anything is spent
        every = ((scope, kind) for scope in (THE_HIVE, agent) for kind in KINDS)
        return [self._kept[key] for key in every if key in self._kept]

    async def set(self, change: Change, actor: AgentName) -> None:
        """Set some budgets of one scope, at once. Raises Refusal("not_found") when there is no such agent."""

        def write(tx: Transaction) -> None:
            if change.scope != THE_HIVE:
                sql = "SELECT 1 FROM agents WHERE name = ?"
                if tx.execute(sql, (change.scope,)).fetchone() is None:
                    raise no_such_agent(tx, change.scope, "set a budget for")
            rows = [(change.scope, kind, amount, change.warn_percent, tx.now_ms) for kind, amount in changes]
            tx.executemany(
                "INSERT OR REPLACE INTO budgets (scope, kind, amount, warn_percent, set_at_ms) VALUES (?, ?, ?, ?, ?)",
                rows,
            )
            for kind, amount in changes:
                tx.emit("budget_set", actor, _about(change.scope), budget=kind, amount=amount, warn=change.warn_percent)

        changes = list(change.amounts.items())
        with trio.CancelScope(shield=True):  # else what is written and what holds could be two things
            await self._store.write(write)
        self._keep(Budget(change.scope, kind, amount, change.warn_percent) for kind, amount in changes)

    async def remove(self, scope: AgentName, kinds: Iterable[Kind], actor: AgentName) -> list[Kind]:
        """Remove those of these kinds that there are, and say which. Raises Refusal("not_found") for none."""
        gone = [kind for kind in kinds if (scope, kind) in self._kept]
        if not gone:
            whose = "the hive" if scope == THE_HIVE else scope
            raise Refusal("not_found", f"cannot remove it: {whose} has no such budget; `hive budget` shows them")

        def write(tx: Transaction) -> None:
            tx.executemany("DELETE FROM budgets WHERE scope = ? AND kind = ?", [(scope, kind) for kind in gone])
            for kind in gone:
                tx.emit("budget_removed", actor, _about(scope), budget=kind)

        with trio.CancelScope(shield=True):
            await self._store.write(write)
        for kind in gone:
            self._kept.pop((scope, kind), None)
        return gone

    async def look_again(self, agent: AgentName) -> None:
        """Know the budgets of one agent as they stand in the database, where it was destroyed or revived."""
        rows = await self._store.insist(lambda tx: tx.execute(f"{_SELECT} WHERE scope = ?", (agent,)).fetchall())
        for kind in KINDS:
            self._kept.pop((agent, kind), None)
        self._keep(Budget(*row) for row in rows)

    def tell(self, tx: Transaction, told: Budget, used: float) -> None:
        """Say to the manager, and in an event, how much of a budget is used; nothing if it was changed meanwhile."""
        sql = "UPDATE budgets SET warned_day = ?, spent_day = ? WHERE scope = ? AND kind = ? AND amount = ?"
        given = (told.warned_day, told.spent_day, told.scope, told.kind, told.amount)
        if tx.execute(sql, given).rowcount == 0:
            return
        spent = used >= told.amount
        data = {"budget": told.kind, "amount": told.amount, "used": int(used)}
        tx.emit("budget_spent" if spent else "budget_warned", SYSTEM, _about(told.scope), None, **data)
        with suppress(Refusal):  # a hive without a manager has nobody to tell it to
            put_message(tx, SYSTEM, MANAGER, _letter(told, used, spent), cause=Cause("system"))

    def keep(self, budget: Budget) -> None:
        """Note what `tell` has said, behind its commit, unless another budget was set in its place."""
        kept = self._kept.get((budget.scope, budget.kind))
        if kept is not None and kept.amount == budget.amount:
            self._keep([budget])

    def _keep(self, budgets: Iterable[Budget]) -> None:
        self._kept.update({(budget.scope, budget.kind): budget for budget in budgets})


def put_away(tx: Transaction, agent: AgentName) -> list[dict[str, Any]]:
    """Take the budgets of an agent that is no more out of those that hold: their rows, for `bring_back`."""
    rows = tx.execute("DELETE FROM budgets WHERE scope = ? RETURNING *", (agent,)).fetchall()
    return [dict(row) for row in rows]


def bring_back(tx: Transaction, agent: AgentName, rows: Iterable[Mapping[str, Any]]) -> None:
    """Let budgets that were put away hold again."""
    known = {row["name"] for row in tx.execute("SELECT name FROM pragma_table_info('budgets')").fetchall()}
    for row in rows:
        values = {key: value for key, value in row.items() if key in known} | {"scope": agent}
        tx.insert("budgets", list(values), [list(values.values())])


def _about(scope: AgentName) -> AgentName | None:
    return None if scope == THE_HIVE else scope


def _letter(budget: Budget, used: float, spent: bool) -> MessageBody:
    so_far = f"{budget.shown(used)} of {budget.shown(budget.amount)}"
    if not spent:
        text = f"of {budget.name} {so_far} is used; whom it holds for is stopped when all is"
        return notice("budget_warning", text, agent=_about(budget.scope))
    return notice("budget_spent", f"{budget.name} is spent ({so_far}); {budget.way_out}", agent=_about(budget.scope))


def midnight_after(at_ms: int) -> int:
    return (at_ms // DAY_MS + 1) * DAY_MS
