from __future__ import annotations

from pathlib import Path

import pytest

from tests.nixes import Nix


@pytest.fixture(scope="session")
def nix(tmp_path_factory: pytest.TempPathFactory) -> Nix:
    return Nix(Path(tmp_path_factory.mktemp("nix")))
