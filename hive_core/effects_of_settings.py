"""What a change of an agent's settings does: a rule for each key of agent.toml."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from typing import Any

from hive_core.destinations import TUNNEL, Allowed, destination
from hive_core.effects import Line, listed, some
from hive_core.egress_rules import Rule as Destination
from hive_core.egress_rules import presets
from hive_core.project_rules import Project
from hive_core.protocol.visible import quoted
from hive_core.settings import AgentSettings, McpServer

Rule = Callable[[str, Any, Any], list[Line]]  # of a key, its value before and its value after
_DEFAULTS = AgentSettings()
ALWAYS = ("program", "model", "tools", "recipients", "credential")  # told of a new agent, whatever they are


def settings_lines(before: AgentSettings | None, after: AgentSettings) -> list[Line]:
    """before: None for a new agent. What widens its rights is then what goes beyond the settings of any agent."""
    lines: list[Line] = []
    for key, rule in RULES.items():
        value = getattr(after, key)
        differs = rule(key, getattr(before or _DEFAULTS, key), value)
        if before is None and key not in _TABLES and (differs or key in ALWAYS):
            differs = [Line(key, None, _say(key, value), any(line.wide for line in differs))]
        lines += differs
    return lines


def _say(key: str, value: Any) -> str:
    """A value in words; one that reads like the words for none stands in quotation marks."""
    nothing = _EMPTY.get(key, "none")
    if value is None:
        return _NONE[key]
    if value in ("", [], {}):
        return nothing
    if key == "network":
        return _NETWORKS[value]
    text = some(value) if isinstance(value, list | dict) else str(value)
    return quoted(text) if text in (_NONE.get(key), nothing) else text


_TABLES = {"mcp_servers", "projects", "egress"}  # told one by one, also of a new agent
_NONE = {
    "effort": "the program's own",
    "context_window": "as the program says",
    "recipients": "everybody",
    "pair_rate_per_hour": "the hive's",
}
_EMPTY = {"available_models": "any", "description": "empty", "recipients": "nobody"}


def _line(key: str, before: Any, after: Any, wide: bool) -> list[Line]:
    # By the values: an agent may be called "everybody", and what reads the same need not be the same.
    return [] if before == after else [Line(key, _say(key, before), _say(key, after), wide)]


def _plain(key: str, before: Any, after: Any) -> list[Line]:
    return _line(key, before, after, wide=False)


def _wide(key: str, before: Any, after: Any) -> list[Line]:
    return _line(key, before, after, wide=True)


def _tools(key: str, before: list[str], after: list[str]) -> list[Line]:
    return listed(key, before, after, widens=True)


def _skills(key: str, before: list[str], after: list[str]) -> list[Line]:
    # What one brings is told by its files.
    return listed(key, before, after)


def _models(key: str, before: list[str], after: list[str]) -> list[Line]:
    if before and after:
        return listed(key, before, after, widens=True)
    return _line(key, before, after, wide=not after)


def _recipients(key: str, before: list[str] | None, after: list[str] | None) -> list[Line]:
    if before is not None and after is not None:
        return listed(key, before, after, widens=True)
    return _line(key, before, after, wide=after is None)


def _rate(key: str, before: int | None, after: int | None) -> list[Line]:
    # The hive's own can be higher or lower than either.
    wide = before is None or after is None or after > before
    return _line(key, before, after, wide)


def _names(key: str, before: Mapping[str, str], after: Mapping[str, str]) -> list[Line]:
    """Names alone: a value may be a secret."""
    others = [name for name in after if name in before and after[name] != before[name]]
    return listed(key, before, after) + ([Line(key, some(others), "another value")] if others else [])


def _servers(key: str, before: Mapping[str, McpServer], after: Mapping[str, McpServer]) -> list[Line]:
    lines: list[Line] = []
    for name in sorted({*before, *after}):
        old, new = before.get(name), after.get(name)
        if old == new:
            continue
        was, is_now = (None if one is None else _server(name, one) for one in (old, new))
        if was == is_now:
            is_now = f"the same with {_others(old, new)}"
        lines.append(Line(key, was, is_now, wide=new is not None and not _narrows(old, new)))
    return lines


def _others(old: McpServer | None, new: McpServer | None) -> str:
    """What two servers that read the same differ in."""
    assert old is not None
    assert new is not None
    if old.allowed_tools == new.allowed_tools:
        others = [name for name in {**old.env, **new.env} if old.env.get(name) != new.env.get(name)]
        return f"another env: {some(others)}" if others else "its env in another order"
    had, has = old.allowed_tools or [], new.allowed_tools or []
    more, less = ([tool for tool in one if tool not in other] for one, other in ((has, had), (had, has)))
    parts = [f"{sign} {some(tools)}" for sign, tools in (("+", more), ("−", less)) if tools]
    return f"other tools: {', '.join(parts)}" if parts else "its tools in another order"


def _narrows(old: McpServer | None, new: McpServer) -> bool:
    """Whether nothing but a part of its tools is to be had any more."""
    if old is None or new.allowed_tools is None or old.model_copy(update={"allowed_tools": new.allowed_tools}) != new:
        return False
    return old.allowed_tools is None or set(new.allowed_tools) <= set(old.allowed_tools)


def _server(name: str, server: McpServer) -> str:
    env = f" (env {some(server.env)})" if server.env else ""
    tools = "" if server.allowed_tools is None else f" (only {some(server.allowed_tools)})"
    return f"{name}: {shlex.join([server.command, *server.args])}{env}{tools}"


def _projects(key: str, before: list[Project], after: list[Project]) -> list[Line]:
    old, new = ({project.name: project.as_text() for project in projects} for projects in (before, after))
    names = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    return [Line(key, old.get(name), new.get(name), wide=name in new) for name in names]


def _egress(key: str, before: list[Destination], after: list[Destination]) -> list[Line]:
    """A line for each, whole: none hides among many."""
    old, new = ([destination_text(one) for one in entries] for entries in (before, after))
    lines = [Line(key, None, text, wide=True) for text in dict.fromkeys(new) if text not in old]
    return lines + [Line(key, text, None) for text in dict.fromkeys(old) if text not in new]


def destination_text(entry: Destination) -> str:
    """An entry of `egress` in words: a preset with what it holds, a host with what is special about it."""
    if entry.to in presets():
        return f"{entry.to} ({', '.join(_allowed_text(one) for one in entry.allowed())})"
    (one,) = entry.allowed()
    special = [", ".join(one.methods)] if entry.methods != Destination(to=entry.to).methods else []
    special += [f"also at {', '.join(entry.addresses)}"] if entry.addresses else []
    return f"{entry.to} ({'; '.join(special)})" if special else entry.to


def _allowed_text(one: Allowed) -> str:
    host = f"*.{one.host}" if one.below else one.host
    return destination(one.methods[0] if one.methods else TUNNEL, host, one.port)


def _network(key: str, before: str, after: str) -> list[Line]:
    return [] if before == after else [Line(key, _NETWORKS[before], _NETWORKS[after], wide=after == "host")]


_NETWORKS = {"private": "private", "host": "host: every address this machine reaches, its own services too"}
RULES: Mapping[str, Rule] = {
    "credential": _wide,
    "recipients": _recipients,
    "pair_rate_per_hour": _rate,
    "tools": _tools,
    "mcp_servers": _servers,
    "env": _names,
    "skills": _skills,
    "plugins": _tools,
    "egress": _egress,
    "projects": _projects,
    "available_models": _models,
    "network": _network,
    **dict.fromkeys(("program", "model", "effort", "description", "turns"), _plain),
    **dict.fromkeys(("warm_idle_s", "warm_turns", "warm_memory_mib", "background_s", "turn_silence_s"), _plain),
    **dict.fromkeys(("context_window", "compact_at_percent"), _plain),
}
