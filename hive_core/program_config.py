"""What an agent's program takes for its own directory (CLAUDE_CONFIG_DIR): /extras/config, which is read-only.

Links in it lead to what the program writes: sessions above all, which outlive the container, and what its shell needs,
which does not. All else that Claude Code finds there would be configuration which no card showed: an environment in
.claude.json that stands above the harness's, MCP servers that are off, a CLAUDE.md, skills. Of .config.json and
.claude.json it takes the first.
"""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path

from hive_core.protocol.paths import sync_folder
from hive_core.trees import open_folder, remove_tree

NAME, NEW = "config", ".config.new."
FILE = ".config.json"
KEPT = ("projects", "file-history", "plans", "plugins/data", "tasks", "todos")
PASSING = ("cache", "debug", "session-env", "sessions", "shell-snapshots")


def make_program_config(extras: Path, kept: str, passing: str) -> None:
    """Have it lie in an agent's extras, whole and on disk, before anything runs that sees it. Again is fine.

    kept, passing: the directories, inside, that the links lead to. The harness makes what is missing there.

    Raises OSError.
    """
    if _is_whole(extras / NAME, kept, passing):
        return
    fresh = extras / f"{NEW}{secrets.token_hex(6)}"
    fresh.mkdir(mode=0o755)
    # All that it would write at a first start, so that it has nothing to write.
    known = {
        "userID": secrets.token_hex(32),
        "machineID": secrets.token_hex(32),
        "firstStartTime": "2026-01-01T00:00:00.000Z",
        "migrationVersion": 13,
        "opusProMigrationComplete": True,
        "sonnet1m45MigrationComplete": True,
        "seenNotifications": {},
    }
    with open(fresh / FILE, "w", encoding="utf-8") as file:
        json.dump(known, file)
        file.flush()
        os.fsync(file.fileno())
    for name, target in _links(kept, passing).items():
        (fresh / name).parent.mkdir(exist_ok=True)
        (fresh / name).symlink_to(target)
    for path in (*fresh.rglob("*"), fresh):
        if path.is_symlink():  # which leads to where the daemon may be forbidden to look
            continue
        path.chmod(0o755 if path.is_dir() else 0o644)  # whatever our umask is
        if path.is_dir():
            sync_folder(path)
    folder = open_folder(extras)
    try:
        for name in os.listdir(folder):  # another layout, what a power cut left of one, and what died on its way here
            if name == NAME or (name.startswith(NEW) and name != fresh.name):
                remove_tree(name, folder)
        os.rename(fresh.name, NAME, src_dir_fd=folder, dst_dir_fd=folder)
        os.fsync(folder)
    finally:
        os.close(folder)


def _links(kept: str, passing: str) -> dict[str, str]:
    return {name: f"{folder}/{name}" for folder, names in ((kept, KEPT), (passing, PASSING)) for name in names}


def _is_whole(config: Path, kept: str, passing: str) -> bool:
    try:
        known = json.loads((config / FILE).read_bytes())
        return isinstance(known, dict) and all(
            os.readlink(config / name) == target for name, target in _links(kept, passing).items()
        )
    except (OSError, ValueError):
        return False
