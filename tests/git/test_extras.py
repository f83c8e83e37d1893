"""Skills and plugins pass the gate: shown with what they bring, and laid out for the container when they are taken."""

from __future__ import annotations

import json
import os
import shutil
from typing import Any

import pytest
import trio

from hive_core.protocol.effect import effect_line
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import CommitSha
from tests.checkouts import Checkout
from tests.git.test_gate import HM1ND, IRIS, approve, hive, iris, serving
from tests.hives import Services
from tests.processes import look_until

__all__ = ["hive", "iris"]

TOML = 'program = "rehearsal"\nskills = ["review"]\nplugins = ["fmt"]\n'
SKILL = "---\ndescription: Reviews a text.\n---\nRead it twice.\n"
OWN = {"own/.claude-plugin/plugin.json", "own/skills/review/SKILL.md"}
HOOKS = {"hooks": {"Stop": [{"hooks": [{"type": "command", "command": "true"}]}]}}


def commit(iris: Checkout, toml: str, **files: str) -> CommitSha:
    """Files by their paths, a slash written as `_`."""
    for name, text in files.items():
        path = iris.path / name.replace("_", "/").replace("SKILL", "SKILL.md").replace("json", ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return iris.commit(agent__toml=toml)


async def ask(hive: Services, sha: CommitSha) -> int:
    number: int = (await hive.gate.apply_commit.request(HM1ND, IRIS, sha, "it shall review"))["approval"]
    return number


async def shown(hive: Services, number: int) -> list[str]:
    effect: Any = (await hive.approvals.get(number)).effect
    return [effect_line(line) for line in effect["lines"] if "extras" not in line["what"]]


def laid_out(hive: Services) -> set[str]:
    """Every file that iris's container sees in /extras, behind its digest."""
    place = hive.state_dir / "agents" / "iris" / "extras"
    # What goes meanwhile is passed over.
    paths = (
        os.path.relpath(os.path.join(folder, file), place) for folder, _, files in os.walk(place) for file in files
    )
    return {path.partition("/")[2] for path in paths}


async def test_they_are_shown_and_lie_there_from_the_change_to_the_next(hive: Services, iris: Checkout) -> None:
    manifest = json.dumps({"name": "fmt"})
    iris_files = {"skills_review_SKILL": SKILL, "plugins_fmt_hooks_hooksjson": json.dumps(HOOKS)}
    (iris.path / "plugins" / "fmt" / ".claude-plugin").mkdir(parents=True)
    (iris.path / "plugins" / "fmt" / ".claude-plugin" / "plugin.json").write_text(manifest)
    async with serving(hive):
        number = await ask(hive, commit(iris, TOML, **iris_files))
        lines = await shown(hive, number)
        assert "plugin files: + fmt: hook Stop: command true" in lines
        assert f"skill files: + review: 1 file, {len(SKILL)} bytes" in lines
        assert not [line for line in lines if line.startswith("files:")], "each is told once"
        assert laid_out(hive) == set(), "nothing of it is there before it is approved"
        assert (await approve(hive, number)).state == "done"
        assert laid_out(hive) == {*OWN, "fmt/.claude-plugin/plugin.json", "fmt/hooks/hooks.json"}
        settings = (await hive.agents.get("iris")).settings or {}
        assert settings["extras"]["skills"] == ["review"]
        assert "skills" not in settings

        number = await ask(hive, commit(iris, TOML.replace('plugins = ["fmt"]\n', "")))
        assert "plugins: − fmt" in await shown(hive, number)
        assert (await approve(hive, number)).state == "done"
        await trio.to_thread.run_sync(look_until, lambda: laid_out(hive) == OWN)


async def test_what_was_lost_lies_there_again_with_the_next_daemon(hive: Services, iris: Checkout) -> None:
    place = hive.state_dir / "agents" / "iris" / "extras"
    async with serving(hive):
        number = await ask(hive, commit(iris, TOML.replace('plugins = ["fmt"]\n', ""), skills_review_SKILL=SKILL))
        await approve(hive, number)
    shutil.rmtree(place)
    hive.gate._mend_all()
    async with serving(hive):
        await trio.to_thread.run_sync(look_until, lambda: laid_out(hive) == OWN)


async def test_a_skill_that_is_not_there_is_refused_when_it_is_asked_for(hive: Services, iris: Checkout) -> None:
    with pytest.raises(Refusal, match=r"skills/review/SKILL\.md is missing; write it, or take review out of skills"):
        await ask(hive, commit(iris, TOML))


async def test_files_that_no_setting_names_are_files_like_any_other(hive: Services, iris: Checkout) -> None:
    number = await ask(hive, commit(iris, 'program = "rehearsal"\n', skills_review_SKILL=SKILL))
    assert "files: + skills/review/SKILL.md" in await shown(hive, number)
