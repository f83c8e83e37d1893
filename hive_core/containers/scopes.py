"""Agents as transient units of the host's systemd: each is a scope of its own, beside the daemon's unit.

`systemd-run --scope` asks systemd for the unit, is moved into it, and becomes the agent's wrapper: same pid, same
descriptors. So the agent is found again as any other is, and whatever ends the daemon's unit, with any KillMode, leaves
it alone. What keeps its prints goes into the unit with it.

Beside the agent's other files lies which unit it is in, and by which invocation: a name can be used again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Collection, Sequence
from pathlib import Path

from hive_core.containers.bounds import AgentGroups, Bounds
from hive_core.containers.host_names import host_name
from hive_core.protocol.words import AgentName

SLICE = "hyperhive-agents.slice"
_PATIENCE_S = 20.0
# Where a unit that systemd knows, or would read, has a file.
_UNIT_FOLDERS = ("/run/systemd/transient", "/run/systemd/system", "/etc/systemd/system")
_INVOCATIONS = Path("/run/systemd/units")
# systemd's own message when the kernel has killed a process of a unit for its memory: sd-messages.h.
_OUT_OF_MEMORY = "fe6faa94e7774663a0da52717891d8ef"
# In the unit: the keeper comes too, what the unit is is written down, and then the command takes the shell's place.
# Which of the trees systemd goes by differs: one for all (v2), one of its own beside the others, or both.
_ENTER = """\
unit=$1 keeper=$2 note=$3
shift 3
while IFS=: read -r _ _ path; do case $path in */"$unit") break ;; esac; done < /proc/self/cgroup
for tree in "" /unified /systemd; do
  procs=/sys/fs/cgroup$tree$path/cgroup.procs
  [ -n "$path" ] && [ -w "$procs" ] && echo "$keeper" > "$procs"
done &
printf '{"unit": "%s", "invocation": "%s"}\\n' "$unit" "$INVOCATION_ID" > "$note"
unset INVOCATION_ID
exec "$@"
"""


class Scopes(AgentGroups):
    """Scopes in `hyperhive-agents.slice`. Only for a daemon that may ask systemd for them: root."""

    kind = "systemd"

    def __init__(self, state_dir: Path, bounds: Bounds) -> None:
        self.bounds = bounds
        self._state_dir = state_dir
        self.trouble = _try([*self._scope(f"hyperhive-probe-{os.getpid()}.scope", "hyperhive probe"), "true"])

    def unit(self, name: AgentName) -> str:
        return f"hyperhive-agent-{host_name(name, self._state_dir)}.scope"

    def entering(self, name: AgentName, command: Sequence[str], keeper: int) -> list[str]:
        unit, description = self.unit(name), f"hyperhive agent {name} of {self._state_dir}"
        self._note(name).unlink(missing_ok=True)
        _make_way(unit, description)
        entering = ["/bin/sh", "-c", _ENTER, "hive-agent", unit, str(keeper), str(self._note(name))]
        return [*self._scope(unit, description), *entering, *command]

    def remove(self, name: AgentName) -> int:
        # systemd has removed the group itself when nothing is in it any more.
        note = self._note(name)
        try:
            invocation = str(json.loads(note.read_text())["invocation"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0
        finally:
            note.unlink(missing_ok=True)
        return _killed_for_memory(invocation)

    def sweep(self, keep: Collection[str]) -> None:
        """Nothing: systemd has done it."""

    def _note(self, name: AgentName) -> Path:
        return self._state_dir / "processes" / f"{name}.unit"

    def _scope(self, unit: str, description: str) -> list[str]:
        bounds = self.bounds
        properties = {
            "Delegate": "yes",  # systemd-nspawn makes groups of its own below
            "MemoryMax": str(bounds.memory_bytes),
            "MemorySwapMax": "0",
            "CPUQuota": f"{bounds.cpu_percent}%",
            "TasksMax": str(bounds.tasks),
        }
        argv = [shutil.which("systemd-run") or "systemd-run", "--scope", "--quiet", "--collect", f"--unit={unit}"]
        argv += [f"--slice={SLICE}", f"--description={description}"]
        return [*argv, *(f"--property={key}={value}" for key, value in properties.items()), "--"]


def systemd_runs() -> bool:
    """Whether systemd is this host's first process, as sd_booted(3) finds out."""
    return os.path.isdir("/run/systemd/system")


def unit_of(pid: int) -> dict[str, str]:
    """The scope that a process is in, and its invocation; nothing when it is in none, or cannot be seen."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            for part in line.split(":", 2)[2].split("/"):
                if part.startswith("hyperhive-agent-") and part.endswith(".scope"):
                    return {"unit": part, "invocation": os.readlink(_INVOCATIONS / f"invocation:{part}")}
    return {}


def _try(command: Sequence[str]) -> str | None:
    try:
        done = _run(command)
    except OSError as exc:
        return f"agents are no units of systemd ({exc})"
    if done.returncode == 0:
        return None
    return f"agents are no units of systemd ({(done.stderr.strip().splitlines() or ['no reason given'])[-1][:300]})"


def _make_way(unit: str, description: str) -> None:
    """Remove what is left of an agent's unit. Raises OSError when the name is taken by another's."""
    if not any(os.path.lexists(os.path.join(folder, unit)) for folder in _UNIT_FOLDERS):
        return
    shown = _run(["systemctl", "show", "--property=Description,ActiveState,FragmentPath", unit]).stdout
    told = dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
    if told.get("Description") != description:
        where = told.get("FragmentPath") or "systemd"
        raise OSError(f"a unit of its name is not ours ({where}); `systemctl stop {unit}`, or remove that file")
    if told.get("ActiveState") != "failed":
        # The agent itself has ended, or we would not be asked to start it.
        _run(["systemctl", "kill", "--signal=SIGKILL", unit])
        _run(["systemctl", "stop", unit])
    _run(["systemctl", "reset-failed", unit])


def _killed_for_memory(invocation: str) -> int:
    """How often systemd has told that processes of a unit were killed for their memory."""
    matches = ["_UID=0", f"INVOCATION_ID={invocation}", f"MESSAGE_ID={_OUT_OF_MEMORY}"]
    with contextlib.suppress(OSError):
        said = _run(["journalctl", "--quiet", "--boot", "--output=cat", "--lines=1000", *matches]).stdout
        return len(said.splitlines())
    return 0


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Raises OSError, also when it does not end in time."""
    try:
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PATIENCE_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise OSError(f"{command[0]} did not answer within {_PATIENCE_S:.0f} s") from None
