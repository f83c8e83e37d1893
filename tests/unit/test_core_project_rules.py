"""Which refs of a project an agent may push, and what agent.toml may say of it."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hive_core.git.repos import harness_settings
from hive_core.project_rules import Project, is_branch
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import parse_project_name
from hive_core.settings import AgentSettings, parse_agent_toml


def project(**given: Any) -> Project:
    return Project.model_validate({"name": "site", **given})


@pytest.mark.parametrize(
    ("push", "branch", "may"),
    [
        (None, "iris/x", True),
        (None, "iris/x/y", True),
        (None, "iris", False),
        (None, "irisx/y", False),
        (None, "argus/x", False),
        ("iris/*", "iris/..", False),
        ("iris/*", "iris/../main", False),
        ("iris/*", "iris/", False),
        ("iris/*", "iris/x.lock", False),
        ("iris/*", "iris/.x", False),
        ("iris/*", "iris//x", False),
        ("iris/*", "Iris/x", False),
        ("next", "next", True),
        ("next", "next/x", False),
        ("*", "main", True),
        ("*", "-x", False),
        ("*", "HEAD", False),
        ("*", "a" * 40, False),
        ("*", "A" * 64, False),
        ("*", "a" * 39, True),
        ("*", "refs/heads/main", False),
        ("*", "tags/v1", False),
        ("", "iris/x", False),
    ],
)
def test_a_branch_may_be_pushed_when_the_pattern_has_it(push: str | None, branch: str, may: bool) -> None:
    assert (project(push=push).refuses("iris", f"refs/heads/{branch}") is None) is may


@pytest.mark.parametrize("ref", ["refs/hive/iris/x", "HEAD", "refs/heads", "refs/notes/x", "refs/heads/", "iris/x", ""])
def test_what_is_no_branch_may_not_be_pushed_whatever_the_pattern(ref: str) -> None:
    assert project(push="*", tags=True).refuses("iris", ref)


def test_tags_may_be_pushed_where_the_settings_say_so() -> None:
    assert project().refuses("iris", "refs/tags/v1")
    assert project(tags=True).refuses("iris", "refs/tags/v1") is None
    assert project(tags=True).refuses("iris", "refs/tags/../heads/main")


@given(st.text(st.sampled_from("aZ9_/.-*@{~^:?[\\ \x00\x7f#l*ock"), max_size=12))
def test_git_takes_every_branch_that_is_taken_here(name: str) -> None:
    if is_branch(name):
        git = ["git", "check-ref-format", f"refs/heads/{name}"]
        assert subprocess.run(git, check=False).returncode == 0


@pytest.mark.parametrize(
    ("entry", "cause"),
    [
        ('{ name = "Site" }', "projects.0.name"),
        ('{ name = "site", path = "/projects/.." }', "projects.0.path"),
        ('{ name = "site", path = "/projects/a/b" }', "projects.0.path"),
        ('{ name = "site", path = "/state/site" }', "projects.0.path"),
        ('{ name = "site", branch = "a..b" }', "projects.0.branch"),
        ('{ name = "site", branch = "-x" }', "projects.0.branch"),
        ('{ name = "site", push = "a*b" }', "projects.0.push"),
        ('{ name = "site", push = "a/**" }', "projects.0.push"),
        ('{ name = "site", push = "../*" }', "projects.0.push"),
        ('{ name = "site", url = "x" }', "projects.0.url"),
        ('{ name = "site" }, { name = "site", path = "/projects/two" }', "site is there twice"),
        ('{ name = "site" }, { name = "other", path = "/projects/site" }', "/projects/site is there twice"),
    ],
)
def test_an_entry_that_means_nothing_is_refused_by_its_key(entry: str, cause: str) -> None:
    with pytest.raises(Refusal) as refused:
        parse_agent_toml(f"projects = [{entry}]".encode())
    assert cause in str(refused.value)


def test_the_host_keeps_the_projects_and_the_harness_is_told_them() -> None:
    settings = AgentSettings(projects=[project(push="iris/*")])
    told = harness_settings(settings, "You are iris.")
    assert told["projects"] == [{"name": "site", "push": "iris/*", "force": False, "tags": False}]
    assert told["policy"]["projects"] == [{"name": "site", "push": "iris/*"}]
    assert "projects" not in harness_settings(AgentSettings(), "You are iris.")


@pytest.mark.parametrize("raw", ["", "Site", "-x", "..", "a/b", "a\n", "a" * 64, None, 7])
def test_a_projects_name_is_no_path_and_no_option(raw: object) -> None:
    with pytest.raises(Refusal):
        parse_project_name(raw)
    assert parse_project_name("a" * 63) == "a" * 63
