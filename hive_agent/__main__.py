"""`hive-agent` started by the path of this file: `python -I -S …/hive_agent/__main__.py mcp …`.

Started so it needs no installed command, no PYTHONPATH and no particular working directory (which the agent can
write to), and skipping `site` saves a few milliseconds on every start of the bridge.
"""

from __future__ import annotations

import os
import sys

# -I keeps the folder of the packages off the path.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from hive_agent.cli import main

if __name__ == "__main__":
    sys.exit(main())
