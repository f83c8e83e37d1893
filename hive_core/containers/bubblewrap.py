"""The sandbox of an agent: what bubblewrap is asked for, and whether it works here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hive_core.containers.inside import (
    ETC,
    ETC_FILES,
    HOME,
    KEYS_OF_THE_HOST,
    NETWORK_FILES,
    OUR_PASSWD,
    PASSWD,
    PROC_OF_THE_HOST,
    SYSTEM_PATHS,
    in_memory,
    is_below,
    links_of,
    program_paths,
)
from hive_core.containers.mounts import STATE, AgentDirs
from hive_core.containers.seccomp import filter_program

_ETC_OF_A_LOGIN = ("/etc/ssl", "/etc/pki", "/etc/static")
# Whoever can write to a directory can put another one in the place of what is mounted below those in it.
_SEALED = ("--remount-ro", ETC, "--remount-ro", "/")


def bwrap_command(dirs: AgentDirs, claude: Path | None, status_fd: int | None, filter_fd: int | None) -> list[str]:
    """bwrap with its options, to be followed by what runs inside; it inherits both descriptors."""
    status = [] if status_fd is None else ["--json-status-fd", str(status_fd)]
    # The harness is process 1: when it ends, the kernel ends everything else in its pid namespace.
    argv = [*_bwrap(filter_fd), *status, "--as-pid-1", *_system()]
    argv += _host_network() if dirs.network == "host" else []
    bound = program_paths(claude)
    for path in sorted(bound):
        argv += ["--ro-bind", path, path]
    for path, target in links_of(sys.executable):
        if not is_below(path, {*SYSTEM_PATHS, *bound}):
            argv += ["--symlink", target, path]
    for mount in dirs.mounts:
        argv += ["--ro-bind" if mount.read_only else "--bind", str(mount.source), mount.target]
    return [*argv, *_SEALED, "--chdir", STATE, "--"]


def login_command(claude: Path, filter_fd: int | None) -> list[str]:
    """The same for the program's own login: with the host's network, and nothing of the hive but the program.

    It ends with the *thread* that starts it, which has to be one that lives as long as the daemon.
    """
    argv = [*_bwrap(filter_fd), "--die-with-parent", *_system(), *_host_network()]
    for path in _ETC_OF_A_LOGIN:
        argv += ["--ro-bind-try", path, path]
    if not is_below(str(claude), SYSTEM_PATHS):
        argv += ["--ro-bind", str(claude), str(claude)]
    return [*argv, *_SEALED, "--chdir", HOME, "--", str(claude)]


def _bwrap(filter_fd: int | None) -> list[str]:
    """bwrap, found on the daemon's own PATH as sandbox_trouble does: the harness's is built from nothing."""
    argv = [shutil.which("bwrap") or "bwrap", "--unshare-all", "--unshare-user", "--uid", "0", "--gid", "0"]
    argv += ["--hostname", "hive", "--disable-userns", "--cap-drop", "ALL", "--new-session"]
    return [*argv, *(["--seccomp", str(filter_fd)] if filter_fd is not None else [])]


def _system() -> list[str]:
    """What a program needs of the host to run, over an empty root."""
    argv = ["--tmpfs", "/", "--proc", "/proc"]
    for path in PROC_OF_THE_HOST:
        argv += ["--ro-bind-try", path, path]
    for path in KEYS_OF_THE_HOST:
        argv += ["--ro-bind", "/dev/null", path] if os.path.exists(path) else []
    argv += ["--dev", "/dev", "--tmpfs", "/tmp", "--tmpfs", HOME, "--tmpfs", ETC, *system_binds()]
    for path in ETC_FILES:
        argv += ["--ro-bind-try", path, path]
    return [*argv, "--ro-bind", OUR_PASSWD, PASSWD, "--perms", "1777", "--tmpfs", "/var/tmp"]


def _host_network() -> list[str]:
    """The host's network in the place of none, and how its names are found."""
    argv = ["--share-net"]
    for path in NETWORK_FILES:
        argv += ["--ro-bind-try", path, path]
    return argv


def system_binds() -> list[str]:
    """bwrap's options for the programs of the host, read-only."""
    argv: list[str] = []
    for path in SYSTEM_PATHS:
        # A link (/bin → usr/bin) stays a link; a directory is bound.
        if os.path.islink(path):
            argv += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            argv += ["--ro-bind", path, path]
    return argv


def sandbox_trouble(become: Sequence[str] = ()) -> str | None:
    """None when bwrap works here, found by running it; else one sentence that names the fix.

    become: what it is given to, to be run as somebody else.
    """
    probe = [*become, "bwrap", "--unshare-all", "--unshare-user", "--disable-userns", "--uid", "0", "--gid", "0"]
    probe += ["--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev"]
    with in_memory(filter_program() or b"") as program:
        probe += ["--seccomp", str(program.fileno())] if filter_program() else []
        try:
            done = subprocess.run(
                [*probe, "true"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=10,
                pass_fds=[program.fileno()],
            )
        except FileNotFoundError:
            return "bubblewrap is not installed: `apt-get install bubblewrap` (or your system's equivalent)"
        except subprocess.TimeoutExpired:
            return "bubblewrap did not answer within 10 s"
    if done.returncode == 0:
        return None
    reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    if "SECCOMP" in reason:
        fix = "run it on a kernel with CONFIG_SECCOMP_FILTER"
    elif os.path.exists("/proc/sys/kernel/apparmor_restrict_unprivileged_userns"):
        fix = "allow it with an AppArmor profile for bwrap, or `sysctl kernel.apparmor_restrict_unprivileged_userns=0`"
    else:
        fix = "allow user namespaces: `sysctl kernel.unprivileged_userns_clone=1 user.max_user_namespaces=10000`"
    return f"bubblewrap does not work here ({reason}); {fix}"
