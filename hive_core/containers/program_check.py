"""A look at a claude executable: it runs where agents run, in a sandbox if there is one, and has nobody to talk to."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from hive_core.containers.bubblewrap import bwrap_command
from hive_core.containers.inside import HOME, harness_environment, in_memory
from hive_core.containers.mounts import agent_dirs
from hive_core.containers.seccomp import filter_program
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName

PATIENCE_S = 240.0  # of all that is asked of it; of each its own is shorter
_VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+-]{0,39}")


def check_program(claude: Path, *, inside: bool) -> list[dict[str, str]]:
    """What `hive-agent check` finds: each a {"check", "status", "message"}, the first also with the "version".

    inside: in bubblewrap. Blocks. Raises Refusal.
    """
    done = _run([sys.executable, "-P", "-m", "hive_agent.cli", "check", str(claude)], claude, inside)
    try:
        found: list[dict[str, str]] = json.loads(done.stdout)
    except ValueError:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise Refusal("failed", f"cannot look at {claude}: {last[:300]}; install hyperhive anew") from None
    return found


def version_of(claude: Path, *, inside: bool) -> str:
    """What it says of itself, "unknown" where that is no version. Blocks. Raises Refusal."""
    done = _run([str(claude), "--version"], claude, inside)
    return parse_version((done.stdout.split() or [""])[0] if done.returncode == 0 else "")


def parse_version(told: str) -> str:
    """What a program calls its version, "unknown" where that is none: it becomes a part of its copy's name."""
    return told if _VERSION.fullmatch(told) else "unknown"


def _run(command: list[str], claude: Path, inside: bool) -> subprocess.CompletedProcess[str]:
    with (
        tempfile.TemporaryDirectory(prefix="hive-") as folder,
        in_memory(b"") as status,
        in_memory(filter_program() or b"") as filtered,
    ):
        if inside:
            filter_fd = filtered.fileno() if filter_program() else None
            dirs = agent_dirs(Path(folder), Path(folder) / "run", AgentName("doctor"))
            dirs.make()
            bwrap, *options = bwrap_command(dirs, claude, status.fileno(), filter_fd)
            command = [bwrap, "--die-with-parent", *options, *command]
        try:
            return subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                cwd=folder,
                env=harness_environment(HOME if inside else folder),
                pass_fds=[status.fileno(), filtered.fileno()],
                timeout=PATIENCE_S,
            )
        except subprocess.TimeoutExpired:
            why = f"it took more than {PATIENCE_S:.0f} s; see what else this machine does"
            raise Refusal("failed", f"cannot look at {claude}: {why}") from None
