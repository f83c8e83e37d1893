"""The hive as a whole: up and down, what it says of itself, and its backup."""

from __future__ import annotations

from hive_core.cli.output import as_json, emit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from typing import Any


def status(arguments: Namespace) -> None:
    if arguments.version:
        from hive_core.version import __version__

        emit(arguments, {"version": __version__}, __version__)
        return
    from hive_core.cli import show

    result = _client().call("status")
    emit(arguments, result, show.status(result))


def events(arguments: Namespace) -> None:
    from hive_core.cli import show

    for event in _client().stream("events", follow=arguments.follow, after=arguments.after, limit=arguments.limit):
        print(as_json(event) if arguments.json else show.event(event), flush=True)


def dashboard(arguments: Namespace) -> None:
    result = _client().call("dashboard")
    emit(arguments, result, result["url"])


def freeze(arguments: Namespace) -> None:
    result = _client().call(arguments.verb)
    text = "the swarm is stopped: `hive thaw` lets it go on" if result["frozen"] else "the swarm goes on"
    emit(arguments, result, text if result["changed"] else f"{text} (it was so before)")


def up(arguments: Namespace) -> int:
    from hive_core.cli.up import up

    return up(as_json=arguments.json, unsafe_no_sandbox=arguments.unsafe_no_sandbox)


def down(arguments: Namespace) -> int:
    from hive_core.cli.up import down

    return down(as_json=arguments.json, patience_s=arguments.patience)


def demo(arguments: Namespace) -> int:
    from hive_core.cli.demo import demo

    return demo(once=arguments.once, deny=arguments.deny, as_json=arguments.json)


def backup(arguments: Namespace) -> int:
    from hive_core.cli.backup import backup

    return backup(arguments.file, with_credentials=arguments.with_credentials, as_json=arguments.json)


def restore(arguments: Namespace) -> int:
    from hive_core.cli.backup import restore

    return restore(arguments.file, check=arguments.check, paused=arguments.paused, as_json=arguments.json)


def _client() -> Any:
    from hive_core.cli.client import Client

    return Client()
