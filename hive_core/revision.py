"""Which hyperhive this is: what an agent runs of ours, or is started with."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from hive_core.version import __version__

# Of the folder that the packages are in. What only the daemon runs is not in it: for that no agent needs another start.
_PARTS = ("hive_agent", "hive_mind", "hive_core/protocol", "hive_core/containers")


@cache
def revision() -> str:
    """VERSION+DIGEST, the same wherever the same files are; the digest tells apart what has the same version."""
    return revision_of(Path(__file__).resolve().parents[1])


def revision_of(folder: Path) -> str:
    """The same of the packages in another folder."""
    digest = hashlib.sha256()
    for part in _PARTS:
        for path in sorted((folder / part).rglob("*.py")):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(folder)}\0{len(content)}\0".encode())
            digest.update(content)
    return f"{__version__}+{digest.hexdigest()[:10]}"
