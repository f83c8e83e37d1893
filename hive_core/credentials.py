"""The credentials for the model provider: found on the host, kept on the host, each by its name.

`default` is what the environment, systemd or state_dir/credentials give; any other is a file of state_dir/credentials,
NAME.api-key or NAME.oauth-token. An agent's settings name the one it uses. Nothing but the operator's word writes one:
an API key and the long-lived token of `claude setup-token` are never refreshed, so nothing races for them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import shown

# (kind, variable, name of the systemd credential and of the file in credentials/), in the order they are tried.
SOURCES = (
    ("api_key", "ANTHROPIC_API_KEY", "anthropic-api-key"),
    ("oauth_token", "CLAUDE_CODE_OAUTH_TOKEN", "claude-oauth-token"),
)
DEFAULT = "default"
SUFFIXES = {"api_key": ".api-key", "oauth_token": ".oauth-token"}
NAME_PATTERN = "[a-z][a-z0-9]*(-[a-z0-9]+)*"
NAME_LIMIT = 30
SECRET_LIMIT = 1024
KEY_LEAST = 16
TOKEN = re.compile(r"sk-ant-oat[0-9]{2}-[A-Za-z0-9_-]{20,}")  # what `claude setup-token` prints
# Without it the provider takes no token of that kind.
OAUTH_BETA = b"oauth-2025-04-20"


@dataclass(frozen=True, slots=True)
class Credential:
    kind: str  # "api_key" or "oauth_token"
    source: str  # where it was found, for people
    secret: str = field(repr=False)
    name: str = DEFAULT

    def headers(self) -> list[tuple[bytes, bytes]]:
        """The request headers that carry it."""
        if self.kind == "api_key":
            return [(b"x-api-key", self.secret.encode())]
        return [(b"authorization", b"Bearer " + self.secret.encode())]

    def put_on(self, headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """A request's headers with this credential, and with what its kind needs beside it.

        A token whose beta the program left out would be refused, and with it the credential, for everybody.
        """
        if self.kind == "oauth_token" and not any(OAUTH_BETA in v for n, v in headers if n == b"anthropic-beta"):
            headers = [*headers, (b"anthropic-beta", OAUTH_BETA)]
        return [*headers, *self.headers()]

    @property
    def fingerprint(self) -> str:
        """Tells one secret from another, and nothing of either."""
        return hashlib.sha256(self.secret.encode()).hexdigest()[:16]


def parse_credential_name(raw: object) -> str:
    """Raises Refusal("usage")."""
    if not isinstance(raw, str) or len(raw) > NAME_LIMIT or not re.fullmatch(NAME_PATTERN, raw):
        raise Refusal(
            "usage",
            f"cannot use {shown(raw)} as a credential's name: a name is 1 to {NAME_LIMIT} characters of a-z, 0-9 and "
            "single dashes, and begins with a letter",
        )
    return raw


def parse_secret(kind: str, raw: object) -> str:
    """A secret that somebody gives, checked by its shape alone. Raises Refusal("usage") that does not quote it."""
    what = "API key" if kind == "api_key" else "token"
    secret = _checked(raw.strip(), f"what was given as the {what}") if isinstance(raw, str) else ""
    if not KEY_LEAST <= len(secret) <= SECRET_LIMIT:
        raise Refusal(
            "usage", f"cannot use this {what}: it must be one word of {KEY_LEAST} to {SECRET_LIMIT} characters"
        )
    if kind == "oauth_token" and not TOKEN.fullmatch(secret):
        raise Refusal("usage", "cannot use this token: what `claude setup-token` prints begins with sk-ant-oat")
    if kind == "api_key" and TOKEN.fullmatch(secret):
        raise Refusal("usage", "cannot use this API key: it is a token of `claude setup-token`; give it with --token")
    return secret


def find_credential(state_dir: Path, environment: Mapping[str, str] = os.environ) -> Credential | None:
    """The first of: the environment, systemd's credentials, state_dir/credentials. None when there is none.

    Raises Refusal("usage") that names the source, never the secret, when what is there cannot be one.
    """
    for kind, variable, _ in SOURCES:
        if secret := environment.get(variable, "").strip():
            return Credential(kind, variable, _checked(secret, variable))
    for kind, path in _default_files(state_dir, environment):
        if secret := read_secret(path):
            return Credential(kind, str(path), secret)
    return None


def _default_files(state_dir: Path, environment: Mapping[str, str]) -> Iterator[tuple[str, Path]]:
    folders = [Path(environment["CREDENTIALS_DIRECTORY"])] if "CREDENTIALS_DIRECTORY" in environment else []
    for folder in [*folders, state_dir / "credentials"]:
        for kind, _, file_name in SOURCES:
            yield kind, folder / file_name


def read_secret(path: Path, private: bool = False) -> str:
    """The word that a file holds; "" when there is none. Raises Refusal("usage"), also of a private one that is not."""
    try:
        # A pipe is not waited for: who asks has the whole hive wait.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            found = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(found):
                why = "it is no regular file; put the secret itself there"
                raise Refusal("usage", f"cannot use the credential in {path}: {why}")
            mode = stat.S_IMODE(found)
            if private and mode & 0o077:
                way_out = f"`chmod 600 {path}`, and think of a new one"
                why = f"others may read it ({mode:04o}); {way_out}"
                raise Refusal("usage", f"cannot use the credential in {path}: {why}")
            return _checked(file.read(64 * 1024).decode("ascii").strip(), str(path))
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
        f"none: `hive login`, or put one into {folder}/anthropic-api-key or {folder}/claude-oauth-token (mode 0600), "
        "or start the hive with ANTHROPIC_API_KEY, or with CLAUDE_CODE_OAUTH_TOKEN from `claude setup-token`"
    )


class _Known(NamedTuple):
    marks: tuple[object, ...]  # of the files that it came from, or could have come from
    credential: Credential | None
    missing: str


class Credentials:
    """Every credential of this host, read again whenever its file has changed."""

    def __init__(self, state_dir: Path, environment: Mapping[str, str] = os.environ) -> None:
        self.folder = state_dir / "credentials"
        self._state_dir = state_dir
        self._environment = environment
        self._known: dict[str, _Known] = {}

    def find(self, name: str) -> Credential | None:
        """The credential of that name as it is now, or None; then `missing` says why. It costs a look at its files."""
        return self._look(name).credential

    def missing(self, name: str) -> str:
        """Why there is no credential of that name, and how to give it; "" when there is one."""
        return self._look(name).missing

    def names(self) -> list[str]:
        """`default`, and every name that a file has."""
        found = {DEFAULT}
        with contextlib.suppress(OSError):
            for file in os.listdir(self.folder):
                name, dot, suffix = file.partition(".")
                if dot + suffix in SUFFIXES.values() and name != DEFAULT and re.fullmatch(NAME_PATTERN, name):
                    found.add(name)
        return sorted(found, key=lambda name: (name != DEFAULT, name))

    def check_writable(self, name: str) -> None:
        """Raises Refusal("refused") when what would be written would not count: another source comes before it."""
        if name != DEFAULT:
            return
        found = self.find(name)
        if found is not None and Path(found.source).parent != self.folder:
            raise Refusal(
                "refused",
                f"cannot change the credential default: it comes from {found.source}, which counts before any file; "
                "take it away there and start the hive again, or give another name",
            )

    def put(self, name: str, kind: str, secret: str) -> Path:
        """Store one, whole or not at all, in the place of what had that name; its file. Raises Refusal or OSError."""
        self.check_writable(name)
        path = self._file(name, kind)
        write_secret(path, secret)
        for other in SUFFIXES:
            if other != kind:
                self._file(name, other).unlink(missing_ok=True)
        _sync(self.folder)
        return path

    def remove(self, name: str) -> None:
        """Raises Refusal("not_found") when no file of ours has it."""
        self.check_writable(name)
        gone = False
        for kind in SUFFIXES:
            with contextlib.suppress(FileNotFoundError):
                self._file(name, kind).unlink()
                gone = True
        if not gone:
            why = "there is none; `hive credentials` lists them"
            raise Refusal("not_found", f"cannot remove the credential {name}: {why}")
        _sync(self.folder)

    def _file(self, name: str, kind: str) -> Path:
        if name == DEFAULT:
            return self.folder / next(file for its_kind, _, file in SOURCES if its_kind == kind)
        return self.folder / f"{name}{SUFFIXES[kind]}"

    def _look(self, name: str) -> _Known:
        if name == DEFAULT:
            files = [path for _, path in _default_files(self._state_dir, self._environment)]
        else:
            files = [self._file(name, kind) for kind in SUFFIXES]
        marks = tuple(map(_mark, files))
        known = self._known.get(name)
        if known is None or known.marks != marks:
            known = self._known[name] = _Known(marks, *self._read(name))
        return known

    def _read(self, name: str) -> tuple[Credential | None, str]:
        try:
            found = find_credential(self._state_dir, self._environment) if name == DEFAULT else self._read_file(name)
        except Refusal as refusal:
            return None, refusal.message
        if found is None and name == DEFAULT:
            return None, how_to_give_one(self._state_dir)
        return found, "" if found else f"there is no credential {name}: `hive login {name}` gives it"

    def _read_file(self, name: str) -> Credential | None:
        # Two are there when a daemon died between storing one and removing the other: the newer counts.
        files = {kind: self._file(name, kind) for kind in SUFFIXES}
        for kind in sorted(files, key=lambda kind: _written_ns(files[kind]), reverse=True):
            if secret := read_secret(files[kind], private=True):
                return Credential(kind, str(files[kind]), secret, name)
        return None


def _mark(path: Path) -> tuple[int, ...] | None:
    """Changes whenever the file does."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_ctime_ns, found.st_size, found.st_mode


def _written_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return -1


def write_secret(path: Path, secret: str) -> None:
    """Store one for the daemon's user alone, whole or not at all, in the place of what was there. Raises OSError."""
    folder = path.parent
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    fresh = folder / f".{secrets.token_hex(8)}"
    try:
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
            file.write(secret + "\n")
            file.flush()
            os.fsync(file.fileno())
        fresh.rename(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    _sync(folder)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
