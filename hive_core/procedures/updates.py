"""Rolling updates: an agent that runs in another shape than it would be started in now is replaced, a few at a time.

Each at its turn's edge: whoever is between turns at once, the others as they come to one. The first goes alone. The
next follows when the one before has said hello and, where it has mail, stays up for a while. If one does not come up,
the others stay as they are until the operator says so. The manager is the last: until then the one that hears of
trouble is one that is known to run.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping

import trio

from hive_core.procedures.coming_up import End, how_it_came_up
from hive_core.procedures.supervise import Supervisor, Tools
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.visible import counted
from hive_core.protocol.words import MANAGER, OPERATOR, SYSTEM, AgentName
from hive_core.revision import revision
from hive_core.services.agents import AT_REST, LIVE
from hive_core.services.container_states import ask_for_restart, forgive
from hive_core.services.notices import notice, tell_manager
from hive_core.services.post import put_message
from hive_core.store.bus import DEPLOYED, EVENTS, WANTED
from hive_core.store.writer import Transaction

log = logging.getLogger(__name__)
STEADY_S = 10.0  # how long one that has something to do has to stay up before the next is replaced


class Updates:
    """supervised: every agent that is served now."""

    def __init__(self, tools: Tools, supervised: Mapping[AgentName, Supervisor]) -> None:
        self._tools = tools
        self._supervised = supervised
        self._places: set[AgentName] = set()  # who is being replaced in its turn
        self._asked: set[AgentName] = set()  # who is because the operator said so
        self._failed: dict[AgentName, str] = {}  # who did not come up, and with which generation
        self._unfit: set[AgentName] = set()  # who runs, and might not be started again now
        self._proven = False  # one has come up as it is started now
        self._nursery: trio.Nursery | None = None

    @property
    def outdated(self) -> list[AgentName]:
        """The agents that run in another shape than they would be started in now, in the order of replacement."""
        return sorted(filter(self.is_outdated, self._supervised), key=lambda name: (name == MANAGER, name))

    def is_outdated(self, name: AgentName) -> bool:
        """Whether an agent runs in another shape than it would be started in now."""
        one = self._supervised.get(name)
        return one is not None and one.outdated and one.running is not None and not one.on_trial

    def is_failed(self, name: AgentName) -> bool:
        """Whether an agent did not come up when it was replaced, for which the others wait."""
        return name in self._failed

    def forget(self, name: AgentName) -> None:
        """An agent is destroyed: nobody waits for it any more."""
        if self._failed.pop(name, None) is not None:
            self._tools.store.bus.publish([LIVE])

    @property
    def trouble(self) -> str:
        """Why no more agents are replaced, and what lets that go on; empty where nothing is wrong."""
        if not self._failed:
            return ""
        names = sorted(self._failed)
        which = f"{', '.join(names)} did not come up when replaced"
        return f"{which}; `hive update {names[0]}` tries it again, `hive update --all` goes on with the others"

    async def serve(self, complete: trio.Event) -> None:
        """Replace who is outdated, until cancelled. complete: every agent is supervised."""
        await self._load()
        await complete.wait()
        for one in list(self._supervised.values()):
            await one.looked.wait()
        await self._look()
        try:
            async with trio.open_nursery() as self._nursery:
                self._nursery.start_soon(self._follow_deployments)
                with self._tools.store.bus.listen(LIVE, WANTED) as listener:
                    while True:
                        await self._look()
                        for name in self.outdated:
                            if self._tools.agents.live(name).state in AT_REST:
                                self.at_edge(self._supervised[name])
                        await listener.wait()
        finally:
            self._nursery = None

    async def _look(self) -> None:
        """Who may not be started here runs on as it is: its container may be being built, or its program be gone."""
        agents = await self._tools.agents.all() if self.outdated else []
        self._unfit = {agent.name for agent in agents if self._tools.may_run(agent) is not None}

    async def _load(self) -> None:
        """A daemon that starts again goes on with no update that failed; but with one to something else."""
        for name, generation in (await self._tools.states.failed_updates()).items():
            same = True  # where nobody can say, it counts as failed still
            with contextlib.suppress(Refusal, OSError):
                same = generation == await self._tools.generation(name)
            if same:
                self._failed[name] = generation

    async def _follow_deployments(self) -> None:
        """A commit may bring its agent another container, for which the one that runs is outdated."""
        with self._tools.store.bus.listen(DEPLOYED) as listener:
            while True:
                await listener.wait()
                for one in list(self._supervised.values()):
                    try:
                        await one.look_again()
                    except (Refusal, OSError) as exc:  # with what is deployed next it is looked at again
                        log.warning("cannot tell whether %s is outdated: %s", one.name, exc, extra={"agent": one.name})
                self._tools.store.bus.publish([LIVE])

    # -- in turn ------------------------------------------------------------------------------------------------------

    def at_edge(self, one: Supervisor) -> None:
        """An agent is between two turns: if it is its turn to be replaced, it begins no other."""
        if self.is_outdated(one.name) and self._has_place(one.name):
            self._places.add(one.name)
            self._begin(one, one.starts)

    def _has_place(self, name: AgentName) -> bool:
        if self._nursery is None or self._failed or self._tools.draining or name in self._places | self._asked:
            return False
        # Who is paused takes no turn: it is replaced when it goes on.
        waiting = [one for one in self.outdated if one not in self._unfit and self._tools.agents.reason(one) is None]
        if name not in waiting or (name == MANAGER and len(waiting) > 1):
            return False
        return len(self._places) < (self._tools.limits.updates_at_once if self._proven else 1)

    def _begin(self, one: Supervisor, starts: int) -> None:
        assert self._nursery is not None
        if one.running is not None and one.outdated:
            one.desk.ask_to_stop()
        self._nursery.start_soon(self._follow, one, starts)

    async def _follow(self, one: Supervisor, starts: int) -> None:
        """Until it is up, or does not come up. starts: how often it was started before."""
        try:
            with self._tools.store.bus.listen(LIVE, WANTED) as listener:
                while (end := await self._end(one, starts)) is None:
                    await listener.wait()
                if end is End.UP and (await self._tools.agents.get(one.name)).queued:
                    with trio.move_on_after(STEADY_S):
                        while end is End.UP:
                            await listener.wait()
                            end = await self._end(one, starts) or end
            if end is End.FAILED:
                await self._note_failed(one)
            elif end is End.UP:
                self._proven = True
                await self._forget_failed(one.name)
        except Refusal:
            pass  # it was destroyed meanwhile
        finally:
            self._places.discard(one.name)
            self._asked.discard(one.name)
            self._tools.store.bus.publish([LIVE])

    async def _end(self, one: Supervisor, starts: int) -> End | None:
        return await how_it_came_up(self._tools, one, starts)

    async def _note_failed(self, one: Supervisor) -> None:
        name, why = one.name, self._tools.agents.live(one.name).detail
        generation, last_words = await self._wanted_generation(name), ""
        with contextlib.suppress(Refusal, OSError):
            last_words = await self._tools.driver.last_words(name)
        first = name not in self._failed
        self._failed[name], self._proven = generation, False
        log.error("the update to %s stops: %s did not come up: %s", revision(), name, why, extra={"agent": name})
        others = [other for other in self.outdated if other != name]
        way_out = f"`hive update {name}` tries it again" + (", `hive update --all` goes on" if others else "")
        text = f"{name} did not come up when it was replaced by {revision()}: {why}; {way_out}"
        body = notice("update_failed", text, agent=name, revision=revision(), last_words=last_words)
        stay = f"{counted(len(others), 'agent')} stay as they are, since {name} did not come up when it was replaced"

        def write(tx: Transaction) -> None:
            self._tools.states.note_failed_update(tx, name, generation)
            tx.emit("update_failed", SYSTEM, name, revision=revision(), why=why, waiting=len(others))
            for who in (MANAGER, OPERATOR):
                if who != name:
                    put_message(tx, SYSTEM, who, body)
            if others:
                tell_manager(tx, notice("needs_update", stay, agents=others, revision=revision()))

        if first or name in self._asked:
            await self._tools.store.insist(write)

    async def _wanted_generation(self, name: AgentName) -> str:
        """What an agent was to be; what it was begun as the last time, where its driver cannot say."""
        try:
            return await self._tools.generation(name)
        except (Refusal, OSError):
            return await self._tools.states.generation(name) or ""

    async def _forget_failed(self, *names: AgentName) -> None:
        if failed := [name for name in names if self._failed.pop(name, None) is not None]:
            await self._tools.store.insist(lambda tx: self._tools.states.forget_failed_updates(tx, failed))

    # -- what the operator does ---------------------------------------------------------------------------------------

    async def update(self, name: AgentName, actor: AgentName) -> bool:
        """Replace one agent, at its turn's edge; or start it again, where it did not come up.

        False when it runs as it would be started now. Raises Refusal for one that is not there, is kept
        down, or may not be started here.
        """
        agent, one = await self._tools.agents.get(name), self._supervised.get(name)
        if agent.wanted == "down":
            why = f"it is kept down, and is started as it shall be by `hive start {name}`"
            raise Refusal("conflict", f"cannot update {name}: {why}")
        if one is None or self._nursery is None:
            raise Refusal("unavailable", f"cannot update {name}: the hive does not serve it yet; try again in a moment")
        if one.on_trial:
            raise Refusal("conflict", f"cannot update {name}: a change of it is tried just now; ask again after that")
        if one.running is not None and not one.outdated:
            await self._forget_failed(name)
            return False
        if (reason := self._tools.may_run(agent)) is not None:
            raise Refusal("conflict", f"cannot update {name}: {reason}")

        def write(tx: Transaction) -> None:
            forgive(tx, name)
            ask_for_restart(tx, name, actor)
            tx.emit("update_asked", actor, name, revision=revision())
            tx.wake(WANTED)

        await self._tools.store.write(write)
        if name not in self._asked:
            self._asked.add(name)
            if one.running is None:  # what was seen of it before the operator asked does not count
                self._tools.agents.observe(name, "starting")
            self._begin(one, one.starts)
        return True

    async def go_on(self, actor: AgentName) -> list[AgentName]:
        """Replace all who are outdated, a few at a time, though one did not come up; who they are."""
        outdated = self.outdated
        failed = list(self._failed)

        def write(tx: Transaction) -> None:
            self._tools.states.forget_failed_updates(tx, failed)
            tx.emit("update_asked", actor, None, revision=revision(), waiting=len(outdated))

        if outdated or failed:
            await self._tools.store.write(write)
            self._failed.clear()
            self._tools.store.bus.publish([LIVE, EVENTS])
        return outdated
