"""What the rules of the policy allow, for the effect that is stored; how they are written, and where one is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hive_core.config import load_config
from hive_core.effects import Effect, Line, file_lines, prompt_lines
from hive_core.effects_of_settings import settings_lines
from hive_core.flakes.effects_of_systems import Closure, closure_lines, parse_facts, system_lines
from hive_core.git.commit_contents import Entry
from hive_core.policy_rules import LINES, OF_SYSTEMS, Case, Rule, allows, parse_rules, troubles
from hive_core.protocol.refusal import Refusal
from hive_core.settings import AgentSettings
from tests.unit.test_core_effects import CHANGES

OWN_PROMPT = """
[[policy]]
name = "own prompt"
kind = "apply_commit"
agents = ["iris"]
requested_by = ["hm1nd"]
only = ["prompt"]
at_most = { prompt_lines = 200 }
per_day = 10
"""


def rule(**given: Any) -> Rule:
    usual = {"name": "r", "kind": "apply_commit", "agents": "*", "requested_by": "*", "only": sorted(LINES)}
    return Rule.model_validate({**usual, **given})


def passes(one: Rule, *lines: Line, unknown: tuple[str, ...] = (), **given: Any) -> bool:
    usual = {"kind": "apply_commit", "agent": "iris", "requested_by": "hm1nd"}
    return allows(one, Case(**{**usual, "effect": Effect(lines, unknown).to_wire(), **given}))


SMALL = Closure({"a": 1})
CLOSURE = closure_lines(SMALL, Closure({"a": 1, "b": 50 * 2**20}))[0]
OPEN = {
    "firewall": False,
    "dhcp": True,
    "tcp": ["22"],
    "udp": ["53"],
    "trusted": ["eth1"],
    "nameservers": ["192.0.2.1"],
}
EVERYTHING: dict[str, Any] = {
    "packages": [{"name": "librsvg-2", "mark": "m"}],
    "services": {"web": "m"},
    "etc": {"motd": "m"},
    "scripts": "m",
    "users": {"web": ["wheel"]},
    "setuid": {"sudo": {"setuid": True, "setgid": False, "capabilities": ""}},
    "capabilities": {"web": "CAP_NET_BIND_SERVICE"},
    "network": OPEN,
    "programs": ["git"],
}
SHUT = {"firewall": True, "dhcp": False, "tcp": [], "udp": [], "nameservers": []}
NOTHING: dict[str, Any] = {key: type(value)() for key, value in EVERYTHING.items()} | {"network": SHUT}
PROMPT = prompt_lines("a\n", "a\nb\n")[0]
MODEL = Line("model", "sonnet", "opus")


# -- what a rule allows -----------------------------------------------------------------------------------------------


def test_a_rule_allows_what_it_names_and_nothing_beside_it() -> None:
    one = rule(only=["prompt"])
    assert passes(one, PROMPT)
    assert not passes(one, MODEL)
    assert not passes(one, PROMPT, MODEL)
    assert passes(rule(only=["prompt", "model"]), PROMPT, MODEL)


def test_a_rule_allows_only_its_agents_and_only_whom_it_lets_ask() -> None:
    one = rule(agents=["iris", "argus"], requested_by=["hm1nd"])
    assert passes(one, PROMPT)
    assert passes(one, PROMPT, agent="argus")
    assert not passes(one, PROMPT, agent="hera")
    assert not passes(one, PROMPT, requested_by="iris")
    assert not passes(rule(requested_by=["operator"]), PROMPT)


def test_the_managers_own_changes_always_wait() -> None:
    assert not passes(rule(agents="*"), PROMPT, agent="hm1nd")
    assert not passes(rule(agents=["hm1nd"]), PROMPT, agent="hm1nd")


@pytest.mark.parametrize(
    "kind", ["spawn", "init_config", "destroy", "raise_budget", "schedule_prompt", "update_meta_inputs", "new"]
)
def test_other_kinds_than_commits_always_wait(kind: str) -> None:
    assert not passes(rule(), PROMPT, kind=kind)
    with pytest.raises(Refusal, match=r"rule 1: kind: 'apply_commit' is needed; change line 4 of"):
        parse_rules(OWN_PROMPT.replace("apply_commit", kind), "rules.toml")


def test_what_shows_no_effect_or_an_empty_one_waits() -> None:
    assert not passes(rule(), effect=None)
    assert not passes(rule())


LINE = st.builds(
    Line,
    what=st.sampled_from(sorted(LINES)),
    before=st.none() | st.text(max_size=5),
    after=st.text(max_size=5),
    amounts=st.dictionaries(st.sampled_from(["prompt_lines", "closure_bytes"]), st.integers(0, 100), max_size=2),
)
PLACE = st.integers(0, 5)


@given(st.lists(LINE, max_size=5), PLACE, LINE, st.text())
def test_what_widens_or_is_unknown_never_passes_whatever_stands_beside_it(
    lines: list[Line], place: int, more: Line, why: str
) -> None:
    one = rule()
    wide = Line(more.what, more.before, more.after, wide=True, amounts=more.amounts)
    assert passes(one, *lines) == bool(lines)
    assert not passes(one, *lines[:place], wide, *lines[place:])
    assert not passes(one, *lines, unknown=(why,))


@given(st.lists(LINE, min_size=1, max_size=5), PLACE, st.text(max_size=20).filter(lambda what: what not in LINES))
def test_a_line_that_no_rule_names_keeps_the_whole_change_waiting(lines: list[Line], place: int, what: str) -> None:
    assert not passes(rule(), *lines[:place], Line(what, None, "x"), *lines[place:])


@given(st.lists(LINE, max_size=4), st.sets(st.sampled_from(sorted(LINES)), min_size=1), st.integers(0, 100))
def test_a_rule_that_names_less_or_bounds_more_allows_nothing_more(
    lines: list[Line], only: set[str], bound: int
) -> None:
    narrow, bounded = rule(only=sorted(only)), rule(only=sorted(only), at_most={"prompt_lines": bound})
    assert passes(rule(), *lines) >= passes(narrow, *lines) >= passes(bounded, *lines)


@pytest.mark.parametrize("key", CHANGES)
def test_every_change_of_a_setting_passes_by_its_name_unless_it_widens(key: str) -> None:
    value, words = CHANGES[key]
    lines = settings_lines(AgentSettings(), AgentSettings.model_validate({key: value}))
    assert passes(rule(only=[key]), *lines) == (not any(word.startswith("!") for word in words))
    assert not passes(rule(only=["prompt"]), *lines)


# -- how much ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [None, "old\n"])
def test_a_prompt_passes_up_to_its_size(before: str | None) -> None:
    one = rule(only=["prompt"], at_most={"prompt_lines": 3, "prompt_bytes": 9})
    assert passes(one, *prompt_lines(before, "a\nb\nc\n"))
    assert not passes(one, *prompt_lines(before, "a\nb\nc\nd\n"))
    assert not passes(one, *prompt_lines(before, "é" * 5))


def test_a_bound_is_about_its_own_lines_and_one_that_was_not_measured_is_not_within_it() -> None:
    small = rule(only=["prompt", "packages", "closure"], at_most={"closure_bytes": 50_000_000})
    package = Line("packages", None, "librsvg 2.58")
    size = Line("closure", "900 MiB", "920 MiB", amounts={"closure_bytes": 20_000_000})
    assert passes(small, PROMPT)
    assert passes(small, package, size)
    assert not passes(small, package)
    assert not passes(small, package, Line("closure", None, "librsvg"))
    assert not passes(small, package, size, Line("closure", "a", "b", amounts={"closure_bytes": 50_000_001}))
    assert not passes(small, package, size, Line("setuid", None, "sudo (setuid)", wide=True))


# -- how they are written ---------------------------------------------------------------------------------------------


def test_rules_are_read_as_they_are_written_and_there_are_none_by_default(tmp_path: Path) -> None:
    assert load_config({}, {}, "/dev/null").policy == []
    (one,) = parse_rules(OWN_PROMPT, "rules.toml")
    assert one == rule(
        name="own prompt",
        agents=["iris"],
        requested_by=["hm1nd"],
        only=["prompt"],
        at_most={"prompt_lines": 200},
    )
    file = tmp_path / "config.toml"
    file.write_text(f"dashboard_port = 0\n{OWN_PROMPT}")
    assert load_config({}, {}, str(file)).policy == [one]


def from_configuration(text: str, folder: Path) -> None:
    file = folder / "rules.toml"
    file.write_text(text)
    load_config({}, {}, str(file))


def from_text(text: str, folder: Path) -> None:
    parse_rules(text, str(folder / "rules.toml"))


@pytest.mark.parametrize("read", [from_configuration, from_text])
@pytest.mark.parametrize(
    ("written", "wrong", "said"),
    [
        ('name = "own prompt"', 'nmae = "own prompt"', "rule 1: name: it is missing; change line 2 of"),
        ("per_day = 10", "per_dya = 10", "rule 1: per_dya: unknown key; change line 9 of"),
        ("per_day = 10", "per_day = 0", "rule 1: per_day: at least 1 is needed; change line 9 of"),
        ("per_day = 10", 'per_day = "10"', "rule 1: per_day: a whole number is needed; change line 9 of"),
        ("prompt_lines = 200", "prompt_line = 200", "rule 1: at_most.prompt_line: unknown key; change line 8 of"),
        ("prompt_lines = 200", "prompt_lines = -1", "rule 1: at_most.prompt_lines: at least 0 is needed; change line"),
        ('agents = ["iris"]', 'agents = "iris"', "rule 1: agents: a list is needed; change line 5 of"),
        ('agents = ["iris"]', 'agents = ["I"]', "rule 1: agents.0: some of its characters, or their order, are not"),
        ('only = ["prompt"]', "only = []", "change line 7 of"),
        ('name = "own prompt"', 'name = "\\u202e"', "rule 1: name: some of its characters, or their order, are not"),
        ("per_day = 10", f"per_day = 10\n{OWN_PROMPT}", "two rules are called own prompt; give each its own name"),
        ("per_day = 10", f"per_day = 10\n{OWN_PROMPT}x = 1", "rule 2: x: unknown key; change line 19 of"),
    ],
)
def test_a_rule_that_is_wrong_is_refused_with_its_key_and_line(
    tmp_path: Path, read: Callable[[str, Path], None], written: str, wrong: str, said: str
) -> None:
    assert written in OWN_PROMPT
    with pytest.raises(Refusal) as caught:
        read(OWN_PROMPT.replace(written, wrong), tmp_path)
    assert caught.value.code == "usage"
    assert caught.value.message.startswith("cannot use the policy: ")
    assert said in caught.value.message
    assert str(tmp_path / "rules.toml") in caught.value.message


@pytest.mark.parametrize("text", ["", "x = 1", f"x = 1\n{OWN_PROMPT}", "[[policy]\n", "policy = 3", "policy = [3]"])
def test_a_text_that_holds_something_else_than_rules_is_refused(text: str) -> None:
    with pytest.raises(Refusal, match=r"rules\.toml"):
        parse_rules(text, "rules.toml")


# -- rules that never allow anything ----------------------------------------------------------------------------------


def test_what_a_rule_can_never_allow_is_named() -> None:
    agents = ["hm1nd", "iris"]
    assert list(troubles(parse_rules(OWN_PROMPT, "r")[0], agents)) == []
    assert list(troubles(rule(), agents)) == []
    (said,) = troubles(rule(only=["prompt", "promt"]), agents)
    assert "only names promt, of which no effect has a line; the lines are agent.nix, available_models, " in said
    (said,) = troubles(rule(agents=["iris", "argus"]), agents)
    assert said == "agents names argus, which no agent is called"
    (said,) = troubles(rule(agents=["hm1nd"]), agents)
    assert "whose own changes always wait" in said
    (said,) = troubles(rule(requested_by=["hm1nd", "operator", "argus"]), agents)
    assert said == "requested_by names argus, who is nobody"


def test_every_line_that_a_commit_can_have_is_one_that_a_rule_can_name() -> None:
    before = {"a": Entry("1" * 40), "b": Entry("2" * 40)}
    changed = file_lines(before, {"a": Entry("3" * 40), "c": Entry("4" * 40, executable=True)})
    lines = [*changed, *prompt_lines(None, "x"), *settings_lines(None, AgentSettings())]
    none, all_of = parse_facts(NOTHING), parse_facts(EVERYTHING)
    lines += system_lines(none, all_of)[0] + system_lines(all_of, none)[0] + CLOSURE
    assert {line.what for line in lines} <= LINES
    assert {line.what for line in lines} >= {*OF_SYSTEMS} - {"system"}  # of a system that differs by nothing of these


def test_a_small_package_passes_and_one_that_brings_a_setuid_program_waits() -> None:
    small = rule(only=["packages", "programs", "closure"], at_most={"closure_bytes": 50 * 2**20})
    facts = {key: parse_facts({**NOTHING, key: EVERYTHING[key]}) for key in ("packages", "setuid")}
    package, setuid = (system_lines(parse_facts(NOTHING), one)[0] for one in facts.values())
    assert passes(small, *package, *CLOSURE)
    assert not passes(rule(**{**small.model_dump(), "only": sorted(LINES)}), *package, *setuid, *CLOSURE)
    assert not passes(rule(**{**small.model_dump(), "at_most": {"closure_bytes": 50 * 2**20 - 1}}), *CLOSURE)
    # What shrinks has grown by nothing.
    assert passes(rule(at_most={"closure_bytes": 0}), *closure_lines(Closure({"a": 1, "b": 1}), SMALL)[0])
    assert not passes(small, *package, unknown=tuple(closure_lines(SMALL, None)[1]))
