"""`hive-mind`: the same harness as `hive-agent`, which serves the manager and nobody else."""

from __future__ import annotations

import sys

from hive_agent.cli import main as agent_main


def main(argv: list[str] | None = None) -> int:
    return agent_main(argv, role="manager", program="hive-mind")


if __name__ == "__main__":
    sys.exit(main())
