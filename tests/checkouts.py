"""A proposed repository, worked in as the manager does."""

from __future__ import annotations

import subprocess
from pathlib import Path

from hive_core.protocol.words import CommitSha
from tests.hives import clean_environment


class Checkout:
    """An agent's proposed repository, as the manager works in it: with git, from its own container."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def git(self, *arguments: str, stdin: bytes | None = None) -> str:
        done = subprocess.run(
            ["git", "-c", "core.hooksPath=/dev/null", *arguments],
            cwd=self.path,
            env=clean_environment(),
            input=stdin,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode().strip()

    def commit(self, **files: str | bytes) -> CommitSha:
        """Commit these files (a name's `__` is its dot); returns the commit."""
        for name, content in files.items():
            data = content if isinstance(content, bytes) else content.encode()
            (self.path / name.replace("__", ".")).write_bytes(data)
        self.git("add", "-A", "-f")
        return self.commit_index()

    def commit_index(self) -> CommitSha:
        self.git("commit", "-q", "--allow-empty", "--no-verify", "-m", "a change")
        return self.head()

    def head(self) -> CommitSha:
        return CommitSha(self.git("rev-parse", "HEAD"))
