"""The words of the house, parsed at the door. Past a socket nothing is a raw string."""

from __future__ import annotations

import re

from hive_core.protocol.refusal import Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal, NewType

    AgentName = NewType("AgentName", str)
    CommitSha = NewType("CommitSha", str)
    MessageBody = NewType("MessageBody", str)
    ProjectName = NewType("ProjectName", str)
    StorePath = NewType("StorePath", str)
    Network = Literal["private", "host"]  # what an agent's container has: its own loopback alone, or the host's network
else:
    AgentName = CommitSha = MessageBody = Network = ProjectName = StorePath = str

MANAGER = AgentName("hm1nd")
OPERATOR = AgentName("operator")
SYSTEM = AgentName("system")
FORGE = AgentName("forge")  # in whose name the hive tells what happens on forges
EVERYONE = AgentName("*")
RESERVED = frozenset({OPERATOR, SYSTEM, FORGE, "all", "manager", "hive"})

NAME_LIMIT = 30
RECIPIENTS_LIMIT = 1000
BODY_LIMIT_BYTES = 512 * 1024
INLINE_LIMIT_BYTES = 64 * 1024  # a larger body is kept as a file
NOTE_LIMIT_BYTES = 4 * 1024
PERSONA_LIMIT_BYTES = 48 * 1024

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_PROJECT = re.compile(r"[a-z][a-z0-9-]{0,62}")
_SHA = re.compile(r"[0-9a-f]{40}")
_STORE_PATH = re.compile(r"/nix/store/[0-9a-df-np-sv-z]{32}-[A-Za-z0-9+_?=-][A-Za-z0-9+._?=-]{0,210}")


def shown(raw: object, limit: int = 40) -> str:
    """A short, printable rendering of hostile input for use inside an error message."""
    text = ascii(raw)
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"


def parse_agent_name(raw: object) -> AgentName:
    """The name of an agent: a to z, digits and single dashes, at most 30 characters, not a reserved word.

    Raises Refusal("usage").
    """
    if not isinstance(raw, str) or len(raw) > NAME_LIMIT or not _NAME.fullmatch(raw):
        raise Refusal(
            "usage",
            f"cannot use {shown(raw)} as an agent's name: a name is 1 to {NAME_LIMIT} characters of a-z, 0-9 and "
            "single dashes, and begins with a letter",
        )
    if raw in RESERVED:
        raise Refusal("usage", f"cannot use {raw!r} as an agent's name: it is reserved; choose another")
    return AgentName(raw)


def parse_recipient(raw: object) -> AgentName:
    """An address to send to: an agent's name, or `operator`. Whether it exists is the broker's to say."""
    if raw == FORGE:
        why = "it is no agent; your tool `forge_comment`, where you have it, answers people on a forge"
        raise Refusal("usage", f"cannot send to {FORGE}: {why}")
    return OPERATOR if raw == OPERATOR else parse_agent_name(raw)


def parse_recipients(raw: object) -> tuple[AgentName, ...]:
    """One address, `*` for everyone, or a list of addresses. Raises Refusal("usage")."""
    if raw == EVERYONE:
        return (EVERYONE,)
    if not isinstance(raw, list):
        return (parse_recipient(raw),)
    if not 0 < len(raw) <= RECIPIENTS_LIMIT:
        raise Refusal("usage", f"cannot send to {len(raw)} recipients: give 1 to {RECIPIENTS_LIMIT} in a list")
    return tuple(parse_recipient(one) for one in raw)


def parse_project_name(raw: object) -> ProjectName:
    """The name of a project: a to z, digits and dashes, at most 63 characters. Raises Refusal("usage")."""
    if not isinstance(raw, str) or not _PROJECT.fullmatch(raw):
        raise Refusal(
            "usage",
            f"cannot use {shown(raw)} as a project's name: a name is 1 to 63 characters of a-z, 0-9 and dashes, and "
            "begins with a letter",
        )
    return ProjectName(raw)


def parse_commit_sha(raw: object) -> CommitSha:
    """A whole commit id. A branch can be named like an abbreviation, so 40 hex digits and nothing else."""
    if not isinstance(raw, str) or not _SHA.fullmatch(raw):
        raise Refusal("usage", f"cannot use {shown(raw)} as a commit: give all 40 hex digits (`git rev-parse HEAD`)")
    return CommitSha(raw)


def parse_deployed_tag(raw: object) -> str:
    """The tag of a deployment. Raises Refusal("usage")."""
    if not isinstance(raw, str) or not re.fullmatch(r"deployed/\d{1,18}", raw, re.ASCII):
        raise Refusal("usage", f"cannot use {shown(raw)} as a deployment: give deployed/ID, as `hive history` tells it")
    return raw


def parse_store_path(raw: object) -> StorePath:
    """The whole path of a thing in the Nix store, and nothing inside of it. Raises Refusal("usage")."""
    if not isinstance(raw, str) or not _STORE_PATH.fullmatch(raw):
        raise Refusal("usage", f"cannot use {shown(raw)} as a store path: give /nix/store/DIGEST-NAME and no more")
    return StorePath(raw)


def parse_text(raw: object, what: str, limit_bytes: int) -> str:
    """Text of at least one visible character and at most `limit_bytes` bytes of UTF-8, without NUL."""
    if not isinstance(raw, str):
        raise Refusal("usage", f"cannot take the {what}: it must be a string")
    if not raw.strip():
        raise Refusal("usage", f"cannot take the {what}: it is empty")
    if "\0" in raw:
        raise Refusal("usage", f"cannot take the {what}: it contains a NUL character")
    try:
        size = len(raw.encode())
    except UnicodeEncodeError:
        raise Refusal("usage", f"cannot take the {what}: it contains half a surrogate pair, not text") from None
    if size > limit_bytes:
        raise too_large(what, f"{size:,} bytes", limit_bytes)
    return raw


def too_large(what: str, size: str, limit_bytes: int) -> Refusal:
    return Refusal("usage", f"cannot take the {what}: it has {size} and the limit is {limit_bytes:,}; shorten it")


def parse_body(raw: object) -> MessageBody:
    return MessageBody(parse_text(raw, "message", BODY_LIMIT_BYTES))


def parse_id(raw: object, what: str) -> int:
    """A row's number: a positive integer that sqlite can hold."""
    if isinstance(raw, bool) or not isinstance(raw, int) or not 0 < raw < 2**63:
        raise Refusal("usage", f"cannot use {shown(raw)} as the number of {what}: give a positive whole number")
    return raw


def parse_instant(raw: object, what: str) -> int:
    """An instant as ISO 8601 has it, in ms since 1970; without a zone it is in UTC, without a time it is midnight."""
    from datetime import UTC, datetime, timedelta  # every client imports this file, and few need this

    try:
        at = datetime.fromisoformat(raw) if isinstance(raw, str) else None
        if at is not None:
            # By whole numbers: rounded as a fraction the last instant of the calendar is one that it does not have.
            at = (at if at.tzinfo else at.replace(tzinfo=UTC)).astimezone(UTC)
            return (at - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)
    except (ValueError, OverflowError):
        pass
    raise Refusal("usage", f"cannot use {shown(raw)} as {what}: give an instant such as 2026-01-31T08:30:00+01:00")
