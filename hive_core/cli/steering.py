"""An agent's session: compact it, begin another, choose the model and its effort."""

from __future__ import annotations

from hive_core.cli.client import Client
from hive_core.cli.output import emit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace


def compact(arguments: Namespace) -> None:
    result = Client().call("compact", agent=arguments.agent)
    emit(arguments, result, f"the next turn of {result['agent']} compacts its session")


def new_session(arguments: Namespace) -> None:
    result = Client().call("new_session", agent=arguments.agent)
    old = f"; turn {result['turn']} ends in the old one" if result["turn"] else ""
    emit(arguments, result, f"{result['agent']} begins a new session with its next turn{old}")


def choose(arguments: Namespace) -> None:
    what = arguments.verb
    result = Client().call(what, agent=arguments.agent, **{what: arguments.choice})
    chosen = result["chosen"] or "what its agent.toml says"
    emit(arguments, result, f"the {what} of {result['agent']} is {chosen}, from its next turn on")
