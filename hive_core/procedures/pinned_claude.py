"""Which claude agents run: a copy of the hive's own, which another one takes the place of by an approval alone.

The first one that is found where an agent needs it is the first pin. Where the program is not the daemon's to choose
(containers that are NixOS systems, and the helper's) it is not pinned: there the system's configuration is the gate.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import trio

from hive_core.config import Config
from hive_core.containers.program_check import version_of
from hive_core.program_copies import Copied, ProgramCopies, Seen, digest_of, is_whole, look_at
from hive_core.programs import find_claude
from hive_core.protocol.paths import explain
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import SYSTEM, AgentName
from hive_core.services.claude_pins import Pin, add_pin, newest_pins, note_source
from hive_core.store.bus import DEPLOYED
from hive_core.store.door import Store

log = logging.getLogger(__name__)
Use = Callable[[Path | None, AgentName | None], None]


def why_unpinned(config: Config) -> str:
    """Why it is not this daemon that chooses which claude agents run, and what does; empty where it is."""
    if config.sandbox == "nixos-container" and not config.unsafe_no_sandbox:
        return "a container has the one that its agent.nix says (hyperhive.claude.package); change it there"
    if config.helper is not None:
        return "the helper starts agents with the one that its own configuration names; change it there"
    return ""


class PinnedClaude:
    """
    path       what agents run; None: there is none that they may
    pin        what it was pinned as, or was seen as where something else decides; None: it is run where it was found
    hindrance  why it is not pinned here, and what decides instead
    """

    def __init__(
        self,
        store: Store,
        state_dir: Path,
        chosen: Path | None,
        *,
        inside: bool = True,
        hindrance: str = "",
        is_helpers: bool = False,
    ) -> None:
        """chosen: see find_claude. inside: a program is looked at in bubblewrap. is_helpers: what is found is what the
        helper starts agents with."""
        self._store = store
        self._copies = ProgramCopies(state_dir)
        self._chosen = chosen
        self.inside = inside
        self.hindrance = hindrance
        self._is_helpers = is_helpers
        self.path: Path | None = None
        self.pin: Pin | None = None
        self._using: list[Use] = []

    def find(self) -> Path | None:
        """The program that is installed here now."""
        return find_claude(self._chosen)

    def when_used(self, *use: Use) -> None:
        """Have somebody know of each other program that agents run from then on."""
        self._using += use

    def use(self, path: Path | None, only: AgentName | None = None) -> None:
        """Agents are started on this from now on, or `only` one that tries it, until they all get theirs anew. Where
        it is to stay, `add_pin` says so."""
        if only is None:
            self.path = path
        for use in self._using:
            use(path, only)

    async def load(self) -> None:
        """Know what agents run. Before any is started."""
        found = self.path = self.find()
        if not self.hindrance:
            try:
                await self._load(found)
            except (Refusal, OSError) as exc:
                log.error("claude could not be kept as a copy: %s", _explained(exc))
        self.use(self.path)

    async def _load(self, found: Path | None) -> None:
        if not (pins := await newest_pins(self._store, 2)):
            await trio.to_thread.run_sync(self._copies.clear, [])  # what a daemon left that died when it made one
            if found is not None and is_whole(found) and await self._is_needed():
                await self._pin_first(found)
            return
        self.pin, self.path = pins[0], None
        # One of the two may run in what a daemon before has left running.
        needed = [self._copies.path_of(pin.version, pin.sha256) for pin in pins]
        await trio.to_thread.run_sync(self._copies.clear, needed)
        if needed[0].exists():
            self.path = needed[0]
        elif found is not None and await self.digest(found) == self.pin.sha256:
            self.path = await self.keep(found, self.pin.version, self.pin.sha256)

    async def serve(self) -> None:
        """Pin what was found as soon as an agent needs it."""
        with self._store.bus.listen(DEPLOYED) as listener:
            while self.pin is None and self.path is not None and not self.hindrance and is_whole(self.path):
                if await self._is_needed():
                    try:
                        await self._pin_first(self.path)
                    except (Refusal, OSError) as exc:  # with what is deployed next it is tried again
                        log.error("claude could not be kept as a copy: %s", _explained(exc))
                    else:
                        self._store.bus.publish([DEPLOYED])
                        return
                await listener.wait()

    async def _is_needed(self) -> bool:
        row = await self._store.row(_NEEDED)
        return row is not None and bool(row["needed"])

    async def _pin_first(self, found: Path) -> None:
        seen = look_at(found)
        copied = await trio.to_thread.run_sync(self._copies.copy, found)
        try:
            version = await trio.to_thread.run_sync(partial(version_of, copied.path, inside=self.inside))
            path = await trio.to_thread.run_sync(self._copies.keep, copied, version)
        except BaseException:
            self._copies.drop(copied)
            raise
        await self._store.write(lambda tx: add_pin(tx, SYSTEM, version, copied.sha256, found, seen))
        await self.know()
        self.use(path)

    async def note_installed(self) -> None:
        """Where the helper's configuration decides what agents run: tell of it once, whenever it is another. It is not
        started: that is not this daemon's to do there."""
        if (found := self.find()) is None or not self._is_helpers:
            return
        seen, last = look_at(found), await newest_pins(self._store, 1, kept=False)
        if not last or (last[0].source, last[0].seen) != (found, seen):
            sha256 = await self.digest(found)
            if last and last[0].sha256 == sha256:
                await self._store.write(lambda tx: note_source(tx, found, seen, kept=False))
            else:
                version = version_in(found)
                await self._store.write(lambda tx: add_pin(tx, SYSTEM, version, sha256, found, seen, kept=False))
        self.pin = (await newest_pins(self._store, 1, kept=False))[0]

    async def know(self) -> None:
        """The rows say what agents run from now on."""
        self.pin = (await newest_pins(self._store, 1))[0]

    async def former(self) -> Path | None:
        """The copy of what agents ran before; None where there is none."""
        for pin in (await newest_pins(self._store, 2))[1:]:
            if (path := self._copies.path_of(pin.version, pin.sha256)).exists():
                return path
        return None

    async def digest(self, path: Path) -> str:
        """The sha256 of a program. Raises OSError."""
        return await trio.to_thread.run_sync(digest_of, path)

    async def keep(self, source: Path, version: str, sha256: str) -> Path:
        """A copy of ours; again is fine. Raises OSError, and Refusal("conflict") when another program lies there."""
        if (path := self._copies.path_of(version, sha256)).exists():
            return path
        copied: Copied = await trio.to_thread.run_sync(self._copies.copy, source)
        if copied.sha256 != sha256:
            self._copies.drop(copied)
            why = f"{source} is another program now than the one that was shown; ask for it again"
            raise Refusal("conflict", f"cannot take claude {version}: {why}")
        return await trio.to_thread.run_sync(self._copies.keep, copied, version)

    async def has_changed(self) -> Path | None:
        """What is installed here now, where that is another program than agents run."""
        found, pin = self.find(), self.pin
        if found is None or pin is None or not is_whole(found):
            return None
        seen: Seen = look_at(found)
        if (found, seen) == (pin.source, pin.seen):
            return None
        if await self.digest(found) != pin.sha256:
            return found
        await self._store.write(lambda tx: note_source(tx, found, seen))
        await self.know()
        return None

    @property
    def missing(self) -> str:
        """Why agents cannot run the one that they are to run; empty where that is not so."""
        if self.pin is None or not self.pin.kept or self.path is not None:
            return ""
        what = f"claude {self.pin.version}, which this hive is pinned to, is not here any more"
        return f"{what}; `hive update-claude` asks to run the one that is installed"


def version_in(path: Path) -> str:
    """The version that the path of a package tells, as one of nixpkgs does; "unknown" where it tells none."""
    found = re.search(r"claude-code-(\d[0-9A-Za-z.+]*)", str(path.resolve()))
    return found[1] if found else "unknown"


def _explained(exc: Refusal | OSError) -> str:
    return explain(exc) if isinstance(exc, OSError) else str(exc)


_NEEDED = """
    SELECT EXISTS (SELECT 1 FROM agents WHERE settings ->> 'program' = 'claude') AS needed
"""
