"""Whether agents can be had in NixOS containers here, and what they would lack."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from hive_core.containers.inside import SYSTEM_PATHS
from hive_core.containers.nixos_conf import UIDS, is_plain
from hive_core.containers.nixos_host import NixosHost
from hive_core.containers.nspawn import PROBE_UID, Found

_PROBE_PATIENCE_S = 20.0
_COMMANDS = {
    "nixos-container": "enable it with `boot.enableContainers = true`",
    "systemctl": "run it where systemd is",
    "nix-env": "add nix to the daemon's path",
    "nix-store": "add nix to the daemon's path",
}


def look_for_nixos_containers(state_dir: Path, runtime_dir: Path, host: NixosHost | None = None) -> Found:
    """What is missing, found by looking, and by mounting the state directory into a container. Blocks for a moment."""
    host = host or NixosHost()
    if os.geteuid() != 0:
        return Found("NixOS containers need root: set helper, run the daemon as root, or set sandbox to bwrap")
    for command, fix in _COMMANDS.items():
        if shutil.which(command, path=host.path) is None:
            return Found(f"{command} is not found: {fix}, or set sandbox to bwrap")
    if not host.confs.is_dir():
        fix = "boot.enableContainers makes it where system.stateVersion is 22.05 or later"
        return Found(f"{host.confs} is missing: {fix}")
    for folder in (state_dir, runtime_dir):
        if not is_plain(str(folder)):
            fix = "nixos-container takes only letters, digits and /._+@=- in a path that it binds"
            return Found(f"{folder} cannot be mounted into a NixOS container: {fix}; move it")
    if (reason := _try(state_dir)) is not None:
        fix = "keep the state directory on ext4, xfs or btrfs"
        return Found(weakness=f"agents have no uids of their own ({reason}); {fix}")
    return Found()


def _try(state_dir: Path) -> str | None:
    """Why a directory of the daemon's cannot be mounted with other uids, or None."""
    beside = next(path for path in (state_dir, *state_dir.parents) if path.is_dir())
    with tempfile.TemporaryDirectory(prefix=".hive-", dir=beside) as folder:
        root, state = Path(folder, "root"), Path(folder, "state")
        for path in (root / "usr", root / "etc", state):
            path.mkdir(parents=True)
        os.chown(root, PROBE_UID, PROBE_UID)
        program = os.path.realpath(shutil.which("true") or "/bin/true")
        command = ["systemd-nspawn", "--quiet", "--settings=no", "--register=no", "--keep-unit", f"--directory={root}"]
        command += [f"--machine=hive-probe-{os.getpid()}", "--private-network", "--console=pipe", "--link-journal=no"]
        command += [f"--private-users={PROBE_UID}:{UIDS}", "--private-users-ownership=off", "--resolv-conf=off"]
        command += ["--timezone=off", f"--bind={state}:/state:rootidmap"]
        command += [f"--bind-ro={path}" for path in SYSTEM_PATHS if os.path.isdir(path)]
        try:
            done = subprocess.run(
                [*command, "--", program],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                env={"PATH": NixosHost().path},
                timeout=_PROBE_PATIENCE_S,
            )
        except (OSError, subprocess.TimeoutExpired) as exc:
            return str(exc)[:300]
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        return None if done.returncode == 0 else (said[-1].strip()[:300] if said else "no reason given")
