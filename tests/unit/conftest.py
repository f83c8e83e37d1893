"""What the tests of the core share."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

import tests.examples  # noqa: F401 - as it is imported, it sets how examples are tried
from tests.hives import Services, open_services


@pytest.fixture(autouse=True)
def _no_unclaimed_error_logs(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """An error in the log is a failure, unless the test expected it and cleared it away."""
    yield
    if request.path.name.startswith("test_core_"):
        # caplog.records would be those of the teardown alone.
        records = [record for when in ("setup", "call", "teardown") for record in caplog.get_records(when)]
        errors = [record.getMessage() for record in records if record.levelno >= logging.ERROR]
        assert not errors, "the log holds errors that the test did not expect"


@pytest.fixture
async def hive(tmp_path: Path) -> AsyncIterator[Services]:
    """The services of a hive with hm1nd, iris and damocles, as rows without repositories."""
    async with open_services(tmp_path) as services:
        await services.add_agents("hm1nd", "iris", "damocles")
        yield services
