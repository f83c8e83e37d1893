"""The forms on harness.sock: what a harness and its host say to each other.

JSON lines, one request at a time, answered in order: `{"id": n, "op": …}` gets `{"id": n, "ok": true, …}` or
`{"id": n, "ok": false, "error": {…}}`. What a harness says is a claim: it can lose only its own agent's mail.

    hello  version, instance, fences, checks    → version, agent, role; checks: it can be asked to check its program
    lease  fence                                → turn, or check: a Check, or stop: true
    checked  check, ok, error, reason           → counted: the end of a check, and in a sentence why it was not well
    lines  turn, first, lines, state, …         → kept, running; the first also with prompt_sha256, of what was asked
    ack    turn, fence, outcome, next, …        → counted, stop, and lease where the next turn began with it
    background  state, work, …                  → counted, also while a lease waits: a command in the background began
                                                  or ended (protocol.harness.BackgroundWork); state none: no other runs
    unasked_turn  key                           → counted, also while a lease waits: a program began a turn by itself
    projects                                    → projects: those of the agent, each a ProjectState, fetched a moment
                                                  ago or just now; at most 10 s are waited for that

The harness chooses the fence of each turn, so a request that is asked again after a lost connection finds the turn that
the first one began. `lines` without lines, every RENEW_EVERY_S, says that the harness of a quiet turn lives; `running`
false in its answer says that the turn was taken away or cancelled, and its program has to end. `state` in it is what
the program does now, when that has changed.

A check is no turn: the harness of an agent that was changed starts its program, sees that it reaches the hive's tools,
and ends it, without a call of the model unless it is given a prompt for it. A harness that said nothing of `checks` is
asked for none.

A hello is answered in the harness's own version. One that is older than the host's gets no new turn: `stop` comes with
the answer to its ack, or instead of a lease, and the host starts a harness of its own version in its place.
"""

from __future__ import annotations

OWN_PLUGIN = "own"  # has the skills of an agent; no plugin of its own is called so
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Literal, NotRequired, TypedDict

    Outcome = Literal["done", "failed", "waiting", "cancelled"]

    class McpServer(TypedDict):
        """A server of tools, as the program's --mcp-config has it, and which of its tools are to be had."""

        command: str
        args: list[str]
        env: dict[str, str]
        allowed_tools: NotRequired[list[str]]  # absent: all

    class Project(TypedDict):
        """A project of the hive's that the agent has a clone of."""

        name: str
        path: NotRequired[str]  # absent: /projects/NAME
        branch: NotRequired[str]  # absent: the project's own
        push: NotRequired[str]  # the branches that it may push, `*` at the end for any rest; absent: AGENT/*
        force: bool
        tags: bool

    class ProjectState(TypedDict):
        """A project as the host has it: what the settings say, and whether it can be cloned."""

        name: str
        path: str
        branch: str | None  # to begin from; None: the project's own
        push: str  # the branches that may be pushed, `*` at the end for any rest; empty: none
        trouble: str | None  # why it may be old, or cannot be cloned at all: a sentence

    class Offered(TypedDict):
        """A skill or a command that the model can choose."""

        name: str
        description: str

    class Extras(TypedDict):
        """What lies in the agent's /extras/DIGEST: plugins by their names, with the skills in OWN_PLUGIN."""

        digest: str
        skills: list[str]
        plugins: list[str]
        offered: list[Offered]

    class Settings(TypedDict):
        """What the deployed commit says about the agent; it travels with each lease, so a change needs no restart."""

        program: str  # "claude" or "rehearsal"
        model: str
        effort: NotRequired[str]
        tools: list[str]  # the program's own tools that are on
        prompt: str  # CLAUDE.md of the deployed commit
        turns: NotRequired[str]  # "warm": one process takes many; "cold": each has its own
        warm_idle_s: NotRequired[int]  # how long a process is kept without a turn
        warm_turns: NotRequired[int]  # how many it takes
        warm_memory_mib: NotRequired[int]  # above which it takes no more
        background_s: NotRequired[int]  # after so long a command in the background is ended
        turn_silence_s: NotRequired[int]  # a turn that prints nothing for so long is stuck
        context_window: NotRequired[int]  # the tokens that fit into the model's context; absent: as the program says
        compact_at_percent: NotRequired[int]  # of that, above which the session is compacted; 0: never
        env: NotRequired[dict[str, str]]  # more of the program's environment
        mcp_servers: NotRequired[dict[str, McpServer]]  # beside the hive's own tools, by name
        projects: NotRequired[list[Project]]
        extras: NotRequired[Extras]

    class LeasedMessage(TypedDict):
        id: int
        sender: str
        pronouns: NotRequired[str]  # of the sender, as it says
        body: str
        sent_at_ms: int
        in_reply_to: int | None
        cause: str  # operator, turn, reminder, schedule or system: what set it off
        cause_id: int | None
        attempt: int  # 1 on the first delivery
        body_bytes: NotRequired[int]  # of a body that goes on: `read_body` has the rest
        files: NotRequired[list[AttachedFile]]

    class AttachedFile(TypedDict):
        """A file that came with a message."""

        name: str
        type: str  # its MIME type, by its name
        bytes: int
        path: NotRequired[str]  # where the agent finds it
        missing: NotRequired[str]  # why it is not there

    class Lease(TypedDict):
        turn: int
        fence: str
        message: LeasedMessage | None  # None on an errand
        errand: NotRequired[str | None]  # what is to be done with the session: one of ERRANDS
        waiting: int  # how many more messages wait
        refused: int  # how many messages the agent's full inbox did not take, ever
        settings: Settings
        session: str | None  # the program's session to go on with
        credential: str  # the kind of placeholder the program needs: "api_key" or "oauth_token"
        notes: NotRequired[list[str]]  # the harness's own: what is to be said of the agent's projects

    class Check(TypedDict):
        check: str  # names it, for `checked`
        prompt: NotRequired[str]  # to be answered in a turn that is none; absent: the model is not called
        settings: Settings
        credential: str  # as of a lease

    class BackgroundWork(TypedDict):
        """A command that outlives the turn which began it. All of it is the agent's claim."""

        state: Literal["running", "ended", "timed_out", "cut_off"]
        work: str  # lower-case hexadecimal digits
        turn: int
        command: str  # shortened
        note: str
        output: str  # the path of its log
        code: int | None  # its exit code, negative for a signal; None while it runs, and where nobody knows
        took_ms: int | None
        tail: NotRequired[str]  # the last lines that it printed

    class State(TypedDict):
        """What the program does now, by the evidence of its stream: one of STATES."""

        state: str
        detail: str  # tool: which; stuck: one of STUCK; rate_limited, overloaded: which try
        until_ms: int | None  # when the program tries again, or the provider's limit ends

    class Context(TypedDict):
        """How full the session is."""

        tokens: int
        window: int | None  # how many fit; None where nobody knows

    class Ack(TypedDict):
        turn: int
        fence: str
        outcome: Outcome
        next: str | None  # the fence of the turn to begin with the same commit; None: begin none
        session: str | None
        error: str | None  # a sentence
        usage: dict[str, Any] | None
        reason: NotRequired[str | None]  # why it did not end well: one of REASONS
        limited_until_ms: NotRequired[int | None]  # when the provider's limit ends, where it said so
        context: NotRequired[Context | None]
        session_lost: NotRequired[bool]  # the session to go on with was unknown, so another was begun


PROTOCOL_VERSION = 3
OLDEST_VERSION = 2  # of a harness that a host still serves to the edge of its turn, and then lets end
LINES_PER_REQUEST = 64
STREAM_LINE_LIMIT_BYTES = 64 * 1024
# A whole request of `lines`: each line is JSON, whose quotes take a backslash more inside a string.
REQUEST_LIMIT_BYTES = 2 * LINES_PER_REQUEST * STREAM_LINE_LIMIT_BYTES
# A turn without a message: compact the session, or let it save its notes to /state before.
ERRANDS = frozenset({"compact", "save_and_compact"})
# `waiting` in an ack: the turn could not run for a reason that is not its own (no login, an overloaded provider).
OUTCOMES = frozenset({"done", "failed", "waiting", "cancelled"})
STATES = frozenset({"starting", "thinking", "tool", "compacting", "rate_limited", "overloaded", "stuck"})
# How a turn can be stuck. never_started: the program printed nothing; silent_busy: silent while its processes use the
# cpu; silent: they do nothing; not_ending: its result came, or its output ended, and it goes on; unanswered_prompt: it
# asks what nobody can answer; loop: it calls the same tool over and over.
STUCK = frozenset({"never_started", "silent_busy", "silent", "not_ending", "unanswered_prompt", "loop"})
# Why a turn did not end well.
REASONS = frozenset(
    {
        "rate_limited",
        "overloaded",  # the provider is overloaded, unreachable, or the hive does not let the agent call it
        "authentication",
        "billing",
        "prompt_too_long",
        "refusal",  # the model declined the request
        "error",  # another error of the provider or the program
        "crashed",  # the program ended before its result
        "stuck",
        "cancelled",
        "no_tools",  # the hive's tools could not be reached
        "no_program",
    }
)
RENEW_EVERY_S = 10.0
# A process is kept no longer than the provider's cache of its session, which is five minutes.
WARM_IDLE_S = 300
WARM_TURNS = 50
WARM_MEMORY_MIB = 1024
# Longer than any tool of the program waits, and than a model thinks before its first word.
TURN_SILENCE_S = 1800
# Behind it there is room for a turn, and for the one that saves notes.
COMPACT_AT_PERCENT = 75
FENCE_LIMIT = 64
BACKGROUND_AT_ONCE = 8
BACKGROUND_S = 6 * 3600
BACKGROUND_NOTE_LIMIT = 200  # characters, as those that follow
BACKGROUND_COMMAND_LIMIT = 500
BACKGROUND_TAIL_LIMIT = 1000
