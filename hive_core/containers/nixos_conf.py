"""What the host says of an agent's NixOS container: its conf file, and the drop-in of its unit.

The conf file is read twice: by systemd as an EnvironmentFile, and by the shell of the unit, which expands
EXTRA_NSPAWN_FLAGS *unquoted*. So no word in it may hold anything that either gives a meaning to, and each is held
against a list of what may stand there before anything is written.

nixos-container itself binds into each container what an agent must not have: the socket of nix's daemon, and the
container's own profile, writable, by which its root could choose what is started next. An empty, read-only directory
is mounted over each, and SYSTEM_PATH names what is started.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from hive_core.containers.bounds import Bounds
from hive_core.containers.mounts import Mount
from hive_core.containers.scopes import SLICE
from hive_core.containers.seccomp import LANDLOCK
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName, Network, StorePath

UIDS = 65536  # of one agent
OWN_FILES = ("json", "run", "end", "built", "creating")  # what the hive keeps of a container: processes/NAME.SUFFIX
_WORD = r"[A-Za-z0-9/._+@=-]+"  # of a path: nothing that a shell, systemd or nspawn's colons give a meaning to
_HIDDEN = ("/nix/var/nix/daemon-socket", "/nix/var/nix/profiles", "/nix/var/nix/gcroots")
_ALLOWED_FLAGS = tuple(
    re.compile(flag)
    for flag in (
        r"--quiet",
        r"--settings=no",
        r"--volatile=overlay",
        rf"--private-users=(identity|\d+:{UIDS})",
        r"--private-users-ownership=off",
        r"--link-journal=no",
        r"--resolv-conf=(off|copy-host)",
        r"--timezone=off",
        r"--system-call-filter=landlock_(create_ruleset|restrict_self)",
        r"--setenv=SYSTEMD_PROC_CMDLINE=systemd\.show_status=false",
        rf"--tmpfs=({'|'.join(_HIDDEN)}):ro,mode=0",
        rf"--bind(-ro)?={_WORD}:{_WORD}(:rootidmap)?",
    )
)
_ALLOWED_KEYS: Mapping[str, re.Pattern[str]] = {
    "AUTO_START": re.compile("0"),
    "PRIVATE_NETWORK": re.compile("[01]"),
    **dict.fromkeys(("HOST_ADDRESS", "LOCAL_ADDRESS", "HOST_BRIDGE", "HOST_PORT"), re.compile("")),
    "PRIVATE_USERS": re.compile(r"identity|\d+"),
    "SYSTEM_PATH": re.compile(r"/nix/store/[A-Za-z0-9+._?=-]+"),
}
# sh alone: the unit has no PATH that finds anything. systemd makes one $ of two, and one % of two.
_TELL_THE_END = "/bin/sh -c 'echo $$INVOCATION_ID $$EXIT_CODE $$EXIT_STATUS > {file}'"


def marker(hive: Path, name: AgentName) -> str:
    """The first line of each file of ours, by which a container is known as this hive's."""
    return f"# Made by hyperhive for {name} of {hive}, and written anew at each start: a change here is lost.\n"


def conf_text(
    first_line: str,
    system: StorePath,
    mounts: Sequence[Mount],
    lent: Sequence[str],
    base: int | None,
    network: Network = "private",
) -> str:
    """The container's conf file.

    lent: programs of the host that are not in its store, to be had at the same paths.
    base: the first of the agent's own uids; None gives it the host's, without their rights.

    Raises Refusal when a path cannot be written into it.
    """
    settings = {
        "AUTO_START": "0",
        "PRIVATE_NETWORK": "0" if network == "host" else "1",
        "HOST_ADDRESS": "",  # nixos-container assigns two, and with one there is a link to the host
        "LOCAL_ADDRESS": "",
        "HOST_BRIDGE": "",
        "HOST_PORT": "",
        "PRIVATE_USERS": "identity" if base is None else str(base),
        "SYSTEM_PATH": system,
        "EXTRA_NSPAWN_FLAGS": " ".join(_flags(mounts, lent, base, network)),
    }
    checked(settings)
    return first_line + "".join(f"{key}={value}\n" for key, value in settings.items())


def drop_in_text(first_line: str, end_file: Path, bounds: Bounds | None) -> str:
    """The drop-in of the container's unit: the daemon starts it again, and is told of each end in `end_file`."""
    if not is_plain(str(end_file)):
        raise _cannot_be_written(str(end_file))
    lines = ["[Unit]", "StartLimitIntervalSec=0", "[Service]", "Restart=no", "RestartForceExitStatus="]
    lines += ["SuccessExitStatus=", "LogRateLimitIntervalSec=30s", "LogRateLimitBurst=2000", "OOMPolicy=continue"]
    lines += [f"Slice={SLICE}"]  # with all other agents, so that what bounds all of the hive bounds it
    if bounds is not None:
        lines += [f"MemoryMax={bounds.memory_bytes}", "MemorySwapMax=0", f"CPUQuota={bounds.cpu_percent}%"]
        lines += [f"TasksMax={bounds.tasks}"]
    lines += [f"ExecStopPost={_TELL_THE_END.format(file=end_file)}"]
    # nixos-container's own runs a program of the agent's system, by a shell whose profile is the agent's to write, and
    # before NixOS 25.05 outside of its uids. A host that is rebuilt may reload all its containers.
    lines += ["ExecReload=", "ExecReload=/bin/sh -c :"]
    return first_line + "\n".join(lines) + "\n"


def checked(settings: Mapping[str, str]) -> None:
    """Raise Refusal when anything stands in a conf file's settings that is not on the list of what may."""
    for key, value in settings.items():
        if key == "EXTRA_NSPAWN_FLAGS":
            for flag in value.split(" "):
                if not any(allowed.fullmatch(flag) for allowed in _ALLOWED_FLAGS):
                    raise _cannot_be_written(flag)
        elif key not in _ALLOWED_KEYS or not _ALLOWED_KEYS[key].fullmatch(value):
            raise _cannot_be_written(f"{key}={value}")


def _flags(mounts: Sequence[Mount], lent: Sequence[str], base: int | None, network: Network) -> Iterator[str]:
    mapped = "" if base is None else ":rootidmap"
    # The container's own root directory stays as it is: what is written there is in memory, and gone with it.
    yield from ("--quiet", "--settings=no", "--volatile=overlay", "--link-journal=no")
    yield f"--resolv-conf={'copy-host' if network == 'host' else 'off'}"
    yield from LANDLOCK if network == "host" else ()
    # Here too, for a NixOS that does not know PRIVATE_USERS.
    yield f"--private-users={'identity' if base is None else f'{base}:{UIDS}'}"
    yield from (
        "--timezone=off",
        "--private-users-ownership=off",
        "--setenv=SYSTEMD_PROC_CMDLINE=systemd.show_status=false",
    )
    for path in _HIDDEN:
        yield f"--tmpfs={path}:ro,mode=0"
    for path in lent:
        yield f"--bind-ro={_path(path)}:{path}{mapped}"
    for mount in mounts:
        own = "" if mount.mapped else mapped
        yield f"--bind{'-ro' if mount.read_only else ''}={_path(str(mount.source))}:{mount.target}{own}"


def is_plain(path: str) -> bool:
    """Whether a path can be written into a conf file."""
    return re.fullmatch(_WORD, path) is not None


def _path(path: str) -> str:
    if not is_plain(path):
        raise _cannot_be_written(path)
    return path


def _cannot_be_written(what: str) -> Refusal:
    return Refusal(
        "failed",
        f"cannot write {what[:200]!r} into a container's settings: nixos-container takes only letters, digits and "
        "/._+@=- there; move state_dir or runtime_dir to a path without others",
    )
