from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.forked import daemons_are_forks


@pytest.fixture(autouse=True)
def _daemons_are_forks(request: pytest.FixtureRequest) -> Iterator[None]:
    # Who outlives whom is tried with processes that came to be as a user's do.
    if "as_a_users" in request.fixturenames:
        yield
    else:
        with daemons_are_forks():
            yield


@pytest.fixture
def as_a_users() -> None:
    """Let the daemon of this test be begun by a new interpreter."""
