"""The secrets of the hive, and whether bytes that are to leave it hold one."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from hive_core.credentials import Credentials

LEAST, MOST = 12, 4 * 1024  # bytes of a secret that is looked for
KEY_LINE_LEAST = 40  # of a line of a key: its last one can be next to nothing
OVERLAP = 4 * MOST  # by which pieces of what is looked at have to overlap: a secret in base64, in lines
# Left out of what is looked at: what parts a text into lines (as `base64` does) and columns, and what UTF-16 has more.
_NOISE = b" \t\r\n\0"
# What every private key that ssh-keygen writes begins with; no secret, and in the tests of many a project.
_SAME_IN_ALL_KEYS = b"b3BlbnNzaC1rZXktdjEA"


def known_secrets(state_dir: Path, credentials: Credentials) -> dict[str, bytes]:
    """Every secret that the hive keeps, by what it is called: those of the provider, of projects and of forges.

    Of a private key each line counts but the last, and one that is the same in all keys.
    """
    found = {}
    for name in credentials.names():
        if (credential := credentials.find(name)) is not None:
            found[f"credential {name}"] = credential.secret.encode()
    for folder, _, files in os.walk(state_dir / "credentials"):
        for file in files:
            path = Path(folder) / file
            if file.endswith(".known_hosts") or path.is_symlink() or not path.is_file():
                continue
            lines = path.read_bytes()[: 64 * 1024].split(b"\n")
            if lines[0].startswith(b"-----BEGIN "):
                lines = [x for x in lines[1:] if len(x) >= KEY_LINE_LEAST and not x.startswith(_SAME_IN_ALL_KEYS)]
            else:
                lines = b" ".join(lines).split()
            name = str(path.relative_to(state_dir))
            found |= {f"{name}{f' {number}' if number else ''}": line for number, line in enumerate(lines)}
    return {name: secret for name, secret in found.items() if LEAST <= len(secret) <= MOST}


def forms_of(secrets: Mapping[str, bytes]) -> list[tuple[str, bytes]]:
    """The bytes to look for: each secret as it is, and as it stands within base64, of both alphabets."""
    forms: list[tuple[str, bytes]] = []
    for name, secret in secrets.items():
        forms.append((name, secret.translate(None, _NOISE)))
        for shift in range(3):
            whole = base64.b64encode(b"\0" * shift + secret)
            # Of the first and last characters a part comes from what stands around it.
            inner = whole[-(-shift * 8 // 6) : len(whole) - 4]
            if len(inner) >= LEAST:
                forms += [(name, form) for form in sorted({inner, inner.translate(_FOR_URLS)})]
    return forms


_FOR_URLS = bytes.maketrans(b"+/", b"-_")


def find_secret(data: bytes, forms: Sequence[tuple[str, bytes]]) -> str | None:
    """The name of a secret that these bytes hold, wherever lines end in it."""
    plain = data.translate(None, _NOISE)
    return next((name for name, form in forms if form in plain), None)
