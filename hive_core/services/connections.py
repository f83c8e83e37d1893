"""What agents connected to, or tried to, through the hive's proxy: the rows, and an event for each.

A connection is told of in memory as it comes, and written a moment later, with others in one transaction. One that
lasts has its row before its end; one that was under way when the daemon died is cut, as far as anybody knows. An agent
that makes more than SINGLE_A_MINUTE has those beyond it summed up by host and verdict, so that it fills no disk.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import trio

from hive_core.limits import Limits
from hive_core.protocol.words import AgentName
from hive_core.store.door import Store
from hive_core.store.errors import StoreBusy
from hive_core.store.writer import Transaction

CONNECTED = "connected"  # the bus topic: what is told of connections has changed
SINGLE_A_MINUTE, SINGLE_AN_HOUR = 100, 1_000
SUMS_A_MINUTE = 10  # of an agent; what is beyond them is one more, of OTHERS
OTHERS = "*"
LASTS_S = 0.2  # most have ended by then, and need no row before their end
FLUSH_EVERY_S = 0.2
BUSY_REST_S = 1.0
MINUTE_MS, HOUR_MS = 60_000, 3_600_000
STEP = 500  # rows that one transaction removes
LOST = "the daemon ended while it was open"


@dataclass(slots=True)
class Connection:
    """One connection of an agent's, or one that was refused.

    turn            that ran when it began, as far as the host knows; None between turns
    how             "tunnel", or the method of a plain request
    address         that was connected to
    sent, received  bytes from the agent, and to it
    verdict         passed, refused, failed (it could not be reached, or broke off) or cut; None while it is open
    count           how many connections this one stands for
    """

    agent: AgentName
    turn: int | None
    host: str
    port: int
    how: str
    began_at_ms: int
    address: str | None = None
    sent: int = 0
    received: int = 0
    ended_at_ms: int | None = None
    verdict: str | None = None
    reason: str | None = None
    count: int = 1
    lasts: bool = False  # it has a row before its end, or is about to
    row: int | None = None  # the number of that


@dataclass(slots=True)
class _Rate:
    """How many connections of an agent have rows of their own, in the minute and the hour that run."""

    minute: int = 0
    hour: int = 0
    in_minute: int = 0
    in_hour: int = 0
    sums: dict[tuple[object, ...], Connection] = field(default_factory=dict)
    sums_of: int = 0  # their minute

    def takes(self, now_ms: int) -> bool:
        """Count one more; False when it is to be summed up."""
        self._turn(now_ms)
        if self.in_minute >= SINGLE_A_MINUTE or self.in_hour >= SINGLE_AN_HOUR:
            return False
        self.in_minute, self.in_hour = self.in_minute + 1, self.in_hour + 1
        return True

    def _turn(self, now_ms: int) -> None:
        if self.minute != now_ms // MINUTE_MS:
            self.minute, self.in_minute = now_ms // MINUTE_MS, 0
        if self.hour != now_ms // HOUR_MS:
            self.hour, self.in_hour = now_ms // HOUR_MS, 0

    def add(self, one: Connection, now_ms: int) -> None:
        """Sum up one that has ended."""
        if not self.sums:
            self.sums_of = now_ms // MINUTE_MS
        key: tuple[object, ...] = (one.host, one.port, one.how, one.verdict)
        if key not in self.sums and len(self.sums) >= SUMS_A_MINUTE:
            one.host, one.port, one.how, one.address, one.reason = OTHERS, 0, OTHERS, None, None
            key = (OTHERS, one.verdict)
        if (sum_ := self.sums.setdefault(key, one)) is not one:
            sum_.count += 1
            sum_.sent, sum_.received = sum_.sent + one.sent, sum_.received + one.received
            sum_.ended_at_ms, sum_.reason = one.ended_at_ms, one.reason

    def due(self, now_ms: int) -> list[Connection]:
        """The sums of a minute that is over, which are then others'."""
        if not self.sums or self.sums_of == now_ms // MINUTE_MS:
            return []
        sums, self.sums = list(self.sums.values()), {}
        return sums


class Connections:
    def __init__(self, store: Store, limits: Limits, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._limits = limits
        self._clock = clock
        self._open: dict[int, Connection] = {}  # that nothing is written of yet, by their ids
        self._ended: list[Connection] = []
        self._rates: dict[AgentName, _Rate] = {}
        self._day = 0
        self._bytes: dict[AgentName, int] = {}  # of today, of connections that have ended
        self._writing = trio.Lock()
        self._moves: dict[AgentName, int] = {}

    @property
    def now_ms(self) -> int:
        return int(self._clock() * 1000)

    async def load(self) -> None:
        """Go on as the daemon before was left."""

        def cut(tx: Transaction) -> None:
            for row in tx.execute(_CUT, (LOST, tx.now_ms)).fetchall():
                _emit(tx, Connection(**{name: row[column] for name, column in _FIELDS.items()}))

        await self._store.insist(cut)
        self._day = self.now_ms // (24 * HOUR_MS)
        sql = "SELECT agent, sum(sent + received) AS bytes FROM connections WHERE began_at_ms >= ? GROUP BY agent"
        for row in await self._store.rows(sql, (self._day * 24 * HOUR_MS,)):
            self._bytes[row["agent"]] = row["bytes"]

    def moves(self, agent: AgentName) -> int:
        """How often what is written of an agent has changed."""
        return self._moves.get(agent, 0)

    def bytes_today(self, agent: AgentName) -> int:
        """Both ways, of connections that ended since midnight, UTC."""
        self._turn_day()
        return self._bytes.get(agent, 0)

    def _turn_day(self) -> None:
        if self._day != (day := self.now_ms // (24 * HOUR_MS)):
            self._day, self._bytes = day, {}

    def began(self, one: Connection) -> None:
        """It is open: it has a row soon, unless it ends before."""
        self._open[id(one)] = one
        self._store.bus.publish([CONNECTED])

    def ended(self, one: Connection) -> None:
        """It has a verdict and an end."""
        self._turn_day()
        self._bytes[one.agent] = self._bytes.get(one.agent, 0) + one.sent + one.received
        self._open.pop(id(one), None)
        rate = self._rate(one.agent)
        if one.lasts or rate.takes(self.now_ms):
            self._ended.append(one)
        else:
            rate.add(one, self.now_ms)
        self._store.bus.publish([CONNECTED])

    def _rate(self, agent: AgentName) -> _Rate:
        return self._rates.setdefault(agent, _Rate())

    async def serve(self) -> None:
        """Write what is told, until cancelled."""
        with self._store.bus.listen(CONNECTED) as listener:
            while True:
                with trio.move_on_after(self._rest_s()):
                    await listener.wait()
                if self._open and not self._ended:
                    await trio.sleep(LASTS_S)
                await self.flush()
                await trio.sleep(FLUSH_EVERY_S)

    def _rest_s(self) -> float:
        """How long there is nothing to do that nobody tells of."""
        if self._open or self._ended:  # the disk took nothing
            return BUSY_REST_S
        if any(rate.sums for rate in self._rates.values()):
            return (MINUTE_MS - self.now_ms % MINUTE_MS) / 1000
        return math.inf

    async def flush(self, sums: bool = False) -> None:
        """Write what is told; also the sums of a minute that is not over."""
        async with self._writing:
            now_ms = self.now_ms
            for rate in self._rates.values():
                self._ended += rate.due(now_ms + MINUTE_MS if sums else now_ms)
            # An open one whose agent makes too many has no row before its end.
            lasting = [one for one in self._open.values() if one.lasts or self._rate(one.agent).takes(now_ms)]
            ended, self._open, self._ended = self._ended, {}, []
            if not lasting and not ended:
                return
            for one in lasting:
                one.lasts = True
            with trio.CancelScope(shield=True):  # cancelled in between, nobody would know whether it was written
                try:
                    await self._store.write(lambda tx: _write(tx, lasting, ended))
                    for name in {one.agent for one in (*lasting, *ended)}:
                        self._moves[name] = self._moves.get(name, 0) + 1
                except StoreBusy:  # again at the next look
                    for one in lasting:
                        one.row = None
                    self._open |= {id(one): one for one in lasting if one.verdict is None}
                    self._ended = ended + self._ended

    async def prune(self, now_ms: int) -> None:
        """Remove what is older than the history is kept, and of each agent all but the newest."""
        cutoff = now_ms - int(self._limits.history_kept_s * 1000)
        sql = "DELETE FROM connections WHERE id IN (SELECT id FROM connections WHERE ended_at_ms < ? LIMIT ?)"
        while await self._store.write(lambda tx: tx.execute(sql, (cutoff, STEP)).rowcount) == STEP:
            pass
        most = self._limits.connections_kept
        for row in await self._store.rows("SELECT agent FROM connections GROUP BY agent HAVING count(*) > ?", (most,)):
            given = (row["agent"], row["agent"], most, STEP)
            while await self._store.write(lambda tx, given=given: tx.execute(_TOO_MANY, given).rowcount) == STEP:  # type: ignore[misc]
                pass


_FIELDS = {
    "agent": "agent",
    "turn": "turn_id",
    **{name: name for name in ("host", "port", "how", "began_at_ms", "address", "sent", "received", "ended_at_ms")},
    "verdict": "verdict",
    "reason": "reason",
    "count": "count",
    "row": "id",
}
_INSERT = tuple(column for name, column in _FIELDS.items() if name != "row")
_CUT = "UPDATE connections SET verdict = 'cut', reason = ?, ended_at_ms = ? WHERE verdict IS NULL RETURNING *"
_TOO_MANY = """
    DELETE FROM connections WHERE id IN (
        SELECT id FROM connections WHERE agent = ? AND id <= (
            SELECT id FROM connections WHERE agent = ? ORDER BY id DESC LIMIT 1 OFFSET ?
        ) AND verdict IS NOT NULL LIMIT ?
    )
"""


def _write(tx: Transaction, lasting: list[Connection], ended: list[Connection]) -> None:
    sql = f"INSERT INTO connections ({', '.join(_INSERT)}) VALUES ({', '.join('?' * len(_INSERT))}) RETURNING id"
    for one in lasting:
        one.row = tx.execute(sql, _row(one)).fetchone()["id"]
    tx.insert("connections", _INSERT, [_row(one) for one in ended if one.row is None])
    update = f"UPDATE connections SET {', '.join(f'{column} = ?' for column in _INSERT)} WHERE id = ?"
    tx.executemany(update, [(*_row(one), one.row) for one in ended if one.row is not None])
    for one in ended:
        _emit(tx, one)


def _row(one: Connection) -> tuple[Any, ...]:
    return tuple(getattr(one, name) for name in _FIELDS if name != "row")


def _emit(tx: Transaction, one: Connection) -> None:
    told: dict[str, Any] = {"turn": one.turn, "host": one.host, "port": one.port, "how": one.how}
    told |= {"verdict": one.verdict, "sent": one.sent, "received": one.received}
    told |= {"address": one.address, "reason": one.reason} | ({"count": one.count} if one.count > 1 else {})
    tx.emit("connection", one.agent, one.agent, **told)
