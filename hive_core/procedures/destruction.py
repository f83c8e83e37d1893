"""Destroying, reviving and purging agents, each in steps that can be done again: the next daemon goes on with them.

The rows say what is under way before anything of it is done, and that it is done when all of it is.
"""

from __future__ import annotations

import logging

import trio

from hive_core.kept import Keeper
from hive_core.procedures.reconcile import Reconciler
from hive_core.procedures.supervise import AWAY_REST_S, is_away
from hive_core.procedures.walk import Walk
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import OPERATOR, AgentName
from hive_core.services.agents import Agents
from hive_core.services.broker import Broker
from hive_core.services.last_will import settle_all
from hive_core.services.tombstones import TOMBSTONES, Tombstone, Tombstones, forget, keep
from hive_core.store.bus import EVENTS
from hive_core.store.door import Store
from hive_core.store.writer import Transaction

log = logging.getLogger(__name__)
ANSWER_WITHIN_S = 10.0


class Destruction:
    def __init__(
        self,
        store: Store,
        agents: Agents,
        reconciler: Reconciler,
        tombstones: Tombstones,
        keeper: Keeper,
        broker: Broker,
        walk: Walk,
    ) -> None:
        self._store = store
        self._agents = agents
        self._reconciler = reconciler
        self._tombstones = tombstones
        self._keeper = keeper
        self._broker = broker
        self._walk = walk
        self._working: set[int] = set()
        self._trouble: dict[str, str] = {}  # label → why it does not come to its end
        self._retried: set[str] = set()  # labels of those that go on by themselves when that is over

    async def serve(self) -> None:
        """Carry out what is under way, also what a daemon before left half done, until cancelled."""
        async with trio.open_nursery() as nursery:
            with self._store.bus.listen(TOMBSTONES) as listener:
                while True:
                    for tombstone in await self._tombstones.under_way():
                        if tombstone.at_once and tombstone.state == "destroying":
                            self._reconciler.hasten(tombstone.name)
                        if tombstone.id not in self._working:
                            self._working.add(tombstone.id)
                            nursery.start_soon(self._carry_out, tombstone)
                    await listener.wait()

    def trouble(self, tombstone: Tombstone) -> str:
        """Why what is under way with it does not come to its end, or an empty text."""
        lingers = self._reconciler.lingers(tombstone.name) if tombstone.state == "destroying" else ""
        return self._trouble.get(tombstone.label) or lingers

    async def destroy(self, name: AgentName, *, at_once: bool) -> Tombstone | None:
        """Destroy an agent at its turn's edge, or `at_once`. Its tombstone as far as that came in some seconds, or
        until it waits for whoever would end it: `trouble` says so. Raises Refusal."""
        self._try_anew(name)
        tombstone = await self._tombstones.destroy(name, OPERATOR, at_once=at_once)
        return await self._wait(tombstone, "destroying")

    async def revive(self, raw: object) -> Tombstone:
        """Make an agent of a tombstone again: the tombstone that it was. Raises Refusal."""
        tombstone = await self._tombstones.find(raw)
        self._try_anew(tombstone.name)
        if tombstone.state == "kept":  # one that cannot come back stays one, and its name can be used
            await self._tombstones.check_nobody_has(tombstone.name)
            await self._keeper.check_room(tombstone.name, tombstone.label)
        await self._tombstones.revive(tombstone, OPERATOR, self._agents.ports)
        await self._wait(tombstone, "reviving")
        return tombstone

    async def purge(self, raw: object) -> Tombstone:
        """Remove a tombstone and all that is kept under it: the tombstone that it was. Raises Refusal."""
        tombstone = await self._tombstones.find(raw)
        self._try_anew(tombstone.name)
        await self._tombstones.purge(tombstone, OPERATOR)
        await self._wait(tombstone, "purging")
        return tombstone

    def _try_anew(self, name: AgentName) -> None:
        """What failed before says nothing of the next try."""
        kept = {label for label in self._trouble if label in self._retried or not label.startswith(f"{name}@")}
        self._trouble = {label: why for label, why in self._trouble.items() if label in kept}

    async def _wait(self, tombstone: Tombstone, state: str) -> Tombstone | None:
        """Until it left a state, but not for long; what there is of it then. Raises Refusal where it cannot."""
        with trio.move_on_after(ANSWER_WITHIN_S), self._store.bus.listen(EVENTS, TOMBSTONES) as listener:
            while (now := await self._tombstones.by_id(tombstone.id)) is not None and now.state == state:
                if tombstone.label in self._retried:
                    break
                if why := self.trouble(tombstone):
                    raise Refusal("failed", f"{why}. It is tried again at the next start, and when you ask again")
                await listener.wait()
        return await self._tombstones.by_id(tombstone.id)

    async def _carry_out(self, tombstone: Tombstone) -> None:
        try:
            while not await self._try(tombstone):  # noqa: ASYNC110 - a helper that comes back tells nobody
                await trio.sleep(AWAY_REST_S)
        finally:
            self._retried.discard(tombstone.label)
            self._working.discard(tombstone.id)
            self._store.bus.publish([EVENTS])

    async def _try(self, tombstone: Tombstone) -> bool:
        """Carry out what is under way as far as that goes; False when whoever would do it is away."""
        steps = {"destroying": self._destroy, "reviving": self._revive, "purging": self._purge}
        try:
            # It was listed a moment ago, and whoever worked on it then may have come to the end since.
            now = await self._tombstones.by_id(tombstone.id)
            if now is not None and now.state in steps:
                await steps[now.state](now)
            self._trouble.pop(tombstone.label, None)
        except (Refusal, OSError) as exc:
            if self._trouble.get(tombstone.label) != str(exc):
                log.error("%s of %s: %s", tombstone.state, tombstone.label, exc, extra={"agent": tombstone.name})
            self._trouble[tombstone.label] = str(exc)
            if is_away(exc):
                self._retried.add(tombstone.label)
                self._store.bus.publish([EVENTS])
                return False
        return True

    async def _destroy(self, tombstone: Tombstone) -> None:
        name = tombstone.name
        await self._reconciler.leave(name, tombstone.at_once)
        try:
            size = await self._keeper.put_away(name, tombstone.label)

            def write(tx: Transaction) -> None:
                self._broker.put_back(tx, name)
                settle_all(tx, name, tombstone.destroyed_by, self._broker.limits)
                keep(tx, tombstone, size)

            await self._store.insist(write)
            self._agents.forget(name)
            await self._broker.ledger.look_again(name)
        finally:
            self._reconciler.left(name)

    async def _revive(self, tombstone: Tombstone) -> None:
        await self._keeper.bring_back(tombstone.name, tombstone.label)
        await self._walk.revive(tombstone.name)
        await self._broker.ledger.look_again(tombstone.name)
        await self._store.insist(lambda tx: forget(tx, tombstone, "revived", OPERATOR))

    async def _purge(self, tombstone: Tombstone) -> None:
        await self._keeper.remove(tombstone.label, tombstone.id)
        await self._store.insist(lambda tx: forget(tx, tombstone, "purged", OPERATOR))
