from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import tests.examples  # noqa: F401 - as it is imported, it sets how examples are tried
from tests.containers.drivers import KINDS, end_all, need


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path) -> Iterator[None]:
    yield
    end_all(tmp_path)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Each driver, and the one that puts nothing around an agent."""
    return need(request.param)
