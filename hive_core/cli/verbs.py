"""The verbs of `hive`: what each takes, and what runs it."""

from __future__ import annotations

from hive_core.cli.verbs_reach import REACH_VERBS
from hive_core.protocol.arguments import parser_class, seconds
from hive_core.protocol.words import shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from typing import Any


def _whole(text: str) -> int:
    from argparse import ArgumentTypeError

    try:
        return int(text)
    except ValueError:
        raise ArgumentTypeError(f"{shown(text)} is not a whole number") from None


_REASON: tuple[tuple[str, ...], dict[str, Any]] = (
    ("--reason",),
    {"default": "asked for by the operator", "help": "why, for the card and the log"},
)
_NEW_AGENT: list[tuple[tuple[str, ...], dict[str, Any]]] = [
    (("agent",), {"metavar": "NAME"}),
    (("persona",), {"nargs": "?", "help": "who it is and what it does; from standard input when absent"}),
    (("--icon",), {"metavar": "SIGN", "help": "such as 🦉"}),
    (("--toolkit",), {"metavar": "NAME", "help": "such as reader: the tools that it has, and packages"}),
    _REASON,
]

# verb → (what runs it, as MODULE.FUNCTION of this package, its help, its arguments)
VERBS: dict[str, tuple[str, str, list[tuple[tuple[str, ...], dict[str, Any]]]]] = {
    "up": (
        "hive.up",
        "start the hive, say what it found, print the sign-in link",
        [(("--unsafe-no-sandbox",), {"action": "store_true", "help": "run real programs without a sandbox"})],
    ),
    "demo": (
        "hive.demo",
        "play a story with rehearsed agents, without an account",
        [
            (("--once",), {"action": "store_true", "help": "approve by itself, play to the end, and stop"}),
            (("--deny",), {"action": "store_true", "help": "with --once: deny the new agent, the other ending"}),
        ],
    ),
    "list": (
        "agents.list_agents",
        "the agents and what they do now",
        [(("--follow",), {"action": "store_true", "help": "print it again after each change, until Ctrl-C"})],
    ),
    "send": (
        "messages.send",
        "send a message to agents",
        [
            (("agent",), {"nargs": "?", "metavar": "AGENT[,AGENT…]", "help": "to whom; * for everyone"}),
            (("body",), {"nargs": "?", "help": "what to say; from standard input when absent and no file is sent"}),
            (("--to",), {"action": "append", "metavar": "AGENT", "help": "instead, once for each recipient"}),
            (("--file",), {"action": "append", "metavar": "FILE", "help": "send it with the message; again for more"}),
            (("--in-reply-to",), {"type": _whole, "metavar": "ID"}),
        ],
    ),
    "read": (
        "messages.read",
        "a message's body, whole however large",
        [(("message",), {"type": _whole, "metavar": "ID"})],
    ),
    "inbox": ("messages.inbox", "messages to you", [(("--limit",), {"type": _whole, "default": 20})]),
    "dead": (
        "messages.aside",
        "messages that were given up after too many failed turns",
        [(("--limit",), {"type": _whole, "default": 50})],
    ),
    "held": (
        "messages.aside",
        "messages that wait for you: a chain too long, or too many of one pair",
        [(("--limit",), {"type": _whole, "default": 50})],
    ),
    "requeue": (
        "messages.move",
        "give a dead message all its tries again",
        [(("message",), {"type": _whole, "metavar": "ID"})],
    ),
    "release": ("messages.move", "let a held message go", [(("message",), {"type": _whole, "metavar": "ID"})]),
    "drop": ("messages.move", "put a dead or held message away", [(("message",), {"type": _whole, "metavar": "ID"})]),
    "compact": ("steering.compact", "let an agent's next turn compact its session", [(("agent",), {})]),
    "new-session": ("steering.new_session", "let an agent begin a new session with its next turn", [(("agent",), {})]),
    "model": (
        "steering.choose",
        "choose an agent's model, in force from its next turn on",
        [(("agent",), {}), (("choice",), {"metavar": "MODEL", "help": "such as opus; default: what agent.toml says"})],
    ),
    "effort": (
        "steering.choose",
        "choose how hard an agent thinks, in force from its next turn on",
        [
            (("agent",), {}),
            (("choice",), {"metavar": "LEVEL", "help": "low, medium, high, xhigh or max; default: as agent.toml says"}),
        ],
    ),
    "cancel": ("agents.cancel", "end an agent's turn for good, its messages with it", [(("agent",), {})]),
    "turns": (
        "turns.turns",
        "the newest turns, of all agents or one",
        [(("agent",), {"nargs": "?"}), (("--limit",), {"type": _whole, "default": 20})],
    ),
    "turn": (
        "turns.turn",
        "show a turn whole, or replay it: run it again with the code of now, at no cost",
        [
            (("what",), {"choices": ["show", "replay"], "help": "replay ends with 1 where it would differ now"}),
            (("turn",), {"type": _whole, "metavar": "ID"}),
        ],
    ),
    "search": (
        "messages.search",
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
        "messages.thread",
        "the messages of one thread, in order",
        [
            (("message",), {"type": _whole, "help": "any message of it"}),
            (("--after",), {"type": _whole, "metavar": "ID", "help": "only those after this one"}),
        ],
    ),
    "explain": (
        "messages.explain",
        "the life of a message: who sent it and why, who had it, how it ended",
        [(("what",), {"nargs": "?", "choices": ["message"]}), (("message",), {"type": _whole, "metavar": "ID"})],
    ),
    "backup": (
        "hive.backup",
        "write the whole hive into one file, while it runs",
        [
            (("file",), {"help": "a tar file; - writes to standard output"}),
            (("--with-credentials",), {"action": "store_true", "help": "put in those of models, projects and forges"}),
        ],
    ),
    "restore": (
        "hive.restore",
        "bring a hive back from a backup, into an empty state directory",
        [
            (("file",), {}),
            (("--check",), {"action": "store_true", "help": "look whether it is whole, and write nothing"}),
            (("--paused",), {"action": "store_true", "help": "let no agent run before `hive start`"}),
        ],
    ),
    "questions": ("questions.questions", "questions to you", [(("--limit",), {"type": _whole, "default": 50})]),
    "answer": (
        "questions.answer",
        "answer a question",
        [
            (("question",), {"type": _whole, "metavar": "ID"}),
            (("text",), {"nargs": "?", "help": "where the question takes text"}),
            (("--choice",), {"action": "append", "metavar": "OPTION", "help": "an option, or its number"}),
            (("--file",), {"action": "append", "metavar": "FILE", "help": "send it with the answer; again for more"}),
        ],
    ),
    "schedule": (
        "schedules.schedule",
        "send a message by a clock",
        [
            (("what",), {"nargs": "?", "choices": ["list", "add", "pause", "resume", "run", "rm"], "default": "list"}),
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
    **REACH_VERBS,
    "loose-ends": (
        "questions.loose_ends",
        "what waits on you, and what you wait for",
        [(("agent",), {"nargs": "?", "help": "of this agent instead"})],
    ),
    "pending": ("approvals.pending", "what waits for your approval", []),
    "show": ("approvals.show", "one approval, whole", [(("approval",), {"type": _whole})]),
    "diff": (
        "approvals.diff",
        "what the commit of an approval changes, against what its agent runs or another commit",
        [
            (("approval",), {"type": _whole}),
            (
                ("--against",),
                {
                    "choices": ["running", "approved", "previous"],
                    "default": "running",
                    "help": "what runs now, what was approved last before it, or what was proposed before it",
                },
            ),
        ],
    ),
    "history": (
        "deploys.history",
        "what was deployed to an agent and what failed, newest first",
        [(("agent",), {}), (("--limit",), {"type": _whole, "default": 20, "help": "how many (20)"})],
    ),
    "blame": (
        "deploys.blame",
        "which approval set a setting of agent.toml (`model`, `env.LANG`) or a line of a file (`CLAUDE.md:12`)",
        [(("agent",), {}), (("key",), {})],
    ),
    "rollback": (
        "deploys.rollback",
        "run an agent on the files again that it ran on before, through the gate: shown, approved by this, proven",
        [
            (("agent",), {}),
            (("--to",), {"metavar": "deployed/ID", "help": "as `hive history` tells it; else what ran before"}),
            (("--reason",), {"help": "why, for the log"}),
        ],
    ),
    "apply": (
        "requests.apply",
        "ask to run an agent on a commit of its proposed repository",
        [
            (("agent",), {}),
            (("revision",), {"metavar": "REVISION", "help": "a branch, a tag, HEAD, or the id of a commit"}),
            _REASON,
        ],
    ),
    "spawn": (
        "requests.spawn",
        "ask for a new agent",
        _NEW_AGENT,
    ),
    "init-config": (
        "requests.spawn",
        "ask for a new agent's repositories alone, to be shaped before anything runs",
        _NEW_AGENT,
    ),
    "update-claude": (
        "requests.update_claude",
        "ask to run agents on another claude: the one that is installed now, PATH, or the one before",
        [
            (("path",), {"nargs": "?", "metavar": "PATH"}),
            (("--former",), {"action": "store_true", "help": "the one that agents ran before"}),
            _REASON,
        ],
    ),
    "update-meta-inputs": (
        "requests.update_meta_inputs",
        "ask to build every agent from newer inputs, where containers are NixOS systems",
        [_REASON],
    ),
    "approve": (
        "approvals.approve",
        "approve what is shown and asked for on a terminal, or by its hash; several of one kind together",
        [
            (("approval",), {"type": _whole, "nargs": "+"}),
            (
                ("--digest",),
                {"action": "append", "metavar": "HASH", "help": "what was shown, as `hive show` tells; once for each"},
            ),
        ],
    ),
    "deny": (
        "approvals.deny",
        "deny, with a reason that the requester reads",
        [(("approval",), {"type": _whole}), (("reason",), {})],
    ),
    "policy": (
        "policy.policy",
        "the rules by which changes pass without a click, and what rules would have let pass so far",
        [
            (("what",), {"nargs": "?", "choices": ["list", "rehearse"], "default": "list"}),
            (("--rule",), {"metavar": "FILE", "help": "rehearse: the rules of this file instead of those in force"}),
            (("--name",), {"help": "rehearse: only the rule of this name"}),
            (("--days",), {"type": _whole, "metavar": "N", "help": "rehearse: only what was asked for since then"}),
        ],
    ),
    "start": ("agents.want", "start an agent that was killed or paused", [(("agent",), {})]),
    "pause": ("agents.want", "let an agent take no turn and reach nothing until it is started", [(("agent",), {})]),
    "kill": ("agents.want", "end an agent now, and keep it down until it is started", [(("agent",), {})]),
    "restart": ("agents.restart", "start an agent anew, at its turn's edge", [(("agent",), {})]),
    "logs": (
        "agents.logs",
        "the last lines that an agent's harness printed",
        [(("agent",), {}), (("--lines",), {"type": _whole, "default": 50, "help": "how many, at most 500"})],
    ),
    "update": (
        "agents.update",
        "replace agents that an older release started, each at its turn's edge",
        [(("agent",), {"nargs": "?"}), (("--all",), {"action": "store_true", "help": "all of them, a few at a time"})],
    ),
    "destroy": (
        "tombstones.destroy",
        "end an agent at its turn's edge and free its name; what it had is kept",
        [(("agent",), {}), (("--now",), {"action": "store_true", "help": "in the middle of its turn"})],
    ),
    "tombstones": ("tombstones.tombstones", "agents that were destroyed, and what is kept of them", []),
    "revive": (
        "tombstones.revive",
        "make an agent again of what is kept of one",
        [(("tombstone",), {"metavar": "NAME[@DATE]"})],
    ),
    "purge": (
        "tombstones.purge",
        "remove what is kept of a destroyed agent, for good",
        [
            (("tombstone",), {"metavar": "NAME[@DATE]"}),
            (("--yes",), {"action": "store_true", "help": "without asking"}),
        ],
    ),
    "snapshots": ("snapshots.snapshots", "snapshots of an agent's /state", [(("agent",), {})]),
    "snapshot": ("snapshots.snapshot", "take a snapshot of an agent's /state, at its turn's edge", [(("agent",), {})]),
    "restore-state": (
        "snapshots.restore_state",
        "let an agent's /state be what it was; what is there now is kept as a snapshot",
        [
            (("agent",), {}),
            (("snapshot",), {"nargs": "?", "help": "its name or its beginning; the newest that differs when absent"}),
            (("--now",), {"action": "store_true", "help": "in the middle of its turn"}),
        ],
    ),
    "estop": ("hive.freeze", "stop the whole swarm now: cut its calls to the model, begin no turn", []),
    "thaw": ("hive.freeze", "let a stopped swarm go on, with the messages that it holds", []),
    "credentials": (
        "credentials.credentials",
        "the credentials for the model provider: who uses them, whether they work, how much is left",
        [
            (("what",), {"nargs": "?", "choices": ["list", "resume", "remove"], "default": "list"}),
            (("name",), {"nargs": "?", "metavar": "NAME", "help": "resume: try it now; remove: its agents wait"}),
        ],
    ),
    "login": (
        "credentials.login",
        "log in at the model provider, or give a key; agents that wait for it go on by themselves",
        [
            (("credential",), {"nargs": "?", "help": "its name; default when absent"}),
            (("--api-key",), {"action": "store_true", "help": "read an API key from standard input"}),
            (("--token",), {"action": "store_true", "help": "read a token of `claude setup-token` from there"}),
            (("--cancel",), {"action": "store_true", "help": "end a login of it that runs"}),
        ],
    ),
    "costs": (
        "spend.costs",
        "what calls to the model have cost",
        [
            (("--by",), {"choices": ["agent", "model", "cause", "day"], "default": "agent"}),
            (
                ("--since",),
                {"metavar": "24h|7d|DATE", "help": "hours back; days of UTC, with today; or from that day on"},
            ),
        ],
    ),
    "budget": (
        "spend.budget",
        "how much the hive or an agent may spend: a warning, then a stop",
        [
            (("what",), {"nargs": "?", "choices": ["list", "set", "remove"], "default": "list"}),
            (("scope",), {"nargs": "?", "metavar": "hive|AGENT"}),
            (("kinds",), {"nargs": "*", "metavar": "KIND", "help": "remove: day, total, window-5h or window-7d"}),
            (("--day",), {"metavar": "USD", "help": "in a day of UTC"}),
            (("--total",), {"metavar": "USD", "help": "since the hive began"}),
            (("--window-5h",), {"metavar": "PERCENT", "help": "of the account's 5-hour window"}),
            (("--window-7d",), {"metavar": "PERCENT"}),
            (("--warn",), {"type": _whole, "metavar": "PERCENT", "help": "when to warn; 80 when absent"}),
        ],
    ),
    "events": (
        "hive.events",
        "what people did and what changed",
        [
            (("--follow",), {"action": "store_true", "help": "go on until Ctrl-C"}),
            (("--after",), {"type": _whole, "metavar": "SEQ", "help": "only events after this number"}),
            (("--limit",), {"type": _whole, "default": 50}),
        ],
    ),
    "dashboard": ("hive.dashboard", "print a link that signs one browser in", []),
    "doctor": ("doctor.doctor", "say whether this machine can run a hive, and what is in the way", []),
    "down": (
        "hive.down",
        "let every agent finish its turn, then end them and the daemon",
        [(("--patience",), {"type": seconds(30), "metavar": "SECONDS", "help": "end agents by force after this long"})],
    ),
}


def parse(words: list[str]) -> Namespace:
    """The arguments of one call. Only the parser of its own verb is built: a start has 100 ms for everything."""
    from argparse import HelpFormatter, RawDescriptionHelpFormatter

    parser_type = parser_class()

    def formatter(prog: str) -> HelpFormatter:
        # A width of our own: looking for the terminal's imports shutil, and with it three kinds of compression.
        return RawDescriptionHelpFormatter(prog, width=100)

    if words and words[0] in VERBS:
        run, help_text, arguments = VERBS[words[0]]
        parser = parser_type(prog=f"hive {words[0]}", description=help_text, formatter_class=formatter)
        for names, options in arguments:
            parser.add_argument(*names, **options)
        parser.set_defaults(run=run, verb=words[0])
        words = words[1:]
    else:
        width = max(map(len, VERBS))
        listed = "\n".join(f"  {name:{width}} {verb[1]}" for name, verb in VERBS.items())
        parser = parser_type(
            prog="hive",
            usage="hive [--json] [VERB …]",
            description="Run a swarm of coding agents on a machine of your own.\nWithout a verb: what waits for you.",
            epilog=f"verbs (`hive VERB --help` says more):\n{listed}",
            formatter_class=formatter,
        )
        parser.add_argument("--version", action="store_true", help="print the version")
        parser.set_defaults(run="hive.status")
        if words and not words[0].startswith("-"):
            parser.error(f"there is no verb {shown(words[0])}")
    parser.add_argument("--json", action="store_true", help="print JSON")
    # Options may stand between the words of these.
    return (parser.parse_intermixed_args if parser.prog in _INTERMIXED else parser.parse_args)(words)


_INTERMIXED = ("hive send", "hive project", "hive schedule", "hive answer", "hive budget", "hive forge")
