"""Skills and plugins are read before a program loads them: what they are, what of them runs, and where they lie."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hive_core.effects import Effect
from hive_core.effects_of_extras import extras_lines
from hive_core.extra_files import ExtraFiles
from hive_core.extras import NONE, BadExtra, ExtraFile, Extras, parse_extras, parse_front_matter
from hive_core.protocol.effect import effect_line
from hive_core.protocol.words import AgentName

IRIS = AgentName("iris")
SKILL = "---\nname: review\ndescription: Reviews a text.\n---\nRead it twice.\n"
HOOKS = {
    "hooks": {
        "PreToolUse": [{"matcher": "Bash", "hooks": [{"type": "command", "command": "guard.sh"}]}],
        "Stop": [{"hooks": [{"type": "prompt", "prompt": "Is it done?"}]}],
    }
}
PLUGIN = {
    "plugins/fmt/.claude-plugin/plugin.json": json.dumps({"name": "fmt", "version": "1.0.0"}),
    "plugins/fmt/hooks/hooks.json": json.dumps(HOOKS),
    "plugins/fmt/.mcp.json": json.dumps({"mcpServers": {"shapes": {"command": "shapes"}}}),
    "plugins/fmt/commands/fix.md": "---\ndescription: Fixes it.\nallowed-tools: Bash\n---\nFix $ARGUMENTS\n",
    "plugins/fmt/skills/tidy/SKILL.md": "---\ndescription: Tidies up.\n---\n!`ls`\n",
}


def parse(files: Mapping[str, str], *, executable: str = "") -> Extras:
    """Everything that lies there is named."""
    named = {
        kind: dict.fromkeys(p.split("/")[1] for p in files if p.startswith(kind)) for kind in ("skills", "plugins")
    }
    given = {path: ExtraFile(text, path == executable) for path, text in files.items()}
    return parse_extras(named["skills"], named["plugins"], given)


def told(before: Extras, after: Extras) -> list[str]:
    wire = Effect(extras_lines(before, after)).to_wire()["lines"]
    return [("!" if line["weight"] == "wide" else "") + effect_line(line) for line in wire]


def test_a_skill_of_text_is_told_by_its_size_and_widens_nothing() -> None:
    extras = parse({"skills/review/SKILL.md": SKILL, "skills/review/more/words.md": "x"})
    size = len(SKILL) + 1
    assert told(NONE, extras) == [f"skill files: + review: 2 files, {size} bytes"]
    assert told(extras, NONE) == [f"skill files: − review: 2 files, {size} bytes"]
    assert told(extras, extras) == []
    changed = parse({"skills/review/SKILL.md": SKILL, "skills/review/more/words.md": "y"})
    assert told(extras, changed) == [
        f"skill files: review: 2 files, {size} bytes → the same size with other files or another text"
    ]
    assert extras.to_wire()["offered"] == [{"name": "own:review", "description": "Reviews a text."}]
    assert extras.digest != changed.digest


@pytest.mark.parametrize(
    ("path", "text", "executable", "power"),
    [
        ("run.sh", "ls", False, "programs run.sh"),
        ("LICENSE", "#!/bin/sh", False, "programs LICENSE"),
        ("notes.md", "x", True, "programs notes.md"),
        ("SKILL.md", f"{SKILL}!`date`\n", False, "runs commands when it is loaded"),
        ("SKILL.md", f"{SKILL}\n```!\ndate\n```\n", False, "runs commands when it is loaded"),
        ("SKILL.md", f"{SKILL}\nRead it twice: ```!\ndate\n```\n", False, "runs commands when it is loaded"),
        *(
            ("SKILL.md", f"{SKILL}{inline}\n", False, "runs commands when it is loaded")
            for inline in (
                *("!$1`date`", "!$ARGUMENTS`date`", "!$ARGUMENTS[1]`date`", "!$ARGU$0MENTS`date`", "!$who`date`"),
                *("``$0`!\ndate\n```", "!$1$2`date`", "$" * 99 + "x" + "{a}" * 99),
            )
        ),
        ("SKILL.md", SKILL.replace("name:", "allowed-tools: Bash\nname:"), False, "sets allowed-tools"),
        ("SKILL.md", SKILL.replace("name:", "hooks:\n  Stop: []\nname:"), False, "sets hooks"),
        ("SKILL.md", SKILL.replace("name:", '"hooks": {}\nname:'), False, 'sets "hooks": {}'),
        ("SKILL.md", SKILL.replace("name:", "version: 1\rhooks: {}\nname:"), False, "sets hooks"),
        ("SKILL.md", SKILL.replace("text.", 'text.\nlicense: "\n...\n"\nhooks: {}'), False, 'sets ", ..., hooks'),
    ],
)
def test_what_of_a_skill_runs_widens_and_is_named(path: str, text: str, executable: bool, power: str) -> None:
    at = f"skills/review/{path}"
    extras = parse({"skills/review/SKILL.md": SKILL, at: text}, executable=at if executable else "")
    first, second = told(NONE, extras)
    assert first.startswith("!skill files: + review: ")
    assert second == f"!skill files: + review: {power}"


def test_a_skill_that_has_arguments_and_code_is_text_alone() -> None:
    text = f"{SKILL}Look at $ARGUMENTS, and at `$1` of ${{CLAUDE_SKILL_DIR}}! Run `date`, never `rm $2`.\n"
    assert told(NONE, parse({"skills/review/SKILL.md": text})) == [f"skill files: + review: 1 file, {len(text)} bytes"]


def test_a_text_of_a_plugin_is_read_however_its_suffix_is_written() -> None:
    plugin = {**PLUGIN, "plugins/fmt/commands/up.MD": "---\ndescription: Up.\nhooks: {}\n---\n!`ls`\n"}
    lines = told(NONE, parse(plugin))
    assert "!plugin files: + fmt: commands/up.MD sets hooks" in lines
    assert "!plugin files: + fmt: commands/up.MD runs commands when it is loaded" in lines


def test_a_plugin_widens_and_its_hooks_and_servers_are_named() -> None:
    size = sum(len(text) for text in PLUGIN.values())
    assert told(NONE, parse(PLUGIN)) == [
        f"!plugin files: + fmt: 5 files, {size} bytes",
        "!plugin files: + fmt: hook PreToolUse (Bash): command guard.sh",
        "!plugin files: + fmt: hook Stop: prompt Is it done?",
        "!plugin files: + fmt: MCP servers shapes, which are not started: name them in mcp_servers",
        "!plugin files: + fmt: commands/fix.md sets allowed-tools",
        "!plugin files: + fmt: skills/tidy/SKILL.md runs commands when it is loaded",
        "!plugin files: + fmt: brings commands, skills",
    ]
    assert told(parse(PLUGIN), NONE) == [f"plugin files: − fmt: 5 files, {size} bytes"]
    offered = [(one["name"], one["description"]) for one in parse(PLUGIN).to_wire()["offered"]]
    assert offered == [("fmt:fix", "Fixes it."), ("fmt:tidy", "Tidies up.")]


@pytest.mark.parametrize(
    ("hook", "said"),
    [
        ({"type": "command", "command": "sh", "args": ["-c", "x.sh"]}, 'command sh; args ["-c", "x.sh"]'),
        ({"type": "command", "command": "x.sh", "timeout": 5, "async": True}, "command x.sh; async true"),
        ({"type": "http", "url": "http://a.b/", "command": "x.sh"}, 'http http://a.b/; command "x.sh"'),
        ({"type": "agent", "prompt": "Look."}, "agent Look."),
        ({"type": "mcp_tool", "server": "maps", "tool": "find"}, 'mcp_tool; server "maps"; tool "find"'),
    ],
)
def test_a_hook_is_told_with_all_that_decides_what_it_runs(hook: dict[str, object], said: str) -> None:
    hooks = json.dumps({"hooks": {"Stop": [{"hooks": [hook]}]}})
    assert f"!plugin files: + fmt: hook Stop: {said}" in told(
        NONE, parse({**PLUGIN, "plugins/fmt/hooks/hooks.json": hooks})
    )


def test_of_a_plugin_the_head_of_every_text_is_read() -> None:
    texts = {
        "plugins/fmt/agents/critic.md": "---\nname: critic\ndescription: d\ntools: Bash\n---\n",
        "plugins/fmt/commands/deep/fix.md": "Fix it: !`date`\n",
    }
    lines = told(NONE, parse({**PLUGIN, **texts}))
    assert "!plugin files: + fmt: agents/critic.md sets tools" in lines
    assert "!plugin files: + fmt: commands/deep/fix.md runs commands when it is loaded" in lines


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"skills/a/x.md": ""}, "skills/a/SKILL.md is missing; write it, or take a out of skills in agent.toml"),
        ({"skills/a/SKILL.md": "Just do it."}, "skills/a/SKILL.md: it has no description; begin it with a line ---"),
        ({"skills/a/SKILL.md": SKILL}, "skills/a/SKILL.md calls itself review; call it a, as its folder"),
        (
            {"skills/review/SKILL.md": SKILL, "skills/review/.claude-plugin/plugin.json": "{}"},
            "a skill holds no .claude-plugin, by which it would be more; make it a plugin",
        ),
        ({"skills/review/SKILL.md": SKILL, "skills/review/x/SKILL.md": ""}, "a skill holds no other"),
        ({"skills/a/SKILL.md": f"---\ndescription: {'a' * 1025}\n---\n"}, "1,025 characters, and the limit is 1,024"),
        (
            {f"skills/a{n}/SKILL.md": f"---\ndescription: {'é' * 1024}\n---\n" for n in range(17)},
            "what they bring have 34,925 bytes together, and the limit is 32,768; shorten the descriptions",
        ),
        ({"plugins/fmt/x.md": ""}, "plugins/fmt/.claude-plugin/plugin.json is missing; write it"),
        ({**PLUGIN, "plugins/fmt/.claude-plugin/plugin.json": "{"}, "plugin.json is not JSON; mend it"),
        ({**PLUGIN, "plugins/fmt/.claude-plugin/plugin.json": '{"name": "hive"}'}, "calls itself hive; call it fmt"),
        (
            {**PLUGIN, "plugins/fmt/.claude-plugin/plugin.json": '{"name": "fmt", "hooks": "./x.json"}'},
            "plugin.json sets hooks; put the parts of a plugin where they are looked for, such as hooks/hooks.json",
        ),
        ({**PLUGIN, "plugins/fmt/hooks/hooks.json": '{"hooks": [1]}'}, "is not as hooks are written"),
        ({**PLUGIN, "plugins/fmt/.mcp.json": '{"mcpServers": []}'}, "mcpServers needs to be an object"),
    ],
)
def test_what_cannot_be_told_is_refused_with_the_way_out(files: dict[str, str], said: str) -> None:
    with pytest.raises(BadExtra) as caught:
        parse(files)
    assert said in str(caught.value)


def test_what_is_not_named_is_neither_read_nor_there() -> None:
    files = {"skills/review/SKILL.md": ExtraFile(SKILL), "skills/b/SKILL.md": ExtraFile("")}
    assert list(parse_extras(["review"], [], files).files) == ["skills/review/SKILL.md"]


@pytest.mark.parametrize(
    ("front", "description"),
    [
        ("description: plain", "plain"),
        ("description: 'it''s quoted'", "it's quoted"),
        ('description: "a \\"b\\""', 'a "b"'),
        ("description: >-\n  folded\n  text\nname: x", "folded text"),
        ("description: goes\n  on", "goes on"),
        ("description:\n  below", "below"),
    ],
)
def test_a_description_is_read_in_the_forms_that_people_write(front: str, description: str) -> None:
    assert parse_front_matter(f"---\n{front}\n---\nbody")["description"] == description


@given(head=st.text(), key=st.sampled_from(["hooks", "allowed-tools"]), tail=st.text())
def test_a_key_that_stands_by_itself_is_found_whatever_is_around_it(head: str, key: str, tail: str) -> None:
    if all(line.rstrip() != "---" for line in f"{head}\n".splitlines()):
        assert key in parse_front_matter(f"---\n{head}\n{key}: x\n---\n{tail}")


@given(text=st.text())
def test_whatever_stands_at_the_head_of_a_text_is_read_or_not(text: str) -> None:
    parse_front_matter(f"---\n{text}")


async def test_they_lie_where_the_program_looks_for_them_and_only_those_that_are_kept(tmp_path: Path) -> None:
    files, place = ExtraFiles(tmp_path), tmp_path / "agents" / "iris" / "extras"
    script = "skills/review/x.sh"
    extras = parse({"skills/review/SKILL.md": SKILL, script: "ls", **PLUGIN}, executable=script)
    await files.put(IRIS, extras)
    await files.put(IRIS, extras)
    (root,) = place.iterdir()
    assert root.name == extras.digest
    found = {str(path.relative_to(root)): path for path in root.rglob("*") if path.is_file()}
    skill = "own/skills/review"
    own = {"own/.claude-plugin/plugin.json", f"{skill}/SKILL.md", f"{skill}/x.sh"}
    assert found.keys() == {*own, *(path.removeprefix("plugins/") for path in PLUGIN)}
    assert found[f"{skill}/SKILL.md"].read_text() == SKILL
    modes = [stat.S_IMODE(found[f"{skill}/{name}"].stat().st_mode) for name in ("SKILL.md", "x.sh")]
    assert modes == [0o644, 0o755]
    other = parse(PLUGIN)
    await files.put(IRIS, other)
    (place / ".new.left").mkdir()
    await files.keep(IRIS, other.digest)
    assert os.listdir(place) == [other.digest]
    assert await files.has(IRIS, other.digest)
    await files.keep(IRIS, None)
    assert os.listdir(place) == []
    await files.put(AgentName("argus"), NONE)
    await files.keep(AgentName("argus"), None)
    assert not (tmp_path / "agents" / "argus").exists()
