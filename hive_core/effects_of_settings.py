"""What a change of an agent's settings does: a rule for each key of agent.toml."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from typing import Any

from hive_core.effects import Line, changed, listed, some
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
        if before is None and key != "mcp_servers" and (differs or key in ALWAYS):
            differs = [Line(key, None, _say(key, value), any(line.wide for line in differs))]
        lines += differs
    return lines


def _say(key: str, value: Any) -> str:
    if value is None:
        return _NONE[key]
    if isinstance(value, list | dict):
        return some(value) if value else _EMPTY.get(key, "none")
    return str(value) if value != "" else "empty"


_NONE = {
    "effort": "the program's own",
    "context_window": "as the program says",
    "recipients": "everybody",
    "pair_rate_per_hour": "the hive's",
}
_EMPTY = {"available_models": "any", "recipients": "nobody"}


def _plain(key: str, before: Any, after: Any) -> list[Line]:
    return changed(key, _say(key, before), _say(key, after))


def _wide(key: str, before: Any, after: Any) -> list[Line]:
    return changed(key, _say(key, before), _say(key, after), wide=True)


def _tools(key: str, before: list[str], after: list[str]) -> list[Line]:
    return listed(key, before, after, widens=True)


def _models(key: str, before: list[str], after: list[str]) -> list[Line]:
    if before and after:
        return listed(key, before, after, widens=True)
    return changed(key, _say(key, before), _say(key, after), wide=not after)


def _recipients(key: str, before: list[str] | None, after: list[str] | None) -> list[Line]:
    if before is not None and after is not None:
        return listed(key, before, after, widens=True)
    return changed(key, _say(key, before), _say(key, after), wide=after is None)


def _rate(key: str, before: int | None, after: int | None) -> list[Line]:
    # The hive's own can be higher or lower than either.
    wide = before is None or after is None or after > before
    return changed(key, _say(key, before), _say(key, after), wide)


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
            is_now = "the same with another value in env"
        lines.append(Line(key, was, is_now, wide=new is not None))
    return lines


def _server(name: str, server: McpServer) -> str:
    env = f" (env {some(server.env)})" if server.env else ""
    return f"{name}: {shlex.join([server.command, *server.args])}{env}"


RULES: Mapping[str, Rule] = {
    "credential": _wide,
    "recipients": _recipients,
    "pair_rate_per_hour": _rate,
    "tools": _tools,
    "mcp_servers": _servers,
    "env": _names,
    "available_models": _models,
    **dict.fromkeys(("program", "model", "effort", "description", "turns"), _plain),
    **dict.fromkeys(("warm_idle_s", "warm_turns", "warm_memory_mib", "background_s", "turn_silence_s"), _plain),
    **dict.fromkeys(("context_window", "compact_at_percent"), _plain),
}
