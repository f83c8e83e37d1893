"""Control groups for agents made by hand, where no systemd makes them: memory, cpu and tasks.

Both hierarchies are known: one tree for all (v2), and one for each kind (v1). An agent's groups lie below the daemon's
own, in one of the hive's. Its wrapper enters them before it becomes anything else, so all that comes of it is in them;
no container shows an agent where they are.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from hive_core.containers.bounds import AgentGroups, Bounds
from hive_core.protocol.words import AgentName

KINDS = ("memory", "cpu", "pids")
ASIDE = "hive-daemon"
_PERIOD_US = 100_000
# Enters groups and becomes a command: `$1 …` are files to write 0 into, then comes --.
_ENTER = 'while [ "$1" != -- ]; do echo 0 > "$1" || exit 125; shift; done; shift; exec "$@"'


class Cgroups(AgentGroups):
    """Groups below the daemon's own."""

    kind = "by hand"

    def __init__(self, state_dir: Path, bounds: Bounds) -> None:
        self.bounds = bounds
        self._folder = _folder_name(state_dir)
        self._trees = _trees()
        self._told: dict[Path, int] = {}  # group → how many of its processes were killed in runs of before
        self.trouble = self._try()

    def _try(self) -> str | None:
        if self._trees is None:
            return "agents are not bounded: no control groups for memory, cpu and pids are mounted; mount cgroup2"
        try:
            self.make("hive-probe")
        except OSError as exc:
            fix = "run the daemon as root, or as a systemd unit with Delegate=yes and DelegateSubgroup=hive-daemon"
            return f"agents are not bounded: no control group can be made ({exc.filename}: {exc.strerror}); {fix}"
        finally:
            self.remove("hive-probe")
        return None

    def entering(self, name: AgentName, command: Sequence[str], keeper: int) -> list[str]:
        entries = (str(entry) for entry in self.make(name))
        return ["/bin/sh", "-c", _ENTER, "hive-agent", *entries, "--", *command]

    def make(self, name: str) -> list[Path]:
        """Make an agent's groups, or take those that are there; the files by which a process enters. Raises OSError."""
        entries = []
        for parent, settings in self._wanted():
            if settings.get("memory.max"):
                hand_down(parent, parent / self._folder)
            group = parent / self._folder / name
            group.mkdir(parents=True, exist_ok=True)
            self._told[group] = _killed_for_memory(group)  # in a run before, whose group could not be removed
            for file, value in settings.items():
                (group / file).write_text(value)
            entries.append(group / "cgroup.procs")
        return entries

    def remove(self, name: str) -> int:
        killed = 0
        for parent, _ in self._wanted():
            group = parent / self._folder / name
            so_far = _killed_for_memory(group)
            killed += max(0, so_far - self._told.get(group, 0))
            self._told[group] = so_far
            _remove_empty(*sorted(group.glob("*/"), reverse=True), group, group.parent)
        return killed

    def sweep(self, keep: Collection[str]) -> None:
        for parent, _ in self._wanted():
            for group in (parent / self._folder).glob("*/"):
                if group.name not in keep:
                    _remove_empty(*sorted(group.glob("*/"), reverse=True), group)
            _remove_empty(parent / self._folder)

    def _wanted(self) -> list[tuple[Path, dict[str, str]]]:
        """Where a group is to be made, and what is to be written into its files."""
        bounds, trees = self.bounds, self._trees or {}
        quota = str(bounds.cpu_percent * _PERIOD_US // 100)
        if "" in trees:
            one = {"memory.max": str(bounds.memory_bytes), "memory.swap.max": "0", "pids.max": str(bounds.tasks)}
            return [(trees[""], {**one, "cpu.max": f"{quota} {_PERIOD_US}"})]
        return [
            (trees["memory"], {"memory.limit_in_bytes": str(bounds.memory_bytes)}),
            (trees["cpu"], {"cpu.cfs_period_us": str(_PERIOD_US), "cpu.cfs_quota_us": quota}),
            (trees["pids"], {"pids.max": str(bounds.tasks)}),
        ]


def folders_of(state_dir: Path) -> list[Path]:
    """Where the groups are that daemons in our own have made for the agents of a state directory, in each tree."""
    return [tree / _folder_name(state_dir) for tree in (_trees() or {}).values()]


def _folder_name(state_dir: Path) -> str:
    return f"hive-{hashlib.sha256(os.fsencode(state_dir)).hexdigest()[:8]}"


def _remove_empty(*groups: Path) -> None:
    for group in groups:
        # Not empty: what has just ended is not gone yet, or another agent is in there.
        with contextlib.suppress(OSError):
            group.rmdir()


def joining(pid: int, command: Sequence[str]) -> list[str]:
    """The command, to be run in the groups that another process is in."""
    mounted, files, lines = mounted_trees(), [], b""
    with contextlib.suppress(OSError):  # it has ended: what is to be done with it says so
        lines = Path(f"/proc/{pid}/cgroup").read_bytes()
    # A container's own systemd makes groups too, whose names are any bytes but a line feed.
    for line in os.fsdecode(lines).split("\n")[:-1]:
        _, kinds, path = line.split(":", 2)
        for kind in kinds.split(","):
            file = mounted.get(kind, Path("/nowhere")) / path.lstrip("/") / "cgroup.procs"
            if os.access(file, os.W_OK) and str(file) not in files:
                files.append(str(file))
    return ["/bin/sh", "-c", _ENTER, "hive-command", *files, "--", *command]


def hand_down(parent: Path, folder: Path, kinds: Sequence[str] = KINDS) -> None:
    """Let groups in a folder below `parent` bound what is in them, in the tree for all. Raises OSError.

    There a group bounds only what the one above has handed down, and one that has processes of its own hands nothing
    down: those of `parent`, the daemon among them, go into a group beside the folder.
    """
    folder.mkdir(exist_ok=True)
    wanted = " ".join(f"+{kind}" for kind in kinds)
    for above in (parent, folder):
        control = above / "cgroup.subtree_control"
        try:
            control.write_text(wanted)
        except OSError as exc:
            if exc.errno != errno.EBUSY:
                raise
            _move_aside(above)
            control.write_text(wanted)


def _move_aside(group: Path) -> None:
    (group / ASIDE).mkdir(exist_ok=True)
    for pid in (group / "cgroup.procs").read_text().split():
        with contextlib.suppress(OSError):  # it has just ended
            (group / ASIDE / "cgroup.procs").write_text(pid)


def _killed_for_memory(group: Path) -> int:
    for file in ("memory.events", "memory.oom_control"):
        with contextlib.suppress(OSError, ValueError):
            for line in (group / file).read_text().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    return 0


def _trees() -> Mapping[str, Path] | None:
    """Our own group in the tree for all (""), or in that of each kind; None where not all three kinds are to be had."""
    mounted = mounted_trees()
    ours: dict[str, Path] = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, kinds, path = line.split(":", 2)
        for kind in kinds.split(","):
            if kind in mounted:
                own = mounted[kind] / path.lstrip("/")
                # A container that was given its part of the tree is told the path in the whole.
                own = own if own.is_dir() else mounted[kind]
                ours[kind] = own.parent if own.name == ASIDE else own
    if "" in ours:
        with contextlib.suppress(OSError):
            if set(KINDS) <= set((ours[""] / "cgroup.controllers").read_text().split()):
                return {"": ours[""]}
        del ours[""]
    return ours if set(KINDS) <= set(ours) else None


def mounted_trees() -> dict[str, Path]:
    """Where each kind's tree is, and under "" the one for all."""
    found: dict[str, Path] = {}
    for line in os.fsdecode(Path("/proc/self/mountinfo").read_bytes()).split("\n")[:-1]:
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        place = Path(before.split()[4])
        if kind == "cgroup2":
            found[""] = place
        elif kind == "cgroup":
            found |= dict.fromkeys(options.split(","), place)
    return found
