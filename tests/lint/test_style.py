"""The project reads as one, and says nothing of the machines it was made on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hive_core.cli.verbs import VERBS
from tests.needs import ROOT


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def module(*command: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", *command)


def project_files() -> list[Path]:
    # The checkout may belong to someone else than who runs the tests; git would refuse to list it.
    listed = run("git", "-c", "safe.directory=*", "ls-files", "-z", "-co", "--exclude-standard")
    assert listed.returncode == 0, listed.stderr
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def lines_matching(pattern: re.Pattern[str]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in project_files()
        for number, line in enumerate(path.read_bytes().decode(errors="replace").splitlines(), 1)
        if pattern.search(line)
    ]


def test_ruff_check_is_clean() -> None:
    done = module("ruff", "check", ".")
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_format_is_clean() -> None:
    done = module("ruff", "format", "--check", ".")
    assert done.returncode == 0, done.stdout + done.stderr


def test_mypy_strict_is_clean_on_the_four_packages() -> None:
    done = module("mypy", "--strict", "-p", "hive_core", "-p", "hive_agent", "-p", "hive_mind", "-p", "dashboard")
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_module_of_the_benchmarks_can_be_imported() -> None:
    """No group of tests runs them."""
    names = sorted(path.stem for path in (ROOT / "tests" / "bench").glob("*.py") if path.stem != "__main__")
    done = run(sys.executable, "-c", "; ".join(f"import tests.bench.{name}" for name in names))
    assert done.returncode == 0, done.stderr


def test_no_file_names_a_registry_host() -> None:
    # Put together here, so that this file names none either.
    hosts = [("pypi", "org"), ("pythonhosted", "org"), ("npmjs", "org"), ("npmjs", "com"), ("crates", "io")]
    named = re.compile("|".join(rf"\b{name}\.{top}\b" for name, top in hosts))
    # Which hosts agents may be let to is said there, for every machine alike.
    assert not [line for line in lines_matching(named) if not line.startswith("hive_core/egress_presets.toml:")]


def test_no_file_names_an_absolute_path_of_a_build_machine() -> None:
    """Homes of people (examples say /home/you), and wherever this checkout and its interpreter happen to be."""
    here = {str(ROOT), sys.base_prefix, os.environ.get("HOME", "")}
    # A place as short as /root or /usr is no one's in particular.
    particular = [re.escape(place) for place in sorted(here) if place.count("/") >= 2 and not place.startswith("/usr")]
    shapes = [r"/home/(?!you\b)[a-z]", r"/Users/[A-Za-z]", r"/root/(?!\.claude\b)[\w.]", r"/tmp/tmp\.?\w{8}"]
    start = r"(?<![\w.}~*/-])"
    assert not lines_matching(re.compile(f"{start}(?:{'|'.join(particular + shapes)})"))


def listed_targets() -> list[str]:
    done = run("make", "help")
    assert done.returncode == 0, done.stderr
    return re.findall(r"^make ([a-z-]+)", done.stdout, re.MULTILINE)


def test_make_alone_lists_the_short_ways() -> None:
    assert run("make").stdout == run("make", "help").stdout
    assert set(listed_targets()) >= {"help", "demo", "test", "test-long", "lint", "bench", "lock"}


@pytest.mark.parametrize("target", listed_targets())
def test_a_make_target_listed_in_help_exists(target: str) -> None:
    done = run("make", "-n", target)
    assert done.returncode == 0, done.stderr


def test_make_adds_nothing_of_its_own_to_stdout() -> None:
    assert all(re.match(r"make [a-z-]+ ", line) for line in run("make", "help").stdout.splitlines())


def test_the_readme_names_every_verb() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert not [verb for verb in VERBS if not re.search(rf"`hive {verb}\b(?!-)", text)]


def test_the_docs_name_tests_that_exist() -> None:
    written = {
        name for path in (ROOT / "tests").rglob("*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    named = {(page.name, name) for page in pages for name in re.findall(r"`(test_\w+)`", page.read_text())}
    assert named
    assert not {(page, name) for page, name in named if name not in written}


def commands_in(page: Path) -> list[list[str]]:
    """The words of each `hive VERB …` that a page has, in a line or in a block."""
    lines = page.read_text("utf-8").splitlines()
    spans = [span for line in lines for span in [line, *line.split("`")[1::2]] if span.startswith("hive ")]
    return [span.partition("#")[0].replace("|", " ").replace("]", " ").replace("[", " ").split()[1:] for span in spans]


def what_is_unknown(words: list[str]) -> list[str]:
    """Of a command: its verb, its action or its options, where `hive` takes none of that name."""
    if not words or not re.fullmatch("[a-z][a-z-]*", words[0]):
        return []
    if words[0] not in VERBS:
        return words[:1]
    arguments = VERBS[words[0]][2]
    options = {name for names, _ in arguments for name in names} | {"--json", "--help"}
    unknown = [word for word in words if re.fullmatch("--[a-z][a-z0-9-]*", word) and word not in options]
    actions = next((more["choices"] for names, more in arguments if names == ("what",) and "choices" in more), None)
    if actions and len(words) > 1 and re.fullmatch("[a-z]+", words[1]) and words[1] not in actions:
        unknown.append(words[1])
    return unknown


def test_the_docs_name_commands_that_exist() -> None:
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]
    found = [(page.name, words) for page in pages for words in commands_in(page)]
    assert len(found) > 100
    assert not [(page, words[0], unknown) for page, words in found if (unknown := what_is_unknown(words))]
