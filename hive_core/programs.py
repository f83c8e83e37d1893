"""Where the agent program is on this host."""

from __future__ import annotations

import glob
import os
import shutil
from pathlib import Path

# npm keeps the native binary in a package of its own beside the launcher; that file alone goes into a sandbox.
_NATIVE = "node_modules/@anthropic-ai/claude-code-linux-*/claude"


def find_claude(chosen: Path | None = None) -> Path | None:
    """The claude executable: the chosen one, else the first of PATH, npm's folders and ~/.local/bin. None: not here."""
    if chosen is not None:
        return chosen if os.access(chosen, os.X_OK) else None
    home = os.path.expanduser("~")
    candidates = [shutil.which("claude")]
    for prefix in (
        os.getcwd() + "/.npm",
        "/usr/local/lib",
        "/usr/lib",
        f"{home}/.npm-global/lib",
        f"{home}/.local/lib",
    ):
        candidates += sorted(glob.glob(f"{prefix}/{_NATIVE}"))
    candidates.append(f"{home}/.local/bin/claude")
    for candidate in candidates:
        if candidate and os.access(candidate, os.X_OK):
            return native_of(Path(candidate))
    return None


def how_to_get_claude(chosen: str | Path | None) -> str:
    """One line for whoever has none."""
    if chosen:
        return f"{chosen} is not an executable; change the setting"
    return "not found; `npm install -g @anthropic-ai/claude-code`, then `hive down; hive up`"


def native_of(path: Path) -> Path:
    """The native binary behind npm's launcher, where there is one."""
    real = Path(os.path.realpath(path))  # of links in a circle it is the path of one, which nothing can open
    for parent in real.parents:
        if parent.name == "node_modules":
            found = sorted(glob.glob(f"{parent.parent}/{_NATIVE}"))
            return Path(found[0]) if found else real
    return real
