from __future__ import annotations

from pathlib import Path

import pytest

import tests.examples  # noqa: F401 - as it is imported, it sets how examples are tried
from tests.nixes import Nix, make_sources


@pytest.fixture(scope="session")
def nix(tmp_path_factory: pytest.TempPathFactory) -> Nix:
    return Nix(Path(tmp_path_factory.mktemp("nix")))


@pytest.fixture(scope="session")
def hyperhive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sources(Path(tmp_path_factory.mktemp("hyperhive")))


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tmp_path_factory.mktemp("store"))
