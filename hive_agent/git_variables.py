"""What git is given in a container."""

from __future__ import annotations

import os
import sys
from pathlib import Path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hive_agent.runner import Seat


def git_variables(seat: Seat) -> dict[str, str]:
    """For its commits who the agent is; for hive://PROJECT its helper, behind all that the container has, and where
    the hive is."""
    who = {"NAME": seat.agent, "EMAIL": f"{seat.agent}@hive"}
    return {
        "PATH": os.pathsep.join((seat.path, str(Path(__file__).with_name("path")))),
        **{f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER") for key, value in who.items()},
        "HIVE_PYTHON": sys.executable,
        "HIVE_GIT_SOCKET": f"{seat.run_dir}/git.sock",
    }
