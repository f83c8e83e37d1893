"""Approvals: shown whole, approved or denied."""

from __future__ import annotations

import sys

from hive_core.cli.client import Client
from hive_core.cli.output import confirmed, emit
from hive_core.protocol.refusal import Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from typing import Any


def pending(arguments: Namespace) -> None:
    from hive_core.cli.show import approval_line

    result = Client().call("pending")
    emit(arguments, result, "\n".join(map(approval_line, result["approvals"])) or "nothing waits for you")


def show(arguments: Namespace) -> None:
    from hive_core.cli.show_approvals import approval

    result = Client().call("show", approval=arguments.approval)
    emit(arguments, result, approval(result))


def diff(arguments: Namespace) -> None:
    from hive_core.cli.show import safe

    result = Client().call("diff", approval=arguments.approval, against=arguments.against)
    emit(arguments, result, safe(result["diff"]).rstrip("\n") or f"the same as {result['base'][:12]}")


def approve(arguments: Namespace) -> int:
    """Approve what was shown: here, to whoever says yes to it, or elsewhere, as the digests that are given say."""
    numbers, digests = arguments.approval, arguments.digest or []
    if digests and len(digests) != len(numbers):
        raise Refusal("usage", "cannot approve by these digests: give --digest once for each approval, in their order")
    client = Client()
    rows = [client.call("show", approval=number) for number in numbers]
    waiting = [] if digests else [row["id"] for row in rows if row["state"] == "pending"]
    if waiting and (arguments.json or not sys.stdin.isatty()):
        which = " ".join(map(str, waiting))
        why = "there is no terminal to show it on" if not arguments.json else "--json shows it to nobody"
        raise Refusal(
            "usage",
            f"cannot approve {which} unseen: {why}; give --digest, the hash that `hive show {waiting[0]}` tells",
        )
    if not arguments.json:
        show_short(rows)
    if waiting and not confirmed("approve this?" if len(rows) == 1 else f"approve these {len(rows)}?"):
        raise Refusal("refused", f"cannot approve {' '.join(map(str, numbers))}: you did not say yes")
    shown = digests or [row["digest"] for row in rows]
    return click(arguments, [(row["id"], digest) for row, digest in zip(rows, shown, strict=True)])


def click(arguments: Namespace, chosen: list[tuple[int, str]]) -> int:
    """Approve these, each as it was shown, and tell each step until all have come to their end."""
    ends = []
    for told in Client().stream("approve_all", approvals=chosen):
        if told.pop("end", False):
            ends.append(told)
        elif not arguments.json:
            _show_step(told)
    if len(ends) == 1 and "error" in ends[0]:
        raise Refusal.from_wire(ends[0]["error"])
    emit(arguments, ends[0] if len(ends) == 1 else {"approvals": ends}, "\n".join(map(_end, ends)))
    return 0 if all(end.get("state") == "done" for end in ends) else 1


def show_short(rows: list[dict[str, Any]]) -> None:
    """What is approved, in short: `hive show` has it whole."""
    from hive_core.cli.show import approval_line
    from hive_core.cli.show_approvals import effect

    for row in rows:
        print("\n".join([approval_line(row), *effect(row)]), flush=True)


def _show_step(row: dict[str, Any]) -> None:
    from hive_core.cli.show import clock, safe

    print(f"{clock(row['step_at_ms'])} approval {row['id']} of {row['agent']}: {safe(row['step'])}", flush=True)


def _end(row: dict[str, Any]) -> str:
    from hive_core.cli.show import one_line

    if "error" in row:
        why = row["error"]["message"].removeprefix(f"cannot approve {row['id']}: ")
        return f"approval {row['id']} is not approved: {one_line(why)}"
    proof = f" ({one_line(row['proof'])})" if row["proof"] else ""
    note = f": {one_line(row['note'])}" if row["note"] else ""
    return f"approval {row['id']} of {row['agent']}: {row['state']}{proof}{note}"


def deny(arguments: Namespace) -> None:
    result = Client().call("deny", approval=arguments.approval, reason=arguments.reason)
    emit(arguments, result, f"approval {result['id']} of {result['agent']}: {result['state']}")
