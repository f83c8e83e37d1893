"""The credential for the model provider: found on the host, kept on the host."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hive_core.protocol.refusal import Refusal

# (kind, variable, name of the systemd credential and of the file in credentials/), in the order they are tried.
SOURCES = (
    ("api_key", "ANTHROPIC_API_KEY", "anthropic-api-key"),
    ("oauth_token", "CLAUDE_CODE_OAUTH_TOKEN", "claude-oauth-token"),
)


@dataclass(frozen=True, slots=True)
class Credential:
    kind: str  # "api_key" or "oauth_token"
    source: str  # where it was found, for people
    secret: str = field(repr=False)
    name: str = "default"

    def headers(self) -> list[tuple[bytes, bytes]]:
        """The request headers that carry it."""
        if self.kind == "api_key":
            return [(b"x-api-key", self.secret.encode())]
        return [(b"authorization", b"Bearer " + self.secret.encode())]


def find_credential(state_dir: Path, environment: Mapping[str, str] = os.environ) -> Credential | None:
    """The first of: the environment, systemd's credentials, state_dir/credentials. None when there is none.

    Raises Refusal("usage") that names the source, never the secret, when what is there cannot be one.
    """
    for kind, variable, _ in SOURCES:
        if secret := environment.get(variable, "").strip():
            return Credential(kind, variable, _checked(secret, variable))
    folders = [Path(environment["CREDENTIALS_DIRECTORY"])] if "CREDENTIALS_DIRECTORY" in environment else []
    for folder in [*folders, state_dir / "credentials"]:
        for kind, _, file_name in SOURCES:
            if secret := _read(folder / file_name):
                return Credential(kind, str(folder / file_name), secret)
    return None


def _read(path: Path) -> str:
    try:
        return _checked(path.read_text("ascii").strip(), str(path))
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError:
        raise Refusal("usage", f"cannot use the credential in {path}: it is not text") from None
    except OSError as exc:
        raise Refusal("usage", f"cannot use the credential in {path}: {exc.strerror}") from None


def _checked(secret: str, source: str) -> str:
    """A credential goes into a header: one word of printable ASCII."""
    if secret and not (secret.isascii() and secret.isprintable() and " " not in secret):
        raise Refusal("usage", f"cannot use the credential in {source}: it must be one word of printable ASCII")
    return secret


def how_to_give_one(state_dir: Path) -> str:
    """One line for whoever has none."""
    folder = state_dir / "credentials"
    return (
        "none: set ANTHROPIC_API_KEY, or CLAUDE_CODE_OAUTH_TOKEN from `claude setup-token`, or put one into "
        f"{folder}/anthropic-api-key or {folder}/claude-oauth-token (mode 0600), then start the hive again"
    )
