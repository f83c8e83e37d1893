"""`hive-mind` started by the path of this file, as `hive_agent/__main__.py` is."""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from hive_mind.cli import main

if __name__ == "__main__":
    sys.exit(main())
