"""The start script of a container@.service that a real systemd runs: `python -m tests.containers.standin.start ID`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.containers.standin.state import Host
from tests.containers.standin.unit import nspawn_script

if __name__ == "__main__":
    script = nspawn_script(Host(Path("/")), sys.argv[1], dict(os.environ))
    os.execve("/bin/sh", ["/bin/sh", "-c", script], {**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"})
