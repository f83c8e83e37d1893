"""Files that the operator attaches to a message: what its rows say of them, and how much they may take.

The file itself is kept as those of large bodies are (bodies.py), and handed to agents by file_delivery.py.
"""

from __future__ import annotations

import json
import mimetypes
from collections.abc import Sequence
from typing import Any, BinaryIO, NamedTuple

from hive_core.limits import Limits
from hive_core.protocol.file_names import FileName
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.visible import counted
from hive_core.protocol.words import MessageBody, parse_body
from hive_core.store.writer import Transaction

ROW = ("message_id", "position", "name", "bytes", "sha256")
# Of the message `m`, in their order; `files_of` reads it.
FILES = """
    (SELECT json_group_array(json_object('name', name, 'bytes', bytes, 'sha256', sha256))
     FROM (SELECT name, bytes, sha256 FROM attachments WHERE message_id = m.id ORDER BY position)) AS files
"""
_TYPES = mimetypes.MimeTypes()  # of Python alone: what this machine calls a file is not asked
for _type, _ending in (("text/markdown", ".md"), ("image/webp", ".webp"), ("text/plain", ".log")):
    _TYPES.add_type(_type, _ending)


class Upload(NamedTuple):
    """A file as it comes, read from where it stands."""

    name: FileName
    file: BinaryIO


class Attached(NamedTuple):
    """A file that is kept."""

    name: FileName
    bytes: int
    sha256: str


def type_of(name: str) -> str:
    """The MIME type of a file by its name: a word for readers, by which nothing is decided."""
    found, packed = _TYPES.guess_type(name)
    return found if found and not packed else "application/octet-stream"


def files_of(raw: str) -> list[dict[str, Any]]:
    """What FILES found: [{"name", "type", "bytes", "sha256"}]."""
    return [] if raw == "[]" else [{**one, "type": type_of(one["name"])} for one in json.loads(raw)]


def body_with(raw: object, files: int) -> MessageBody:
    """A message's body, which may be left out where files come with it. Raises Refusal."""
    left_out = raw is None or (isinstance(raw, str) and not raw.strip())
    return MessageBody(f"{counted(files, 'file')} attached") if files and left_out else parse_body(raw)


def check_count(files: int, limits: Limits) -> None:
    """Raise Refusal where these are too many for one message."""
    if files > limits.files_per_message:
        most = f"the limit is {limits.files_per_message} a message (files_per_message)"
        raise Refusal("usage", f"cannot attach {files} files: {most}; send fewer, or one archive")


def check_size(name: FileName, size: int, others: int, limits: Limits) -> None:
    """Raise Refusal where a file has too many bytes, by itself or with the `others` of its message."""
    if size > limits.file_bytes:
        most = f"the limit is {limits.file_bytes:,} (file_bytes)"
        raise Refusal("usage", f"cannot attach {name}: it has {size:,} bytes or more and {most}; send a smaller file")
    if size + others > limits.message_files_bytes:
        most = f"the limit is {limits.message_files_bytes:,} (message_files_bytes)"
        together = f"with it the message's files have {size + others:,} bytes or more"
        raise Refusal("usage", f"cannot attach {name}: {together} and {most}; send it by itself")


def check_quota(tx: Transaction, files: Sequence[Attached], limits: Limits) -> None:
    """Raise Refusal where these do not fit beside all that are kept. The same file is kept once."""
    if not files:
        return
    known = {row["sha256"]: row["bytes"] for row in tx.execute("SELECT DISTINCT sha256, bytes FROM attachments")}
    new = {file.sha256: file.bytes for file in files if file.sha256 not in known}
    kept, more = sum(known.values()), sum(new.values())
    if new and kept + more > limits.files_quota_bytes:
        raise Refusal(
            "refused",
            f"cannot attach {more:,} bytes: the files of messages take {kept:,} bytes already and the limit is "
            f"{limits.files_quota_bytes:,} (files_quota_bytes); send less, or wait until old messages are gone",
        )


def rows_of(message_id: int, files: Sequence[Attached]) -> list[tuple[Any, ...]]:
    return [(message_id, position, *file) for position, file in enumerate(files, 1)]
