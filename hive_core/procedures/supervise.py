"""One agent's container: started when it is wanted and may be, watched to its end, and started again after a rest."""

from __future__ import annotations

import errno
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from hive_core.containers.driver import Driver
from hive_core.containers.mounts import AgentDirs
from hive_core.containers.running import Exit, Running
from hive_core.limits import Limits
from hive_core.procedures.desk import Desk
from hive_core.procedures.starts import Starts
from hive_core.protocol.ends import how_ended
from hive_core.protocol.paths import explain
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import MANAGER, OPERATOR, SYSTEM, AgentName
from hive_core.revision import revision
from hive_core.services.agents import Agent, Agents
from hive_core.services.container_states import ContainerStates, forget_restart
from hive_core.services.notices import notice, tell_manager
from hive_core.services.post import put_message
from hive_core.store.door import Store
from hive_core.store.errors import StoreBusy
from hive_core.store.writer import Transaction

log = logging.getLogger(__name__)
KILL_PATIENCE_S = 10.0
TROUBLE_REST_S = 30.0  # before it is tried again
AWAY_REST_S = 5.0  # and where all that is missing is whoever would do it
_FULL = (errno.ENOSPC, errno.EDQUOT)


async def _nothing(name: AgentName) -> None:
    pass


@dataclass
class Tools:
    """What all supervisors share.

    dirs      what an agent's container has of the host when it is started now
    may_run   the sentence that says why an agent may not be started here, or None
    put_back  closes the running turn of an agent that was ended on purpose
    before_switch  hears of an agent that is about to be started in a container of another shape
    draining  every agent ends, and none is started any more
    """

    store: Store
    agents: Agents
    driver: Driver
    dirs: Callable[[AgentName], Awaitable[AgentDirs]]
    may_run: Callable[[Agent], str | None]
    put_back: Callable[[Transaction, AgentName], None]
    limits: Limits
    states: ContainerStates
    starts: Starts
    before_switch: Callable[[AgentName], Awaitable[object]] = _nothing
    draining: bool = False

    async def generation(self, name: AgentName) -> str:
        """Names all that an agent is like when it is started now: hyperhive's revision, and its container's shape."""
        return f"{revision()} {await self.driver.generation(name, await self.dirs(name))}"


class Supervisor:
    def __init__(self, tools: Tools, name: AgentName, desk: Desk) -> None:
        self.name = name
        self.desk = desk
        self.running: Running | None = None
        self.changed = trio.Event()  # what is wanted of it may be something else
        self.ended = trio.Event()
        self.let_go: Callable[[], None] = lambda: None  # ends its sockets and this, and no container
        self.gone = trio.Event()  # that has been done
        self.killed_s: float | None = None  # since when it ought to have ended, by trio's clock
        self._starts_since_s: float | None = None  # while the driver starts it
        self.starts = 0  # how often this daemon has started it, or tried to
        self.outdated = False  # what runs is of another generation than it would be started with now
        self.on_trial = False  # it was changed: it takes no turn before it is proven, and its crashes are the change's
        self.fell = False  # it has crashed on trial, and is not started again on it
        self._tools = tools
        self._trouble = ""  # why it could not be seen to, the last time
        self.looked = trio.Event()  # whether one of an earlier daemon runs is known
        self._beginning = trio.Lock()  # held while it is started: an end waits for it
        self._unseen = True  # one that nobody has found yet may run

    async def now_running(self) -> Running | None:
        """What runs, also when it was just being looked for or started."""
        await self.looked.wait()
        async with self._beginning:
            return self.running

    @asynccontextmanager
    async def at_rest(self, at_once: bool) -> AsyncIterator[None]:
        """Its container ended, at its turn's edge or `at_once`, and none is started before this is left.

        Raises Refusal where nobody can say whether one runs.
        """
        await self.looked.wait()
        while True:
            async with self._beginning:
                if self.running is None:
                    if self._unseen:
                        await self._insist_that_none_runs()
                    yield
                    return
                self.desk.ask_to_stop()
                if at_once:
                    self.kill()
                ended = self.ended
            await ended.wait()

    async def _insist_that_none_runs(self) -> None:
        try:
            found = await self._tools.driver.find(self.name, await self._tools.dirs(self.name))
        except OSError as exc:
            raise Refusal("unavailable", f"cannot tell whether {self.name} runs: {explain(exc)}") from exc
        if found is not None:
            why = "it was out of sight and runs; in a minute it is seen to again: try again then"
            raise Refusal("conflict", f"cannot end {self.name}: {why}")

    def kill(self) -> None:
        """End what runs of it, at once."""
        if self.running is not None:
            self.killed_s = trio.current_time() if self.killed_s is None else self.killed_s
            self.running.kill()

    def trouble(self) -> str:
        """Why it cannot be seen to, as its row says it; an empty text where it can, or that was before."""
        return self._trouble if self._tools.agents.live(self.name).detail == self._trouble else ""

    def lingers(self) -> str:
        """That it was killed some time ago and has not gone, or its start has not come back; else an empty text."""
        if self._starts_since_s is not None and trio.current_time() - self._starts_since_s >= KILL_PATIENCE_S:
            return "its start has not come back; its disk may hang"
        if self.running is None or self.killed_s is None or trio.current_time() - self.killed_s < KILL_PATIENCE_S:
            return ""
        return f"process {self.running.pid} was killed and has not gone yet; its disk may hang"

    def begin_trial(self) -> None:
        """What it runs on was changed: it is started whatever its crashes were before, and crashes once at most."""
        self.on_trial, self.fell = True, False
        self.desk.hold(True)

    def prove(self) -> None:
        """It has come up: its crashes are its own from now on. It takes no turn before its trial ends."""
        self.on_trial = self.fell = False

    def end_trial(self) -> None:
        """It is as it is to stay: it takes turns again."""
        self.on_trial = self.fell = False
        self.desk.hold(False)
        self.changed.set()

    async def serve(self) -> None:
        """Keep what is wanted true, until cancelled, which ends nothing.

        What cannot be done with it is its own trouble, and is tried again after a while.
        """
        while True:
            try:
                await self._serve()
            except* (Refusal, OSError) as group:
                trouble, away = _said(group), is_away(_first(group))
                log.error("cannot run %s: %s", self.name, trouble, extra={"agent": self.name})
            # What runs all the same is found again.
            self.running, self.changed, self._unseen = None, trio.Event(), True
            self.ended.set()
            self.looked.set()
            # What a helper that is away started runs on, and is what it was.
            self._observe(self._tools.agents.live(self.name).state if away else "crashed", trouble)
            self._trouble = trouble
            with trio.move_on_after(AWAY_REST_S if away else TROUBLE_REST_S):
                await self._wait_changed()

    async def _serve(self) -> None:
        await self._adopt()
        while True:
            agent = await self._agent()
            if self._unwanted(agent):
                self._observe("down")
            elif reason := self._tools.may_run(agent):
                self._observe("down", reason)
            elif self.fell:
                pass
            elif not self.on_trial and (hindrance := await self._tools.states.hindrance(self.name)):
                self._observe(hindrance.state, hindrance.sentence, hindrance.until_ms)
                with trio.move_on_after(hindrance.rest_s or float("inf")):
                    await self._wait_changed()
                continue
            else:
                if await self._take_place():
                    await self._run()
                continue
            await self._wait_changed()

    async def _agent(self) -> Agent:
        return await self._tools.agents.get(self.name)

    def _unwanted(self, agent: Agent) -> bool:
        return agent.wanted == "down" or self._tools.draining

    def _observe(self, state: str, detail: str = "", until_ms: int | None = None) -> None:
        self._tools.agents.observe(self.name, state, detail, self._tools.driver.sandbox, until_ms)

    async def _wait_changed(self) -> None:
        await self.changed.wait()
        self.changed = trio.Event()

    def _begin(self, running: Running) -> None:
        self.running, self.ended, self.killed_s = running, trio.Event(), None

    async def _adopt(self) -> None:
        """Go on with an agent that outlived the daemon before, or tell how it ended meanwhile."""
        driver = self._tools.driver
        running = await driver.find(self.name, await self._tools.dirs(self.name))
        self._unseen = False
        if running is not None:
            self._begin(running)
            await self.look_again()
            self.looked.set()
            log.info("adopted %s (pid %d)", self.name, running.pid, extra={"agent": self.name})
            told = {**running.unit(), **({"outdated": True} if self.outdated else {})}
            await self._tools.store.insist(
                lambda tx: tx.emit("agent_adopted", SYSTEM, self.name, None, pid=running.pid, **told)
            )
            if not self.desk.said_hello.is_set():
                self._observe("starting", "waits for its hello")
            elif self._trouble and self._tools.agents.live(self.name).detail == self._trouble:
                self._tools.agents.observe_rest(self.name)
            if (await self._agent()).wanted == "down":
                running.kill()
            if (await self._tools.states.restart(self.name)).asked_by is not None:
                self.desk.ask_to_stop()  # as the daemon before was asked
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._tell_restarted)
                await self._watch(running, adopted=True)
                nursery.cancel_scope.cancel()
            return
        self.looked.set()
        if missed := await driver.missed_exit(self.name):
            when = "with the machine" if missed.with_machine else "while the daemon was away"
            expected = missed.code == 0 or missed.with_machine
            await self._note_end(missed, "" if expected else f"{how_ended(missed.code)} {when}", when=when)

    async def look_again(self) -> None:
        """Know whether what runs is as it would be started now."""
        known, wanted = await self._tools.states.generation(self.name), await self._tools.generation(self.name)
        self.outdated = self.running is not None and known not in (None, wanted)

    async def _take_place(self) -> bool:
        """Wait for a place among those that start at once; False when it is not wanted any more."""

        def tell(before: int) -> None:
            self._observe("starting", f"waits for {before} {'other' if before == 1 else 'others'}")

        async def unless_unwanted(scope: trio.CancelScope) -> None:
            while not self._unwanted(await self._agent()):
                await self._wait_changed()
            scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(unless_unwanted, nursery.cancel_scope)
            await self._tools.starts.take(self.name, tell)
            nursery.cancel_scope.cancel()
            return True
        return False

    async def _run(self) -> None:
        try:
            async with trio.open_nursery() as nursery:
                if (running := await self._start(nursery)) is not None:
                    pid = running.pid
                    await self._tools.store.insist(lambda tx: tx.emit("agent_started", SYSTEM, self.name, pid=pid))
                    await self._watch(running)
                nursery.cancel_scope.cancel()
        finally:
            self._tools.starts.give_back(self.name)

    async def _let_others_start(self) -> None:
        """Give the place back: when it has said hello, or that takes too long."""
        limit_s = self._tools.limits.start_s
        with trio.move_on_after(limit_s) as patience:
            await self.desk.said_hello.wait()
        if patience.cancelled_caught and self.running is None:
            self._observe("starting", f"its start has not come back for {limit_s:.0f} s; its disk may hang")
        self._tools.starts.give_back(self.name)

    async def _tell_restarted(self) -> None:
        """Tell hm1nd that it has said hello, where somebody had it started anew."""
        await self.desk.said_hello.wait()
        asked_by, begun_by = await self._tools.states.restart(self.name)
        is_it = not self.desk.asked_to_stop  # what was asked for while it started
        if (by := begun_by or (asked_by if is_it else None)) is None:
            return

        def write(tx: Transaction) -> None:
            forget_restart(tx, self.name, asked=is_it)
            tx.emit("agent_restarted", SYSTEM, self.name, by=by)
            if self.name != MANAGER:
                text = f"{self.name} was started anew, and has said hello"
                tell_manager(tx, notice("restarted", text, agent=self.name, by=by))

        await self._tools.store.insist(write)

    async def _start(self, nursery: trio.Nursery) -> Running | None:
        """What runs now; None when it could not be started, which is told, or is not wanted any more."""
        async with self._beginning:
            agent = await self._agent()
            if self._unwanted(agent) or self._tools.may_run(agent):
                return None
            self.starts, self.outdated = self.starts + 1, False
            self._observe("starting")
            self.desk.expect()
            nursery.start_soon(self._let_others_start)
            nursery.start_soon(self._tell_restarted)
            generation = await self._tools.generation(self.name)
            if await self._tools.states.generation(self.name) not in (None, generation):
                await self._tools.before_switch(self.name)
            await self._tools.states.note_start(self.name, generation)
            dirs = await self._tools.dirs(self.name)
            try:
                self._starts_since_s = trio.current_time()
                running = await self._tools.driver.start(self.name, dirs)
            except (Refusal, OSError) as exc:
                if isinstance(exc, StoreBusy | BlockingIOError) or _is_full(exc) or is_away(exc):
                    raise  # no fault of the agent's: a full disk, a helper that is away, one that runs and is found now
                trouble = _said(exc)
                log.error("cannot start %s: %s", self.name, trouble, extra={"agent": self.name})
                await self._note_end(None, f"could not be started: {trouble}")
                return None
            finally:
                self._starts_since_s = None
            self._begin(running)
            return running

    async def _watch(self, running: Running, adopted: bool = False) -> None:
        hung = ""

        async def end_hung() -> None:
            nonlocal hung
            hung = await self.desk.hung()
            running.kill()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(end_hung)
            exit_ = await running.wait()
            nursery.cancel_scope.cancel()
        await self._note_end(exit_, self._crash(exit_, adopted, hung), hung=hung)
        await self._tools.driver.forget(self.name)
        self.running = None
        self.ended.set()

    def _crash(self, exit_: Exit, adopted: bool, hung: str) -> str:
        """What is said of an end that nobody asked for, or an empty text."""
        if hung:
            return f"was ended: {hung}"
        # An adopted one may have been asked by the daemon before.
        if self.desk.asked_to_stop or (exit_.code == 0 and adopted):
            return ""
        return how_ended(exit_.code) + (", and nobody had asked it to" if exit_.code == 0 else "")

    async def _note_end(self, exit_: Exit | None, crash: str, when: str = "", hung: str = "") -> None:
        """Write down how it ended, and tell of a crash. exit_: None when it never began."""
        if self._unwanted(await self._agent()):
            crash = ""
        self.fell = self.on_trial and bool(crash)
        last_words = await self._tools.driver.last_words(self.name) if exit_ is not None else ""
        code = exit_.code if exit_ is not None else None

        def write(tx: Transaction) -> None:
            if exit_ is not None:
                tx.emit("agent_ended", SYSTEM, self.name, code=code, expected=not crash, when=when, hung=hung)
            if crash and not self.fell:
                self._tell_crash(tx, crash, last_words)
            else:
                self._tools.put_back(tx, self.name)

        self._observe("crashed" if crash else "down", crash)  # while the disk is full, that is all that tells it
        await self._tools.store.insist(write)
        if crash:
            log.warning("%s %s", self.name, crash, extra={"agent": self.name})

    def _tell_crash(self, tx: Transaction, crash: str, last_words: str) -> None:
        """Count it. The first in a row is told to the manager, and the one that brings the quarantine to both."""
        crashes, quarantine = self._tools.states.note_crash(tx, self.name, crash, last_words)
        if quarantine:
            told, body = (
                [MANAGER, OPERATOR],
                notice("container_quarantined", f"{self.name} is not started any more: {quarantine}", agent=self.name),
            )
        else:
            told = [MANAGER] if crashes == 1 else []
            text = f"{self.name} {crash}, and is started again by itself"
            body = notice("container_crash", text, agent=self.name, last_words=last_words)
        for who in told:
            if who != self.name:
                put_message(tx, SYSTEM, who, body)


def _said(trouble: BaseException) -> str:
    """Why something cannot be done with an agent: cause and way out."""
    trouble = _first(trouble)
    return explain(trouble) if isinstance(trouble, OSError) else str(trouble)


def is_away(trouble: BaseException) -> bool:
    """Whether all that is missing is whoever would do it: it can be tried again."""
    return isinstance(trouble, Refusal) and trouble.code == "unavailable" and not isinstance(trouble, StoreBusy)


def _is_full(trouble: BaseException) -> bool:
    return getattr(trouble, "errno", None) in _FULL


def _first(trouble: BaseException) -> BaseException:
    while isinstance(trouble, BaseExceptionGroup):
        trouble = trouble.exceptions[0]
    return trouble
