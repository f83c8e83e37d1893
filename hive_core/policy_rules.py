"""The rules of the policy as data: which changes may pass without a click. Pure: the same effect, the same answer.

A rule allows; what no rule allows waits for the operator. It never allows what widens somebody's rights, what is not
known, and what is about the manager; and of the kinds of changes only those of KINDS.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError
from pydantic.functional_validators import BeforeValidator

from hive_core.distinct import distinct
from hive_core.effects_of_extras import PLUGIN_FILES, SKILL_FILES
from hive_core.effects_of_settings import RULES as SETTINGS
from hive_core.protocol.effect import PLAIN
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.visible import named
from hive_core.protocol.words import MANAGER, NAME_LIMIT, OPERATOR, shown
from hive_core.settings import describe

# A new agent, the end of one, a budget, a schedule and what all are built from always wait.
Kind = Literal["apply_commit"]
KINDS: tuple[str, ...] = get_args(Kind)
RULES_LIMIT = 100
PER_DAY = 10
DAY_MS = 24 * 3600 * 1000
# What the lines of an effect can be about.
OF_SYSTEMS = (
    *("closure", "packages", "programs", "services", "etc", "scripts", "system", "users", "setuid", "capabilities"),
    *("firewall", "DHCP", "open TCP ports", "open UDP ports", "trusted interfaces", "nameservers"),
)
LINES = frozenset(
    {*SETTINGS, "prompt", "agent.nix", "files", "executable files", SKILL_FILES, PLUGIN_FILES, *OF_SYSTEMS}
)
# What a limit measures → the lines that it is about. Where one of those is and its measure is not, it is not kept.
MEASURES: Mapping[str, tuple[str, ...]] = {
    "prompt_lines": ("prompt",),
    "prompt_bytes": ("prompt",),
    "closure_bytes": OF_SYSTEMS,
}

EVERYBODY = "*"
Name = Annotated[str, StringConstraints(pattern=r"^([a-z][a-z0-9-]*|\*)\z", max_length=NAME_LIMIT)]
Names = Annotated[
    list[Name],
    Field(min_length=1, max_length=1_000),
    BeforeValidator(lambda given: [EVERYBODY] if given == EVERYBODY else given),
]
Bound = Annotated[int, Field(ge=0, lt=2**62, strict=True)]


class AtMost(BaseModel):
    """The most that a change may measure. closure_bytes: by how much it grows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt_lines: Bound | None = None
    prompt_bytes: Bound | None = None
    closure_bytes: Bound | None = None


class Rule(BaseModel):
    """A table [[policy]] of the configuration.

    agents, requested_by  whose changes, and asked for by whom; "*" is everybody's
    only                  the lines that the effect may hold, by what they are about; no others
    per_day               how many pass by it in 24 hours; those over it wait
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, StringConstraints(pattern=r"^\w[\w .,:'-]*\z", max_length=60)]
    kind: Kind
    agents: Names
    requested_by: Names
    only: Annotated[list[Annotated[str, Field(max_length=60)]], Field(min_length=1, max_length=100)]
    at_most: AtMost = AtMost()
    per_day: Annotated[int, Field(ge=1, le=1_000, strict=True)] = PER_DAY


Rules = Annotated[list[Rule], Field(max_length=RULES_LIMIT), distinct("rules")]


class Case(NamedTuple):
    """What is asked for. effect: as it is stored; None where nothing is shown of it."""

    kind: str
    agent: str
    requested_by: str
    effect: Mapping[str, Any] | None


def allows(rule: Rule, case: Case) -> bool:
    """Whether a rule lets a change pass, for all that its effect says."""
    return hindrance(rule, case) is None


def hindrance(rule: Rule, case: Case) -> str | None:
    """The first reason for which a rule lets a change wait; None where it lets it pass."""
    if rule.kind != case.kind:
        return f"of the kind {case.kind}"
    if case.agent == MANAGER:
        return f"of {MANAGER}"
    if not _among(case.agent, rule.agents):
        return "of others than agents names"
    if not _among(case.requested_by, rule.requested_by):
        return "asked for by others than requested_by names"
    return _hindrance_of_effect(rule, case.effect)


def _hindrance_of_effect(rule: Rule, effect: Mapping[str, Any] | None) -> str | None:
    # An effect without a line gives nothing to judge by.
    if effect is None or not effect["lines"]:
        return "without a line"
    if effect["unknown"]:
        return "with something unknown"
    for line in effect["lines"]:
        if line["weight"] != PLAIN:
            return f"that widen {line['what']}"
        if line["what"] not in rule.only:
            return f"with {line['what']}, which only does not name"
    for measure, bound in rule.at_most:
        if bound is not None and not _is_within(effect["lines"], measure, bound):
            return f"not known to be within {measure}"
    return None


def _among(name: str, names: Collection[str]) -> bool:
    return EVERYBODY in names or name in names


def _is_within(lines: Sequence[Mapping[str, Any]], measure: str, bound: int) -> bool:
    about = [line for line in lines if line["what"] in MEASURES[measure]]
    measured = [line["amounts"][measure] for line in about if measure in line.get("amounts", {})]
    return not about or (bool(measured) and max(measured) <= bound)


def troubles(rule: Rule, agents: Collection[str]) -> Iterator[str]:
    """Why a rule, or a part of it, can never allow anything. agents: those that there are."""
    if unknown := [what for what in rule.only if what not in LINES]:
        known = ", ".join(sorted(LINES, key=str.lower))
        yield f"only names {_quoted(unknown)}, of which no effect has a line; the lines are {known}"
    if EVERYBODY not in rule.agents:
        if gone := [name for name in rule.agents if name not in agents]:
            yield f"agents names {_quoted(gone)}, which no agent is called"
        if MANAGER in rule.agents:
            yield f"agents names {MANAGER}, whose own changes always wait for you"
    askers = {*agents, MANAGER, OPERATOR}
    if EVERYBODY not in rule.requested_by and (gone := [name for name in rule.requested_by if name not in askers]):
        yield f"requested_by names {_quoted(gone)}, who is nobody"


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(named(name)[:60] for name in names[:6]) + (" and others" if len(names) > 6 else "")


# -- reading ----------------------------------------------------------------------------------------------------------


def parse_rules(text: str, where: str) -> list[Rule]:
    """The tables [[policy]] of a TOML text. Raises Refusal("usage") that names the key and its line."""
    try:
        given = tomllib.loads(text)
    except (ValueError, RecursionError) as exc:
        raise Refusal("usage", f"cannot read {where}: it is not TOML ({str(exc)[:200]}); mend it there") from None
    if list(given) != ["policy"]:
        others = ", ".join(shown(key) for key in given if key != "policy")
        why = f"it has {others[:200]} too" if others else "it has none"
        raise Refusal("usage", f"cannot use {where}: {why}; give tables [[policy]], and nothing else")
    try:
        return TypeAdapter(Rules).validate_python(given["policy"])
    except ValidationError as exc:
        raise cannot_use_rules(exc, where, text) from None


def cannot_use_rules(error: ValidationError, where: str, text: str, table: str = "policy") -> Refusal:
    """The refusal of a rule, with its key and, where the text has that, its line.

    error: its locations begin with the rule's number, or with the name of its tables before that.
    table: that name; lanes are refused as rules are
    """
    at = [part for part in error.errors(include_url=False)[0]["loc"] if part != table]
    line = line_of(text, at, table)
    place = f"line {line} of {where}" if line else where
    what = describe(error).removeprefix(f"{table}.")
    one, all_of_them = ("rule", "the policy") if table == "policy" else (table, f"the {table}s")
    rule = f"{one} {int(at[0]) + 1}: " if at and isinstance(at[0], int) else ""
    return Refusal("usage", f"cannot use {all_of_them}: {rule}{re.sub(r'^[0-9]+[.]?', '', what)}; change {place}")


def line_of(text: str, at: Sequence[int | str], table: str = "policy") -> int | None:
    """The line of a key of a rule, counted from 1: its number, its key, and one in that. None where it is not found."""
    if not at or not isinstance(at[0], int):
        return None
    lines = text.splitlines()
    heads = [number for number, line in enumerate(lines) if re.match(rf"\s*\[\[\s*{table}\s*\]\]", line)]
    if at[0] >= len(heads):
        return None
    begin, end = heads[at[0]], [*heads, len(lines)][at[0] + 1]
    for key in [part for part in reversed(at[1:]) if isinstance(part, str)]:
        for number in range(begin + 1, end):
            if re.search(rf"(^|[\s{{,.\"']){re.escape(key)}[\"']?\s*=", lines[number]):
                return number + 1
    return begin + 1
