"""What an agent's container is called among all of the host's, by systemd-nspawn and systemd."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from hive_core.protocol.container_id import container_id
from hive_core.protocol.words import AgentName

_DIGEST = 6


def host_name(name: AgentName, state_dir: Path) -> str:
    """The container's id and a digest of the hive's state directory: another hive of this host may have the same id."""
    return f"{container_id(name)}-{hashlib.sha256(os.fsencode(state_dir)).hexdigest()[:_DIGEST]}"
