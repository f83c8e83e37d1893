"""What an agent's container is called on the host: by systemd, machinectl and the names of its network interfaces."""

from __future__ import annotations

from hive_core.protocol.words import MANAGER, AgentName

CONTAINER_ID_LIMIT = 11  # `ve-` and it have to fit into the 15 characters of an interface's name
_SHORT = CONTAINER_ID_LIMIT - len("h-")
_CUT, _DIGEST = 3, 4


def container_id(name: AgentName) -> str:
    """`hm1nd`, `h-NAME`, or for a name of more than 9 characters `h-` with its beginning and a digest.

    A name has no two dashes in a row, so a digest never makes the id of a short name. Two long names can have the same.
    """
    if name == MANAGER:
        return name
    if len(name) <= _SHORT:
        return f"h-{name}"
    from base64 import b32encode  # the client imports what stands beside this, and needs neither
    from hashlib import sha256

    digest = b32encode(sha256(name.encode()).digest()).decode().lower()
    return f"h-{name[:_CUT].rstrip('-')}--{digest[:_DIGEST]}"
