"""What an agent's program takes for its own directory (CLAUDE_CONFIG_DIR): /extras/config, which is read-only.

Links in it lead to what the program writes: sessions above all, which outlive the container, and what its shell needs,
which does not. All else that Claude Code finds there would be configuration which no card showed: an environment in
.claude.json that stands above the harness's, MCP servers that are off, a CLAUDE.md, skills. Of .config.json and
.claude.json it takes the first.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from pathlib import Path

from hive_core.protocol.paths import sync_folder

NAME, NEW = "config", ".config.new"
KEPT = ("projects", "file-history", "plans", "plugins/data", "tasks", "todos")
PASSING = ("cache", "debug", "session-env", "sessions", "shell-snapshots")


def make_program_config(extras: Path, kept: str, passing: str) -> None:
    """Have it lie in an agent's extras, whole. Again is fine.

    kept, passing: the directories, inside, that the links lead to. The harness makes what is missing there.

    Raises OSError.
    """
    if (extras / NAME).exists():
        return
    fresh = extras / NEW
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(fresh)
    fresh.mkdir(mode=0o755)
    # All that it would write at a first start, so that it has nothing to write: it tries for long.
    known = {
        "userID": secrets.token_hex(32),
        "machineID": secrets.token_hex(32),
        "firstStartTime": "2026-01-01T00:00:00.000Z",
        "migrationVersion": 13,
        "opusProMigrationComplete": True,
        "sonnet1m45MigrationComplete": True,
        "seenNotifications": {},
    }
    (fresh / ".config.json").write_text(json.dumps(known))
    for folder, names in ((kept, KEPT), (passing, PASSING)):
        for name in names:
            (fresh / name).parent.mkdir(exist_ok=True)
            (fresh / name).symlink_to(f"{folder}/{name}")
    for path in (fresh, *fresh.rglob("*")):  # whatever our umask is
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() else 0o644)
    sync_folder(fresh)
    os.rename(fresh, extras / NAME)
