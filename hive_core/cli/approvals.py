"""Approvals: shown whole, approved or denied."""

from __future__ import annotations

from hive_core.cli.client import Client
from hive_core.cli.output import emit
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
    from hive_core.protocol.visible import named

    result = Client().call("diff", approval=arguments.approval, against=arguments.against)
    emit(arguments, result, named(result["diff"]).rstrip("\n") or f"the same as {result['base'][:12]}")


def approve(arguments: Namespace) -> int:
    """Approve what is shown here, and tell each step until all have come to their end."""
    numbers = arguments.approval
    if arguments.digest and len(numbers) > 1:
        raise Refusal("usage", "cannot approve several by one digest: leave --digest out, or give one approval")
    client = Client()
    rows = [client.call("show", approval=number) for number in numbers]
    if not arguments.json:
        _show(rows)
    pairs = [[row["id"], arguments.digest or row["digest"]] for row in rows]
    ends = []
    for told in client.stream("approve_all", approvals=pairs):
        if told.pop("end", False):
            ends.append(told)
        elif not arguments.json:
            _show_step(told)
    if len(ends) == 1 and "error" in ends[0]:
        raise Refusal.from_wire(ends[0]["error"])
    emit(arguments, ends[0] if len(ends) == 1 else {"approvals": ends}, "\n".join(map(_end, ends)))
    return 0 if all(end.get("state") == "done" for end in ends) else 1


def _show(rows: list[dict[str, Any]]) -> None:
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
