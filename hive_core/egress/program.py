"""How the proxy's process is started, by the daemon and by whoever tries whether it can be."""

from __future__ import annotations

import os
import sys

from hive_core.containers.inside import harness_environment

# Of the daemon's own environment: what names are resolved by, and where Python finds what it imports.
_PASSED_ON = ("LD_LIBRARY_PATH", "LOCPATH", "PYTHONPATH")


def command() -> list[str]:
    """It takes the daemon's socket as its stdin, and ends when that hangs up."""
    return [sys.executable, "-P", "-m", "hive_core.egress"]


def environment() -> dict[str, str]:
    return {**harness_environment("/"), **{name: os.environ[name] for name in _PASSED_ON if name in os.environ}}
