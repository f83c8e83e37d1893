"""What the operator can tell an agent's harness from its page, by a button or as a /command: one list for both."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from hive_core.hive import Hive
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import OPERATOR, AgentName, shown
from hive_core.services.steering import DEFAULT

Command = Callable[[Hive, AgentName, str], Awaitable[str]]  # answers with what was done, in a sentence


async def _help(hive: Hive, name: AgentName, value: str) -> str:
    return "; ".join(f"/{verb}{f' {takes}' if takes else ''}: {what}" for verb, (_, takes, what) in COMMANDS.items())


async def _cancel(hive: Hive, name: AgentName, value: str) -> str:
    turn = await hive.broker.cancel_turn(name, OPERATOR)
    return f"turn {turn} of {name} is cancelled, and its messages with it"


async def _pause(hive: Hive, name: AgentName, value: str) -> str:
    await hive.agents.want(name, "paused", OPERATOR)
    return f"{name} is paused: it takes no turn and reaches nothing"


async def _resume(hive: Hive, name: AgentName, value: str) -> str:
    await hive.agents.want(name, "up", OPERATOR)
    return f"{name} goes on"


async def _compact(hive: Hive, name: AgentName, value: str) -> str:
    await hive.steering.compact(name, OPERATOR)
    return f"the next turn of {name} compacts its session"


async def _new_session(hive: Hive, name: AgentName, value: str) -> str:
    turn = (await hive.steering.new_session(name, OPERATOR))["turn"]
    return f"{name} begins a new session with its next turn" + (f"; turn {turn} ends in the old one" if turn else "")


async def _update(hive: Hive, name: AgentName, value: str) -> str:
    if await hive.reconciler.updates.update(name, OPERATOR):
        return f"{name} is replaced at its turn's edge"
    return f"{name} is as it would be started now"


def _choose(what: str) -> Command:
    async def choose(hive: Hive, name: AgentName, value: str) -> str:
        chosen = (await hive.steering.choose(name, what, value, OPERATOR))["chosen"]
        return f"the {what} of {name} is {chosen or 'what its agent.toml says'}, from its next turn on"

    return choose


# the word → what does it, what it takes, what that is
COMMANDS: dict[str, tuple[Command, str, str]] = {
    "help": (_help, "", "say this"),
    "cancel": (_cancel, "", "end the turn that runs, its messages with it"),
    "pause": (_pause, "", "take no turn, reach nothing"),
    "resume": (_resume, "", "go on"),
    "update": (_update, "", "be replaced as it would be started now"),
    "compact": (_compact, "", "compact the session in the next turn"),
    "new-session": (_new_session, "", "forget the session"),
    "model": (_choose("model"), f"NAME|{DEFAULT}", "choose the model"),
    "effort": (_choose("effort"), f"LEVEL|{DEFAULT}", "choose how hard it thinks"),
}


async def run_command(hive: Hive, name: AgentName, verb: str, value: str) -> str:
    """Do what the operator tells; a sentence that says what was done. Raises Refusal."""
    if verb not in COMMANDS:
        known = ", ".join(f"/{word}" for word in COMMANDS)
        raise Refusal("usage", f"cannot do /{shown(verb).strip()}: the commands are {known}; begin with // to send it")
    command, takes, _ = COMMANDS[verb]
    if bool(takes) != bool(value):
        raise Refusal("usage", f"cannot do /{verb}: it takes {takes or 'nothing behind it'}")
    await hive.agents.get(name)
    return await command(hive, name, value)


def read_command(text: str) -> tuple[str, str] | None:
    """The command that a text is, and what stands behind it; None for a message. Two slashes begin a message."""
    if not text.startswith("/") or text.startswith("//"):
        return None
    verb, _, value = text[1:].strip().partition(" ")
    return verb, value.strip()
