"""Whether an agent may call the model now: each service that can say no gives a reason, and here they meet.

The relay asks before each call and cuts those under way when the answer changes; the broker asks before each turn; the
pages show the answer. Nothing that an agent says of itself is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from hive_core.protocol.words import AgentName
from hive_core.store.bus import Bus, mail
from hive_core.store.door import Store
from hive_core.store.writer import Transaction

HALTS = ("paused", "frozen")
ACCESS = "access"  # the bus topic: what closes or opens some agent's way to the model changed


@dataclass(frozen=True, slots=True)
class Closed:
    """Why an agent may not call the model now.

    state     what the agent is meanwhile: paused, frozen, over_budget, rate_limited or needs_login
    sentence  for its program and the operator: cause, limit, and who can change it
    until_ms  when it opens by itself, where that is known
    status    with which the relay answers a call
    cuts      whether calls under way are cut, too
    own       how many calls in a row that the agent made itself have closed it; 0: it was not closed by one
    """

    state: str
    sentence: str
    until_ms: int | None = None
    status: int = 503
    cuts: bool = True
    own: int = field(default=0, compare=False)


Reason = Callable[[AgentName], Closed | None]  # from memory, which each service keeps equal to what it has committed


class Access:
    def __init__(self, bus: Bus, reasons: Iterable[Reason] = ()) -> None:
        self.bus = bus
        self._reasons = list(reasons)
        self._held: dict[AgentName, int] = {}  # whose turn's edge is held, and by how many
        self._turned: set[AgentName] | None = set()  # whose answer may have changed since `serve` looked; None: all

    def add(self, reason: Reason) -> None:
        """One more that can say no; those before it are asked first."""
        self._reasons.append(reason)

    def closed(self, name: AgentName) -> Closed | None:
        """The first reason that says no, or None: the agent may call the model and begin a turn."""
        for reason in self._reasons:
            if (closed := reason(name)) is not None:
                return closed
        return None

    def cut(self, name: AgentName) -> Closed | None:
        """The first reason to end the calls that the agent has under way, or None."""
        for reason in self._reasons:
            if (closed := reason(name)) is not None and closed.cuts:
                return closed
        return None

    def halted(self, name: AgentName) -> Closed | None:
        """That the operator has stopped the agent, or the whole swarm: then it reaches nothing, not the model alone."""
        for reason in self._reasons:
            if (closed := reason(name)) is not None and closed.state in HALTS:
                return closed
        return None

    def no_turn(self, name: AgentName) -> Closed | None:
        """The first reason to begin no turn: its way to the model is closed, or its turn's edge is held."""
        if self._held.get(name):
            return Closed("idle", f"a snapshot is taken of {name}; its next turn begins when that is done", cuts=False)
        return self.closed(name)

    @contextmanager
    def at_edge(self, name: AgentName) -> Iterator[None]:
        """Let no turn of the agent begin within. One that runs goes on, and reaches the model as before."""
        self._held[name] = self._held.get(name, 0) + 1
        try:
            yield
        finally:
            self._held[name] -= 1
            if not self._held[name]:
                del self._held[name]
                self.changed(name)

    def changed(self, *names: AgentName) -> None:
        """The answer for these agents, or for all when none is named, may be another from now on."""
        self._turned = None if not names or self._turned is None else self._turned | set(names)
        self.bus.publish([ACCESS])

    async def serve(self, store: Store) -> None:
        """Let the leases of agents that may go on look again, until cancelled."""
        with self.bus.listen(ACCESS) as listener:
            while True:
                turned, self._turned = self._turned, set()
                if turned is None or turned:
                    await store.insist(lambda tx, turned=turned: self._wake(tx, turned))  # type: ignore[misc]
                await listener.wait()

    def _wake(self, tx: Transaction, turned: set[AgentName] | None) -> None:
        for row in tx.execute("SELECT name FROM agents").fetchall():
            if (turned is None or row["name"] in turned) and self.no_turn(row["name"]) is None:
                tx.wake(mail(row["name"]))
