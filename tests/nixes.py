"""Real nix for tests, on a store of its own: nothing is left in the machine's, and nobody has to be root."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GIVEN = os.environ.get("HIVE_TEST_NIXPKGS", "")
WITHIN_S = 120
# Our flake on the stand-in for nixpkgs, and on what HIVE_TEST_NIXPKGS gives: a nixpkgs, or a folder with its lib/.
NIXPKGS = ["", *([GIVEN] if GIVEN else [])]


def quoted(text: str) -> str:
    """A string as a Nix literal."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("${", "\\${") + '"'


def make_sources(folder: Path) -> Path:
    """As much of ourselves as evaluating an agent takes: a whole checkout is copied by nix each time."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("flake.nix", "nix", "pyproject.toml"):
        subprocess.run(["cp", "-r", ROOT / name, folder], check=True)
    for name in ("protocol", "__init__.py", "version.py"):
        (folder / "hive_core").mkdir(exist_ok=True)
        subprocess.run(["cp", "-r", ROOT / "hive_core" / name, folder / "hive_core"], check=True)
    for name in ("hive_agent", "hive_mind"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").touch()
    return folder


class Nix:
    """nix with a store below `folder`, flakes on, and nothing of the user's settings."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "NIX_REMOTE": f"local?root={folder}/store",
            "NIX_CONF_DIR": str(folder),
            "NIX_CONFIG": "experimental-features = nix-command flakes\nbuild-users-group =\nsubstituters =",
            "GIT_CONFIG_NOSYSTEM": "1",
        }

    def run(self, *command: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=cwd, env=self.environment, capture_output=True, text=True, timeout=WITHIN_S, check=False
        )

    def value(self, expression: str, nixpkgs: str = "") -> Any:
        """What an expression is, which sees evaluate.nix."""
        done = self._evaluate(expression, nixpkgs)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def failure(self, expression: str, nixpkgs: str = "") -> str:
        """What nix says of an expression that cannot be evaluated."""
        done = self._evaluate(expression, nixpkgs)
        assert done.returncode != 0, done.stdout
        return done.stderr

    def parses(self, files: Sequence[Path]) -> None:
        for file in files:
            done = self.run("nix-instantiate", "--parse", file)
            assert done.returncode == 0, done.stderr

    def _evaluate(self, expression: str, nixpkgs: str) -> subprocess.CompletedProcess[str]:
        scope = f"with import ./tests/nix/evaluate.nix {{ given = {quoted(nixpkgs)}; }}; "
        return self.run("nix-instantiate", "--eval", "--strict", "--json", "-E", scope + expression)
