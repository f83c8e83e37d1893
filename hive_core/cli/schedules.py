"""Schedules: messages that are sent by a clock."""

from __future__ import annotations

from hive_core.cli.client import Client
from hive_core.cli.output import emit
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace

ID_DIGITS = 18  # Python converts no number of some thousand digits, and says so in words for programmers


def schedule(arguments: Namespace) -> None:
    from hive_core.cli import show

    what, words = arguments.what, arguments.words
    needs = {"add": 2, "list": 0}.get(what, 1)
    if len(words) != needs:
        form = {"add": "AGENT BODY with --cron or --every", "list": "nothing"}.get(what, "the number of a schedule")
        raise Refusal("usage", f"cannot run `hive schedule {what}`: it takes {form}")
    if what == "add":
        given = {"cron": arguments.cron, "zone": arguments.tz, "every_s": arguments.every}
        result = Client().call("schedule", agent=words[0], body=words[1], **given)
        emit(arguments, result, f"schedule {result['schedule']}: first at {show.day(result['next_at_ms'])}")
        return
    if what == "list":
        result = Client().call("schedules")
        emit(arguments, result, "\n".join(map(show.schedule, result["schedules"])) or "there is no schedule")
        return
    if not words[0].isdecimal() or len(words[0]) > ID_DIGITS:
        raise Refusal(
            "usage", f"cannot use {shown(words[0])} as the number of a schedule: `hive schedule list` shows them"
        )
    verb = {"rm": "remove"}.get(what, what)
    result = Client().call(f"schedule_{verb}", schedule=int(words[0]))
    text = {
        "pause": "is paused",
        "resume": f"goes on, next at {show.day(result.get('next_at_ms') or 0)}",
        "run": f"was sent as message {result.get('message')}",
        "rm": "is gone",
    }[what]
    emit(arguments, result, f"schedule {result['schedule']} {text}")
