from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.nixes import ROOT, Nix


@pytest.fixture(scope="session")
def nix(tmp_path_factory: pytest.TempPathFactory) -> Nix:
    return Nix(Path(tmp_path_factory.mktemp("nix")))


@pytest.fixture(scope="session")
def hyperhive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As much of ourselves as evaluating an agent takes: a whole checkout is copied by nix each time."""
    folder = Path(tmp_path_factory.mktemp("hyperhive"))
    for name in ("flake.nix", "nix", "pyproject.toml"):
        subprocess.run(["cp", "-r", ROOT / name, folder], check=True)
    for name in ("protocol", "__init__.py", "version.py"):
        (folder / "hive_core").mkdir(exist_ok=True)
        subprocess.run(["cp", "-r", ROOT / "hive_core" / name, folder / "hive_core"], check=True)
    for name in ("hive_agent", "hive_mind"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").touch()
    return folder


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tmp_path_factory.mktemp("store"))
