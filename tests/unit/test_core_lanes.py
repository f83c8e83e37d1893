"""Lanes: which news of forges goes to whom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hive_core.config import load_config
from hive_core.lanes import Lane, News, asks_for_files, lane_of, matches, may_take, troubles
from hive_core.protocol.refusal import Refusal


def lane(name: str = "triage", **given: Any) -> Lane:
    return Lane.model_validate({"name": name, "agents": ["iris"], **given})


BUG = News("site", "issue", ["bug", "later"])
CHANGE = News("site", "pull_request", [], ["docs/a/b.md", "src/main.c"])


@pytest.mark.parametrize(
    ("given", "news", "fits"),
    [
        ({}, BUG, True),
        ({"projects": ["site", "other"]}, BUG, True),
        ({"projects": "*"}, BUG, True),
        ({"projects": ["other"]}, BUG, False),
        ({"kinds": ["issue"]}, BUG, True),
        ({"kinds": ["pull_request"]}, BUG, False),
        ({"labels": ["wish", "bug"]}, BUG, True),
        ({"labels": ["Bug"]}, BUG, False),
        ({"labels": ["bug"]}, CHANGE, False),
        ({"paths": ["docs/**"]}, CHANGE, True),
        ({"paths": ["docs/*"]}, CHANGE, False),
        ({"paths": ["docs/**"]}, BUG, False),
        ({"paths": ["**/*.c"], "projects": ["other"]}, CHANGE, False),
    ],
)
def test_a_lane_takes_what_is_as_it_says(given: dict[str, Any], news: News, fits: bool) -> None:
    assert (lane_of([lane(**given)], news) is not None) == fits


def test_the_first_lane_that_fits_takes_it() -> None:
    lanes = [lane("a", labels=["wish"]), lane("b", labels=["bug"]), lane("c")]
    assert [found and found.name for found in (lane_of(lanes, BUG), lane_of(lanes, CHANGE), lane_of([], BUG))] == [
        "b",
        "c",
        None,
    ]
    assert may_take(lanes, "site")
    assert not may_take([lane(projects=["other"])], "site")


def test_files_are_asked_for_only_where_the_choice_depends_on_them() -> None:
    docs, rest = lane("docs", paths=["docs/**"]), lane("rest")
    assert asks_for_files([docs, rest], CHANGE)
    assert not asks_for_files([rest, docs], CHANGE)
    assert not asks_for_files([docs, rest], BUG)
    assert not asks_for_files([lane(paths=["x"], labels=["bug"])], CHANGE)


@pytest.mark.parametrize(
    ("pattern", "path", "is_like"),
    [
        ("README.md", "README.md", True),
        ("*.md", "docs/a.md", False),
        ("*/*.md", "docs/a.md", True),
        ("**/*.md", "a.md", True),
        ("**/*.md", "x/y/a.md", True),
        ("docs/**", "docs/a/b", True),
        ("docs/**", "docsy/a", False),
        ("a/**/b", "a/b", True),
        ("a/**/b", "a/x/y/b", True),
        ("a/**/b", "a/x/y/c", False),
        ("**", "anything/at/all", True),
        ("a**", "ab/c", False),
    ],
)
def test_a_path_is_like_a_pattern_part_by_part(pattern: str, path: str, is_like: bool) -> None:
    assert matches(pattern, path) == is_like


@given(st.lists(st.sampled_from(["a", "b", "*", "**", "a*"]), min_size=1, max_size=6).map("/".join), st.text("ab/"))
def test_stars_for_every_part_match_whatever_a_pattern_matches(pattern: str, path: str) -> None:
    if matches(pattern, path):
        assert matches("**", path)
        assert matches(f"**/{pattern}", path)
        assert matches(f"{pattern}/**", path)


def test_no_path_makes_a_pattern_slow() -> None:
    """With one that goes back and tries again this would not come to an end."""
    assert not matches("/".join(["**", "*a*a*a*b"] * 12), "/".join(["a" * 40] * 25))


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"agents": []}, "agents: "),
        ({"agents": ["forge"]}, "forge is no agent's name"),
        ({"agents": ["system"]}, "system is no agent's name"),
        ({"agents": ["../x"]}, "agents.0"),
        ({"name": ""}, "name: "),
        ({"projects": []}, "projects: "),
        ({"kinds": ["wish"]}, "kinds.0"),
        ({"labels": [""]}, "labels.0"),
        ({"paths": ["/docs"]}, "paths.0"),
        ({"per_hour": 0}, "per_hour: at least 1"),
        ({"per_hour": True}, "per_hour"),
        ({"agent": "iris"}, "agent: unknown key"),
    ],
)
def test_a_lane_that_is_no_good_is_refused_by_its_key_and_line(tmp_path: Path, given: dict[str, Any], why: str) -> None:
    def written(value: Any) -> str:
        return str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')

    file = tmp_path / "config.toml"
    table = {"name": "triage", "agents": ["iris"], **given}
    text = "\n".join(f"{key} = {written(value)}" for key, value in table.items())
    file.write_text(f'[[lane]]\nname = "first"\nagents = ["operator"]\n\n[[lane]]\n{text}\n')
    with pytest.raises(Refusal) as refused:
        load_config({}, {}, str(file))
    assert "cannot use the lanes: lane 2: " in refused.value.message
    assert why in refused.value.message
    line = 6 + list(table).index(next(iter(given)))
    assert f"change line {line} of {file}" in refused.value.message


def test_two_lanes_of_one_name_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('[[lane]]\nname = "a"\nagents = ["iris"]\n' * 2)
    with pytest.raises(Refusal, match="two lanes are called a"):
        load_config({}, {}, str(file))


def test_what_makes_a_lane_tell_nobody_is_told() -> None:
    assert list(troubles(lane(agents=["iris", "operator"]), ["iris"])) == []
    assert list(troubles(lane(agents=["argus", "iris"]), ["iris"])) == ["agents names argus, which no agent is called"]
    assert list(troubles(lane(paths=["x"], kinds=["issue"]), ["iris"])) == [
        "paths are those of pull requests, which kinds leaves out"
    ]
