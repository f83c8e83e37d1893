"""Group `reach`: what an agent reaches, and how soon it has the repositories that it works on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.bench import egress, workspaces


def measure() -> Iterator[dict[str, Any]]:
    yield from egress.measure()
    yield from workspaces.measure()
