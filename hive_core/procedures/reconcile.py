"""Wanted and observed: one task per agent closes the difference between what should run and what runs."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

import trio

from hive_core.agents import Agent, Agents
from hive_core.containers.driver import AgentDirs, Driver
from hive_core.containers.running import Exit, Running
from hive_core.post import put_message
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.visible import quoted
from hive_core.protocol.words import MANAGER, SYSTEM, AgentName, parse_body
from hive_core.store.bus import WANTED
from hive_core.store.door import Store
from hive_core.store.writer import Transaction

log = logging.getLogger(__name__)
RESTART_FIRST_S = 1.0
RESTART_LIMIT_S = 60.0
STEADY_S = 30.0  # an agent that ran this long starts with the shortest backoff again


class Desk(Protocol):
    """What the reconciler needs to know of an agent's harness."""

    said_hello: trio.Event

    def ask_to_stop(self) -> None:
        """Let the harness end at its turn's edge."""

    async def hung(self) -> str:
        """Return why the harness of a container that runs counts as hung, once it does."""


@dataclass
class Supervised:
    """One agent as its task sees it."""

    name: AgentName
    desk: Desk
    dirs: AgentDirs
    running: Running | None = None
    changed: trio.Event = field(default_factory=trio.Event)
    ended: trio.Event = field(default_factory=trio.Event)
    looked: trio.Event = field(default_factory=trio.Event)  # whether one of an earlier daemon runs is known
    beginning: trio.Lock = field(default_factory=trio.Lock)  # held while it is started: an end waits for it

    def begin(self, running: Running) -> None:
        self.running, self.ended = running, trio.Event()

    async def now_running(self) -> Running | None:
        """What runs, also when it was just being looked for or started."""
        await self.looked.wait()
        async with self.beginning:
            return self.running


class Reconciler:
    """Starts, adopts, restarts and ends agents.

    may_run   the sentence that says why an agent may not be started here, or None
    put_back  closes the running turn of an agent that was ended on purpose
    serve     opens and serves an agent's sockets until cancelled; reports its desk when they listen
    """

    def __init__(
        self,
        store: Store,
        agents: Agents,
        driver: Driver,
        dirs: Callable[[AgentName], AgentDirs],
        may_run: Callable[[Agent], str | None],
        serve: Callable[[Agent, trio.TaskStatus[Desk]], Awaitable[None]],
        put_back: Callable[[Transaction, AgentName], None],
    ) -> None:
        self._store = store
        self._agents = agents
        self._driver = driver
        self._dirs = dirs
        self._may_run = may_run
        self._serve = serve
        self._put_back = put_back
        self._supervised: dict[AgentName, Supervised] = {}
        self._draining = False
        self._serving = False
        self._complete = trio.Event()  # every agent is supervised

    async def serve(self) -> None:
        """Keep what is wanted true, until cancelled. Cancelling it ends no agent."""
        self._serving = True
        async with trio.open_nursery() as nursery:
            with self._store.bus.listen(WANTED) as listener:
                while True:
                    for agent in await self._agents.all():
                        if agent.settings is None:
                            continue
                        if agent.name not in self._supervised:
                            await self._take_on(agent, nursery)
                        if agent.name in self._supervised:
                            self._supervised[agent.name].changed.set()
                    self._complete.set()
                    await listener.wait()

    async def _take_on(self, agent: Agent, nursery: trio.Nursery) -> None:
        """Open an agent's sockets and begin to supervise it; when they cannot be opened, that is its own trouble."""
        try:
            desk: Desk = await nursery.start(self._serve, agent)
        except (Refusal, OSError) as exc:
            self._agents.observe(agent.name, "crashed", str(exc))
            log.error("cannot serve %s: %s", agent.name, exc, extra={"agent": agent.name})
            return
        supervised = self._supervised[agent.name] = Supervised(agent.name, desk, self._dirs(agent.name))
        nursery.start_soon(self._supervise, supervised)

    async def kill(self, name: AgentName, actor: AgentName) -> None:
        """End an agent now and keep it down. Raises Refusal for the manager itself and for unknown names."""
        if name == MANAGER and actor == MANAGER:
            raise Refusal("refused", f"cannot kill {name}: the manager does not end itself; ask the operator")
        await self._agents.want(name, "down", actor)
        supervised = self._supervised.get(name)
        if supervised is not None and (running := await supervised.now_running()) is not None:
            running.kill()
            await supervised.ended.wait()

    def running(self) -> list[AgentName]:
        """The agents whose container runs now."""
        return [supervised.name for supervised in self._supervised.values() if supervised.running is not None]

    async def drain(self, patience_s: float) -> dict[str, str]:
        """End every agent: at its turn's edge, or by force after `patience_s`. Returns how each one ended."""
        self._draining = True
        ends: dict[str, str] = {}
        if self._serving:
            # A daemon that has just begun may not have looked for the agents of the one before.
            await self._complete.wait()
        async with trio.open_nursery() as nursery:
            for supervised in self._supervised.values():
                nursery.start_soon(self._drain_one, supervised, patience_s, ends)
        for agent in await self._agents.all():
            if agent.name not in self._supervised:
                await self._end_unserved(agent.name, ends)
        return ends

    async def _end_unserved(self, name: AgentName, ends: dict[str, str]) -> None:
        """End what an earlier daemon left of an agent whose sockets this one could not open."""
        if running := self._driver.find(name, self._dirs(name)):
            running.kill()
            await running.wait()
            self._driver.forget(name)
            ends[name] = "killed"

    async def _drain_one(self, supervised: Supervised, patience_s: float, ends: dict[str, str]) -> None:
        if await supervised.now_running() is None:
            return
        self._agents.observe(supervised.name, "stopping", "finishes its turn")
        supervised.desk.ask_to_stop()
        with trio.move_on_after(patience_s) as scope:
            await supervised.ended.wait()
        if scope.cancelled_caught and supervised.running is not None:
            supervised.running.kill()
            await supervised.ended.wait()
        ends[supervised.name] = "killed" if scope.cancelled_caught else "finished"

    async def _supervise(self, supervised: Supervised) -> None:
        backoff_s = RESTART_FIRST_S
        await self._adopt(supervised)
        while True:
            agent = await self._agents.get(supervised.name)
            if agent.wanted == "down" or self._draining:
                self._agents.observe(agent.name, "down", sandbox=self._driver.sandbox)
            elif reason := self._may_run(agent):
                self._agents.observe(agent.name, "down", reason, sandbox=self._driver.sandbox)
            else:
                began = trio.current_time()
                await self._run(supervised)
                steady = trio.current_time() - began > STEADY_S
                backoff_s = RESTART_FIRST_S if steady else min(backoff_s * 2, RESTART_LIMIT_S)
                with trio.move_on_after(backoff_s):
                    await self._wait_not_wanted(supervised)
                continue
            await self._wait_changed(supervised)

    async def _wait_changed(self, supervised: Supervised) -> None:
        await supervised.changed.wait()
        supervised.changed = trio.Event()

    async def _wait_not_wanted(self, supervised: Supervised) -> None:
        while (await self._agents.get(supervised.name)).wanted != "down" and not self._draining:
            await self._wait_changed(supervised)

    async def _adopt(self, supervised: Supervised) -> None:
        """Go on with an agent that outlived the daemon before, or tell how it ended meanwhile."""
        name = supervised.name
        if running := self._driver.find(name, supervised.dirs):
            supervised.begin(running)
            supervised.looked.set()
            log.info("adopted %s (pid %d)", name, running.pid, extra={"agent": name})
            await self._store.insist(lambda tx: tx.emit("agent_adopted", SYSTEM, name, pid=running.pid))
            self._agents.observe(name, "starting", "waits for its hello", sandbox=self._driver.sandbox)
            if (await self._agents.get(name)).wanted == "down":
                running.kill()
            await self._watch(supervised, running)
            return
        supervised.looked.set()
        if missed := self._driver.missed_exit(name):
            await self._tell_end(name, missed, "while the daemon was away")

    async def _run(self, supervised: Supervised) -> None:
        name = supervised.name
        async with supervised.beginning:
            if self._draining or (await self._agents.get(name)).wanted == "down":
                return
            self._agents.observe(name, "starting", sandbox=self._driver.sandbox)
            try:
                running = await self._driver.start(name, supervised.dirs)
            except OSError as exc:
                self._agents.observe(name, "crashed", f"cannot be started: {exc}")
                log.error("cannot start %s: %s", name, exc, extra={"agent": name})
                return
            supervised.begin(running)
        await self._store.insist(lambda tx: tx.emit("agent_started", SYSTEM, name, pid=running.pid))
        await self._watch(supervised, running)

    async def _watch(self, supervised: Supervised, running: Running) -> None:
        hung = ""

        async def end_hung() -> None:
            nonlocal hung
            hung = await supervised.desk.hung()
            running.kill()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(end_hung)
            exit_ = await running.wait()
            nursery.cancel_scope.cancel()
        supervised.running = None
        self._driver.forget(supervised.name)
        await self._tell_end(supervised.name, exit_, "", hung)
        supervised.ended.set()

    async def _tell_end(self, name: AgentName, exit_: Exit, when: str, hung: str = "") -> None:
        agent = await self._agents.get(name)
        expected = exit_.code == 0 or agent.wanted == "down" or self._draining
        detail = "" if expected else f"was ended: {hung}" if hung else f"ended with code {exit_.code} {when}".strip()
        self._agents.observe(name, "down" if expected else "crashed", detail)

        def write(tx: Transaction) -> None:
            tx.emit("agent_ended", SYSTEM, name, code=exit_.code, expected=expected, when=when, hung=hung)
            if expected:
                self._put_back(tx, name)
            if not expected and name != MANAGER:
                text = f"container_crash: {name} {detail}. Its last words: {quoted(self._driver.last_words(name))}"
                put_message(tx, SYSTEM, MANAGER, parse_body(text))

        await self._store.insist(write)
        if not expected:
            log.warning("%s %s", name, detail, extra={"agent": name})
