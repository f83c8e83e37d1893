"""The house has floors: what is in a room knows only of its own floor and of those below."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.needs import ROOT

# From the ground up. A name is a module of hive_core's, or a package with all that is in it.
FLOORS = [
    {"protocol"},
    {  # what asks nobody
        *(
            "credentials",
            "cron",
            "destinations",
            "distinct",
            "egress_edit",
            "egress_rules",
            "extra_files",
            "extras",
            "kept",
            "limits",
            "lock",
            "logs",
            "prices",
        ),
        *("program_config", "program_copies", "programs", "project_rules", "provider_limits", "revision"),
        *("settings", "snapshots", "systemd", "toolkits", "tree_copies", "trees", "usage", "version"),
    },
    {"git", "store"},
    {"config", "effects", "effects_of_extras", "effects_of_settings", "lanes", "policy_rules"},
    {"containers", "egress", "flakes", "forge"},
    {"services"},
    {"procedures"},
    {"hive", "commands"},
    {"sockets"},
    {"agent_doors"},
    {"daemon", "daemon_cli", "helper", "cli", "__main__"},
]


def modules() -> Iterator[tuple[str, Path]]:
    """Each module of hive_core's, and the room that it is in."""
    core = ROOT / "hive_core"
    for path in sorted(core.rglob("*.py")):
        room = path.relative_to(core).with_suffix("").parts[0]
        if room != "__init__":
            yield room, path


def imported(path: Path) -> Iterator[str]:
    """What a module imports, wherever in it: `from a import b` is told as `a.b`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_each_room_is_on_one_floor() -> None:
    told = [room for floor in FLOORS for room in floor]
    assert sorted(told) == sorted({room for room, _ in modules()})


def test_nothing_imports_from_a_floor_above_its_own() -> None:
    floor_of = {room: number for number, floor in enumerate(FLOORS) for room in floor}
    upward = [
        f"{path.relative_to(ROOT)} imports {name}"
        for room, path in modules()
        for name in imported(path)
        if name.startswith("hive_core.") and floor_of.get(name.split(".")[1], -1) > floor_of[room]
    ]
    assert upward == []


def test_what_runs_in_a_container_knows_of_the_daemon_only_how_they_talk() -> None:
    more = [
        f"{path.relative_to(ROOT)} imports {name}"
        for package in ("hive_agent", "hive_mind")
        for path in sorted((ROOT / package).rglob("*.py"))
        for name in imported(path)
        if name.startswith(("hive_core.", "dashboard")) and not name.startswith("hive_core.protocol")
    ]
    assert more == []
