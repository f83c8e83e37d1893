from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.forked import daemons_are_forks


@pytest.fixture(autouse=True, scope="module")
def _daemons_are_forks(request: pytest.FixtureRequest) -> Iterator[None]:
    """But those of the story, which is to go as it does for a user."""
    if request.path.name == "test_story.py":
        yield
    else:
        with daemons_are_forks():
            yield
