"""The health gate: an agent whose change was taken shows that it comes up with it, before the change stays.

Its container runs, its harness says hello, and its program starts and reaches the hive's tools. Until then it takes no
turn, so that what comes to nothing costs no message a try, and nobody is told of its crash.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import trio

from hive_core.procedures.coming_up import End, how_it_came_up
from hive_core.procedures.desk import CheckEnd
from hive_core.procedures.supervise import Supervisor, Tools
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.visible import quoted
from hive_core.protocol.words import AgentName
from hive_core.services.agents import LIVE
from hive_core.store.bus import WANTED

HEALTHY = "healthy"
CANARY = "This is a test of your configuration, before it stays. Answer with the one word ready, and call no tool."
OF_THE_PROVIDER = frozenset({"rate_limited", "overloaded", "authentication", "billing"})


def unproven(why: str) -> str:
    return f"unproven: {why}"


def is_healthy(proof: str) -> bool:
    """Whether it came up, also where something beside it did not."""
    return proof.startswith(HEALTHY)


class Unhealthy(Refusal):
    """It has not come up. why: what was seen, with its last words."""

    def __init__(self, name: AgentName, why: str) -> None:
        super().__init__("failed", f"cannot keep the change of {name}: {why}")
        self.why = why


class Trial:
    """Of one agent, from its rest on. one: None where it is not served, which proves nothing."""

    def __init__(self, tools: Tools, name: AgentName, one: Supervisor | None) -> None:
        self._tools = tools
        self._name = name
        self._one = one
        self._starts = 0  # before it was begun on trial
        self._former: dict[str, Any] | None = None

    @asynccontextmanager
    async def at_rest(self) -> AsyncIterator[None]:
        """Its container ended at its turn's edge; when this is left, it is started on trial.

        Raises Refusal where nobody can say whether one runs, and when it was destroyed.
        """
        async with self._rest(at_once=False) as one:
            if one is not None:
                one.begin_trial()
                self._starts = one.starts
            yield
            if one is not None:
                # What was seen until now, also why it might not be started, says nothing of this one.
                self._tools.agents.observe(self._name, "starting", "on trial")

    async def begin_anew(self) -> None:
        """What runs of it is ended at its turn's edge, and it is started on trial."""
        async with self.at_rest():
            pass

    @asynccontextmanager
    async def back(self) -> AsyncIterator[None]:
        """Its container ended at once; when this is left, it is started as any other, and the trial is over."""
        async with self._rest(at_once=True) as one:
            if one is not None:
                self._tools.agents.observe(self._name, "starting", "is taken back to what it ran on before")
            yield
            if one is not None:
                one.end_trial()

    @asynccontextmanager
    async def _rest(self, at_once: bool) -> AsyncIterator[Supervisor | None]:
        if (one := self._one) is None:
            yield None
            return
        async with one.at_rest(at_once):
            if one.gone.is_set():
                raise Refusal("conflict", f"cannot go on with {self._name}: it was destroyed meanwhile")
            yield one
        one.changed.set()

    async def prove(self, former: dict[str, Any] | None) -> str:
        """How it was proven: healthy, or unproven and why. Raises Unhealthy when it does not come up.

        former: the settings that it had before. What might not run here with those either proves nothing.
        """
        self._former = former
        if (one := self._one) is None:
            return unproven("it is not served now")
        proof = await self._prove(one)
        one.prove()
        return proof

    async def _prove(self, one: Supervisor) -> str:
        with self._tools.store.bus.listen(LIVE, WANTED) as self._listener:
            limit_s = self._tools.limits.hello_s
            ended = await self._until_hello(one, limit_s)
            if ended is None:
                raise await self._failure(f"it said no hello within {limit_s:.0f} s (hello_s)")
            if ended is End.UP:
                return await self._check(one)
        return await self._not_up(ended)

    async def _until_hello(self, one: Supervisor, limit_s: float) -> End | None:
        """None: it took longer than that. The time while others start first does not count."""
        with trio.CancelScope() as patience:
            while (end := await how_it_came_up(self._tools, one, self._starts)) is None:
                if one.starts > self._starts and patience.deadline == float("inf"):
                    patience.deadline = trio.current_time() + limit_s
                await self._listener.wait()
            return end
        return None

    async def _check(self, one: Supervisor) -> str:
        limits = self._tools.limits
        proof = await self._ask(one, None, f"{limits.init_s:.0f} s (init_s)", limits.init_s)
        return await self._canary(one) if limits.canary_turn and is_healthy(proof) else proof

    async def _canary(self, one: Supervisor) -> str:
        """A turn with a fixed prompt. What is no fault of the agent's, but of the model's provider, proves nothing."""
        if (closed := self._tools.agents.access.closed(self._name)) is not None:
            return unproven(f"no canary turn could be taken: {closed.sentence}")
        limit_s = self._tools.limits.canary_s
        return await self._ask(one, CANARY, f"{limit_s:.0f} s (canary_s)", limit_s)

    async def _ask(self, one: Supervisor, prompt: str | None, within: str, limit_s: float) -> str:
        """Ask the harness for a check, for as long as it is up."""
        end, told = End.UP, list[CheckEnd | None]()

        async def ask(scope: trio.CancelScope) -> None:
            told.append(await one.desk.check(prompt))
            scope.cancel()

        with trio.move_on_after(limit_s):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask, nursery.cancel_scope)
                while (end := await how_it_came_up(self._tools, one, self._starts) or End.UP) is End.UP:
                    await self._listener.wait()
                nursery.cancel_scope.cancel()
        if not told:
            if end is not End.UP:
                return await self._not_up(end)
            if prompt is not None:
                return unproven(f"its canary turn did not end within {within}")
            raise await self._failure(f"its program said nothing of itself within {within}")
        if (checked := told[0]) is None:
            return unproven("its harness is of an older release, and cannot be asked")
        if not checked.error:
            gone = ", ".join(checked.without)
            return f"{HEALTHY}, but without its MCP servers {gone}, which do not start" if gone else HEALTHY
        if prompt is None:
            raise await self._failure(f"its program does not come up: {checked.error}")
        if checked.reason in OF_THE_PROVIDER:
            return unproven(f"its canary turn could not be taken: {checked.error}")
        raise await self._failure(f"its canary turn did not end well: {checked.error}")

    async def _not_up(self, end: End) -> str:
        if end is End.FAILED:
            live = self._tools.agents.live(self._name)
            agent = await self._tools.agents.get(self._name)
            if live.state == "down" and self._tools.may_run(replace(agent, settings=self._former)) is not None:
                return unproven(f"it may not run here: {live.detail}")
            raise await self._failure(f"it {live.detail}" if live.state == "crashed" else live.detail)
        if self._tools.draining:
            await trio.sleep_forever()  # this daemon ends; the next one tries it again
        return unproven("it is kept down")

    async def _failure(self, why: str) -> Unhealthy:
        last_words = ""
        with suppress(Refusal, OSError):
            last_words = (await self._tools.driver.last_words(self._name)).strip()
        said = f"; its last words: {quoted(last_words)}" if last_words else ""
        return Unhealthy(self._name, f"{why}{said}")
