"""What the operator asks for by a card, which he then approves as any other."""

from __future__ import annotations

from hive_core.cli.client import Client
from hive_core.cli.output import emit, given_text
from hive_core.protocol.words import PERSONA_LIMIT_BYTES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace


def spawn(arguments: Namespace) -> None:
    """A new agent, or (init-config) its repositories alone."""
    verb = {"spawn": "request_spawn", "init-config": "request_init_config"}[arguments.verb]
    persona = given_text("persona", PERSONA_LIMIT_BYTES) if arguments.persona is None else arguments.persona
    more = {key: getattr(arguments, key) for key in ("icon", "toolkit", "reason")}
    client = Client()
    result = client.call(verb, agent=arguments.agent, persona=persona, **more)
    text = how_it_stands(client, result["approval"])
    if config := result.get("config"):
        text += f"\nthen it lies in {config} to be shaped, and `hive apply {arguments.agent} HEAD` asks to create it"
    emit(arguments, result, text)


def apply(arguments: Namespace) -> None:
    client = Client()
    sha = client.call("expand_commit", agent=arguments.agent, revision=arguments.revision)["sha"]
    result = client.call("request_apply_commit", agent=arguments.agent, sha=sha, reason=arguments.reason)
    text = f"{arguments.revision} is {sha}; {how_it_stands(client, result['approval'])}"
    emit(arguments, {**result, "sha": sha}, text)


def update_meta_inputs(arguments: Namespace) -> None:
    client = Client()
    result = client.call("request_update_meta_inputs", reason=arguments.reason)
    emit(arguments, result, how_it_stands(client, result["approval"]))


def update_claude(arguments: Namespace) -> None:
    import os

    path = None if arguments.path is None else os.path.abspath(os.path.expanduser(arguments.path))
    client = Client()
    result = client.call("request_claude", path=path, reason=arguments.reason, former=arguments.former)
    emit(arguments, result, how_it_stands(client, result["approval"]))


def how_it_stands(client: Client, number: int) -> str:
    """Whether what was asked for waits, and how to go on."""
    from hive_core.cli.show import safe

    if rule := client.call("show", approval=number)["rule"]:
        return f"approval {number} passes by rule {safe(rule)}, without a click\n`hive show {number}` shows it"
    return f"approval {number} waits for you\n`hive show {number}` shows it, `hive approve {number}` approves it"
