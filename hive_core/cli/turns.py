"""Turns: listed, shown whole, and replayed with the code of now."""

from __future__ import annotations

import json
import sys

from hive_core.cli.client import Client
from hive_core.cli.output import emit
from hive_core.protocol.refusal import Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from typing import Any

REPLAY_WITHIN_S = 120.0


def turns(arguments: Namespace) -> None:
    from hive_core.cli import show_turns

    result = Client().call("turns", agent=arguments.agent, limit=arguments.limit)
    emit(arguments, result, "\n".join(map(show_turns.row, result["turns"])) or "no turns")


def turn(arguments: Namespace) -> int:
    return {"show": _show, "replay": _replay}[arguments.what](arguments)


def _show(arguments: Namespace) -> int:
    from hive_core.cli import show_turns

    record = _record(arguments.turn)
    emit(arguments, record, show_turns.whole(record))
    return 0


def _record(turn_id: int) -> dict[str, Any]:
    client = Client()
    record: dict[str, Any] = client.call("turn", turn=turn_id)
    record["stream"], after = [], -1
    while after is not None:
        some = client.call("turn_lines", turn=turn_id, after=after)
        record["stream"] += some["lines"]
        after = some["next_after"]
    return record


def _replay(arguments: Namespace) -> int:
    from hive_core.cli import show_turns

    record = _record(arguments.turn)
    cannot = f"cannot replay turn {arguments.turn}"
    if record["state"] == "running":
        raise Refusal("conflict", f"{cannot}: it runs; wait for its end, or `hive cancel {record['agent']}`")
    if record["given"] is None or "body" not in (record["given"]["message"] or {"body": ""}):
        raise Refusal("not_found", f"{cannot}: {'; '.join(record['missing'])}, is not there")
    found = {"turn": arguments.turn, **_run({**record, "lines": [line["line"] for line in record["stream"]]})}
    emit(arguments, found, show_turns.replayed(found))
    return 0 if found["same"] else 1


def _run(record: dict[str, Any]) -> dict[str, Any]:
    """What the harness's own code says of a record. It runs by itself: nothing of this process is in its way."""
    import subprocess

    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "hive_agent.cli", "replay"],
            input=json.dumps(record),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=REPLAY_WITHIN_S,
        )
        found: dict[str, Any] = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        raise Refusal("failed", f"cannot replay: it took more than {REPLAY_WITHIN_S:.0f} s") from None
    except ValueError:
        words = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise Refusal("failed", f"cannot replay: {words[0]}") from None
    return found
