"""Where things are, for the daemon and for every client of it; and the one limit that paths of sockets have."""

from __future__ import annotations

import os

from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import NAME_LIMIT

# sun_path holds 108 bytes with the closing NUL: unix(7).
SOCKET_PATH_LIMIT_BYTES = 107


def default_state_dir() -> str:
    if os.geteuid() == 0:
        return "/var/lib/hyperhive"
    return os.path.join(os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state"), "hyperhive")


def default_runtime_dir() -> str:
    if os.geteuid() == 0:
        return "/run/hyperhive"
    if folder := os.environ.get("XDG_RUNTIME_DIR"):
        return os.path.join(folder, "hyperhive")
    return f"/tmp/hyperhive-{os.geteuid()}"


def config_files() -> list[str]:
    """The configuration files, the first that exists counts."""
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return ["/etc/hyperhive/config.toml", os.path.join(home, "hyperhive", "config.toml")]


def runtime_dir() -> str:
    """The runtime directory as a client finds it."""
    return _chosen("runtime_dir") or default_runtime_dir()


def state_dir() -> str:
    """The state directory as `hive up` finds it."""
    return _chosen("state_dir") or default_state_dir()


def _chosen(key: str) -> str | None:
    """A setting as the daemon would read it, without its libraries: HIVE_KEY, the configuration file, or None."""
    chosen = os.environ.get(f"HIVE_{key.upper()}")
    for path in [] if chosen else config_files():
        if os.path.exists(path):
            import tomllib

            try:
                with open(path, "rb") as file:
                    chosen = tomllib.load(file).get(key)
            except (OSError, ValueError) as exc:
                raise Refusal("usage", f"cannot read {path}: {getattr(exc, 'strerror', None) or exc}") from None
            break
    return os.path.abspath(os.path.expanduser(str(chosen))) if chosen else None


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
