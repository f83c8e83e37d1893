"""The tokens of forges: a file each in credentials/forges of the state directory, for the daemon's user alone.

A token's file is named by its project and by the place that it is for, so that none is ever sent to another place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path

from hive_core.credentials import SECRET_LIMIT, read_secret, write_secret
from hive_core.forge.words import Place
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import ProjectName

TOKEN_LEAST = 8


class Tokens:
    def __init__(self, state_dir: Path) -> None:
        self._folder = state_dir / "credentials" / "forges"

    def get(self, project: ProjectName, place: Place) -> str:
        """Raises Refusal("refused") when there is none."""
        path = self._file(project, place)
        if token := read_secret(path, private=True):
            return token
        why = f"its token is not there ({path}); `hive forge add` gives it"
        raise Refusal("refused", f"cannot use the forge of {project}: {why}")

    def put(self, project: ProjectName, place: Place, token: str) -> None:
        """Store it, whole or not at all. Raises OSError."""
        self._folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_secret(self._file(project, place), token)

    def keep_only(self, project: ProjectName, place: Place | None) -> None:
        """Remove what the project has besides the token for this place, or all."""
        kept = self._file(project, place) if place else None
        for path in self._folder.glob(f"{project}.*"):
            if path != kept:
                path.unlink(missing_ok=True)

    def keep_those_of(self, projects: Collection[str]) -> None:
        """Remove the tokens of all other projects."""
        for path in self._folder.glob("*"):
            if path.name.partition(".")[0] not in projects:
                path.unlink(missing_ok=True)

    def _file(self, project: ProjectName, place: Place) -> Path:
        digest = hashlib.sha256(f"{place.kind} {place.url} {place.repository}".encode()).hexdigest()
        return self._folder / f"{project}.{digest[:16]}"


def parse_token(raw: object) -> str:
    """A token that somebody gives, checked by its shape alone. Raises Refusal("usage") that does not quote it."""
    token = raw.strip() if isinstance(raw, str) else ""
    one_word = token.isascii() and token.isprintable() and " " not in token
    if not one_word or not TOKEN_LEAST <= len(token) <= SECRET_LIMIT:
        form = f"it must be one word of {TOKEN_LEAST} to {SECRET_LIMIT} characters"
        raise Refusal("usage", f"cannot use this token: {form}")
    return token
