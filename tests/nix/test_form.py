"""The Nix files are as nixfmt lays them out, where there is one: `nix flake check` asks the same."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from hive_core.flakes.flake_files import agent_files, meta_flake, other_packages_flake
from hive_core.protocol.words import AgentName
from tests.nixes import ROOT

NIXFMT = shutil.which("nixfmt")
pytestmark = pytest.mark.skipif(NIXFMT is None, reason="nixfmt is not installed")
SYSTEM = "x86_64-linux"
LONG = AgentName("z" * 30)


def misshapen(*files: Path) -> str:
    return subprocess.run([NIXFMT or "", "--check", *files], capture_output=True, text=True, timeout=60).stderr


def test_the_files_of_the_flake_are_laid_out_by_nixfmt() -> None:
    assert misshapen(ROOT / "flake.nix", *(ROOT / "nix").rglob("*.nix")) == ""


@pytest.mark.parametrize("title", ["", "A reader", "y" * 200, 'a "b" ${c} \\'])
def test_what_is_rendered_for_an_agent_is_laid_out_by_nixfmt(tmp_path: Path, title: str) -> None:
    for name, text in agent_files(LONG, title, hyperhive="path:/" + "x" * 90, system=SYSTEM).items():
        (tmp_path / name).write_text(text)
        assert misshapen(tmp_path / name) == ""


@pytest.mark.parametrize("names", [[], [LONG], [LONG, AgentName("hm1nd"), AgentName("a-b")]])
def test_what_is_rendered_for_all_is_laid_out_by_nixfmt(tmp_path: Path, names: list[AgentName]) -> None:
    urls = {name: f"git+file:///var/lib/{name}.git?ref=refs/heads/main&rev={'0' * 40}" for name in names}
    file = tmp_path / "flake.nix"
    file.write_text(meta_flake(urls, hyperhive="path:/x", nixpkgs="path:/" + "y" * 100, system=SYSTEM))
    assert misshapen(file) == ""


def test_what_is_rendered_to_hold_two_commits_against_each_other_is_laid_out_by_nixfmt(tmp_path: Path) -> None:
    url = f"git+file:///var/lib/{LONG}.git?ref=refs/heads/main&rev={'0' * 40}"
    file = tmp_path / "flake.nix"
    file.write_text(other_packages_flake(LONG, url, url, hyperhive="path:/x", nixpkgs="path:/y", system=SYSTEM))
    assert misshapen(file) == ""
    assert misshapen(ROOT / "hive_core/templates/nix/wanted.nix") == ""
