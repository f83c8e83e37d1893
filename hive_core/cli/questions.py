"""Questions, and everything else that waits for somebody's word."""

from __future__ import annotations

from hive_core.cli.client import Client
from hive_core.cli.messages import opened, with_files
from hive_core.cli.output import emit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace


def questions(arguments: Namespace) -> None:
    from hive_core.cli import show

    result = Client().call("questions", limit=arguments.limit)
    emit(arguments, result, "\n".join(map(show.question, result["questions"])) or "no question waits for you")


def answer(arguments: Namespace) -> None:
    descriptors, files = opened(arguments.file or ())
    given = {"question": arguments.question, "text": arguments.text, "choices": arguments.choice, "files": files}
    result = Client().call("answer", descriptors, **given)
    text = f"question {result['question']} is answered, with message {result['message']}"
    emit(arguments, result, text + with_files(result))


def loose_ends(arguments: Namespace) -> None:
    from hive_core.cli import show

    result = Client().call("loose_ends", agent=arguments.agent)
    emit(arguments, result, show.loose_ends(result, arguments.agent or "you"))
