"""`hive-agent replay`: run a recorded turn again, with the present code and no program, and say what would differ.

The turn goes through the runner as any other. Only its executable is another: it prints the recorded lines and calls no
model. Time is virtual, so that a silence of half an hour is over at once.

On stdin comes a record as JSON, as the host keeps it:
    state, reason, error, usage   how the turn ended
    given                 the lease, with its message's body and its prompt
    asked_sha256          of what the program was asked; null where nobody knows
    before                the last result of the session before the turn, or null
    lines                 what the stream had
    missing               sentences about what is not there any more
On stdout goes {"same", "differences": [{"what", "recorded", "now"}], "missing", "prompt"}.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

import trio
import trio.testing

from hive_agent.claude import Claude
from hive_agent.claude_usage import number
from hive_agent.own_command import own_command
from hive_agent.program import Program
from hive_agent.runner import Ending, Seat
from hive_core.protocol.harness import REASONS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hive_core.protocol.harness import Check, Lease

QUIET_S = 1.0  # of real time in which nothing happens, before virtual time goes on
SHOWN = 300  # characters of what differs
LINES_SHOWN = 10
CUT = 2000  # characters from which on a line that was no JSON may have been longer
STUCK = "the turn was stuck"
_EXIT = re.compile(r"the program (?:ended with exit code (\d+)|was ended by signal (\d+)) before its result")
# The harness's own lines about what was between turns, or on the way to the host.
_BESIDE_THE_TURN = ("lines_dropped", "unasked_turn")


class Replay(Claude):
    """The runner of a recorded turn. It counts on from the result `before`, where the turn's process did."""

    def __init__(self, seat: Seat, tape: Path, before: dict[str, Any] | None) -> None:
        super().__init__(seat)
        self._tape = tape
        self._before = before

    def executable(self) -> list[str]:
        return own_command("tape", str(self._tape))

    async def _ready(self, executable: list[str], lease: Lease | Check, session: str | None) -> Program:
        program = await super()._ready(executable, lease, session)
        if self._before is not None:
            self._last, self._before = self._before, None
        return program


class Recorded:
    """A record, read into what the program did.

    tape     what the program printed, and how it ended by itself: see tape.py
    missing  why a replay may differ though the code would not
    """

    def __init__(self, record: dict[str, Any]) -> None:
        self.given: dict[str, Any] = record["given"]
        self.state, self.error, self.usage = record["state"], record["error"], record["usage"]
        self.reason: str | None = record["reason"]
        self.asked, self.lines = record["asked_sha256"], [str(line) for line in record["lines"]]
        self.missing = list(record["missing"])
        self._printed: list[tuple[int, str]] = []
        self._results: list[dict[str, Any]] = []
        self._last_stderr = ""
        for line in self.lines:
            self._read(line)
        self.tape = {"lines": self._printed, "code": self._exit_code()}
        self.before: dict[str, Any] | None = None if self._counts_from_0() else record["before"]

    def _counts_from_0(self) -> bool:
        """Whether its process had no turn before this one, so that what it counted over all is this one's."""
        costs = [number(result.get("total_cost_usd")) for result in self._results]
        known = [cost for cost in costs if cost is not None]
        return not known or (self.usage or {}).get("cost_usd") in (known[-1], round(sum(known), 10))

    def _read(self, line: str) -> None:
        event = _event(line)
        if event.get("type") != "hive":
            self._results += [event] if event.get("type") == "result" else []
            self._printed.append((1, line))
            return
        text = str(event.get("text", ""))
        match event.get("subtype"):
            case "stderr":
                self._last_stderr = text.strip() or self._last_stderr
                self._printed.append((2, text))
            case "malformed":
                self._printed.append((1, text))
                if len(text) >= CUT:
                    self.missing.append("the end of a line that was no JSON")
            case "project":
                self.given = {**self.given, "notes": [*self.given.get("notes", []), text]}
            case "session_lost":
                self._printed.append((0, ""))
            case "line_too_long":
                self.missing.append("a line that was too long to be kept")
            case "lines_dropped":
                self.missing.append(f"{event.get('count')} lines, which were too many while the host was away")

    def _exit_code(self) -> int | None:
        """How the program ended by itself, as far as the turn's error tells; None: it waited for its stdin's end."""
        if self.state != "failed" or (self._results and self._results[-1].get("is_error")):
            return None
        if found := _EXIT.search(self.error or ""):
            return int(found[1]) if found[1] else -int(found[2])
        return 1 if self._last_stderr and (self.error or "").startswith(self._last_stderr[:SHOWN]) else None

    @property
    def passed_on(self) -> list[str]:
        return [line for line in self.lines if _event(line).get("subtype") not in _BESIDE_THE_TURN]


async def replay(record: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run a record's turn again, in an empty folder; what was found. To be run in virtual time."""
    recorded, tape = Recorded(record), folder / "tape"
    tape.write_text(json.dumps(recorded.tape))
    where = str(folder)
    seat = Seat("replay", where, where, where, where, "/usr/bin:/bin", None, True, 9)
    runner, lines = Replay(seat, tape, recorded.before), list[str]()
    heard = _interrupter(runner, recorded) if recorded.state == "cancelled" else None

    def pass_on(line: str) -> None:
        lines.append(line)
        if heard is not None:
            heard()

    if heard is not None and not recorded.lines:
        runner.interrupt()
    try:
        ending = await runner.take_turn(cast("Lease", recorded.given), pass_on)
    finally:
        await runner.close()
    differences = [*_of_prompt(recorded, runner.asked), *_of_ending(recorded, ending), *_of_lines(recorded, lines)]
    told = Path(f"{tape}.told").read_text().partition("\n")[0]  # noqa: ASYNC240
    return {
        "same": not differences,
        "differences": differences,
        "missing": recorded.missing,
        "prompt": _event(told).get("message", {}).get("content", ""),
    }


def _interrupter(runner: Replay, recorded: Recorded) -> Callable[[], None]:
    """To be called with each line: takes the turn away where the host did, behind all that was recorded."""
    left = len(recorded.passed_on)

    def heard() -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            runner.interrupt()

    return heard


def _of_prompt(recorded: Recorded, asked: str | None) -> list[dict[str, Any]]:
    if recorded.asked in (None, asked):
        return []
    return [{"what": "prompt", "recorded": f"sha256 {recorded.asked}", "now": f"sha256 {asked}"}]


def _of_ending(recorded: Recorded, ending: Ending) -> list[dict[str, Any]]:
    if recorded.state == "lost":
        return []  # its harness died: there is no ending to compare
    now = {
        "outcome": ending.outcome,
        "reason": ending.reason,
        "error": ending.error,
        "usage": json.loads(json.dumps(ending.usage)),
    }
    was = {"outcome": recorded.state, "reason": recorded.reason, "error": recorded.error, "usage": recorded.usage}
    if recorded.state == "cancelled":
        # The host's own words about who did it, and it did not wait for what the harness would say.
        was.update({key: now[key] for key in ("reason", "error", "usage")})
    elif recorded.reason is not None and recorded.reason not in REASONS:
        was["reason"] = now["reason"]  # the host's own word for why it cut the turn short
    elif (recorded.error or "").startswith(STUCK) and (ending.error or "").startswith(STUCK):
        was["error"] = now["error"]  # for how long, and with how much cpu, is not repeated
    return [{"what": key, "recorded": _short(was[key]), "now": _short(now[key])} for key in was if was[key] != now[key]]


def _of_lines(recorded: Recorded, lines: list[str]) -> list[dict[str, Any]]:
    """stdout and stderr each by itself: which of two came first is chance."""
    differences = []
    for of_stderr in (False, True):
        was = [line for line in recorded.passed_on if _is_stderr(line) == of_stderr and not _is_stuck(line)]
        now = [line for line in lines if _is_stderr(line) == of_stderr and not _is_stuck(line)]
        for place, (old, new) in enumerate(zip_longest(was, now), 1):
            if old != new:
                what = f"line {place}{' of stderr' if of_stderr else ''}"
                differences.append({"what": what, "recorded": _short(old), "now": _short(new)})
    return differences[:LINES_SHOWN]


def _is_stderr(line: str) -> bool:
    event = _event(line)
    return (event.get("type"), event.get("subtype")) == ("hive", "stderr")


def _is_stuck(line: str) -> bool:
    event = _event(line)
    return (event.get("type"), event.get("subtype")) == ("hive", "stuck")


def _short(value: object) -> str | None:
    text = value if isinstance(value, str) or value is None else json.dumps(value, ensure_ascii=False)
    return text if text is None or len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def _event(line: str) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return event if isinstance(event, dict) else {}


def main() -> int:
    record = json.load(sys.stdin)
    with tempfile.TemporaryDirectory(prefix="hive-replay-") as folder:
        found = trio.run(replay, record, Path(folder), clock=trio.testing.MockClock(autojump_threshold=QUIET_S))
    json.dump(found, sys.stdout)
    return 0 if found["same"] else 1
