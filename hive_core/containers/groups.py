"""What bounds agents on this host."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from hive_core.config import Config
from hive_core.containers.bounds import AgentGroups, Bounds
from hive_core.containers.cgroups import Cgroups
from hive_core.containers.scopes import Scopes, systemd_runs

log = logging.getLogger(__name__)


def bounds_of(config: Config) -> Bounds:
    """What each agent may take of the host."""
    return Bounds(config.agent_memory_bytes, config.agent_cpu_percent, config.agent_tasks)


def choose_groups(state_dir: Path, bounds: Bounds) -> AgentGroups:
    """What bounds agents here: units of systemd where it runs and we may ask for them, else groups made by hand."""
    if systemd_runs() and os.geteuid() == 0:
        scopes = Scopes(state_dir, bounds)
        if scopes.trouble is None:
            return scopes
        log.warning("%s", scopes.trouble)
    return Cgroups(state_dir, bounds)
