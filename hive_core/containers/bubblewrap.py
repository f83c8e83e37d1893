"""The sandbox of an agent: what bubblewrap is asked for, and whether it works here."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hive_core.containers.seccomp import filter_program

# What a program needs of the host to run, read-only, where it exists.
_SYSTEM_PATHS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store", "/run/current-system/sw")
# Settings of the whole kernel, which go by the uid alone: under a root daemon the sandbox's 0 is the host's.
_PROC_OF_THE_HOST = tuple(
    f"/proc/{name}"
    for name in ("sys", "sysrq-trigger", "irq", "bus", "acpi", "fs", "scsi", "pressure", "driver", "mtrr")
)
# The host's keys, told to whoever has the same uid.
_KEYS_OF_THE_HOST = ("/proc/keys", "/proc/key-users")
_ETC_FILES = ("/etc/ld.so.cache", "/etc/alternatives", "/etc/ssl/certs", "/etc/localtime")
# How the network's names are found.
_ETC_OF_THE_NETWORK = ("/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/etc/ssl", "/etc/pki", "/etc/static")
HOME = "/root"  # inside
_PACKAGES = ("hive_core", "hive_agent", "hive_mind")


@dataclass(frozen=True, slots=True)
class AgentDirs:
    """The host's directories of one agent; they are all of the host that it can write."""

    run: Path  # → /run/hive: its sockets
    state: Path  # → /state: durable notes
    claude: Path  # → ~/.claude: sessions of the program
    proposed: Path | None  # → /agents: everybody's configuration, for the manager alone


def bwrap_command(dirs: AgentDirs, claude: Path | None, status_fd: int, filter_fd: int | None) -> list[str]:
    """bwrap with its options, to be followed by what runs inside; it inherits both descriptors."""
    # The harness is process 1: when it ends, the kernel ends everything else in its pid namespace.
    argv = [*_bwrap(filter_fd), "--json-status-fd", str(status_fd), "--as-pid-1", *_system()]
    bound = _program_paths(claude)
    for path in sorted(bound):
        argv += ["--ro-bind", path, path]
    for path, target in _links_of(sys.executable):
        if not _is_below(path, {*_SYSTEM_PATHS, *bound}):
            argv += ["--symlink", target, path]
    # Its sockets can be connected to, not replaced.
    argv += ["--ro-bind", str(dirs.run), "/run/hive", "--bind", str(dirs.state), "/state"]
    argv += ["--bind", str(dirs.claude), f"{HOME}/.claude"]
    if dirs.proposed is not None:
        argv += ["--bind", str(dirs.proposed), "/agents"]
    return [*argv, "--chdir", "/state", "--"]


def login_command(claude: Path, filter_fd: int | None) -> list[str]:
    """The same for the program's own login: with the host's network, and nothing of the hive but the program.

    It ends with the *thread* that starts it, which has to be one that lives as long as the daemon.
    """
    argv = [*_bwrap(filter_fd), "--share-net", "--die-with-parent", *_system()]
    for path in _ETC_OF_THE_NETWORK:
        argv += ["--ro-bind-try", path, path]
    if not _is_below(str(claude), _SYSTEM_PATHS):
        argv += ["--ro-bind", str(claude), str(claude)]
    return [*argv, "--chdir", HOME, "--", str(claude)]


def _bwrap(filter_fd: int | None) -> list[str]:
    """bwrap, found on the daemon's own PATH as sandbox_trouble does: the harness's is built from nothing."""
    argv = [shutil.which("bwrap") or "bwrap", "--unshare-all", "--unshare-user", "--uid", "0", "--gid", "0"]
    argv += ["--hostname", "hive", "--disable-userns", "--cap-drop", "ALL", "--new-session"]
    return [*argv, *(["--seccomp", str(filter_fd)] if filter_fd is not None else [])]


def _system() -> list[str]:
    """What a program needs of the host to run, over an empty root."""
    argv = ["--tmpfs", "/", "--proc", "/proc"]
    for path in _PROC_OF_THE_HOST:
        argv += ["--ro-bind-try", path, path]
    for path in _KEYS_OF_THE_HOST:
        argv += ["--ro-bind", "/dev/null", path] if os.path.exists(path) else []
    argv += ["--dev", "/dev", "--tmpfs", "/tmp", "--tmpfs", HOME]
    for path in _SYSTEM_PATHS:
        # A link (/bin → usr/bin) stays a link; a directory is bound.
        if os.path.islink(path):
            argv += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            argv += ["--ro-bind", path, path]
    for path in _ETC_FILES:
        argv += ["--ro-bind-try", path, path]
    return argv


def _program_paths(claude: Path | None) -> set[str]:
    """The interpreter, the libraries and our own packages, where they are not part of the system already."""
    paths = {sys.prefix, sys.base_prefix, sysconfig.get_paths()["purelib"], os.path.realpath(sys.executable)}
    paths |= {os.path.join(parent, package) for parent in package_parents() for package in _PACKAGES}
    if claude is not None:
        paths |= {str(claude), os.path.realpath(claude)}
    outside = {path for path in paths if not _is_below(path, _SYSTEM_PATHS) and os.path.exists(path)}
    return {path for path in outside if not _is_below(path, outside - {path})}


def package_parents() -> list[str]:
    """The folder our packages are imported from: site-packages, or the checkout."""
    return [str(Path(__file__).resolve().parents[2])]


def _links_of(path: str) -> list[tuple[str, str]]:
    """Every link on the way from a path to its file: (where it stands, what it says)."""
    links: list[tuple[str, str]] = []
    while os.path.islink(path) and len(links) < 40:
        target = os.readlink(path)
        links.append((path, target))
        path = os.path.normpath(os.path.join(os.path.dirname(path), target))
    return links


def _is_below(path: str, parents: Sequence[str] | set[str]) -> bool:
    return any(path == parent or path.startswith(parent.rstrip("/") + "/") for parent in parents)


def in_memory(content: bytes) -> io.FileIO:
    """A file without a path, to be read by whoever inherits it."""
    file = io.FileIO(os.memfd_create("hive", os.MFD_CLOEXEC), "r+")
    file.write(content)
    file.seek(0)
    return file


def sandbox_trouble() -> str | None:
    """None when bwrap works here, found by running it; else one sentence that names the fix."""
    probe = ["bwrap", "--unshare-all", "--unshare-user", "--disable-userns", "--uid", "0", "--gid", "0"]
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
