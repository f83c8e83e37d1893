"""`hive`: the operator's command line, a client of host.sock.

It imports neither trio nor pydantic, and what a verb needs more than the standard library's small change is imported
by that verb, so that it starts in under 100 ms.
"""

from __future__ import annotations

import json
import os
import sys

from hive_core.protocol.refusal import EXIT_CODES, Refusal

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
    try:
        arguments = _parse(words)
    except SystemExit as exit_:
        if as_json and exit_.code:
            error = Refusal("usage", "these words are not understood; standard error says why")
            print(json.dumps({"ok": False, "error": error.to_wire()}))
        raise
    arguments.json = as_json
    try:
        run: Callable[[Namespace], int | None] = globals()[arguments.run]
        return run(arguments) or 0
    except Refusal as refusal:
        if arguments.json:
            print(json.dumps({"ok": False, "error": refusal.to_wire()}))
        print(f"hive: {refusal.message}", file=sys.stderr)
        return EXIT_CODES.get(refusal.code, 1)
    except BrokenPipeError:
        # The reader went away (`hive events | head`): that is its right.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as exc:
        print(f"hive: cannot go on: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


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
        "send a message to an agent",
        [
            (("agent",), {}),
            (("body",), {"nargs": "?", "help": "what to say; from standard input when absent"}),
            (("--in-reply-to",), {"type": int, "metavar": "ID"}),
        ],
    ),
    "inbox": ("_inbox", "messages to you", [(("--limit",), {"type": int, "default": 20})]),
    "pending": ("_pending", "what waits for your approval", []),
    "show": ("_show", "one approval, whole", [(("approval",), {"type": int})]),
    "approve": (
        "_approve",
        "approve exactly what `hive show` shows",
        [
            (("approval",), {"type": int}),
            (("--digest",), {"help": "approve only if it is still this; `hive show --json` gives it"}),
        ],
    ),
    "deny": (
        "_deny",
        "deny, with a reason that the requester reads",
        [(("approval",), {"type": int}), (("reason",), {})],
    ),
    "start": ("_want", "start an agent that was killed or paused", [(("agent",), {})]),
    "pause": ("_want", "let an agent take no turn and reach no model until it is started", [(("agent",), {})]),
    "kill": ("_want", "end an agent now, and keep it down until it is started", [(("agent",), {})]),
    "events": (
        "_events",
        "what people did and what changed",
        [
            (("--follow",), {"action": "store_true", "help": "go on until Ctrl-C"}),
            (("--after",), {"type": int, "metavar": "SEQ", "help": "only events after this number"}),
            (("--limit",), {"type": int, "default": 50}),
        ],
    ),
    "dashboard": ("_dashboard", "print a link that signs one browser in", []),
    "down": (
        "_down",
        "let every agent finish its turn, then end them and the daemon",
        [(("--patience",), {"type": float, "metavar": "SECONDS", "help": "end agents by force after this long"})],
    ),
}


def _parse(words: list[str]) -> Namespace:
    """The arguments of one call. Only the parser of its own verb is built: a start has 100 ms for everything."""
    from argparse import ArgumentParser, HelpFormatter, RawDescriptionHelpFormatter

    def formatter(prog: str) -> HelpFormatter:
        # A width of our own: looking for the terminal's imports shutil, and with it three kinds of compression.
        return RawDescriptionHelpFormatter(prog, width=100)

    if words and words[0] in _VERBS:
        run, help_text, arguments = _VERBS[words[0]]
        parser = ArgumentParser(prog=f"hive {words[0]}", description=help_text, formatter_class=formatter)
        for names, options in arguments:
            parser.add_argument(*names, **options)
        parser.set_defaults(run=run, verb=words[0])
        words = words[1:]
    else:
        listed = "\n".join(f"  {name:10} {verb[1]}" for name, verb in _VERBS.items())
        parser = ArgumentParser(
            prog="hive",
            usage="hive [--json] [VERB …]",
            description="Run a swarm of coding agents on a machine of your own.\nWithout a verb: what waits for you.",
            epilog=f"verbs (`hive VERB --help` says more):\n{listed}",
            formatter_class=formatter,
        )
        parser.add_argument("--version", action="store_true", help="print the version")
        parser.set_defaults(run="_status")
        if words and not words[0].startswith("-"):
            parser.error(f"there is no verb {words[0]!r}; the verbs are {', '.join(_VERBS)}")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(words)


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
    body = sys.stdin.read() if arguments.body is None else arguments.body
    result = _client().call("send", to=arguments.agent, body=body, in_reply_to=arguments.in_reply_to)
    _emit(arguments, result, f"sent as message {result['message']}")


def _inbox(arguments: Namespace) -> None:
    from hive_core.cli import show

    result = _client().call("inbox", limit=arguments.limit)
    _emit(arguments, result, "\n".join(map(show.message, result["messages"])) or "no messages")


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
