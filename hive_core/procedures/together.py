"""Several waiting cards approved by one click, each bound to what was shown of it, and each with its own end."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import trio

from hive_core.procedures.gate import Gate
from hive_core.protocol.effect import is_for_itself
from hive_core.protocol.refusal import Refusal
from hive_core.services.approvals import Approval, Approvals
from hive_core.services.events import events_after
from hive_core.store.bus import EVENTS
from hive_core.store.door import Store

TOGETHER_LIMIT = 100


class Click(NamedTuple):
    """An approval, and the digest of what was shown of it."""

    approval_id: int
    digest: str


class Outcome(NamedTuple):
    """How one of them stands: as it is now, or why it was not approved."""

    click: Click
    approval: Approval | None
    refusal: Refusal | None

    def to_wire(self) -> dict[str, Any]:
        if self.approval is not None:
            return self.approval.to_wire()
        assert self.refusal is not None
        return {"id": self.click.approval_id, "error": self.refusal.to_wire()}


Tell = Callable[[dict[str, Any]], Awaitable[None]]


class Together:
    def __init__(self, store: Store, approvals: Approvals, gate: Gate) -> None:
        self._store = store
        self._approvals = approvals
        self._gate = gate

    async def approve(
        self,
        clicks: Sequence[Click],
        actor: str,
        origin: str | None = None,
        patience_s: float | None = None,
        tell: Tell | None = None,
    ) -> list[Outcome]:
        """Approve each as Gate.approve does, and wait for all of them; one that is refused hinders none.

        tell: called with {"id", "agent", "step", "step_at_ms"} for each step of each, in order.

        Raises Refusal("usage") for none, for too many, for one twice, for cards of more than one kind, and
        for one that is approved by itself.
        """
        await self._check(clicks)
        seq = await self._store.last_seq()
        # One after the other, so that they are carried out in the order in which they are named.
        outcomes = {click.approval_id: await self._click(click, actor, origin) for click in clicks}

        async def watch(click: Click) -> None:
            approval = await self._approvals.wait_settled(click.approval_id)
            outcomes[click.approval_id] = Outcome(click, approval, None)

        ended = trio.Event()
        async with trio.open_nursery() as telling:
            if tell is not None:
                telling.start_soon(self._tell_steps, set(outcomes), seq, ended, tell)
            with trio.move_on_after(math.inf if patience_s is None else patience_s):
                async with trio.open_nursery() as nursery:
                    for click in clicks:
                        if outcomes[click.approval_id].approval is not None:
                            nursery.start_soon(watch, click)
            ended.set()
        return [outcomes[click.approval_id] for click in clicks]

    async def _check(self, clicks: Sequence[Click]) -> None:
        cannot = "cannot approve them together"
        if not clicks:
            raise Refusal("usage", "cannot approve: none is chosen; choose one or more")
        if len(clicks) > TOGETHER_LIMIT:
            raise Refusal("usage", f"{cannot}: they are {len(clicks):,}, and {TOGETHER_LIMIT} is the limit; take fewer")
        if len({click.approval_id for click in clicks}) != len(clicks):
            raise Refusal("usage", f"{cannot}: one is there twice; name each once")
        kinds: dict[str, int] = {}
        for click in clicks:
            approval = await self._approvals.get(click.approval_id)
            kinds.setdefault(approval.kind, approval.id)
            if len(clicks) > 1 and is_for_itself(approval.effect):
                why = f"{approval.id} gives {approval.agent} the host's network; approve that by itself"
                raise Refusal("usage", f"{cannot}: {why}")
        if len(kinds) > 1:
            (one, first), (other, second), *_ = kinds.items()
            why = f"{first} is of the kind {one} and {second} of the kind {other}"
            raise Refusal("usage", f"{cannot}: {why}; approve each kind by itself")

    async def _click(self, click: Click, actor: str, origin: str | None) -> Outcome:
        try:
            approval = await self._gate.approve(click.approval_id, click.digest, actor, origin, patience_s=0)
        except Refusal as refusal:
            return Outcome(click, None, refusal)
        return Outcome(click, approval, None)

    async def _tell_steps(self, numbers: set[int], seq: int, ended: trio.Event, tell: Tell) -> None:
        """Tell each step after an event, until all that happened before the end is told."""
        with self._store.bus.listen(EVENTS) as listener:
            while True:
                is_over = ended.is_set()
                page = await events_after(self._store, seq)
                for event in page:
                    seq, data = event["seq"], event["data"]
                    if event["kind"] == "approval_step" and data["approval"] in numbers:
                        row = {"id": data["approval"], "agent": event["agent"]}
                        await tell({**row, "step": data["step"], "step_at_ms": event["at_ms"]})
                if not page and is_over:
                    return
                if not page:
                    await _first_of(listener.wait, ended.wait)


async def _first_of(*waits: Callable[[], Awaitable[object]]) -> None:
    """Until one of them returns."""

    async def run(wait: Callable[[], Awaitable[object]], scope: trio.CancelScope) -> None:
        await wait()
        scope.cancel()

    async with trio.open_nursery() as nursery:
        for wait in waits:
            nursery.start_soon(run, wait, nursery.cancel_scope)
