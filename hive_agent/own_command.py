"""How a command of this package is started."""

from __future__ import annotations

import sys
from pathlib import Path


def own_command(*arguments: str) -> list[str]:
    """By the path of its file: it works however the package was installed."""
    return [sys.executable, "-I", "-S", str(Path(__file__).with_name("__main__.py")), *arguments]
