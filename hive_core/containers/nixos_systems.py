"""The NixOS systems that agents' containers have: switched to, gone back from.

A container is created through nixos-container with the system that was built. Later systems are made the container's
profile by nix-env, and the container switches to them: all that `nixos-container update` does, but that would evaluate
the agent's flake once more, as root and without limits.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

import trio

from hive_core.containers.entering import nsenter
from hive_core.containers.nixos_conf import marker
from hive_core.containers.nixos_host import NixosHost, reason_of
from hive_core.containers.process_tree import first_in_namespace
from hive_core.containers.running import Done
from hive_core.protocol.container_id import container_id
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName, StorePath, parse_store_path

GENERATIONS_KEPT = 10
_SWITCH_WITHIN_S = 300.0
_UNITS_FAILED = 4  # of switch-to-configuration
_GENERATION = re.compile(r"system-(\d+)-link")


class NixosSystems:
    """Systems of a driver's; driver.py says what each call does.

    state_dir: what is known of agents is kept in there.
    hive: names the hive whose containers these are; the state directory where it is not said.
    """

    def __init__(self, state_dir: Path, *, hive: Path | None = None, host: NixosHost | None = None) -> None:
        self._hive = hive or state_dir.absolute()
        self._files = state_dir.absolute() / "processes"
        self._host = host or NixosHost()

    async def switch(self, name: AgentName, system: StorePath) -> None:
        self._need_nixos(system)
        if not self._is_ours(name):
            await self._create(name, system)
        elif (before := await self.current(name)) != system:
            await self._take(name, system)
            try:
                await self._activate(name, system)
            except Refusal as refusal:
                raise Refusal("failed", f"{refusal.message}; {await self._back(name, before)}") from None
            await self._nix_env(name, "--delete-generations", f"+{GENERATIONS_KEPT}")

    async def roll_back(self, name: AgentName) -> StorePath:
        now, *earlier = self._generations(name) if self._has_own(name) else [0]
        if not earlier:
            raise Refusal("conflict", f"cannot roll {name} back: it has had no other system before; build one")
        await self._nix_env(name, "--switch-generation", str(earlier[0]))
        await self._nix_env(name, "--delete-generations", str(now))
        system = await self.current(name)
        assert system is not None
        await self._activate(name, system)
        return system

    async def current(self, name: AgentName) -> StorePath | None:
        profile = self._profile(name)
        with contextlib.suppress(OSError, Refusal):
            return parse_store_path(os.readlink(profile.parent / os.readlink(profile)))
        return None

    def _unit(self, name: AgentName) -> str:
        return f"container@{container_id(name)}.service"

    def _file(self, name: AgentName, suffix: str) -> Path:
        self._files.mkdir(mode=0o700, parents=True, exist_ok=True)
        return self._files / f"{name}.{suffix}"

    def _conf_file(self, name: AgentName) -> Path:
        return self._host.confs / f"{container_id(name)}.conf"

    def _is_ours(self, name: AgentName) -> bool:
        """Whether the agent has a container. Raises Refusal("conflict") when one of its id is somebody else's."""
        conf = self._conf_file(name)
        try:
            if conf.read_text("utf-8", "replace").startswith(marker(self._hive, name)):
                return True
        except FileNotFoundError:
            return False
        except OSError as exc:
            raise Refusal("failed", f"cannot read {conf}: {exc.strerror}; run the daemon as root") from None
        if self._file(name, "creating").exists():
            return False  # half made by a daemon that died
        raise Refusal(
            "conflict",
            f"cannot use the container {container_id(name)} for {name}: {conf} was made by somebody else, and nothing "
            f"of it was touched; remove it (`nixos-container destroy {container_id(name)}`), or give the agent another "
            "name",
        )

    def _has_own(self, name: AgentName) -> bool:
        """The same, where somebody else's container is none of the agent's."""
        try:
            return self._is_ours(name)
        except Refusal as refusal:
            if refusal.code != "conflict":
                raise
            return False

    async def _create(self, name: AgentName, system: StorePath) -> None:
        half_made, what = self._file(name, "creating"), f"create the container of {name}"
        if half_made.exists():
            await self._host.insist(what, "nixos-container", "destroy", container_id(name))
        unit = self._unit(name)
        if not (await self._host.state(unit)).ended:
            raise Refusal(
                "conflict",
                f"cannot {what}: {unit} runs, and no container of ours is in it; end it with `systemctl stop {unit}`",
            )
        half_made.touch()
        try:
            words = ["nixos-container", "create", container_id(name), "--system-path", system]
            await self._host.insist(what, *words)
            write_whole(self._conf_file(name), marker(self._hive, name) + "AUTO_START=0\nPRIVATE_NETWORK=1\n")
        except BaseException:
            with trio.CancelScope(shield=True), contextlib.suppress(Refusal):
                await self._host.run("nixos-container", "destroy", container_id(name))
            raise
        finally:
            half_made.unlink(missing_ok=True)

    async def _take(self, name: AgentName, system: StorePath) -> None:
        await self._nix_env(name, "--set", system)

    async def _activate(self, name: AgentName, system: StorePath) -> None:
        """Let a container that runs switch to a system; the harness goes on. Raises Refusal when it does not."""
        if not (await self._host.state(self._unit(name))).runs:
            return
        switch = f"{system}/bin/switch-to-configuration"
        done = await self._inside(name, switch, "test", patience_s=_SWITCH_WITHIN_S)
        if done.code:
            which = "a unit of the new system failed" if done.code == _UNITS_FAILED else "the new system was not taken"
            raise Refusal("failed", f"cannot switch {name} (code {done.code}): {which}: {reason_of(done)}")

    async def _inside(self, name: AgentName, *words: str, patience_s: float = 30.0) -> Done:
        """Run a command in a container that runs, by its own root. Raises Refusal when there is none.

        `nixos-container run` has a login shell do it, and before NixOS 25.05 it enters every namespace but that of
        users: what the agent has in its shell's profile would be done by the root of the host.
        """
        first = await self._first_inside(name)
        if first is None:
            raise Refusal("conflict", f"cannot run {words[0]} in the container of {name}: it does not run; start it")
        path = "PATH=/run/current-system/sw/bin:/usr/bin:/bin"
        entering = [*nsenter(first), "--", "/usr/bin/env", "-i", path, "HOME=/root", "LANG=C.UTF-8"]
        return await self._host.run(*entering, *words, patience_s=patience_s)

    async def _first_inside(self, name: AgentName) -> int | None:
        state = await self._host.state(self._unit(name)) if self._has_own(name) else None
        return first_in_namespace(state.pid) if state is not None and state.runs else None

    async def _back(self, name: AgentName, before: StorePath | None) -> str:
        """Undo a switch that went wrong; says what became of it."""
        if before is None:
            return "it had no system before"
        failed, *earlier = self._generations(name)
        links = {each: self._profile(name).with_name(f"system-{each}-link") for each in earlier}
        # Not always the newest of them: somebody may have gone back by hand.
        back = next((each for each in earlier if os.readlink(links[each]) == before), None)
        try:
            if back is None:
                raise Refusal("failed", f"{before} is kept no more")
            await self._nix_env(name, "--switch-generation", str(back))
            await self._nix_env(name, "--delete-generations", str(failed))
            await self._activate(name, before)
        except Refusal as refusal:
            return f"going back failed too ({refusal.message}): restart it"
        return "it has the system before again"

    async def _nix_env(self, name: AgentName, *words: str) -> None:
        await self._host.insist(f"set the system of {name}", "nix-env", "--profile", str(self._profile(name)), *words)

    def _profile(self, name: AgentName) -> Path:
        return self._host.profiles / container_id(name) / "system"

    def _generations(self, name: AgentName) -> list[int]:
        """Its generation now, and those before it, the newest first."""
        profile = self._profile(name)
        try:
            now = int(_GENERATION.fullmatch(os.readlink(profile))[1])  # type: ignore[index]
            found = [int(match[1]) for entry in os.listdir(profile.parent) if (match := _GENERATION.fullmatch(entry))]
        except (OSError, TypeError):
            raise Refusal(
                "failed", f"cannot read {profile}: it is no profile of nix-env's; build {name} again"
            ) from None
        return [now, *sorted((each for each in found if each < now), reverse=True)]

    def _need_nixos(self, system: StorePath) -> None:
        real = self._host.store / Path(parse_store_path(system)).name
        for file in ("init", "bin/switch-to-configuration"):
            if not os.path.lexists(real / file):
                raise Refusal(
                    "usage", f"cannot use {system} as a NixOS system: it has no {file}; build one with mkAgent"
                )


def write_whole(path: Path, text: str) -> bool:
    """Write a file by renaming, so that nobody reads half of it; whether it was another before.

    Raises Refusal, and OSError for a disk that cannot take it.
    """
    try:
        with contextlib.suppress(OSError):
            if path.read_text("utf-8", "replace") == text:
                return False
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f".{path.name}.hyperhive")
        fresh.write_text(text, "utf-8")
        fresh.rename(path)
    except PermissionError as exc:
        raise Refusal("failed", f"cannot write {path}: {exc.strerror}; run the daemon as root") from None
    return True
