"""What `hive doctor` says of the proxy by which agents reach what their `egress` names."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator

from hive_core.cli.doctor import Finding
from hive_core.egress.program import command, environment

PATIENCE_S = 30.0


def look_at_proxy(name: str) -> Iterator[Finding]:
    """Start one as the daemon does, and hang up: it has given up its rights then, and ends."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            command(),
            stdin=theirs.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment(),
            cwd="/",
        )
    ours.close()
    try:
        errors = process.communicate(timeout=PATIENCE_S)[1].decode("utf-8", "replace").strip().splitlines()
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        errors = [f"it did not end within {PATIENCE_S:.0f} s"]
    if process.returncode == 0:
        yield Finding(name, "ok", "starts, gives up its rights, and lets agents reach what their `egress` names")
        return
    why = (errors or ["no reason given"])[-1].removeprefix("egress: ")
    yield Finding(name, "warning", f"it does not run ({why}); agents reach their models alone until that is mended")
