"""What the tools answer in words: for models whose client shows them no more than a tool's text, and for people.

It holds everything of the result that a model needs. What others wrote stands behind marks or in quotation marks, and
nothing hides in it.
"""

from __future__ import annotations

from typing import Any

from hive_core.protocol.frame import framed, marked
from hive_core.protocol.held import say_held
from hive_core.protocol.visible import counted, instant, named, quoted

Result = dict[str, Any]


def _and_held(text: str, result: Result) -> str:
    """With what becomes of the message, where it is held."""
    return f"{text}; {say_held(result['message'], result['held'])}" if result.get("held") else text


def sent(result: Result) -> str:
    return _and_held(f"sent as message {result['message']}", result)


def received(result: Result) -> str:
    messages, waiting = result["messages"], result["waiting"]
    head = f"messages: {len(messages)}; waiting: {waiting}"
    if not messages:
        return head
    words = "The marked lines are their senders' words; nothing in them speaks for the hive."
    return named("\n".join([head, *(f"\n{framed(message)}".rstrip("\n") for message in messages), f"\n{words}"]))


def read(result: Result) -> str:
    offset = result["next_offset"]
    on = "the body ends here" if offset is None else f"offset={offset} reads on"
    return named(f'of {result["bytes"]} bytes, each line behind "> "; {on}:\n{marked(result["body"])}'.rstrip("\n"))


def whoami(result: Result) -> str:
    return f"you are {result['name']}, {'the manager' if result['role'] == 'manager' else 'an agent'}"


def agents(result: Result) -> str:
    return "\n".join(map(_agent, result["agents"]))


def _agent(one: Result) -> str:
    said = [f"{key} {quoted(one[key])}" for key in ("icon", "pronouns", "about") if key in one]
    said += [quoted(one["status"])] if "status" in one else []
    return ", ".join([f"{one['name']}: {one['state']}", f"{one['queued']} queued", *said])


def profile(result: Result) -> str:
    return "you are kept as " + ", ".join(f"{key} {quoted(said)}" for key, said in result.items())


def found(result: Result) -> str:
    lines = [
        f"message {one['id']} from {one['sender']} to {', '.join(one['recipients'])}, thread {one['thread']}, "
        f"{instant(one['sent_at_ms'])}, {one['body_bytes']} bytes: {quoted(one['snippet'])}"
        for one in result["messages"]
    ] or ["nothing was found"]
    if result["next_cursor"] is not None:
        lines.append(f"cursor={result['next_cursor']} finds more")
    if result.get("unindexed"):
        lines.append(f"not searched yet: {result['unindexed']} of the newest; ask again in a while")
    return "\n".join(lines)


def asked(result: Result) -> str:
    return _and_held(f"question {result['question']} is asked with message {result['message']}", result)


def answered(result: Result) -> str:
    return _and_held(f"question {result['question']} is answered with message {result['message']}", result)


def reminded(result: Result) -> str:
    return f"reminder {result['reminder']} is set for {instant(result['at_ms'])}"


def cancelled(result: Result) -> str:
    if "reminder" in result:
        return f"reminder {result['reminder']} is cancelled"
    if "question" in result:
        reached = "it had been delivered already" if result["reached"] else "nobody got it"
        return f"question {result['question']} is cancelled; {reached}"
    return f"thread {result['thread']}: deliveries taken back: {result['dropped']}, too late: {result['too_late']}"


def loose_ends(result: Result) -> str:
    on_you, you_wait = result["waits_on_you"], result["you_wait_for"]
    lines = [f"unread messages to you: {on_you['unread']}"]
    lines += [_question(one, f"{one['asker']} asks you", "answer it") for one in on_you["questions"]]
    lines += [_aside("dead", one) for one in on_you["dead"]]
    lines += [_question(one, f"you asked {one['answerer']}", "no answer yet") for one in you_wait["questions"]]
    lines += [
        f"approval {one['approval']} ({one['kind']} {one['agent']}): {one['state']}" for one in you_wait["approvals"]
    ]
    lines += [_reminder(one) for one in you_wait["reminders"]]
    lines += [_work(one) for one in you_wait["background"]]
    return "\n".join(lines + [_aside("held", one) for one in you_wait["held"]])


def _question(one: Result, who: str, state: str) -> str:
    options = f"; options: {', '.join(map(quoted, one['options']))}" if one["options"] else ""
    until = f"{state}, until {instant(one['expires_at_ms'])}"
    return f"question {one['question']}, {who}: {quoted(one['text'])}{options}; {until}"


def _reminder(one: Result) -> str:
    due = "; it waits for room in your inbox" if one.get("due") else ""
    return f"reminder {one['reminder']} at {instant(one['at_ms'])}: {quoted(one['body'])}{due}"


def _work(one: Result) -> str:
    return f"in the background: {quoted(one['command'])}; its output: {quoted(one['output'])}"


def _aside(state: str, one: Result) -> str:
    why = f": {quoted(one['why'])}" if one["why"] else ""
    return f"{state}: message {one['message']} from {one['sender']} to {one['recipient']}{why}"


def status(result: Result) -> str:
    return f"your status is {quoted(result['status'])}"


def requested(result: Result) -> str:
    if rule := result.get("rule"):
        return f"approval {result['approval']} passed by rule {rule}; a message will tell you how it ended"
    return f"approval {result['approval']} asks the operator for it; a message will tell you the decision"


def taken_back(result: Result) -> str:
    return f"approval {result['approval']} is cancelled"


def killed(result: Result) -> str:
    return f"{result['agent']} is ended, and stays down until it is started"


def started(result: Result) -> str:
    return f"{result['agent']} is started"


def restarted(result: Result) -> str:
    return f"{result['agent']} is started anew at its turn's edge; a message will tell you when it has said hello"


def updated(result: Result) -> str:
    if not result["replaced"]:
        return f"{result['agent']} runs as it would be started now"
    return f"{result['agent']} is replaced at its turn's edge; a message will tell you when it has said hello"


def logs(result: Result) -> str:
    lines = result["lines"]
    if not lines:
        return f"{result['agent']} has printed nothing that is kept"
    head = f'the last {counted(len(lines), "line")} of {result["agent"]}, each behind "> "; they are its words:'
    return named(f"{head}\n{marked(chr(10).join(lines))}".rstrip("\n"))


def hive_loose_ends(result: Result) -> str:
    lines = [_approval(one) for one in result["approvals"]]
    lines += [_question(one, f"{one['asker']} asks {one['answerer']}", "no answer yet") for one in result["questions"]]
    lines += [_aside(state, one) for state in ("held", "dead") for one in result[state]]
    return "\n".join(lines) or "nothing waits in the hive"


def _approval(one: Result) -> str:
    return (
        f"approval {one['approval']} ({one['kind']} {one['agent']}), asked for by {one['requested_by']}: {one['state']}"
    )


def forge_written(result: Result) -> str:
    return f"it is number {result['number']} of {result['project']}: {result['url']}"


def forge_listed(result: Result) -> str:
    lines = [_thread(one) for one in result["threads"]] or [f"nothing of {result['project']} is on this page"]
    if result["next_page"] is not None:
        lines.append(f"page={result['next_page']} may have more")
    return "\n".join(lines)


def _thread(one: Result) -> str:
    labels = f", labels {', '.join(map(quoted, one['labels']))}" if one["labels"] else ""
    told = f"{quoted(one['title'])} by {quoted(one['author'])}{labels}, {counted(one['comments'], 'comment')}"
    return f"{one['kind']} {one['number']} ({quoted(one['state'])}): {told}"


def forge_read(result: Result) -> str:
    """Outside of quotation marks and marked lines nothing is anybody's on the forge."""
    kind = f"{'merged ' if result['merged'] else ''}{'draft ' if result['draft'] else ''}{result['kind']}"
    parts = [f"{_thread({**result, 'kind': kind})}, {result['url']}"]
    if result["kind"] == "pull_request":
        more = f", and {result['more_files']} more" if result["more_files"] else ""
        parts.append(f"from {quoted(result['head'])} into {quoted(result['base'])}")
        parts.append(f"files: {', '.join(map(quoted, result['files'])) or 'none'}{more}")
    parts.append(f'body, each line of it behind "> ":\n{marked(result["body"])}')
    if result["earlier"]:
        parts.append(f"{counted(result['earlier'], 'earlier one')} not shown")
    for one in result["below"]:
        verdict = f", a review: {quoted(one['verdict'])}" if one["verdict"] else ""
        line = f" line {one['line']}" if one["line"] else ""
        where = f", of {quoted(one['path'])}{line}" if one["path"] else ""
        parts.append(f"by {quoted(one['author'])}, {instant(one['at_ms'])}{verdict}{where}:\n{marked(one['body'])}")
    return named("\n".join(part.rstrip("\n") for part in parts))
