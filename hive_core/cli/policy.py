"""The policy: which changes pass without a click, and what its rules would have let pass."""

from __future__ import annotations

from hive_core.cli.client import Client
from hive_core.cli.output import emit
from hive_core.protocol.refusal import Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterator
    from typing import Any

FILE_LIMIT = 256 * 1024
NONE = "no rules: everything waits for you"


def policy(arguments: Namespace) -> None:
    given = {"text": arguments.rule, "name": arguments.name, "days": arguments.days}
    if arguments.what == "list":
        if any(value is not None for value in given.values()):
            raise Refusal("usage", "cannot list by --rule, --name or --days: say `hive policy rehearse`")
        result = Client().call("policy")
        emit(arguments, result, "\n".join(line for one in result["rules"] for line in _rule(one)) or NONE)
        return
    if arguments.rule is not None:
        given["text"] = _text(arguments.rule)
    result = Client().call("policy_rehearse", **{key: value for key, value in given.items() if value is not None})
    emit(arguments, result, "\n".join(_rehearsal(result)))


def _text(path: str) -> str:
    from hive_core.protocol.paths import explain

    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(FILE_LIMIT + 1)
        if len(text) <= FILE_LIMIT:
            return text
        why = f"it has more than {FILE_LIMIT:,} characters, and rules need far fewer"
    except OSError as exc:
        why = explain(exc, "--rule")
    except UnicodeDecodeError as exc:
        why = f"byte {exc.start} is not UTF-8; save it as UTF-8"
    raise Refusal("usage", f"cannot read {path}: {why}")


def _rule(one: dict[str, Any]) -> Iterator[str]:
    from hive_core.cli.show import paint, safe

    bounds = "".join(f", {key} up to {value:,}" for key, value in one["at_most"].items() if value is not None)
    yield (
        f"{paint(safe(one['name']), 'bold')}: {one['kind']} of {_names(one['agents'])}, "
        f"asked for by {_names(one['requested_by'])}"
    )
    yield f"  only {safe(', '.join(one['only']))}{bounds}"
    yield f"  {one['passed']} of {one['per_day']} passed in the last 24 hours"
    for trouble in one["troubles"]:
        yield f"  {paint('!', 'amber')} {safe(trouble)}"


def _names(names: list[str]) -> str:
    return "everybody" if "*" in names else ", ".join(names)


def _rehearsal(result: dict[str, Any]) -> Iterator[str]:
    from hive_core.cli.show import paint
    from hive_core.protocol.visible import counted

    if not result["rules"]:
        yield NONE
        return
    total = counted(result["looked_at"], "recorded request")
    yield f"{result['passes']:,} of {total} would have passed without a click"
    against = [f"you denied {result['denied']:,}"] if result["denied"] else []
    against += [f"{result['failed']:,} failed"] if result["failed"] else []
    if against:
        yield paint(f"▲ of those {', and '.join(against)}", "red")
    if result["over_per_day"]:
        yield f"{result['over_per_day']:,} would have waited because of per_day"
    if result["not_known"]:
        yield f"{result['not_known']:,} not known: recorded before effects were"
    for rule in result["rules"]:
        yield from _rehearsed(rule)
    for row in result["approvals"]:
        yield from _passed(row)
    if (more := result["passes"] - len(result["approvals"])) > 0:
        yield f"and {more:,} more"


def _rehearsed(rule: dict[str, Any]) -> Iterator[str]:
    """How many would have passed by one rule, and for which reasons it lets the others wait."""
    from hive_core.cli.show import paint, safe

    yield f"{paint(safe(rule['name']), 'bold')}: {rule['passes']:,} would have passed"
    for why, count in rule["waits"].items():
        yield f"  {count:,} wait: {safe(why)}"
    for trouble in rule["troubles"]:
        yield f"  {paint('!', 'amber')} {safe(trouble)}"


def _passed(row: dict[str, Any]) -> Iterator[str]:
    from hive_core.cli.show import approval_line, day, one_line, paint, safe
    from hive_core.protocol.effect import effect_line

    mark = paint(f"▲ {row['state']}", "red") if row["state"] in ("denied", "failed") else row["state"]
    did = f"; it passed by {safe(row['passed_by'])}" if row["passed_by"] else ""
    yield f"{mark}  {approval_line(row)}"
    yield f"  {day(row['requested_at_ms'])}, by rule {safe(row['rule'])}{did}"
    if row["note"]:
        yield f"  note: {one_line(row['note'])}"
    for line in row["effect"]["lines"]:
        text = safe(effect_line(line)).replace("\n", " ")
        yield f"    {text}"
