"""Where things are, for the daemon and for every client of it; what to say when they cannot be there; and the one limit
that paths of sockets have.
"""

from __future__ import annotations

import errno
import os

from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import NAME_LIMIT, shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# sun_path holds 108 bytes with the closing NUL: unix(7).
SOCKET_PATH_LIMIT_BYTES = 107
SYSTEM_CONFIG = "/etc/hyperhive/config.toml"


# What a path setting may be, for a sentence that begins with "it must be".
PATH_FORM = "a path: not empty, without NUL, and with the name of a user where it begins with ~"

# errno → (cause, what to do about it, how a setting could name something else)
_HOST = "an address of this machine, such as 127.0.0.1"
_DENIED = ("permission is denied", "run it as somebody who may", "another")
_NOT_THERE = ("there is no such file or directory", "create it", "another")
_NO_DIRECTORY = ("a file stands where a directory is needed", "move it away", "another")
_TOO_LONG = ("its name is too long", "", "a shorter one")
_FULL = ("no space is left", "make room", "another")
_NO_NAME = ("no address was found for that name", "", _HOST)
_TROUBLES = {
    errno.EACCES: _DENIED,
    errno.EPERM: _DENIED,
    errno.ENOENT: _NOT_THERE,
    errno.EEXIST: _NO_DIRECTORY,
    errno.ENOTDIR: _NO_DIRECTORY,
    errno.EISDIR: ("a directory stands where a file is needed", "move it away", "another"),
    errno.ENAMETOOLONG: _TOO_LONG,
    errno.ELOOP: ("symbolic links lead in a circle", "mend them", "another"),
    errno.EROFS: ("the file system is read-only", "make it writable", "another"),
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.ENOLCK: ("this file system cannot lock files", "", "another"),
    errno.EMFILE: ("too many files are open", "raise the limit (`ulimit -n`)", "another"),
    errno.EADDRINUSE: ("another program uses the port", "stop it", "another"),
    errno.EADDRNOTAVAIL: ("this machine has no such address", "", _HOST),
    errno.EAFNOSUPPORT: ("this machine has no addresses of that kind", "", _HOST),
}


def explain(error: OSError, setting: str = "") -> str:
    """`cause; way out` of an error of the system. `setting` names what could point to something else."""
    number = error.errno or 0
    if number < 0:  # of getaddrinfo, which has numbers of its own
        trouble = _NO_NAME
    elif not number and "too long" in str(error):  # Python's own check of a socket's path
        trouble = _TOO_LONG
    else:
        trouble = _TROUBLES.get(number, (error.strerror or str(error), "", "another"))
    cause, remedy, other = trouble
    if not setting and isinstance(error.filename, str | bytes):
        cause = f"{os.fsdecode(error.filename)}: {cause}"
    ways = [remedy] if remedy else []
    if setting:
        ways.append(f"set {setting} to {other}")
    return f"{cause}; {', or '.join(ways)}" if ways else cause


def cannot_use(raw: object, key: str, allowed: str, place: str) -> Refusal:
    """The refusal of a setting's value. `place` is where it stands, for whoever has to change it."""
    return Refusal("usage", f"cannot use {shown(raw)} as {key}: it must be {allowed}; change {place}")


def absolute(raw: object) -> str:
    """A path setting as an absolute path. Raises ValueError for what is not PATH_FORM."""
    path = os.path.expanduser(raw) if isinstance(raw, str) else ""
    if not path or "\0" in path or path.startswith("~"):
        raise ValueError(f"must be {PATH_FORM}")
    return os.path.abspath(path)


def read_config(path: str) -> dict[str, Any]:
    """What a configuration file holds. Raises Refusal("usage") that names the file."""
    import tomllib

    try:
        with open(path, "rb") as file:
            return tomllib.loads(file.read().decode())
    except OSError as exc:
        cause = explain(OSError(exc.errno, exc.strerror))
    except UnicodeDecodeError as exc:
        cause = f"byte {exc.start} is not UTF-8; save it as UTF-8"
    except RecursionError:
        cause = "it is nested too deep; write key = value lines"
    except ValueError as exc:  # also of a number too long to convert
        cause = f"it is not TOML ({str(exc)[:200]}); mend it there"
    raise Refusal("usage", f"cannot read {path}: {cause}")


def _folder(variable: str, usual: str) -> str:
    """A folder of the XDG specification, by which a relative one does not count, or the usual place below the home."""
    chosen = os.environ.get(variable, "")
    return chosen if os.path.isabs(chosen) else os.path.expanduser(usual)


def default_state_dir() -> str:
    if os.geteuid() == 0:
        return "/var/lib/hyperhive"
    folder = _folder("XDG_STATE_HOME", "~/.local/state")
    if not os.path.isabs(folder):
        raise Refusal(
            "usage", "cannot find your home directory: HOME names no directory; set HOME, or state_dir (HIVE_STATE_DIR)"
        )
    return os.path.join(folder, "hyperhive")


def default_runtime_dir() -> str:
    if os.geteuid() == 0:
        return "/run/hyperhive"
    folder = _folder("XDG_RUNTIME_DIR", "")
    return os.path.join(folder, "hyperhive") if folder else f"/tmp/hyperhive-{os.geteuid()}"


def config_files() -> list[str]:
    """The configuration files, the first that exists counts."""
    return [
        SYSTEM_CONFIG,
        os.path.join(_folder("XDG_CONFIG_HOME", "~/.config"), "hyperhive/config.toml"),
    ]


def runtime_dir() -> str:
    """The runtime directory as a client finds it."""
    return _chosen("runtime_dir") or default_runtime_dir()


def state_dir() -> str:
    """The state directory as `hive up` finds it."""
    return _chosen("state_dir") or default_state_dir()


def _chosen(key: str) -> str | None:
    """A setting as the daemon would read it, without its libraries: HIVE_KEY, the configuration file, or None."""
    place = variable = f"HIVE_{key.upper()}"
    chosen: object = os.environ.get(variable) or None
    for path in [] if chosen else config_files():
        if os.path.exists(path):
            place, chosen = f"it in {path}", read_config(path).get(key)
            break
    if chosen is None:
        return None
    try:
        return absolute(chosen)
    except ValueError:
        raise cannot_use(chosen, key, PATH_FORM, place) from None


def host_socket(runtime: str) -> str:
    return os.path.join(runtime, "host.sock")


def check_socket_room(runtime: str) -> None:
    """Refuse a runtime directory in which the socket with the longest name would not fit."""
    longest = os.path.join(runtime, "agents", "n" * NAME_LIMIT, "harness.sock")
    excess = len(os.fsencode(longest)) - SOCKET_PATH_LIMIT_BYTES
    if excess > 0:
        raise Refusal(
            "usage",
            f"cannot use {runtime} as the runtime directory: a socket's path may have {SOCKET_PATH_LIMIT_BYTES} bytes "
            f"and the longest here would have {excess} more; set runtime_dir to a shorter path",
        )


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Have the names in a folder on disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
