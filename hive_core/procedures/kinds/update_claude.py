"""Another claude than agents run. payload: {"path", "version", "sha256", "bytes", "mtime_ns", "before"}, where `before`
is the sha256 of what they run, None where that is not pinned.

It is copied, proven by one agent that comes up with it, and taken by the others at their turns' edges, as an update is.
"""

from __future__ import annotations

import os
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import trio

from hive_core.containers.program_check import check_program, parse_version
from hive_core.effects import Effect, Line, changed
from hive_core.procedures.kinds.kind import Asking, Done, Step
from hive_core.procedures.pinned_claude import PinnedClaude
from hive_core.procedures.reconcile import Reconciler
from hive_core.procedures.trials import unproven
from hive_core.program_copies import Seen, is_whole, look_at
from hive_core.programs import how_to_get_claude, native_of
from hive_core.protocol.paths import explain
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.visible import hides
from hive_core.protocol.words import MANAGER, NOTE_LIMIT_BYTES, OPERATOR, SYSTEM, AgentName, parse_text, shown
from hive_core.services.agents import Agents
from hive_core.services.approvals import Approval, Request, Shown
from hive_core.services.claude_pins import add_pin, was_asked_for
from hive_core.store.bus import DEPLOYED
from hive_core.store.writer import Transaction

COPYING, PROVING = "copying", "proving"
_UNKNOWN = "what else it does: of a program its version and its flags are looked at"


class UpdateClaude:
    kind = "claude"

    def __init__(self, asking: Asking, agents: Agents, reconciler: Reconciler, pinned: PinnedClaude) -> None:
        self._asking = asking
        self._agents = agents
        self._reconciler = reconciler
        self._pinned = pinned

    async def request(self, given_path: object, given_reason: object, former: bool = False) -> dict[str, Any]:
        """The operator asks to run a program, None: the one that is installed; or the `former`, which agents ran
        before; `{"approval": id}`. Raises Refusal."""
        reason = parse_text(given_reason or "the operator asks for it", "reason", NOTE_LIMIT_BYTES)
        self._insist_that_it_is_pinned()
        if not former:
            return await self._ask(OPERATOR, self._candidate(given_path), reason)
        if given_path is not None:
            raise Refusal("usage", "cannot update claude to two programs: give a path, or ask for the former one")
        if (path := await self._pinned.former()) is None:
            raise Refusal("not_found", "cannot update claude: there is no copy of one that agents ran before")
        return await self._ask(OPERATOR, path, reason)

    async def look(self) -> None:
        """Ask for what is installed now, where that is another program than agents run and nobody was asked yet; where
        something else decides what they run, tell that it is another."""
        try:
            if self._pinned.hindrance:
                await self._pinned.note_installed()
                return
            found = await self._pinned.has_changed()
            if found is None or await was_asked_for(self._asking.store, await self._pinned.digest(found)):
                return
            await self._ask(SYSTEM, found, "the claude that is installed here is another one than agents run")
        except (Refusal, OSError) as exc:
            why = explain(exc) if isinstance(exc, OSError) else exc.message
            await self._asking.store.write(lambda tx: tx.emit("claude_not_looked_at", SYSTEM, None, why=why))

    async def _ask(self, requested_by: AgentName, path: Path, reason: str) -> dict[str, Any]:
        found = await self._shown(path)

        def make(_: Transaction) -> Request:
            return Request(self.kind, MANAGER, requested_by, reason, found)

        return await self._asking.put(requested_by, None, f"request_{self.kind}", "another claude", make)

    def _insist_that_it_is_pinned(self) -> None:
        if self._pinned.hindrance:
            raise Refusal("refused", f"cannot update claude: {self._pinned.hindrance}")

    def _candidate(self, given: object) -> Path:
        if given is None:
            if (found := self._pinned.find()) is None:
                raise Refusal("not_found", f"cannot update claude: {how_to_get_claude(None)}")
            return found
        if not isinstance(given, str) or not os.path.isabs(given) or hides(given):
            why = "it must be an absolute path, of visible characters"
            raise Refusal("usage", f"cannot take {shown(given)} as the path of claude: {why}")
        return native_of(Path(given))

    async def _shown(self, path: Path) -> Shown:
        pin, pinned = self._pinned.pin, self._pinned
        try:
            seen = look_at(path)
            if not is_whole(path) or not os.access(path, os.X_OK):
                why = f"{path} is not a program in one file, of which a copy could be kept; give the native executable"
                raise Refusal("refused", f"cannot update claude: {why}")
            sha256 = await pinned.digest(path)
            if pin is not None and pin.sha256 == sha256 and not pinned.missing:
                raise Refusal("refused", f"cannot update claude: {path} is what agents run already ({pin.version})")
            found = await trio.to_thread.run_sync(partial(check_program, path, inside=pinned.inside))
            if look_at(path) != seen:
                raise Refusal("conflict", f"cannot update claude: {path} was changed just now; ask again")
        except OSError as exc:
            raise Refusal("not_found", f"cannot update claude: {explain(exc)}") from None
        version = parse_version(found[0].get("version", ""))
        before = (None, None, None) if pin is None else (pin.version, pin.sha256, str(pin.source))
        lines = [Line("claude", before[0], version if version != before[0] else f"{version}, another build", wide=True)]
        lines += changed("sha256", before[1], sha256) + changed("found at", before[2], str(path))
        lines += [Line("hive doctor says", None, f"{one['check']}: {one['message']}") for one in found]
        about = {"path": str(path), "version": version, "sha256": sha256, "bytes": seen.size_bytes}
        return Shown({**about, "mtime_ns": seen.mtime_ns, "before": before[1]}, Effect(lines, [_UNKNOWN]).to_wire())

    def title(self, approval: Approval) -> str:
        return f"claude {approval.payload['version']} for every agent"

    async def show_now(self, approval: Approval) -> Shown:
        payload, pin = approval.payload, self._pinned.pin
        path = Path(payload["path"])
        try:
            is_same = look_at(path) == Seen(payload["bytes"], payload["mtime_ns"])
        except OSError as exc:
            raise Refusal("not_found", f"cannot update claude: {explain(exc)}") from None
        if is_same and payload["before"] == (None if pin is None else pin.sha256):
            return Shown(payload, approval.effect)
        return await self._shown(path)

    async def carry_out(self, approval: Approval, step: Step) -> Done:
        payload = approval.payload
        version, sha256, source = payload["version"], payload["sha256"], Path(payload["path"])
        self._insist_that_it_is_pinned()
        await step(COPYING)
        try:
            path = await self._pinned.keep(source, version, sha256)
        except OSError as exc:
            raise Refusal("failed", f"cannot copy {source}: {explain(exc)}") from None
        await step(PROVING)
        proof = await self._prove(path)
        self._pinned.use(path)

        def write(tx: Transaction) -> None:
            seen = Seen(payload["bytes"], payload["mtime_ns"])
            add_pin(tx, approval.resolved_by or OPERATOR, version, sha256, source, seen, approval.id)
            tx.wake(DEPLOYED)  # whoever runs on the one before is replaced at its turn's edge

        held = AsyncExitStack()
        held.push_async_callback(self._pinned.know)
        return Done(write, proof, held)

    async def _prove(self, path: Path) -> str:
        """One agent comes up with it, which no other one is started on before; or it is taken back. Raises
        Unhealthy."""
        former = self._pinned.path
        if former is None or (name := await self._who_tries()) is None:
            return unproven("no agent runs claude now")
        agent = await self._agents.get(name)
        async with self._reconciler.trial(name) as trial:
            try:
                async with trial.at_rest():
                    self._pinned.use(path, name)
                return f"{await trial.prove(agent.settings)} ({name} tried it)"
            except Exception:
                async with trial.back():
                    self._pinned.use(former, name)
                raise

    async def _who_tries(self) -> AgentName | None:
        """An agent that runs claude now: one that need not be waited for, and where there is another not the manager,
        who hears of trouble."""
        running = set(self._reconciler.running())
        names = [
            agent.name
            for agent in await self._agents.all()
            if agent.name in running and (agent.settings or {}).get("program") == "claude" and agent.wanted == "up"
        ]
        busy = {name: self._agents.live(name).state != "idle" for name in names}
        return min(names, key=lambda name: (busy[name], name == MANAGER, name), default=None)

    async def closed(self, approval: Approval) -> None:
        pass
