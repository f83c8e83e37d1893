"""The credentials of projects in files of the host's alone: an ssh key or a token, and the host keys that are known."""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import re
import secrets
from collections.abc import Collection, Iterator
from pathlib import Path

from hive_core.git.remotes import Access, Source
from hive_core.git.sterile_git import GitFailed
from hive_core.protocol.paths import sync_folder
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import ProjectName

FOLDER = "projects"  # of credentials/
KEY, TOKEN, KNOWN_HOSTS = ".key", ".token", ".known_hosts"
SECRET_LIMIT = 64 * 1024
TOKEN_LIMIT = 4096
_KEY_TYPE = re.compile(r"(ssh|ecdsa|sk)-[A-Za-z0-9@.-]{1,60}")


def parse_key(raw: object) -> str:
    """A private key as ssh-keygen writes one. Raises Refusal("usage") that does not quote it."""
    text = raw.replace("\r\n", "\n").strip() + "\n" if isinstance(raw, str) else ""
    if len(text) > SECRET_LIMIT or not text.startswith("-----BEGIN ") or "PRIVATE KEY-----\n" not in text:
        raise Refusal("usage", "cannot use this key: give the file of a private key, as ssh-keygen writes it")
    if "ENCRYPTED" in text:
        raise Refusal("usage", "cannot use this key: it needs a passphrase; give one without (`ssh-keygen -p`)")
    return text


def parse_token(raw: object) -> str:
    """One word of printable ASCII. Raises Refusal("usage") that does not quote it."""
    token = raw.strip() if isinstance(raw, str) else ""
    if not 8 <= len(token) <= TOKEN_LIMIT or not token.isascii() or not token.isprintable() or " " in token:
        raise Refusal("usage", f"cannot use this token: it must be one word of 8 to {TOKEN_LIMIT:,} ASCII characters")
    return token


def parse_host_key(raw: object, host: str, port: int | None) -> str:
    """A line of a known_hosts file, or `TYPE KEY` alone, for the project's own host. Raises Refusal("usage")."""
    words = raw.split() if isinstance(raw, str) and len(raw) < 8_192 and raw.isprintable() else []
    for start in (0, 1):
        kind, key = (*words[start : start + 2], "", "")[:2]
        with contextlib.suppress(binascii.Error, ValueError):
            if _KEY_TYPE.fullmatch(kind) and kind.encode() in base64.b64decode(key, validate=True)[:80]:
                place = host if port in (None, 22) else f"[{host}]:{port}"
                return f"{place} {kind} {key}\n"
    raise Refusal("usage", "cannot use this host key: give a line such as `ssh-ed25519 AAAA…`, as ssh-keyscan tells it")


class ProjectKeys:
    """Files NAME.key, NAME.token and NAME.known_hosts of state_dir/credentials/projects, mode 0600."""

    def __init__(self, state_dir: Path) -> None:
        self.folder = state_dir / "credentials" / FOLDER

    def put(self, name: ProjectName, suffix: str, text: str) -> None:
        """Write one, whole or not at all. Raises OSError."""
        for folder in (self.folder.parent, self.folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh = self.folder / f".{secrets.token_hex(8)}"
        try:
            with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            fresh.rename(self._file(name, suffix))
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise
        sync_folder(self.folder)

    def read(self, name: ProjectName) -> dict[str, str]:
        """What there is of a project, by suffix. Raises OSError."""
        files = ((suffix, self._file(name, suffix)) for suffix in (KEY, TOKEN, KNOWN_HOSTS))
        return {suffix: file.read_text(errors="replace") for suffix, file in files if file.exists()}

    def remove(self, name: ProjectName, kept: Collection[str] = ()) -> None:
        """kept: the ends of the files that stay. Again is fine."""
        for suffix in (KEY, TOKEN, KNOWN_HOSTS):
            if suffix not in kept:
                self._file(name, suffix).unlink(missing_ok=True)

    def names(self) -> Iterator[str]:
        """The projects of which there is a file."""
        with contextlib.suppress(FileNotFoundError):
            yield from {file.partition(".")[0] for file in os.listdir(self.folder) if not file.startswith(".")}

    def access(self, name: ProjectName, source: Source) -> Access:
        """How the project is reached. Raises GitFailed when its credential is gone."""
        key, token = self._file(name, KEY), self._file(name, TOKEN)
        try:
            return Access(
                source,
                key=key if source.kind == "ssh" and key.exists() else None,
                known_hosts=self._file(name, KNOWN_HOSTS) if source.kind == "ssh" else None,
                token=token.read_text().strip() if source.kind == "http" and token.exists() else "",
            )
        except (OSError, UnicodeDecodeError):
            raise GitFailed(f"its credential in {token} cannot be read; give it again") from None

    def _file(self, name: ProjectName, suffix: str) -> Path:
        return self.folder / f"{name}{suffix}"
