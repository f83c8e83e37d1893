"""A directory held for one process: the daemon's, or a restore's."""

from __future__ import annotations

import fcntl
import os
import pwd
from pathlib import Path

from hive_core.protocol.paths import explain
from hive_core.protocol.refusal import Refusal


def take_lock(folder: Path) -> int:
    """Hold a directory for this process; the lock goes with it. Raises Refusal naming who holds it, or the trouble."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_owner(folder)
        descriptor = os.open(folder / "daemon.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _lock(descriptor, folder)
        except BaseException:
            os.close(descriptor)
            raise
    except OSError as exc:
        raise Refusal("refused", f"cannot use {folder}: {explain(exc, 'state_dir or runtime_dir')}") from None
    return descriptor


def check_owner(folder: Path) -> None:
    """Raise Refusal for a directory that somebody else owns or can write in."""
    found = folder.stat()
    other = "or set state_dir or runtime_dir to another"
    if found.st_uid != os.geteuid():
        owner = _user_of(found.st_uid)
        why = f"it belongs to {owner}, and another user's hive may be in it; do this as {owner}"
        raise Refusal("refused", f"cannot use {folder}: {why}, {other}")
    if found.st_mode & 0o022:
        fix = f"`chmod 700 {folder}`, {other}"
        raise Refusal("refused", f"cannot use {folder}: nobody else may write in it; {fix}")


def _user_of(uid: int) -> str:
    """The name of a user, or what there is of one without a name."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 32).decode("ascii", "replace").strip() or "unknown"
        raise Refusal(
            "conflict", f"cannot use {folder}: a daemon (pid {holder}) runs on it; `hive down` ends it"
        ) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
