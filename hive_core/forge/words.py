"""What is said to and by a forge, parsed into types: where it is, and what its answers hold.

What people wrote on a forge is hostile text: nothing here quotes it but in fields that say so.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import shown

Kind = Literal["forgejo", "github"]
KINDS: tuple[str, ...] = get_args(Kind)
ThreadKind = Literal["issue", "pull_request"]
URL_LIMIT = 300
TITLE_LIMIT = 250  # bytes; Forgejo takes 255 characters
WRITTEN_LIMIT_BYTES = 60_000  # GitHub takes 65,536 characters
_PART = r"(?!\.{1,2}(?:/|\Z))[A-Za-z0-9._-]{1,100}"
_REPOSITORY = re.compile(rf"{_PART}/{_PART}")
_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]{2,45}\]")
_PATH = re.compile(r"(?:/[A-Za-z0-9][A-Za-z0-9._~-]*)*")


@dataclass(frozen=True, slots=True)
class Place:
    """A repository on a forge: `url` is the forge's, without a slash at its end."""

    kind: Kind
    url: str
    repository: str  # OWNER/REPO

    @property
    def api(self) -> str:
        if self.kind == "forgejo":
            return f"{self.url}/api/v1"
        return "https://api.github.com" if self.url == "https://github.com" else f"{self.url}/api/v3"

    def page(self, kind: ThreadKind, number: int) -> str:
        """Where people look at a thread."""
        pull = "pulls" if self.kind == "forgejo" else "pull"
        return f"{self.url}/{self.repository}/{'issues' if kind == 'issue' else pull}/{number}"


@dataclass(frozen=True, slots=True)
class Thread:
    """An issue or a pull request, as its forge tells it. Its texts are its people's. Times are ms since 1970 UTC."""

    number: int
    kind: ThreadKind
    state: str  # open or closed
    title: str
    body: str
    author: str
    labels: tuple[str, ...]
    updated_at_ms: int
    comments: int = 0
    merged: bool = False
    draft: bool = False
    head: str = ""  # of a pull request, where that was asked for
    base: str = ""

    def to_wire(self) -> dict[str, Any]:
        return {**asdict(self), "labels": list(self.labels)}


@dataclass(frozen=True, slots=True)
class Comment:
    """What somebody wrote below a thread.

    verdict     of a review, in the forge's word; "" of a plain comment
    path, line  of a changed file, where it is about one
    """

    id: int
    author: str
    body: str
    at_ms: int
    verdict: str = ""
    path: str = ""
    line: int | None = None

    def to_wire(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Notification:
    """That something happened to a thread. number None: it is about no issue and no pull request."""

    id: str
    updated_at_ms: int
    kind: ThreadKind | None
    number: int | None
    title: str


def parse_place(kind: object, url: object, repository: object) -> Place:
    """Where a repository is. Raises Refusal("usage") naming which of the three is no good."""
    if kind not in KINDS:
        raise Refusal("usage", f"cannot use {shown(kind)} as the kind of a forge: give {' or '.join(KINDS)}")
    if not isinstance(repository, str) or not _REPOSITORY.fullmatch(repository):
        raise Refusal("usage", f"cannot use {shown(repository)} as the repository: give OWNER/REPO, such as ada/site")
    return Place("github" if kind == "github" else "forgejo", _parse_url(url), repository)


def _parse_url(raw: object) -> str:
    """The address of a forge: http or https, a host, perhaps a port and a path."""
    way_out = "give its address, such as https://forge.example or http://git.lan:3000"
    cannot = Refusal("usage", f"cannot use {shown(raw, 80)} as the forge's address: {way_out}")
    if not isinstance(raw, str) or len(raw) > URL_LIMIT:
        raise cannot
    scheme, _, rest = raw.partition("://")
    place, slash, path = rest.partition("/")
    host, colon, port = place.rpartition(":") if not place.endswith("]") and ":" in place else (place, "", "")
    path = f"{slash}{path}".rstrip("/")
    good_port = not colon or (port.isdecimal() and port.isascii() and 0 < int(port[:6]) <= 65535)
    if scheme not in ("http", "https") or not _HOST.fullmatch(host) or not good_port or not _PATH.fullmatch(path):
        raise cannot
    try:
        urlsplit(raw)
    except ValueError:
        raise cannot from None
    return f"{scheme}://{place.lower()}{path}"
