"""What happens on forges, told by lanes: the notifications of the hive's account there are its queue.

A notification is marked as read behind the commit that holds its message: a daemon that is killed in between finds it
again, and the message's row says that it was told. A forge cannot wake a hive that has no public port: it is asked.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence

import trio

from hive_core.forge.adapter import Forge
from hive_core.forge.api import ForgeTrouble
from hive_core.forge.words import Notification, Thread
from hive_core.lanes import Lane, may_take
from hive_core.limits import REST_LIMIT_S, Limits
from hive_core.procedures.forges import Forges, choose_lane
from hive_core.protocol.refusal import Refusal
from hive_core.services.forge_notices import (
    Outcome,
    State,
    compose,
    is_known,
    put_news,
    tell_lane_full,
    told_before,
)
from hive_core.services.forges import FORGES, Registered, all_forges, note_look
from hive_core.store.errors import StoreError

log = logging.getLogger(__name__)
CLOCKS_APART_MS = 5 * 60_000  # by which a forge's may be behind ours
LOOKS_MOST = 3  # at a thread that changes while it is told
REST_MOST_S = 3600.0  # of a forge that does not say when it wants to be asked again
REASON_LIMIT = 300
GONE = (404, 410)  # of a thread that was removed
OF_ALL = (0, 401, 429, 502, 503, 504)
FAILED_MOST = 10  # notifications of one look
BRAKED_FOR_S = 3600.0  # in which a full lane is told once


class ForgeWatch:
    def __init__(
        self,
        forges: Forges,
        lanes: Sequence[Lane],
        limits: Limits,
        chance: random.Random | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """chance: for jitter. clock: seconds since 1970."""
        self._forges = forges
        self._store = forges.store
        self._lanes = lanes
        self._limits = limits
        self._chance = chance or random.Random()
        self._clock = clock
        self._braked: dict[str, float] = {}  # lane → when that was told last
        self._failed: dict[int, dict[str, str]] = {}  # forge → notifications that could not be told, which come last
        self._watched: dict[int, trio.CancelScope] = {}

    async def serve(self) -> None:
        """Look at each forge of which some lane tells, from time to time and beside each other, until cancelled."""
        await self._forges.tidy()
        async with trio.open_nursery() as nursery:
            with self._store.bus.listen(FORGES) as listener:
                while True:
                    there = {forge.id: forge for forge in await all_forges(self._store)}
                    for number in set(self._watched) - set(there):
                        self._watched.pop(number).cancel()
                    for forge in there.values():
                        if forge.id not in self._watched and may_take(self._lanes, forge.project):
                            self._watched[forge.id] = trio.CancelScope()
                            nursery.start_soon(self._watch, forge.id, self._watched[forge.id])
                    await listener.wait()

    async def _watch(self, number: int, scope: trio.CancelScope) -> None:
        with scope, self._store.bus.listen(FORGES) as listener:
            while True:
                found = [forge for forge in await all_forges(self._store) if forge.id == number]
                rest_s = self._rests_s(found[0]) if found else REST_MOST_S
                if found and not rest_s:
                    rest_s = await self.look(found[0])
                with trio.move_on_after(rest_s):
                    await listener.wait()  # another token may have come

    def _rests_s(self, forge: Registered) -> float:
        """For how long it is not to be asked; no longer than any rest is, whatever the clock says."""
        left_s = (forge.rests_until_ms or 0) / 1000 - self._clock()
        return left_s if 0 < left_s <= REST_LIMIT_S else 0.0

    async def look(self, forge: Registered) -> float:
        """Tell what happened there. After how many seconds it may be asked again."""
        try:
            every_s, failed = await self._look(forge)
        except StoreError:
            raise
        except Exception as exc:
            trouble = _told(exc, forge)
            until_s = self._clock() + self._rest_s(forge, trouble)
            error, until_ms = trouble.message, int(until_s * 1000)
            await self._store.insist(lambda tx: note_look(tx, forge, error, until_ms))
            log.warning("cannot look at the forge of %s: %s", forge.project, error)
            return until_s - self._clock()
        await self._store.insist(lambda tx: note_look(tx, forge, failed, None))
        return min(max(self._limits.forge_poll_s, every_s or 0.0), float(REST_LIMIT_S))

    def _rest_s(self, forge: Registered, trouble: Refusal) -> float:
        doubled = self._limits.forge_poll_s * 2.0 ** min(forge.failures + 1, 20)
        rest_s = min(doubled, REST_MOST_S) * (0.5 + self._chance.random())
        told_ms = trouble.until_ms if isinstance(trouble, ForgeTrouble) else None
        return min(max(rest_s, (told_ms or 0) / 1000 - self._clock()), float(REST_LIMIT_S))

    async def _look(self, forge: Registered) -> tuple[float | None, str | None]:
        """How often it wants to be asked; and why something could not be told, which keeps nothing else back."""
        ours = self._forges.open(forge)
        unread = await ours.unread(forge.added_at_ms - CLOCKS_APART_MS)
        failed: dict[str, str] = {}
        before = self._failed.get(forge.id, {})
        for one in sorted(unread.notifications, key=lambda one: one.id in before):
            try:
                await self._take(ours, forge, one)
            except StoreError:
                raise
            except Exception as exc:
                trouble = _told(exc, forge)
                if _is_of_all(trouble) or len(failed) == FAILED_MOST:
                    raise
                failed[one.id] = f"of number {one.number} nothing could be told: {trouble.message}"
                log.warning("of the forge of %s %s", forge.project, failed[one.id])
        self._failed[forge.id] = failed
        return unread.every_s, next(iter(failed.values()), None)

    async def _take(self, ours: Forge, forge: Registered, one: Notification) -> None:
        """Tell of one, and mark it as read; again where the thread has changed meanwhile, whose mark that may be."""
        thread = await self._thread(ours, one)
        for _ in range(LOOKS_MOST):
            state = _state(one, thread)
            if not await is_known(self._store, forge, state):
                outcome = await self._tell(ours, forge, state, thread)
                if outcome in ("full", "absent"):
                    return
            await ours.mark_read(one.id)
            if thread is None:
                return
            thread = await self._thread(ours, one)
            if _state(one, thread) == state:
                return

    async def _thread(self, ours: Forge, one: Notification) -> Thread | None:
        if one.number is None:
            return None
        try:
            return await ours.thread(one.number)
        except ForgeTrouble as trouble:
            if trouble.status in GONE:
                return None
            raise

    async def _tell(self, ours: Forge, forge: Registered, state: State, thread: Thread | None) -> Outcome:
        lane = await choose_lane(self._lanes, forge.project, ours, thread) if thread else None
        body = in_reply_to = None
        if thread is not None and lane is not None:
            before = await told_before(self._store, forge, thread.number)
            since_ms = before.updated_at_ms + 1 if before else forge.added_at_ms - CLOCKS_APART_MS
            comments = await ours.comments(thread.number, since_ms) if thread.comments else []
            if thread.kind == "pull_request":
                comments = sorted([*comments, *await ours.reviews(thread.number, since_ms)], key=lambda one: one.at_ms)
            news = [one for one in comments if one.at_ms >= since_ms and one.author != forge.login]
            body = compose(forge, lane, thread, before, news)
            in_reply_to = before.message if before else None
        outcome = await self._store.write(lambda tx: put_news(tx, forge, state, lane, body, in_reply_to, self._limits))
        if outcome == "full" and lane is not None:
            await self._brake(lane, forge)
        return outcome

    async def _brake(self, lane: Lane, forge: Registered) -> None:
        now = trio.current_time()
        if now - self._braked.get(lane.name, -BRAKED_FOR_S) >= BRAKED_FOR_S:
            self._braked[lane.name] = now
            await self._store.write(lambda tx: tell_lane_full(tx, lane, forge, self._limits))


def _told(exc: Exception, forge: Registered) -> Refusal:
    """What a forge answers is its own trouble, also where nobody has thought of it."""
    if isinstance(exc, Refusal):
        return exc
    log.error("cannot look at the forge of %s", forge.project, exc_info=exc)
    return Refusal("failed", f"{type(exc).__name__}: {exc}"[:REASON_LIMIT])


def _is_of_all(trouble: Refusal) -> bool:
    """Whether the next question would have the same answer: it is away, wants no calls, or refuses the token."""
    return isinstance(trouble, ForgeTrouble) and (trouble.status in OF_ALL or trouble.until_ms is not None)


def _state(one: Notification, thread: Thread | None) -> State:
    if thread is None:
        return State(one.id, one.updated_at_ms, 0, None, None)
    return State(one.id, thread.updated_at_ms, thread.comments, thread.kind, thread.number)
