"""Objects of git as no git would write them."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable
from pathlib import Path

from hive_core.protocol.words import CommitSha
from tests.checkouts import Checkout


def store(checkout: Checkout, kind: str, data: bytes) -> str:
    """Put an object into a repository as a file of its own, whatever is in it; its id."""
    whole = f"{kind} {len(data)}\0".encode() + data
    object_id = hashlib.sha1(whole).hexdigest()
    path = loose(checkout, object_id)
    path.parent.mkdir(exist_ok=True)
    if not path.exists():
        path.write_bytes(zlib.compress(whole, 1))
    return object_id


def loose(checkout: Checkout, object_id: str) -> Path:
    return checkout.path / ".git" / "objects" / object_id[:2] / object_id[2:]


def blob(checkout: Checkout, data: bytes) -> str:
    return store(checkout, "blob", data)


def tree(checkout: Checkout, entries: Iterable[tuple[bytes, bytes, str]]) -> str:
    """Mode, name and id of each entry, in the order that git sorts them."""

    def sorts(entry: tuple[bytes, bytes, str]) -> bytes:
        return entry[1] + (b"/" if entry[0] == b"40000" else b"")

    return raw_tree(checkout, sorted(entries, key=sorts))


def raw_tree(checkout: Checkout, entries: Iterable[tuple[bytes, bytes, str]]) -> str:
    return store(checkout, "tree", b"".join(b"%b %b\0" % entry[:2] + bytes.fromhex(entry[2]) for entry in entries))


def known(checkout: Checkout) -> list[tuple[bytes, bytes, str]]:
    """The entries that each commit needs, as HEAD has them."""
    names = ("CLAUDE.md", "agent.toml")
    return [(b"100644", name.encode(), checkout.git("rev-parse", f"HEAD:{name}")) for name in names]


def commit(checkout: Checkout, tree_id: str, *parents: str, header: bytes = b"", message: bytes = b"a change\n") -> str:
    who = b"the manager <hm1nd@localhost> 1700000000 +0000"
    lines = [b"tree " + tree_id.encode(), *(b"parent " + parent.encode() for parent in parents)]
    lines += [b"author " + who, b"committer " + who]
    return store(checkout, "commit", b"\n".join(lines) + b"\n" + header + b"\n" + message)


def commit_with(checkout: Checkout, *entries: tuple[bytes, bytes, str]) -> CommitSha:
    """A commit on HEAD that holds these entries beside what every one needs."""
    return CommitSha(commit(checkout, tree(checkout, [*known(checkout), *entries]), checkout.head()))
