"""What a change does is told line by line, what widens rights first, and what is unknown with its reason."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hive_core.effects import LISTED, TEXT_LIMIT, Effect, Line, file_lines, prompt_lines
from hive_core.effects_of_settings import settings_lines
from hive_core.flakes.effects_of_systems import (
    Closure,
    Facts,
    Package,
    brought_lines,
    closure_lines,
    parse_closure,
    parse_facts,
    system_lines,
)
from hive_core.git.commit_contents import Entry
from hive_core.protocol.effect import effect_line
from hive_core.settings import AgentSettings

# key → a value that is another than the default, and how the change to it reads; `!` before what widens
CHANGES: dict[str, tuple[Any, list[str]]] = {
    "program": ("rehearsal", ["program: claude → rehearsal"]),
    "model": ("opus", ["model: sonnet → opus"]),
    "available_models": (["sonnet", "opus"], ["available_models: any → sonnet, opus"]),
    "effort": ("high", ["effort: the program's own → high"]),
    "tools": (["Bash", "Read", "WebFetch"], ["!tools: + WebFetch", "tools: − Edit, Write, Glob, Grep"]),
    "skills": (["review"], ["skills: + review"]),
    "plugins": (["fmt"], ["!plugins: + fmt"]),
    "turns": ("cold", ["turns: warm → cold"]),
    "warm_idle_s": (60, ["warm_idle_s: 300 → 60"]),
    "warm_turns": (7, ["warm_turns: 50 → 7"]),
    "warm_memory_mib": (64, ["warm_memory_mib: 1024 → 64"]),
    "background_s": (60, ["background_s: 21600 → 60"]),
    "turn_silence_s": (60, ["turn_silence_s: 1800 → 60"]),
    "context_window": (1_000, ["context_window: as the program says → 1000"]),
    "compact_at_percent": (50, ["compact_at_percent: 75 → 50"]),
    "description": ("reads", ["description: empty → reads"]),
    "credential": ("work", ["!credential: default → work"]),
    "recipients": (["hm1nd"], ["recipients: everybody → hm1nd"]),
    "pair_rate_per_hour": (5, ["!pair_rate_per_hour: the hive's → 5"]),
    "network": (
        "host",
        ["!network: private → host: every address this machine reaches, its own services too"],
    ),
    "env": ({"TOKEN": "hunter2"}, ["env: + TOKEN"]),
    "mcp_servers": (
        {"maps": {"command": "maps", "args": ["--at", "a b"], "env": {"KEY": "hunter2"}}},
        ["!mcp_servers: + maps: maps --at 'a b' (env KEY)"],
    ),
    "egress": (
        ["nix-cache", "git.lan:22", {"to": "http://r.lan", "methods": ["POST"], "addresses": ["10.0.0.7"]}],
        [
            "!egress: + nix-cache (cache.nixos.org:443, channels.nixos.org:443, releases.nixos.org:443, "
            "tarballs.nixos.org:443)",
            "!egress: + git.lan:22",
            "!egress: + http://r.lan (POST; also at 10.0.0.7)",
        ],
    ),
    "projects": (
        [{"name": "site", "branch": "next", "push": "iris/*", "force": True}],
        ["!projects: + site at /projects/site, branch next, push iris/*, force"],
    ),
}


M: dict[str, Any] = {"command": "m"}


def settings(**given: Any) -> AgentSettings:
    return AgentSettings.model_validate(given)


def told(lines: list[Line]) -> list[str]:
    wire = Effect(lines).to_wire()["lines"]
    return [("!" if line["weight"] == "wide" else "") + effect_line(line) for line in wire]


@pytest.mark.parametrize("key", AgentSettings.model_fields)
def test_every_key_of_agent_toml_has_its_line(key: str) -> None:
    value, words = CHANGES[key]
    assert told(settings_lines(AgentSettings(), settings(**{key: value}))) == words
    # What is taken back is told as well.
    assert settings_lines(settings(**{key: value}), AgentSettings())
    new = [line for line in settings_lines(None, settings(**{key: value})) if line.what == key]
    assert new
    assert all(line.before is None for line in new)
    assert any(line.wide for line in new) == any(word.startswith("!") for word in words)


def test_equal_settings_have_no_line() -> None:
    whole = {key: value for key, (value, _) in CHANGES.items() if key not in ("available_models", "model")}
    assert settings_lines(settings(**whole), settings(**whole)) == []
    assert settings_lines(settings(tools=["Bash", "Read"]), settings(tools=["Read", "Bash"])) == []


@pytest.mark.parametrize(
    ("key", "before", "after", "words"),
    [
        ("recipients", ["hm1nd"], None, ["!recipients: hm1nd → everybody"]),
        ("recipients", ["hm1nd", "iris"], ["iris", "argus"], ["!recipients: + argus", "recipients: − hm1nd"]),
        ("recipients", [], ["iris"], ["!recipients: + iris"]),
        ("recipients", None, [], ["recipients: everybody → nobody"]),
        ("recipients", ["everybody"], None, ['!recipients: "everybody" → everybody']),
        ("recipients", None, ["nobody", "iris"], ["recipients: everybody → nobody, iris"]),
        ("pair_rate_per_hour", 5, 4, ["pair_rate_per_hour: 5 → 4"]),
        ("pair_rate_per_hour", 5, 6, ["!pair_rate_per_hour: 5 → 6"]),
        ("pair_rate_per_hour", 5, None, ["!pair_rate_per_hour: 5 → the hive's"]),
        ("available_models", ["sonnet"], [], ["!available_models: sonnet → any"]),
        ("available_models", ["sonnet"], ["sonnet", "opus"], ["!available_models: + opus"]),
        ("description", "", "empty", ['description: empty → "empty"']),
        ("env", {"A": "1"}, {"A": "2"}, ["env: A → another value"]),
        ("mcp_servers", {"m": {"command": "m"}}, {}, ["mcp_servers: − m: m"]),
        ("egress", ["a.lan:1", "b.lan:1"], ["b.lan:1"], ["egress: − a.lan:1"]),
        (
            "egress",
            ["*.a.lan:1"],
            [{"to": "*.a.lan:1", "addresses": ["10.0.0.0/8"]}],
            ["!egress: + *.a.lan:1 (also at 10.0.0.0/8)", "egress: − *.a.lan:1"],
        ),
        (
            "projects",
            [{"name": "a"}, {"name": "b"}],
            [{"name": "b", "push": ""}],
            [
                "!projects: b at /projects/b, push its own name's branches → b at /projects/b, push nothing",
                "projects: − a at /projects/a, push its own name's branches",
            ],
        ),
        ("mcp_servers", {"m": M}, {"m": {**M, "allowed_tools": ["a"]}}, ["mcp_servers: m: m → m: m (only a)"]),
        ("mcp_servers", {"m": {**M, "allowed_tools": ["a"]}}, {"m": M}, ["!mcp_servers: m: m (only a) → m: m"]),
        (
            "mcp_servers",
            {"m": {**M, "allowed_tools": ["a", "b"]}},
            {"m": {**M, "allowed_tools": ["b"]}},
            ["mcp_servers: m: m (only a, b) → m: m (only b)"],
        ),
        (
            "mcp_servers",
            {"m": {**M, "allowed_tools": ["a"]}},
            {"m": {**M, "allowed_tools": ["a", "b"]}},
            ["!mcp_servers: m: m (only a) → m: m (only a, b)"],
        ),
        (
            "mcp_servers",
            {"m": {**M, "allowed_tools": ["a"]}},
            {"m": {"command": "n", "allowed_tools": ["a"]}},
            ["!mcp_servers: m: m (only a) → m: n (only a)"],
        ),
    ],
)
def test_what_widens_is_told_from_what_narrows(key: str, before: Any, after: Any, words: list[str]) -> None:
    assert told(settings_lines(settings(**{key: before}), settings(**{key: after}))) == words


def test_what_differs_behind_the_names_that_a_line_has_room_for_is_told() -> None:
    many = [f"g{number:02}" for number in range(LISTED)]
    before, after = ({"users": {"web": [*many, group]}} for group in ("audio", "wheel"))
    lines, _ = system_lines(parse_facts(before), parse_facts(after))
    assert [line.what for line in lines] == ["users"]
    servers = (
        {"m": {"command": "m", "env": dict.fromkeys([*(name.upper() for name in many), last], "1")}}
        for last in ("X", "Y")
    )
    one, other = (settings(mcp_servers=server) for server in servers)
    (server,) = told(settings_lines(one, other))
    assert server.endswith("→ the same with another env: X, Y")


def test_long_texts_that_begin_with_the_same_are_told_from_where_they_differ() -> None:
    before, after = (settings(mcp_servers={"m": {**M, "args": ["x" * 1000, last]}}) for last in ("--safe", "--rm"))
    (server,) = told(settings_lines(before, after))
    begins = f"m: m {'x' * 35}… 928 characters …{'x' * 37} --"
    assert server == f"!mcp_servers: {begins}safe → {begins}rm"
    assert told(settings_lines(after, before)) != [server]


def test_tools_behind_those_that_a_line_has_room_for_are_told() -> None:
    many = [f"t{number:02}" for number in range(LISTED)]
    before, after = (settings(mcp_servers={"m": {**M, "allowed_tools": [*many, last]}}) for last in ("x", "y"))
    (server,) = told(settings_lines(before, after))
    assert server.startswith("!")
    assert server.endswith("→ the same with other tools: + y, − x")


def test_models_that_are_named_as_the_word_for_all_of_them_are_told() -> None:
    before, after = settings(model="any", available_models=["any"]), settings(model="any")
    assert told(settings_lines(before, after)) == ['!available_models: "any" → any']


def test_a_value_of_the_environment_is_never_told() -> None:
    server = {"command": "maps", "env": {"KEY": "hunter2"}}
    before, after = (
        {"command": "maps", "env": {"KEY": "hunter1"}},
        settings(env={"A": "hunter2"}, mcp_servers={"m": server}),
    )
    for one in (None, AgentSettings(), settings(env={"A": "hunter1"}, mcp_servers={"m": before})):
        lines = settings_lines(one, after)
        assert {"env", "mcp_servers"} <= {line.what for line in lines}
        assert "hunter" not in str(lines)


def test_a_new_agent_is_told_by_what_it_has() -> None:
    assert told(settings_lines(None, settings(recipients=["hm1nd"]))) == [
        "credential: + default",
        "recipients: + hm1nd",
        "tools: + Bash, Read, Edit, Write, Glob, Grep",
        "program: + claude",
        "model: + sonnet",
    ]


def test_a_prompt_is_told_by_its_size_and_by_how_many_lines_come_and_go() -> None:
    assert told(prompt_lines("a\nb\n", "a\nb\n")) == []
    assert told(prompt_lines(None, "a\n")) == ["prompt: + 1 line, 2 bytes"]
    assert told(prompt_lines("a\nb\n", "a\nc\nd\n")) == ["prompt: 2 lines, 4 bytes → 3 lines, 6 bytes (+2 −1 lines)"]
    joined = told(prompt_lines("a\x0cb\n", "a\nb\n"))
    assert joined == ["prompt: 1 line, 4 bytes → 2 lines, 4 bytes (+2 −1 lines)"]
    (moved,) = told(prompt_lines("a\nb\n", "b\na\n"))
    assert "in another order" in moved


def test_files_are_told_by_name_and_the_first_of_them_where_they_are_many() -> None:
    one, two, run = Entry("1" * 40), Entry("2" * 40), Entry("1" * 40, executable=True)
    before = {"agent.toml": one, "old.md": one, "same.md": one, "other.md": one, "tool": one}
    after = {"agent.toml": two, "same.md": one, "other.md": two, "tool": run} | {f"new/{n}.md": one for n in range(500)}
    came, went, other, runs = told(file_lines(before, after, ["agent.toml"]))
    assert came.startswith("files: + 500: new/0.md, ")
    assert came.endswith(f"and {500 - LISTED} more")
    assert (went, other) == ("files: − old.md", "files: other.md → changed")
    assert runs == "executable files: + tool"


@given(st.text(), st.text())
def test_an_effect_is_bounded_and_what_widens_comes_first(text: str, other: str) -> None:
    wire = Effect([Line("a", text * 50, None), Line("b", None, other * 50, wide=True)], ["why"]).to_wire()
    assert [line["weight"] for line in wire["lines"]] == ["wide", "plain"]
    assert all(len(line["before"] or line["after"] or "") <= TEXT_LIMIT + 40 for line in wire["lines"])
    assert wire["unknown"] == ["why"]


def closure(**sizes: int) -> Closure:
    said = [f"/nix/store/{'a' * 32}-{name}-1\t {size}" for name, size in sizes.items()]
    found = parse_closure("\n".join(said).encode())
    assert found is not None
    return found


def test_closures_are_told_by_size_and_by_what_comes_and_goes() -> None:
    before, after = closure(glibc=2**20 - 6, strace=6), closure(glibc=2**20 - 6, git=2**20 + 6)
    lines, unknown = closure_lines(before, after)
    assert told(lines) == [
        "closure: 1.0 MiB in 2 paths → 2.0 MiB in 2 paths",
        "closure: + git-1",
        "closure: − strace-1",
    ]
    assert (lines[0].amounts, unknown) == ({"closure_bytes": 1048576}, [])
    assert closure_lines(before, None)[1]
    assert closure_lines(after, after) == ([], [])


@pytest.mark.parametrize("said", ["", "[]", "x", "x y", "x 1 2", "x 1\ny", "x -1"])
def test_what_nix_says_of_no_closure_is_none(said: str) -> None:
    assert parse_closure(said.encode()) is None


def test_packages_alone_are_told_by_what_they_bring_as_far_as_they_are_in_the_store() -> None:
    before = closure(glibc=2**20)
    jq, fd = (Package(name=name, mark=name) for name in ("jq-1", "fd-1"))
    (line,), unknown = brought_lines(before, [jq], closure(glibc=2**20, jq=2**20, onig=2**19))
    assert told([line]) == ["closure: + 1.5 MiB in 2 paths: jq-1, onig-1"]
    assert (line.amounts, unknown) == ({"closure_bytes": 2**20 + 2**19}, [])
    (line,), unknown = brought_lines(before, [], closure(glibc=2**20))
    assert (told([line]), line.amounts, unknown) == (["closure: + no more than there is"], {"closure_bytes": 0}, [])
    said = ["closure: fd-1, jq-1 is not in the store yet, so its size is known once it is built"]
    assert brought_lines(before, [jq, fd], None) == ([], said)
    assert brought_lines(None, [], closure(jq=1))[1]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@given(JSON | st.fixed_dictionaries(dict.fromkeys(Facts.model_fields, JSON)))
def test_facts_that_an_agent_made_up_are_none_or_are_told(raw: object) -> None:
    facts = parse_facts(raw)
    lines, unknown = system_lines(Facts(), facts)
    assert (lines, len(unknown)) == ([], len(Facts.model_fields) - 1), "all but the names of what is absent"
    assert system_lines(facts, facts)[0] == []
