"""What `hive doctor` says of the helper, where one is set."""

from __future__ import annotations

import os
from collections.abc import Iterator

import trio

from hive_core.cli.doctor import Finding
from hive_core.config import Config
from hive_core.containers.helped import Helper
from hive_core.protocol.refusal import Refusal


def look_at_helper(name: str, config: Config) -> Iterator[Finding]:
    """Ask it what the daemon asks it first; nothing where there is none."""
    if config.helper is None:
        return
    if config.helper.exists() and not os.access(config.helper, os.W_OK):
        yield Finding(name, "ok", f"{config.helper} is there; only {config.helper_user} and root may ask it")
        return
    try:
        told = trio.run(Helper(config.helper, config.state_dir, config.runtime_dir, config.sandbox).greet)
    except Refusal as refusal:
        yield Finding(name, "trouble", refusal.message)
        return
    if told.get("trouble"):
        yield Finding(name, "trouble", f"the helper can start no agent: {told['trouble']}")
    else:
        kind, user = told.get("sandbox"), told.get("user")
        yield Finding(name, "ok", f"it starts agents in {kind} for uid {user}, asked on {config.helper}")
