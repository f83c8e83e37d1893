"""The one form of a figure."""

from __future__ import annotations

import sys
from typing import Any


def figure(
    name: str, value: float, unit: str, peer: str | None = None, peer_value: float | None = None, digits: int = 4
) -> dict[str, Any]:
    """One line of output; `ratio` is value over peer_value."""
    return {
        "name": name,
        "value": round(value, digits),
        "unit": unit,
        "peer": peer,
        "peer_value": None if peer_value is None else round(peer_value, digits),
        "ratio": None if not peer_value else round(value / peer_value, 3),
    }


def say(text: str) -> None:
    """What is being measured, for whoever waits; stdout is for figures alone."""
    print(f"  {text}", file=sys.stderr, flush=True)
