"""`hive`: the operator's command line, a client of host.sock.

It imports neither trio nor pydantic, and what a verb needs more than the standard library's small change is imported
by that verb, so that it starts in under 100 ms.
"""

from __future__ import annotations

import json
import os
import sys

from hive_core.protocol.arguments import parser_class, seconds
from hive_core.protocol.paths import explain
from hive_core.protocol.refusal import EXIT_CODES, Refusal
from hive_core.protocol.words import BODY_LIMIT_BYTES, shown, too_large

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable
    from typing import Any


def main(argv: list[str] | None = None) -> int:
    """Run one verb. Exit codes: 0 ok, 1 failed, 2 usage, 3 not found or not running, 4 refused."""
    words = sys.argv[1:] if argv is None else argv
    # --json may stand anywhere before a --.
    end = words.index("--") if "--" in words else len(words)
    as_json = "--json" in words[:end]
    words = [word for word in words[:end] if word != "--json"] + words[end:]
    _prepare_streams()
    try:
        try:
            return _run(words, as_json)
        except Refusal as refusal:
            return _refuse(refusal, as_json)
        finally:
            sys.stdout.flush()  # here, and not when the interpreter ends: its complaint would be a trace
    except BrokenPipeError:
        # The reader went away (`hive events | head`): that is its right.
        _drop_output()
        return 0
    except OSError as exc:
        _drop_output()
        return _refuse(Refusal("failed", f"cannot go on: {explain(exc)}"), False)
    except KeyboardInterrupt:
        return 130


def _run(words: list[str], as_json: bool) -> int:
    for position, word in enumerate(words, 1):
        try:
            word.encode()
        except UnicodeEncodeError:
            raise Refusal(
                "usage", f"cannot read the words: argument {position} is not UTF-8; give it as UTF-8"
            ) from None
    arguments = _parse(words)
    arguments.json = as_json
    run: Callable[[Namespace], int | None] = globals()[arguments.run]
    try:
        return run(arguments) or 0
    except BrokenPipeError:
        raise
    except OSError as exc:
        raise Refusal("failed", f"cannot go on: {explain(exc)}") from None


def _refuse(refusal: Refusal, as_json: bool) -> int:
    if as_json:
        print(json.dumps({"ok": False, "error": refusal.to_wire()}))
    print(f"hive: {refusal.message}", file=sys.stderr)
    return EXIT_CODES.get(refusal.code, 1)


def _prepare_streams() -> None:
    """Have all three, and let none of them refuse a character that its encoding lacks."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - it stays open as long as we run
        elif mode == "w" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _drop_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _whole(text: str) -> int:
    from argparse import ArgumentTypeError

    try:
        return int(text)
    except ValueError:
        raise ArgumentTypeError(f"{shown(text)} is not a whole number") from None


# verb → (what runs it, its help, its arguments)
_VERBS: dict[str, tuple[str, str, list[tuple[tuple[str, ...], dict[str, Any]]]]] = {
    "up": (
        "_up",
        "start the hive, say what it found, print the sign-in link",
        [(("--unsafe-no-sandbox",), {"action": "store_true", "help": "run real programs without a sandbox"})],
    ),
    "demo": (
        "_demo",
        "play a story with rehearsed agents, without an account",
        [
            (("--once",), {"action": "store_true", "help": "approve by itself, play to the end, and stop"}),
            (("--deny",), {"action": "store_true", "help": "with --once: deny the new agent, the other ending"}),
        ],
    ),
    "list": (
        "_list",
        "the agents and what they do now",
        [(("--follow",), {"action": "store_true", "help": "print it again after each change, until Ctrl-C"})],
    ),
    "send": (
        "_send",
        "send a message to agents",
        [
            (("agent",), {"nargs": "?", "metavar": "AGENT[,AGENT…]", "help": "to whom; * for everyone"}),
            (("body",), {"nargs": "?", "help": "what to say; from standard input when absent"}),
            (("--to",), {"action": "append", "metavar": "AGENT", "help": "instead, once for each recipient"}),
            (("--in-reply-to",), {"type": _whole, "metavar": "ID"}),
        ],
    ),
    "read": ("_read", "a message's body, whole however large", [(("message",), {"type": _whole, "metavar": "ID"})]),
    "inbox": ("_inbox", "messages to you", [(("--limit",), {"type": _whole, "default": 20})]),
    "dead": (
        "_aside",
        "messages that were given up after too many failed turns",
        [(("--limit",), {"type": _whole, "default": 50})],
    ),
    "held": (
        "_aside",
        "messages that wait for you: a chain too long, or too many of one pair",
        [(("--limit",), {"type": _whole, "default": 50})],
    ),
    "requeue": (
        "_move",
        "give a dead message all its tries again",
        [(("message",), {"type": _whole, "metavar": "ID"})],
    ),
    "release": ("_move", "let a held message go", [(("message",), {"type": _whole, "metavar": "ID"})]),
    "drop": ("_move", "put a dead or held message away", [(("message",), {"type": _whole, "metavar": "ID"})]),
    "cancel": ("_cancel", "end an agent's turn for good, its messages with it", [(("agent",), {})]),
    "search": (
        "_search",
        "find messages by their words",
        [
            (("text",), {"nargs": "*", "help": "words that must all be there; wor* is the beginning of one"}),
            (("--sender",), {"metavar": "NAME"}),
            (("--thread",), {"type": _whole, "metavar": "ID"}),
            (
                ("--after",),
                {"metavar": "INSTANT", "help": "sent then or later: 2026-01-31T08:30 by your clock, or with Z"},
            ),
            (("--before",), {"metavar": "INSTANT"}),
            (("--limit",), {"type": _whole, "default": 20}),
            (("--cursor",), {"type": _whole, "metavar": "ID", "help": "only messages before this one"}),
        ],
    ),
    "thread": (
        "_thread",
        "the messages of one thread, in order",
        [
            (("message",), {"type": _whole, "help": "any message of it"}),
            (("--after",), {"type": _whole, "metavar": "ID", "help": "only those after this one"}),
        ],
    ),
    "explain": (
        "_explain",
        "the life of a message: who sent it and why, who had it, how it ended",
        [(("what",), {"nargs": "?", "choices": ["message"]}), (("message",), {"type": _whole, "metavar": "ID"})],
    ),
    "backup": (
        "_backup",
        "write the whole hive into one file, while it runs",
        [
            (("file",), {"help": "a tar file; - writes to standard output"}),
            (("--with-credentials",), {"action": "store_true", "help": "put the keys of the model provider in, too"}),
        ],
    ),
    "restore": (
        "_restore",
        "bring a hive back from a backup, into an empty state directory",
        [
            (("file",), {}),
            (("--check",), {"action": "store_true", "help": "look whether it is whole, and write nothing"}),
            (("--paused",), {"action": "store_true", "help": "let no agent run before `hive start`"}),
        ],
    ),
    "questions": ("_questions", "questions to you", [(("--limit",), {"type": _whole, "default": 50})]),
    "answer": (
        "_answer",
        "answer a question",
        [
            (("question",), {"type": _whole, "metavar": "ID"}),
            (("text",), {"nargs": "?", "help": "where the question takes text"}),
            (("--choice",), {"action": "append", "metavar": "OPTION", "help": "an option, or its number"}),
        ],
    ),
    "schedule": (
        "_schedule",
        "send a message by a clock",
        [
            (("what",), {"choices": ["add", "list", "pause", "resume", "run", "rm"]}),
            (
                ("words",),
                {"nargs": "*", "metavar": "AGENT BODY | ID", "help": "add: to whom and what; else its number"},
            ),
            (("--cron",), {"metavar": "FIELDS", "help": "five fields, such as '0 7 * * 1-5'"}),
            (
                ("--tz",),
                {"metavar": "ZONE", "help": "whose clocks --cron reads, such as Europe/Berlin; UTC when absent"},
            ),
            (("--every",), {"type": seconds(30), "metavar": "SECONDS", "help": "instead: once in so many"}),
        ],
    ),
    "loose-ends": (
        "_loose_ends",
        "what waits on you, and what you wait for",
        [(("agent",), {"nargs": "?", "help": "of this agent instead"})],
    ),
    "pending": ("_pending", "what waits for your approval", []),
    "show": ("_show", "one approval, whole", [(("approval",), {"type": _whole})]),
    "approve": (
        "_approve",
        "approve exactly what `hive show` shows",
        [
            (("approval",), {"type": _whole}),
            (("--digest",), {"help": "approve only if it is still this; `hive show --json` gives it"}),
        ],
    ),
    "deny": (
        "_deny",
        "deny, with a reason that the requester reads",
        [(("approval",), {"type": _whole}), (("reason",), {})],
    ),
    "start": ("_want", "start an agent that was killed or paused", [(("agent",), {})]),
    "pause": ("_want", "let an agent take no turn and reach no model until it is started", [(("agent",), {})]),
    "kill": ("_want", "end an agent now, and keep it down until it is started", [(("agent",), {})]),
    "events": (
        "_events",
        "what people did and what changed",
        [
            (("--follow",), {"action": "store_true", "help": "go on until Ctrl-C"}),
            (("--after",), {"type": _whole, "metavar": "SEQ", "help": "only events after this number"}),
            (("--limit",), {"type": _whole, "default": 50}),
        ],
    ),
    "dashboard": ("_dashboard", "print a link that signs one browser in", []),
    "down": (
        "_down",
        "let every agent finish its turn, then end them and the daemon",
        [(("--patience",), {"type": seconds(30), "metavar": "SECONDS", "help": "end agents by force after this long"})],
    ),
}


def _parse(words: list[str]) -> Namespace:
    """The arguments of one call. Only the parser of its own verb is built: a start has 100 ms for everything."""
    from argparse import HelpFormatter, RawDescriptionHelpFormatter

    parser_type = parser_class()

    def formatter(prog: str) -> HelpFormatter:
        # A width of our own: looking for the terminal's imports shutil, and with it three kinds of compression.
        return RawDescriptionHelpFormatter(prog, width=100)

    if words and words[0] in _VERBS:
        run, help_text, arguments = _VERBS[words[0]]
        parser = parser_type(prog=f"hive {words[0]}", description=help_text, formatter_class=formatter)
        for names, options in arguments:
            parser.add_argument(*names, **options)
        parser.set_defaults(run=run, verb=words[0])
        words = words[1:]
    else:
        listed = "\n".join(f"  {name:10} {verb[1]}" for name, verb in _VERBS.items())
        parser = parser_type(
            prog="hive",
            usage="hive [--json] [VERB …]",
            description="Run a swarm of coding agents on a machine of your own.\nWithout a verb: what waits for you.",
            epilog=f"verbs (`hive VERB --help` says more):\n{listed}",
            formatter_class=formatter,
        )
        parser.add_argument("--version", action="store_true", help="print the version")
        parser.set_defaults(run="_status")
        if words and not words[0].startswith("-"):
            parser.error(f"there is no verb {shown(words[0])}; the verbs are {', '.join(_VERBS)}")
    parser.add_argument("--json", action="store_true", help="print JSON")
    # Options may stand between the words of these.
    return (parser.parse_intermixed_args if parser.prog in _INTERMIXED else parser.parse_args)(words)


_INTERMIXED = ("hive send", "hive schedule", "hive answer")


def _emit(arguments: Namespace, result: Any, text: str) -> None:
    print(json.dumps(result, ensure_ascii=False) if arguments.json else text)


def _client() -> Any:
    from hive_core.cli.client import Client

    return Client()


def _status(arguments: Namespace) -> None:
    if arguments.version:
        from hive_core.version import __version__

        _emit(arguments, {"version": __version__}, __version__)
        return
    from hive_core.cli import show

    result = _client().call("status")
    _emit(arguments, result, show.status(result))


def _list(arguments: Namespace) -> None:
    client = _client()
    for result in client.stream("watch") if arguments.follow else [client.call("list")]:
        if arguments.json:
            print(json.dumps(result), flush=True)
        else:
            from hive_core.cli import show

            print(show.agents(result), flush=True)


def _send(arguments: Namespace) -> None:
    to, body = arguments.agent, arguments.body
    if arguments.to:
        if body is not None:
            raise Refusal("usage", "cannot send: give the recipients before the body or with --to, not both")
        to, body = ",".join(arguments.to), to
    if to is None:
        raise Refusal("usage", "cannot send to nobody: name an agent, several with commas, or * for everyone")
    if body is None:
        given = sys.stdin.buffer.read(BODY_LIMIT_BYTES + 1)  # whatever comes in may have no end
        if len(given) > BODY_LIMIT_BYTES:
            raise too_large("message", f"{len(given):,} bytes or more", BODY_LIMIT_BYTES)
        try:
            body = given.decode()
        except UnicodeDecodeError as exc:
            why = f"byte {exc.start} is not UTF-8; give it as UTF-8"
            raise Refusal("usage", f"cannot send the message: {why}") from None
    # The shell, and not we, would make one word of a list; the daemon takes one name, or a list.
    recipients = to.split(",") if "," in to else to
    result = _client().call("send", to=recipients, body=body, in_reply_to=arguments.in_reply_to)
    text = f"sent as message {result['message']}"
    if held := result.get("held"):
        from hive_core.protocol.held import say_held

        text += f"; {say_held(result['message'], held)}"
    _emit(arguments, result, text)


def _read(arguments: Namespace) -> None:
    from hive_core.cli import show

    client, body, offset = _client(), "", 0
    while offset is not None:
        result = client.call("read", message=arguments.message, offset=offset)
        body, offset = body + result["body"], result["next_offset"]
    _emit(arguments, {"message": arguments.message, "body": body, "bytes": result["bytes"]}, show.safe(body))


def _aside(arguments: Namespace) -> None:
    from hive_core.cli import show

    result = _client().call(arguments.verb, limit=arguments.limit)
    lines = [show.aside(arguments.verb, row) for row in result["messages"]]
    _emit(arguments, result, "\n".join(lines) or f"nothing is {arguments.verb}")


def _move(arguments: Namespace) -> None:
    result = _client().call(arguments.verb, message=arguments.message)
    number, names = result["message"], ", ".join(result["recipients"])
    text = {
        "requeue": f"message {number} goes to {names} again, with all its tries",
        "release": f"message {number} is on its way to {names}",
        "drop": f"message {number} is dropped: {names} will not get it",
    }[arguments.verb]
    _emit(arguments, result, text)


def _cancel(arguments: Namespace) -> None:
    result = _client().call("cancel", agent=arguments.agent)
    _emit(arguments, result, f"turn {result['turn']} of {result['agent']} is cancelled, and its messages with it")


def _inbox(arguments: Namespace) -> None:
    from hive_core.cli import show

    result = _client().call("inbox", limit=arguments.limit)
    _emit(arguments, result, "\n".join(map(show.message, result["messages"])) or "no messages")


def _search(arguments: Namespace) -> None:
    from hive_core.cli import show

    # A word that the shell took the quotes from is a phrase again.
    text = " ".join(f'"{word}"' if " " in word and '"' not in word else word for word in arguments.text)
    given = {key: getattr(arguments, key) for key in ("sender", "thread", "after", "before", "limit", "cursor")}
    given |= {key: _with_zone(given[key]) for key in ("after", "before") if given[key]}
    result = _client().call("search", text=text, **given)
    lines = [show.found(row) for row in result["messages"]] or ["nothing was found"]
    if result["next_cursor"]:
        lines.append(f"more: add --cursor {result['next_cursor']}")
    if result.get("unindexed"):
        lines.append(f"not searched yet: {result['unindexed']} of the newest; ask again in a while")
    _emit(arguments, result, "\n".join(lines))


def _with_zone(instant: str) -> str:
    """An instant without a zone is one of the clock on the wall, as all that we print; the daemon's is UTC."""
    from datetime import datetime

    try:
        at = datetime.fromisoformat(instant)
        return instant if at.tzinfo else at.astimezone().isoformat()
    except (ValueError, OverflowError):
        return instant  # which the daemon refuses with its reason


def _thread(arguments: Namespace) -> None:
    from hive_core.cli import show

    result = _client().call("thread", message=arguments.message, after=arguments.after)
    _emit(arguments, result, show.thread(result))


def _explain(arguments: Namespace) -> None:
    from hive_core.cli import show

    result = _client().call("explain", message=arguments.message)
    _emit(arguments, result, show.life(result))


def _backup(arguments: Namespace) -> int:
    from hive_core.cli.backup import backup

    return backup(arguments.file, with_credentials=arguments.with_credentials, as_json=arguments.json)


def _restore(arguments: Namespace) -> int:
    from hive_core.cli.backup import restore

    return restore(arguments.file, check=arguments.check, paused=arguments.paused, as_json=arguments.json)


def _questions(arguments: Namespace) -> None:
    from hive_core.cli import show

    result = _client().call("questions", limit=arguments.limit)
    _emit(arguments, result, "\n".join(map(show.question, result["questions"])) or "no question waits for you")


def _answer(arguments: Namespace) -> None:
    result = _client().call("answer", question=arguments.question, text=arguments.text, choices=arguments.choice)
    _emit(arguments, result, f"question {result['question']} is answered, with message {result['message']}")


def _schedule(arguments: Namespace) -> None:
    from hive_core.cli import show

    what, words = arguments.what, arguments.words
    needs = {"add": 2, "list": 0}.get(what, 1)
    if len(words) != needs:
        form = {"add": "AGENT BODY with --cron or --every", "list": "nothing"}.get(what, "the number of a schedule")
        raise Refusal("usage", f"cannot run `hive schedule {what}`: it takes {form}")
    if what == "add":
        given = {"cron": arguments.cron, "zone": arguments.tz, "every_s": arguments.every}
        result = _client().call("schedule", agent=words[0], body=words[1], **given)
        _emit(arguments, result, f"schedule {result['schedule']}: first at {show.day(result['next_at_ms'])}")
        return
    if what == "list":
        result = _client().call("schedules")
        _emit(arguments, result, "\n".join(map(show.schedule, result["schedules"])) or "there is no schedule")
        return
    if not words[0].isdecimal():
        raise Refusal(
            "usage", f"cannot use {shown(words[0])} as the number of a schedule: `hive schedule list` shows them"
        )
    verb = {"rm": "remove"}.get(what, what)
    result = _client().call(f"schedule_{verb}", schedule=int(words[0]))
    text = {
        "pause": "is paused",
        "resume": f"goes on, next at {show.day(result.get('next_at_ms') or 0)}",
        "run": f"was sent as message {result.get('message')}",
        "rm": "is gone",
    }[what]
    _emit(arguments, result, f"schedule {result['schedule']} {text}")


def _loose_ends(arguments: Namespace) -> None:
    from hive_core.cli import show

    result = _client().call("loose_ends", agent=arguments.agent)
    _emit(arguments, result, show.loose_ends(result, arguments.agent or "you"))


def _pending(arguments: Namespace) -> None:
    from hive_core.cli import show

    result = _client().call("pending")
    _emit(arguments, result, "\n".join(map(show.approval_line, result["approvals"])) or "nothing waits for you")


def _show(arguments: Namespace) -> None:
    from hive_core.cli import show

    result = _client().call("show", approval=arguments.approval)
    _emit(arguments, result, show.approval(result))


def _approve(arguments: Namespace) -> int:
    client = _client()
    digest = arguments.digest or client.call("show", approval=arguments.approval)["digest"]
    result = client.call("approve", approval=arguments.approval, digest=digest)
    note = f": {result['note']}" if result["note"] else ""
    _emit(arguments, result, f"approval {result['id']} of {result['agent']}: {result['state']}{note}")
    return 0 if result["state"] == "done" else 1


def _deny(arguments: Namespace) -> None:
    result = _client().call("deny", approval=arguments.approval, reason=arguments.reason)
    _emit(arguments, result, f"approval {result['id']} of {result['agent']}: {result['state']}")


def _want(arguments: Namespace) -> None:
    result = _client().call(arguments.verb, agent=arguments.agent)
    _emit(arguments, result, f"{result['agent']} is wanted {result['wanted']}")


def _events(arguments: Namespace) -> None:
    from hive_core.cli import show

    for event in _client().stream("events", follow=arguments.follow, after=arguments.after, limit=arguments.limit):
        print(json.dumps(event, ensure_ascii=False) if arguments.json else show.event(event), flush=True)


def _dashboard(arguments: Namespace) -> None:
    result = _client().call("dashboard")
    _emit(arguments, result, result["url"])


def _up(arguments: Namespace) -> int:
    from hive_core.cli.up import up

    return up(as_json=arguments.json, unsafe_no_sandbox=arguments.unsafe_no_sandbox)


def _down(arguments: Namespace) -> int:
    from hive_core.cli.up import down

    return down(as_json=arguments.json, patience_s=arguments.patience)


def _demo(arguments: Namespace) -> int:
    from hive_core.cli.demo import demo

    return demo(once=arguments.once, deny=arguments.deny, as_json=arguments.json)
