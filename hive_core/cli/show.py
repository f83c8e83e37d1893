"""How results look in a terminal. What agents wrote is hostile: control characters are shown, not sent."""

from __future__ import annotations

import sys
import time

from hive_core.protocol.visible import counted, mib, named_apart

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

DETAIL_SHOWN = 60  # characters of it in a table
_COLOURS = {"red": "31", "green": "32", "amber": "33", "mauve": "35", "dim": "2", "bold": "1"}
_STATE_COLOURS = {
    "idle": "green",
    "thinking": "mauve",
    "tool": "mauve",
    "crashed": "red",
    "quarantined": "red",
    "down": "dim",
    "frozen": "red",
    "compacting": "mauve",
    "rate_limited": "amber",
    "overloaded": "amber",
    "stuck": "red",
    "over_budget": "red",
    "needs_login": "red",
    "paused": "dim",
}


def paint(text: str, colour: str) -> str:
    return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m" if sys.stdout.isatty() else text


def safe(text: str) -> str:
    """Text that shows what is there, where it is: see protocol.visible. Newlines and tabs stay."""
    return named_apart(text)


def one_line(text: str) -> str:
    """The same as one line: what follows in a list is not theirs who wrote it."""
    return " ".join(safe(text).split())


def ago(at_ms: int) -> str:
    seconds = max(0, int(time.time() - at_ms / 1000))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def clock(at_ms: int) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at_ms / 1000))


def table(rows: list[list[str]], header: list[str]) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [paint("  ".join(cell.ljust(width) for cell, width in zip(header, widths, strict=True)).rstrip(), "dim")]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def agents(result: dict[str, Any]) -> str:
    rows = [
        [
            agent["name"],
            _state(agent),
            ago(agent["since_ms"]),
            _waiting(agent),
            _disk(agent),
            f"{agent['program']} · {agent['model']}{' (chosen)' if agent['chosen_model'] else ''}",
            _sandbox(agent),
            agent["page"],
        ]
        for agent in result["agents"]
    ]
    text = table(rows, ["agent", "state", "since", "queued", "disk", "program", "sandbox", "page"])
    for agent in result["agents"]:
        if agent["status"]:
            text += f"\n{paint(agent['name'], 'bold')}: {safe(agent['status'])}"
    for one in result.get("configured", ()):
        text += f"\n{paint(one['name'], 'bold')} is configured since {ago(one['at_ms'])}, and no agent yet: "
        text += f"the first commit of its repository that is approved creates it (`hive apply {one['name']} HEAD`)"
    shared = [f"/shared takes {mib(size)}"] if (size := result.get("shared_bytes") or 0) >= 2**20 else []
    return "\n".join([*_alarms(result), text, *shared, *_whole_details(result["agents"])])


def _sandbox(agent: dict[str, Any]) -> str:
    around = "no sandbox" if agent["sandbox"] == "none" else str(agent["sandbox"])
    return around + (", host network" if agent.get("network") == "host" else "")


def _alarms(result: dict[str, Any]) -> list[str]:
    """What is wrong with the hive as a whole."""
    alarms = []
    if result["frozen_since_ms"] is not None:
        since = ago(result["frozen_since_ms"])
        alarms.append(paint(f"! the whole swarm is stopped since {since}: `hive thaw` lets it go on", "red"))
    if result["unsafe"]:
        alarms.append(paint("! agents run without a sandbox (--unsafe-no-sandbox)", "red"))
    return alarms


def _whole_details(agents: list[dict[str, Any]]) -> list[str]:
    """What was too long for the table: why agents do what they do, once for all that have the same reason."""
    names: dict[str, list[str]] = {}
    for agent in agents:
        if len(detail := safe(agent["detail"])) > DETAIL_SHOWN:
            names.setdefault(detail, []).append(agent["name"])
    return [f"{paint(', '.join(who), 'bold')}: {detail}" for detail, who in names.items()]


def _state(agent: dict[str, Any]) -> str:
    whole = safe(agent["detail"])
    detail = f" ({whole if len(whole) <= DETAIL_SHOWN else whole[: DETAIL_SHOWN - 1] + '…'})" if whole else ""
    rest = f", rests until {clock(agent['rests_until_ms'])}" if agent["rests_until_ms"] else ""
    until = f", until {clock(agent['until_ms'])}" if agent["until_ms"] else ""
    outdated = ", outdated" if agent["outdated"] else ""
    return f"{agent['state']}{detail}{until}{rest}{_context(agent)}{outdated}"


def _context(agent: dict[str, Any]) -> str:
    """How full its session is, and what is done about it."""
    tokens, window = agent["context_tokens"], agent["context_window"]
    full = f", context {round(100 * tokens / window)} %" if tokens and window else ""
    return full + (", compacts next" if agent["errand"] else "")


def _waiting(agent: dict[str, Any]) -> str:
    """How many messages wait for an agent, and what is wrong with its mail."""
    parts = [str(agent["queued"])]
    parts += [f"{agent[state]} {state}" for state in ("held", "dead") if agent[state]]
    if agent["inbox_full"] or agent["refused"]:
        parts.append(f"{'inbox full, ' if agent['inbox_full'] else ''}{agent['refused']} refused")
    return " · ".join(parts)


def _disk(agent: dict[str, Any]) -> str:
    """What its directories take, and of how much where that is too much."""
    size = agent["disk_bytes"]
    if size is None:
        return "–"
    over = f" of {mib(agent['disk_quota_bytes'])}!" if size > agent["disk_quota_bytes"] else ""
    return f"{mib(size)}{over}"


def aside(state: str, row: dict[str, Any]) -> str:
    """A dead or a held message to one recipient: why, and what it says."""
    from hive_core.protocol.held import WHY_HELD

    who = paint(f"{row['sender']} → {row['recipient']}", "bold")
    if state == "held":
        why = f"held {ago(row['sent_at_ms'])} ago: {WHY_HELD.get(row['held'], row['held'])}"
    else:
        failed = f" after {counted(row['failures'], 'failed turn')}" if row["failures"] else ""
        note = f": {safe(row['note'])}" if row["note"] else ""
        why = f"dead {ago(row['settled_at_ms'] or row['sent_at_ms'])} ago{failed}{note}"
    first = safe(row["body"]).strip().partition("\n")[0]
    said = first if len(first) <= 100 else f"{first[:99]}…"
    return f"{paint(str(row['id']), 'red' if state == 'dead' else 'amber')} {who} {' '.join(why.split())}\n    {said}"


def message(row: dict[str, Any]) -> str:
    to = f" → {row['recipient']}" if "recipient" in row else ""
    reply = f" (answers {row['in_reply_to']})" if row["in_reply_to"] else ""
    mark = paint("new ", "amber") if row.get("unread") else ""
    head = f"{mark}{paint(str(row['id']), 'dim')} {clock(row['sent_at_ms'])} {paint(row['sender'] + to, 'bold')}{reply}"
    return head + "\n" + "\n".join(f"    {line}" for line in safe(row["body"]).splitlines())


def file(row: dict[str, Any]) -> str:
    """A file that came with a message."""
    return f"{safe(row['name'])} ({row['type']}, {row['bytes']:,} bytes)"


def found(row: dict[str, Any]) -> str:
    """One message that a search found."""
    to = ", ".join(row["recipients"])
    where = "" if row["thread"] == row["id"] else f" (thread {row['thread']})"
    head = f"{paint(str(row['id']), 'dim')} {day(row['sent_at_ms'])} {paint(row['sender'] + ' → ' + to, 'bold')}{where}"
    return f"{head}\n    {safe(row['snippet'])}"


def day(at_ms: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at_ms / 1000))


def thread(result: dict[str, Any]) -> str:
    blocks = []
    for row in result["messages"]:
        to = ", ".join(f"{one['recipient']} ({one['state']})" for one in row["recipients"])
        reply = f" (answers {row['in_reply_to']})" if row["in_reply_to"] else ""
        head = f"{paint(str(row['id']), 'dim')} {day(row['sent_at_ms'])} {paint(row['sender'], 'bold')} → {to}{reply}"
        lines = [*safe(row["body"]).splitlines(), *(f"with it: {file(one)}" for one in row["files"])]
        blocks.append("\n".join([head, *(f"    {line}" for line in lines)]))
    if result["next_after"]:
        blocks.append(f"it goes on: `hive thread {result['thread']} --after {result['next_after']}`")
    return "\n".join(blocks)


_MOMENT_COLOURS = {"held": "amber", "dead": "red", "failed": "red", "lost": "red", "acked": "green", "dropped": "dim"}


def life(result: dict[str, Any]) -> str:
    """The life of a message, each recipient's by itself."""
    sent = result["sent"]
    lines = [f"{day(sent['at_ms'])}  {paint('message ' + str(result['message']['id']), 'bold')}: {safe(sent['text'])}"]
    for delivery in result["deliveries"]:
        lines.append(f"{paint('→ ' + delivery['recipient'], 'bold')}: {delivery['state']}")
        for name, why in delivery["missing"].items():
            lines.append("  " + paint(f"{safe(name)} did not come with it: {safe(why)}", "amber"))
        for moment in delivery["life"]:
            colour = _MOMENT_COLOURS.get(moment["what"])
            text = safe(moment["text"]).replace("\n", " ")
            lines.append(f"  {day(moment['at_ms'])}  {paint(text, colour) if colour else text}")
    return "\n".join(lines)


def question(row: dict[str, Any]) -> str:
    """A question to the operator: its words, its options by number, and until when it waits."""
    head = (
        f"{paint('? ' + str(row['id']), 'amber')} {paint(row['asker'], 'bold')} asks, until {day(row['expires_at_ms'])}"
    )
    head = paint("held ", "amber") + head if row.get("held") else head
    lines = [head, *(f"    {line}" for line in safe(row["text"]).splitlines())]
    lines += [f"    {number}. {safe(option)}" for number, option in enumerate(row["options"], 1)]
    if row.get("held"):
        return "\n".join([*lines, paint(f"    hive release {row['message_id']}", "dim")])
    choice = f"--choice N{' (again for more)' if row['multi'] else ''}"
    how = {(True, False): choice, (True, True): f"{choice}, or TEXT"}.get(
        (bool(row["options"]), row["free_text"]), "TEXT"
    )
    return "\n".join([*lines, paint(f"    hive answer {row['id']} {how}", "dim")])


def schedule(row: dict[str, Any]) -> str:
    rhythm = f"{row['cron']} {row['zone']}" if row["cron"] else f"every {row['every_s']:g} s"
    if row["state"] == "on":
        state = f"next at {day(row['next_at_ms'])}"
    else:
        state = paint(f"paused{': ' + safe(row['note']) if row['note'] else ''}", "amber")
    return f"{row['schedule']} {paint(row['agent'], 'bold')} {rhythm} · {state}\n    {_first_line(row['body'])}"


def _first_line(text: str) -> str:
    first = safe(text).strip().partition("\n")[0]
    return first if len(first) <= 100 else f"{first[:99]}…"


def loose_ends(result: dict[str, Any], who: str) -> str:
    """What waits on somebody and what they wait for, a line for each."""
    on, waits_for = result["waits_on_you"], result["you_wait_for"]
    lines = [f"question {row['question']} of {row['asker']}: {_first_line(row['text'])}" for row in on["questions"]]
    lines += [f"approval {row['approval']}: {row['kind']} {row['agent']}" for row in on.get("approvals", [])]
    lines += [f"{on['unread']} unread"] if on["unread"] else []
    for state in ("held", "dead"):
        lines += [_aside_line(row, state) for row in on.get(state, [])]
    then = [
        f"question {row['question']} to {row['answerer']}: {_first_line(row['text'])}" for row in waits_for["questions"]
    ]
    then += [f"approval {row['approval']}: {row['kind']} {row['agent']}" for row in waits_for.get("approvals", [])]
    then += [_aside_line(row, "held") for row in waits_for.get("held", [])]
    then += [
        f"reminder {row['reminder']} at {day(row['at_ms'])}{_waits_for_room(row)}: {_first_line(row['body'])}"
        for row in waits_for["reminders"]
    ]
    then += [
        f"work {row['work']}, which runs for {ago(row['begun_at_ms'])}: {_first_line(row['note'] or row['command'])}"
        for row in waits_for.get("background", [])
    ]
    then += [
        f"schedule {row['schedule']} at {day(row['next_at_ms'])} for {row['agent']}"
        for row in waits_for.get("schedules", [])
    ]
    waits, verb = ("you wait", "you") if who == "you" else (f"{who} waits", who)
    blocks = [[f"waits on {verb}:", *lines]] if lines else [[f"nothing waits on {verb}"]]
    blocks += [[f"{waits} for:", *then]] if then else []
    return "\n".join("\n  ".join(block) for block in blocks)


def _waits_for_room(row: dict[str, Any]) -> str:
    return ", due and waits for room (inbox_depth, held_depth)" if row["due"] else ""


def _aside_line(row: dict[str, Any], state: str) -> str:
    return f"message {row['message']} {row['sender']} → {row['recipient']} is {state}"


def approval_line(row: dict[str, Any]) -> str:
    what = {"spawn": "new agent", "apply_commit": "change", "egress": "wish of"}.get(row["kind"], row["kind"])
    return f"{paint('◆ ' + str(row['id']), 'amber')} {what} {paint(row['agent'], 'bold')}: {one_line(row['reason'])}"


def event(row: dict[str, Any]) -> str:
    data = " ".join(f"{key}={safe(str(value))[:80]}" for key, value in row["data"].items() if value is not None)
    about = f" {row['agent']}" if row["agent"] and row["agent"] != row["actor"] else ""
    head = f"{paint(str(row['seq']), 'dim')} {clock(row['at_ms'])} {row['actor']}"
    return f"{head} {paint(row['kind'], 'mauve')}{about} {data}"


_CREDENTIAL_COLOURS = {"works": "green", "limited": "amber", "refused": "red", "missing": "red"}


def credential(row: dict[str, Any]) -> str:
    since = f" since {day(row['since_ms'])}" if row["since_ms"] else ""
    until = f" until {day(row['until_ms'])}" if row["until_ms"] else ""
    kind = "API key" if row["kind"] == "api_key" else "token"
    parts = [f"{kind} from {safe(row['source'])}"] if row["source"] else []
    parts += [_window(name, window) for name, window in row["windows"].items()]
    parts.append(f"used by {', '.join(row['agents'])}" if row["agents"] else "used by nobody")
    state = paint(f"{row['state']}{since}{until}", _CREDENTIAL_COLOURS.get(row["state"], "dim"))
    line = f"credential {paint(row['name'], 'bold')} {state}: {' · '.join(parts)}"
    return f"{line}\n  {safe(row['sentence'])}" if row["sentence"] else line


def _window(name: str, window: dict[str, Any]) -> str:
    reset = f" until {day(window['reset_ms'])}" if window["reset_ms"] else ""
    return f"{name} window {round(window['left'] * 100)} % left{reset}"


def status(result: dict[str, Any]) -> str:
    lines = [f"hyperhive {result['version']} · {result['dashboard']}", *_alarms(result)]
    told = [row for row in result["credentials"] if row["agents"] and (row["sentence"] or row["windows"])]
    lines += [credential(row) for row in told]
    # The swarm's stop and what a credential lacks are told already, once for all agents.
    sentences = [row["sentence"] for row in told if row["sentence"]]
    still = [row for row in result["stopped"] if row["state"] != "frozen"]
    lines += [_stopped(row) for row in still if not any(sentence in row["why"] for sentence in sentences)]
    if result["update_trouble"]:
        lines.append(paint(f"the update has stopped: {safe(result['update_trouble'])}", "red"))
    failing = [row for row in result.get("forges", ()) if row["error"]]
    lines += [f"! the forge of {paint(row['project'], 'bold')} fails: {one_line(row['error'])}" for row in failing]
    lines += [approval_line(row) for row in result["pending"]]
    lines += [question(row) for row in result["questions"]]
    if result["unread"]:
        lines.append(f"{result['unread']} unread: `hive inbox`")
    if result["held"]:
        lines.append(paint(f"{result['held']} held: `hive held`", "amber"))
    if result["dead"]:
        lines.append(paint(f"{result['dead']} dead: `hive dead`", "red"))
    for name, refused in result["refused"].items():
        lines.append(paint(f"inbox full: {name} did not get {counted(refused, 'message')}", "red"))
    waits = ("pending", "questions", "unread", "held", "dead", "refused", "stopped", "frozen_since_ms")
    if not failing and not any(result[key] for key in (*waits, "update_trouble")):
        lines.append("nothing waits for you")
    return "\n".join(lines)


def _stopped(row: dict[str, Any]) -> str:
    """Agents that stand still for one reason, and what lets them go on."""
    state = paint(row["state"], _STATE_COLOURS.get(row["state"], "amber"))
    return f"! {paint(', '.join(row['agents']), 'bold')} {state}: {safe(row['why'])}"
