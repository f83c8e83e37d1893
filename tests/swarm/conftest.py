from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import forked
from tests.daemons import Daemon


@pytest.fixture(autouse=True, scope="module")
def _daemons_are_forks(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        # Who outlives whom is tried with processes that came to be as a user's do.
        if request.path.name != "test_outlive.py":
            patch.setattr(Daemon, "begin", staticmethod(forked.start))
        yield
