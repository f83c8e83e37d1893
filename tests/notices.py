"""Notices of the hive as a program reads them, and their table as docs/messages.md has it."""

from __future__ import annotations

import json
from typing import Any

from hive_core.services.notices import KINDS


def read_notice(body: str) -> tuple[str, str, dict[str, Any]]:
    """(kind, sentence, fields) of a notice: texts in quotation marks are decoded, numbers are numbers."""
    first, *lines = body.split("\n")
    kind, _, sentence = first.partition(": ")
    fields: dict[str, Any] = {}
    for line in lines:
        name, _, value = line.partition(": ")
        is_json = value.startswith('"') or value.lstrip("-").isdigit()
        fields[name] = json.loads(value) if is_json else value
    return kind, sentence, fields


def table() -> str:
    """The table of kinds in docs/messages.md; `python -m tests.notices` prints it."""
    rows = [f"| `{name}` | {kind.who} | {kind.when} | {', '.join(kind.fields)} |" for name, kind in KINDS.items()]
    return "\n".join(["| kind | told to | when | fields |", "|---|---|---|---|", *rows])


if __name__ == "__main__":
    print(table())
