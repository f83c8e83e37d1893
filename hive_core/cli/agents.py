"""Agents: what they do, and whether they shall."""

from __future__ import annotations

import json

from hive_core.cli.client import Client
from hive_core.cli.output import emit
from hive_core.protocol.refusal import Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace


def list_agents(arguments: Namespace) -> None:
    client = Client()
    for result in client.stream("watch") if arguments.follow else [client.call("list")]:
        if arguments.json:
            print(json.dumps(result), flush=True)
        else:
            from hive_core.cli import show

            print(show.agents(result), flush=True)


def want(arguments: Namespace) -> None:
    result = Client().call(arguments.verb, agent=arguments.agent)
    emit(arguments, result, f"{result['agent']} is wanted {result['wanted']}")


def restart(arguments: Namespace) -> None:
    result = Client().call("restart", agent=arguments.agent)
    emit(arguments, result, f"{result['agent']} is started anew, at its turn's edge")


def logs(arguments: Namespace) -> None:
    from hive_core.cli.show import safe

    result = Client().call("logs", agent=arguments.agent, lines=arguments.lines)
    emit(arguments, result, safe("\n".join(result["lines"])) or f"{result['agent']} has printed nothing that is kept")


def cancel(arguments: Namespace) -> None:
    result = Client().call("cancel", agent=arguments.agent)
    emit(arguments, result, f"turn {result['turn']} of {result['agent']} is cancelled, and its messages with it")


def update(arguments: Namespace) -> None:
    if arguments.all == (arguments.agent is not None):
        raise Refusal("usage", "cannot tell whom to update: name one agent, or give --all")
    result = Client().call("update", **({"all": True} if arguments.all else {"agent": arguments.agent}))
    if names := result["agents"]:
        text = f"{', '.join(names)}: replaced at the edge of {'a' if len(names) > 1 else 'its'} turn"
    else:
        text = f"{arguments.agent or 'every agent'} is as it would be started now ({result['revision']})"
    emit(arguments, result, text)
