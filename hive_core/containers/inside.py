"""What an agent's container holds, whichever driver makes it."""

from __future__ import annotations

import io
import os
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

# What a program needs of the host to run, read-only, where it exists.
SYSTEM_PATHS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store", "/run/current-system/sw")
# Settings of the whole kernel, which go by the uid alone: under a root daemon the sandbox's 0 is the host's.
PROC_OF_THE_HOST = tuple(
    f"/proc/{name}"
    for name in ("sys", "sysrq-trigger", "irq", "bus", "acpi", "fs", "scsi", "pressure", "driver", "mtrr")
)
# The host's keys, told to whoever has the same uid.
KEYS_OF_THE_HOST = ("/proc/keys", "/proc/key-users")
ETC = "/etc"  # read-only: settings that lie there stand above all that a commit says, the program's too
ETC_FILES = (
    *("/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime"),
    # The certificates that are trusted, and where they lead on (NixOS, Fedora). Beside those lie private keys.
    *("/etc/ssl/certs", "/etc/static/ssl/certs", "/etc/pki/tls/certs", "/etc/pki/ca-trust/extracted"),
)
PASSWD = "/etc/passwd"  # who is who in there: ssh, for one, runs for nobody that it does not name
OUR_PASSWD = str(Path(__file__).with_name("passwd"))
# How the names of the host's network are found, for who has that.
NETWORK_FILES = ("/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf")
HOME = "/root"  # inside
_PACKAGES = ("hive_core", "hive_agent", "hive_mind")


def program_paths(claude: Path | None) -> set[str]:
    """The interpreter, the libraries and our own packages, where they are not part of the system already."""
    libraries = sysconfig.get_paths()["purelib"]
    paths = {sys.prefix, sys.base_prefix, libraries, os.path.realpath(libraries), os.path.realpath(sys.executable)}
    paths |= {os.path.join(parent, package) for parent in package_parents() for package in _PACKAGES}
    if claude is not None:
        paths |= {str(claude), os.path.realpath(claude)}
    outside = {path for path in paths if not is_below(path, SYSTEM_PATHS) and os.path.exists(path)}
    return {path for path in outside if not is_below(path, outside - {path})}


def package_parents() -> list[str]:
    """The folder our packages are imported from: site-packages, or the checkout."""
    return [str(Path(__file__).resolve().parents[2])]


def links_of(path: str) -> list[tuple[str, str]]:
    """Every link on the way from a path to its file: (where it stands, what it says)."""
    links: list[tuple[str, str]] = []
    while os.path.islink(path) and len(links) < 40:
        target = os.readlink(path)
        links.append((path, target))
        path = os.path.normpath(os.path.join(os.path.dirname(path), target))
    return links


def is_below(path: str, parents: Sequence[str] | set[str]) -> bool:
    return any(path == parent or path.startswith(parent.rstrip("/") + "/") for parent in parents)


def in_memory(content: bytes) -> io.FileIO:
    """A file without a path, to be read by whoever inherits it."""
    file = io.FileIO(os.memfd_create("hive", os.MFD_CLOEXEC), "r+")
    file.write(content)
    file.seek(0)
    return file


def harness_environment(home: str) -> dict[str, str]:
    """The environment of whatever runs our packages for an agent, built from nothing."""
    path = os.pathsep.join(("/usr/local/bin", "/usr/bin", "/bin", "/run/current-system/sw/bin"))
    return {"PATH": path, "LANG": "C.UTF-8", "PYTHONPATH": os.pathsep.join(package_parents()), "HOME": home}
