"""Wanted and observed: one task per agent closes the difference between what should run and what runs."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial

import trio

from hive_core.containers.driver import Driver
from hive_core.containers.mounts import AgentDirs
from hive_core.git.agent_locks import AgentLocks
from hive_core.limits import Limits
from hive_core.procedures.desk import Desk
from hive_core.procedures.starts import Starts
from hive_core.procedures.supervise import KILL_PATIENCE_S, Supervisor, Tools
from hive_core.procedures.trials import Trial
from hive_core.procedures.updates import Updates
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import MANAGER, AgentName
from hive_core.services.agents import LIVE, Agent, Agents
from hive_core.services.container_states import ContainerStates, ask_for_restart, forgive
from hive_core.store.bus import WANTED
from hive_core.store.door import Store
from hive_core.store.writer import Transaction

log = logging.getLogger(__name__)
UNSERVED_REST_S = 30.0  # before the sockets of an agent that could not be opened are tried again


class Reconciler:
    """Starts, adopts, restarts and ends agents.

    may_run   the sentence that says why an agent may not be started here, or None
    put_back  closes the running turn of an agent that was ended on purpose
    locks     who holds an agent's keeps its container from being forgotten
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
        limits: Limits | None = None,
        clock: Callable[[], float] = time.time,
        locks: AgentLocks | None = None,
    ) -> None:
        limits = limits or Limits()
        self._locks = locks or AgentLocks()
        states, starts = ContainerStates(store, limits, clock), Starts(limits.starts_at_once)
        self._tools = Tools(store, agents, driver, self._given, may_run, put_back, limits, states, starts)
        self._store = store
        self._agents = agents
        self._driver = driver
        self._dirs = dirs
        self._serve = serve
        self._supervised: dict[AgentName, Supervisor] = {}
        self.updates = Updates(self._tools, self._supervised)
        self._leaving: set[AgentName] = set()  # agents that are being destroyed
        self._unserved: set[AgentName] = set()  # whose sockets could not be opened
        self.on_trial: set[AgentName] = set()  # whose change is tried, also by a daemon before that died in it
        self._serving = False
        self._complete = trio.Event()  # every agent is supervised

    async def _given(self, name: AgentName) -> AgentDirs:
        """What an agent's container has of the host as its settings are now."""
        return replace(self._dirs(name), network=(await self._agents.get(name)).network)

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep what is wanted true, until cancelled. Cancelling it ends no agent."""
        self._serving = True
        task_status.started()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.updates.serve, self._complete)
            with self._store.bus.listen(WANTED) as listener:
                while True:
                    rest_s = float("inf")
                    for agent in await self._agents.all():
                        if agent.settings is None or agent.name in self._leaving:
                            continue
                        if agent.name not in self._supervised:
                            await nursery.start(self._take_on, agent)
                        if agent.name in self._supervised:
                            self._supervised[agent.name].changed.set()
                        else:
                            rest_s = UNSERVED_REST_S
                    self._complete.set()
                    with trio.move_on_after(rest_s):
                        await listener.wait()

    async def _take_on(self, agent: Agent, task_status: trio.TaskStatus[None]) -> None:
        """Open an agent's sockets and supervise it; when they cannot be opened, that is its own trouble."""
        name = agent.name
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as rooms:
                try:
                    desk: Desk = await rooms.start(self._serve, agent)
                except (Refusal, OSError) as exc:
                    self._unserved.add(name)
                    self._agents.observe(name, "crashed", str(exc))
                    log.error("cannot serve %s: %s", name, exc, extra={"agent": name})
                    task_status.started()
                    return
                self._unserved.discard(name)
                supervisor = self._supervised[name] = Supervisor(self._tools, name, desk)
                supervisor.let_go = scope.cancel
                if name in self.on_trial:
                    supervisor.begin_trial()
                self._store.bus.publish([LIVE])
                desk.call_at_edges(partial(self.updates.at_edge, supervisor))
                task_status.started()
                try:
                    await supervisor.serve()
                finally:
                    self._supervised.pop(name, None)
        supervisor.gone.set()

    async def leave(self, name: AgentName, at_once: bool) -> None:
        """End an agent, which is wanted down, and serve it no more: at its turn's edge, or `at_once`.

        It is not taken on again before `left`. Again is fine. Raises Refusal, "unavailable" while whoever would end it
        is away.
        """
        if self._serving:
            await self._complete.wait()
        self._leaving.add(name)
        if (supervised := self._supervised.get(name)) is not None:
            if await supervised.now_running() is not None:
                supervised.desk.ask_to_stop()
                if at_once:
                    supervised.kill()
                await supervised.ended.wait()
            supervised.let_go()
            await supervised.gone.wait()
        # Also what was out of sight while it was served.
        await self._end_unserved(name, {})
        self.updates.forget(name)
        self.on_trial.discard(name)  # also of a daemon before: whoever is revived takes turns
        async with self._locks.of(name):  # a change of its that is being switched to comes to its end first
            await self._driver.destroy(name)

    @asynccontextmanager
    async def at_rest(self, name: AgentName, at_once: bool = False) -> AsyncIterator[None]:
        """An agent's container ended, at its turn's edge or `at_once`, and started again only when this is left.

        Raises Refusal where the agent is not served.
        """
        if self._serving:
            await self._complete.wait()
        if (supervised := self._supervised.get(name)) is None or name in self._leaving:
            raise Refusal("conflict", f"cannot end {name}: it is not served now; `hive list` says why")
        async with supervised.at_rest(at_once):
            if supervised.gone.is_set():
                raise Refusal("conflict", f"cannot go on with {name}: it was destroyed meanwhile")
            yield

    @asynccontextmanager
    async def trial(self, name: AgentName) -> AsyncIterator[Trial]:
        """Let an agent show that it comes up after a change. When this is left, it is as it is to stay.

        Raises Refusal for one that is being destroyed.
        """
        if self._serving:
            await self._complete.wait()
            await self._taken_on(name)
        if name in self._leaving:
            raise Refusal("conflict", f"cannot go on with {name}: it is being destroyed")
        supervised = self._supervised.get(name)
        self.on_trial.add(name)
        try:
            yield Trial(self._tools, name, supervised)
        finally:
            self.end_trial(name)

    async def _taken_on(self, name: AgentName) -> None:
        """Until an agent that may have just been created is served, or cannot be; or is none any more."""
        with suppress(Refusal), self._store.bus.listen(LIVE, WANTED) as listener:
            while name not in self._supervised and name not in self._leaving | self._unserved:
                if (await self._agents.get(name)).settings is None:
                    return
                await listener.wait()

    def end_trial(self, name: AgentName) -> None:
        """An agent is as it is to stay. The same again does nothing."""
        if name not in self.on_trial:
            return
        self.on_trial.discard(name)
        if (supervised := self._supervised.get(name)) is not None:
            supervised.end_trial()

    def before_switch(self, hear: Callable[[AgentName], Awaitable[object]]) -> None:
        """Have somebody hear of each agent that is about to be started in a container of another shape."""
        self._tools.before_switch = hear

    def left(self, name: AgentName) -> None:
        """An agent of that name may be taken on again."""
        self._leaving.discard(name)
        self._store.bus.publish([WANTED])

    def hasten(self, name: AgentName) -> None:
        """End what is only asked to end."""
        if (supervised := self._supervised.get(name)) is not None:
            supervised.kill()

    def lingers(self, name: AgentName) -> str:
        """That an agent was killed some time ago and has not gone; else an empty text."""
        supervised = self._supervised.get(name)
        return "" if supervised is None else supervised.lingers()

    def trouble(self, name: AgentName) -> str:
        """Why an agent cannot be seen to now, which is tried again; else an empty text."""
        supervised = self._supervised.get(name)
        return "" if supervised is None else supervised.trouble()

    async def kill(self, name: AgentName, actor: AgentName) -> None:
        """End an agent now and keep it down. Raises Refusal for the manager itself and for unknown names."""
        if name == MANAGER and actor == MANAGER:
            raise Refusal("refused", f"cannot kill {name}: the manager does not end itself; ask the operator")
        await self._agents.want(name, "down", actor)
        if (supervised := self._supervised.get(name)) is None or await self._end_now(supervised):
            return
        why = supervised.lingers() or "its start has not come back; its disk may hang"
        raise Refusal("unavailable", f"cannot end {name} at once: {why}. It is kept down, and ends with that")

    async def restart(self, name: AgentName, actor: AgentName) -> None:
        """Start an agent anew, at its turn's edge; at once where none of it runs. hm1nd is told when that has come up.

        Raises Refusal for unknown names, for one that is kept down, and for one that is not served.
        """
        agent, supervised = await self._agents.get(name), self._supervised.get(name)
        if agent.wanted == "down":
            raise Refusal("conflict", f"cannot restart {name}: it is kept down; start it")
        if supervised is None:
            raise Refusal("unavailable", f"cannot restart {name}: the hive does not serve it now; `hive list` says why")

        def write(tx: Transaction) -> None:
            forgive(tx, name)
            ask_for_restart(tx, name, actor)
            tx.emit("restart_asked", actor, name)
            tx.wake(WANTED)

        await self._store.write(write)
        if supervised.running is not None:
            supervised.desk.ask_to_stop()

    async def logs(self, name: AgentName, lines: int) -> list[str]:
        """The last lines that an agent printed, the oldest first. Raises Refusal for unknown names."""
        return await self._driver.logs((await self._agents.get(name)).name, lines)

    async def _end_now(self, supervised: Supervisor) -> bool:
        """Kill what runs of an agent; whether that has gone, which is not waited for for long."""
        with trio.move_on_after(KILL_PATIENCE_S):
            if await supervised.now_running() is not None:
                supervised.kill()
                await supervised.ended.wait()
            return True
        return False

    def running(self) -> list[AgentName]:
        """The agents whose container runs now."""
        return [supervised.name for supervised in self._supervised.values() if supervised.running is not None]

    async def drain(self, patience_s: float) -> dict[str, str]:
        """End every agent: at its turn's edge, or by force after `patience_s`. Returns how each one ended."""
        self._tools.draining = True
        ends: dict[str, str] = {}
        if self._serving:
            # A daemon that has just begun may not have looked for the agents of the one before.
            await self._complete.wait()
        async with trio.open_nursery() as nursery:
            for supervised in self._supervised.values():
                nursery.start_soon(self._drain_one, supervised, patience_s, ends)
        for agent in await self._agents.all():
            if agent.name not in self._supervised:
                try:
                    await self._end_unserved(agent.name, ends)
                except (Refusal, OSError) as exc:
                    log.error("%s", exc, extra={"agent": agent.name})
                    ends[agent.name] = "not ended"
        return ends

    async def _end_unserved(self, name: AgentName, ends: dict[str, str]) -> None:
        """End what an earlier daemon left of an agent whose sockets this one could not open. Raises Refusal."""
        if running := await self._driver.find(name, self._dirs(name)):
            running.kill()
            with trio.move_on_after(KILL_PATIENCE_S) as patience:
                await running.wait()
            if patience.cancelled_caught:
                why = f"process {running.pid} was killed and has not gone yet; its disk may hang"
                raise Refusal("unavailable", f"cannot end {name}: {why}")
            await self._driver.forget(name)
            ends[name] = "killed"

    async def _drain_one(self, supervised: Supervisor, patience_s: float, ends: dict[str, str]) -> None:
        with trio.move_on_after(KILL_PATIENCE_S) as looking:
            if await supervised.now_running() is None:
                return
        if looking.cancelled_caught:  # its start hangs
            ends[supervised.name] = "not ended"
            return
        self._agents.observe(supervised.name, "stopping", "finishes its turn")
        supervised.desk.ask_to_stop()
        with trio.move_on_after(patience_s) as patience:
            await supervised.ended.wait()
        if not patience.cancelled_caught:
            ends[supervised.name] = "finished"
        else:
            ends[supervised.name] = "killed" if await self._end_now(supervised) else "not ended"
