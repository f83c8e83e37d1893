"""Messages: sent, read, searched, and those that wait for the operator."""

from __future__ import annotations

import os
import stat
import sys

from hive_core.cli.client import Client
from hive_core.cli.output import emit, given_text
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import BODY_LIMIT_BYTES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Sequence
    from typing import Any


def send(arguments: Namespace) -> None:
    to, body = arguments.agent, arguments.body
    if arguments.to:
        if body is not None:
            raise Refusal("usage", "cannot send: give the recipients before the body or with --to, not both")
        to, body = ",".join(arguments.to), to
    if to is None:
        raise Refusal("usage", "cannot send to nobody: name an agent, several with commas, or * for everyone")
    if body is None and not arguments.file:
        body = given_text("message", BODY_LIMIT_BYTES)
    # The shell, and not we, would make one word of a list; the daemon takes one name, or a list.
    recipients = to.split(",") if "," in to else to
    descriptors, files = opened(arguments.file or ())
    given = {"to": recipients, "body": body, "in_reply_to": arguments.in_reply_to, "files": files}
    result = Client().call("send", descriptors, **given)
    text = f"sent as message {result['message']}{with_files(result)}"
    if held := result.get("held"):
        from hive_core.protocol.held import say_held

        text += f"; {say_held(result['message'], held)}"
    emit(arguments, result, text)


def opened(paths: Sequence[str]) -> tuple[list[int], list[dict[str, str]] | None]:
    """The files to send, open, and what a request says of them. Raises Refusal."""
    from hive_core.protocol.file_names import FILES_MOST, TOO_MANY

    if len(paths) > FILES_MOST:
        raise Refusal("usage", f"cannot send {len(paths):,} files: {TOO_MANY}")
    return [_open(path) for path in paths], [{"name": os.path.basename(path)} for path in paths] or None


def with_files(result: dict[str, Any]) -> str:
    """What is said behind "sent" of the files that went."""
    return f" with {', '.join(sent)}" if (sent := result.get("files")) else ""


def _open(path: str) -> int:
    """A file to send, open: the daemon may be somebody who cannot. Raises Refusal."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
    except OSError as exc:
        from hive_core.protocol.paths import explain

        raise Refusal("usage", f"cannot send the file: {explain(exc)}") from None
    raise Refusal("usage", f"cannot send {path}: it is not a file; give a file, or an archive of a folder")


def read(arguments: Namespace) -> None:
    from hive_core.cli import show

    client, body, offset = Client(), "", 0
    while offset is not None:
        result = client.call("read", message=arguments.message, offset=offset)
        body, offset = body + result["body"], result["next_offset"]
    files = result["files"]
    told = {"message": arguments.message, "body": body, "bytes": result["bytes"], "files": files}
    emit(arguments, told, show.safe(body))
    for file in () if arguments.json else files:  # beside what is printed, which is the body and nothing else
        print(f"with it: {show.file(file)}", file=sys.stderr)


def aside(arguments: Namespace) -> None:
    from hive_core.cli import show

    result = Client().call(arguments.verb, limit=arguments.limit)
    lines = [show.aside(arguments.verb, row) for row in result["messages"]]
    emit(arguments, result, "\n".join(lines) or f"nothing is {arguments.verb}")


def move(arguments: Namespace) -> None:
    result = Client().call(arguments.verb, message=arguments.message)
    number, names = result["message"], ", ".join(result["recipients"])
    text = {
        "requeue": f"message {number} goes to {names} again, with all its tries",
        "release": f"message {number} is on its way to {names}",
        "drop": f"message {number} is dropped: {names} will not get it",
    }[arguments.verb]
    emit(arguments, result, text)


def inbox(arguments: Namespace) -> None:
    from hive_core.cli import show

    result = Client().call("inbox", limit=arguments.limit)
    emit(arguments, result, "\n".join(map(show.message, result["messages"])) or "no messages")


def search(arguments: Namespace) -> None:
    from hive_core.cli import show

    # A word that the shell took the quotes from is a phrase again.
    text = " ".join(f'"{word}"' if " " in word and '"' not in word else word for word in arguments.text)
    given = {key: getattr(arguments, key) for key in ("sender", "thread", "after", "before", "limit", "cursor")}
    given |= {key: _with_zone(given[key]) for key in ("after", "before") if given[key]}
    result = Client().call("search", text=text, **given)
    lines = [show.found(row) for row in result["messages"]] or ["nothing was found"]
    if result["next_cursor"]:
        lines.append(f"more: add --cursor {result['next_cursor']}")
    if result.get("unindexed"):
        lines.append(f"not searched yet: {result['unindexed']} of the newest; ask again in a while")
    emit(arguments, result, "\n".join(lines))


def _with_zone(instant: str) -> str:
    """An instant without a zone is one of the clock on the wall, as all that we print; the daemon's is UTC."""
    from datetime import datetime

    try:
        at = datetime.fromisoformat(instant)
        return instant if at.tzinfo else at.astimezone().isoformat()
    except (ValueError, OverflowError):
        return instant  # which the daemon refuses with its reason


def thread(arguments: Namespace) -> None:
    from hive_core.cli import show

    result = Client().call("thread", message=arguments.message, after=arguments.after)
    emit(arguments, result, show.thread(result))


def explain(arguments: Namespace) -> None:
    from hive_core.cli import show

    result = Client().call("explain", message=arguments.message)
    emit(arguments, result, show.life(result))
