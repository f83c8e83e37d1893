"""One more entry in `egress` of an agent.toml, with its comments and everything else as they were."""

from __future__ import annotations

from hive_core.egress_rules import Rule
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import shown
from hive_core.settings import AgentSettings, parse_agent_toml

WAY_OUT = "let hm1nd propose it"


def add_to_egress(text: str, entry: Rule) -> str:
    """agent.toml with the entry behind the others. Raises Refusal when it is there already, or cannot be written so."""
    before = parse_agent_toml(text.encode())
    if entry in before.egress:
        raise Refusal("conflict", f"cannot add {shown(entry.to)} to egress of agent.toml: it is there already")
    try:
        edited = _edited(text, entry)
        after = parse_agent_toml(edited.encode())
    except (_toml_error(), Refusal) as exc:
        raise Refusal("refused", f"cannot add {shown(entry.to)} to agent.toml: {exc}; {WAY_OUT}") from None
    wanted = before.model_dump() | {"egress": [one.model_dump() for one in [*before.egress, entry]]}
    if after != AgentSettings.model_validate(wanted):
        raise Refusal("refused", f"cannot add {shown(entry.to)} to agent.toml as it is written; {WAY_OUT}")
    return edited


def _edited(text: str, entry: Rule) -> str:
    import tomlkit  # when it is needed: it takes a tenth of a second
    from tomlkit.items import Array

    document = tomlkit.parse(text)
    written = entry.written()
    if isinstance(written, dict):
        table = tomlkit.inline_table()
        table.update(written)
        written = table
    if "egress" not in document:
        document["egress"] = tomlkit.array()
    entries = document["egress"]
    if isinstance(entries, Array):
        entries.append(written)
    else:
        entries.append(tomlkit.item(entry.model_dump(exclude_defaults=True)))  # [[egress]] tables
    return tomlkit.dumps(document)


def _toml_error() -> type[Exception]:
    from tomlkit.exceptions import TOMLKitError

    return TOMLKitError
