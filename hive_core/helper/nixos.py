"""NixOS containers as the helper has them: what they get of the daemon's was opened first, and stands where the host's
systemd finds it for as long as a container begins.
"""

from __future__ import annotations

import contextlib
import logging
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from hive_core.config import Config
from hive_core.containers.former import FormerProcesses
from hive_core.containers.groups import bounds_of
from hive_core.containers.mounts import AgentDirs, Mount
from hive_core.containers.nixos_container import NixosContainers
from hive_core.containers.nixos_host import NixosHost
from hive_core.containers.ranges import UidRangesFile
from hive_core.containers.scopes import systemd_runs
from hive_core.helper.staging import clones, staging_command
from hive_core.protocol.container_id import container_id
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName, StorePath, parse_store_path

log = logging.getLogger(__name__)
_STAGING_S = 30.0


class StagedNixos(NixosContainers):
    """Containers whose directories are mounts that were made of open descriptors, and whose systems are in the store.

    A unit of systemd's sees no mount of this process's namespace, so they are put into the host's: below a directory of
    root's, on a file system in memory of each agent's own. systemd-nspawn has mounts of its own of them once it runs;
    then they are taken away, and nobody but a helper can start the container.
    """

    def __init__(self, config: Config, ranges: UidRangesFile, claude: Path | None, host: NixosHost | None) -> None:
        super().__init__(
            config.helper_state_dir,
            hive=config.state_dir,
            base_of=ranges.first_uid,
            claude=claude,
            bounds=bounds_of(config),
            host=host,
        )
        self._ranges = ranges
        self._stage = config.helper_state_dir / "stage"
        self._stage.mkdir(mode=0o700, exist_ok=True)
        # Where units are started; without systemd, by what stands in for it, that is here.
        self._namespace = f"/proc/{1 if systemd_runs() else 'self'}/ns/mnt"
        self.former = FormerProcesses(config.helper_state_dir, self.sandbox, config.orphan_grace_s)
        for left in self._stage.iterdir():  # by a helper that was killed
            self._take_away(left)

    @asynccontextmanager
    async def _placed(self, name: AgentName, dirs: AgentDirs, base: int | None) -> AsyncIterator[Sequence[Mount]]:
        assert base is not None
        folder = self._stage / container_id(name)
        try:
            yield await trio.to_thread.run_sync(self._put, folder, dirs, base, limiter=trio.CapacityLimiter(1))
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._take_away, folder, limiter=trio.CapacityLimiter(1))

    def _put(self, folder: Path, dirs: AgentDirs, base: int) -> Sequence[Mount]:
        with contextlib.ExitStack() as opened:
            mounts, staged = clones(dirs, base, folder, opened)
            folder.mkdir(mode=0o700, exist_ok=True)
            _run(staging_command(self._namespace, folder, mounts), mounts)
        return staged.mounts

    def _take_away(self, folder: Path) -> None:
        try:
            if folder.exists():
                _run(staging_command(self._namespace, folder, []), [])
                folder.rmdir()
        except OSError as exc:  # the next start does it
            log.error("mounts are left in %s: %s", folder, exc)

    def difference(self, name: AgentName, run: Path) -> str | None:
        """The same, where one of which nothing is written down is a root daemon's of before: its mounts are others."""
        return super().difference(name, run) if "id" in self._told(name, "run") else "by a daemon that was root"

    async def switch(self, name: AgentName, system: StorePath) -> None:
        await self._check(system)
        await super().switch(name, system)
        if not self._file(name, "run").exists():
            self._write(name, "run", {})  # from now on it is one of so many agents as there may be

    async def destroy(self, name: AgentName) -> None:
        await super().destroy(name)
        self._ranges.release(name)

    async def _check(self, system: StorePath) -> None:
        """Raise Refusal unless a path is one that nix has registered, of a directory, and root's.

        What is in it anybody may have written who may ask nix: nothing of it is run but in the agent's container.
        """
        real = self._host.store / Path(parse_store_path(system)).name
        if system.endswith(".drv"):  # nix-env would build it
            raise Refusal("usage", f"cannot use {system} as a system: it is a derivation; build it")
        try:
            for part in (real, real / "bin"):
                if part.is_symlink() or not part.is_dir() or part.lstat().st_uid != 0:
                    raise Refusal("refused", f"cannot use {system}: {part} is no directory of root's; build a system")
        except OSError as exc:
            raise Refusal("failed", f"cannot use {system}: {exc.strerror}; build it again") from None
        done = await self._host.run("nix-store", "--check-validity", system)
        if done.code:
            raise Refusal("refused", f"cannot use {system}: nix does not know it as a path of its store; build it")


def _run(command: Sequence[str], kept: Sequence[int]) -> None:
    """Run a command of ours to its end. Raises OSError with what it said."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env={},
            cwd="/",
            pass_fds=kept,
            timeout=_STAGING_S,
        )
    except subprocess.TimeoutExpired:
        raise OSError(f"what mounts an agent's directories did not end within {_STAGING_S:g} s") from None
    if done.returncode:
        raise OSError(done.stderr.strip() or f"what mounts an agent's directories ended with {done.returncode}")
