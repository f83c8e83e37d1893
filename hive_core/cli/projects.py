"""Projects: the repositories that agents work on, each with a mirror on the host."""

from __future__ import annotations

from hive_core.cli.client import Client
from hive_core.cli.output import emit
from hive_core.cli.secret_input import read_secret
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.visible import mib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterator
    from typing import Any

_NEEDS: dict[str, tuple[str, ...]] = {
    "list": (),
    "add": ("its name", "a path or a url"),
    "fetch": ("its name",),
    "rm": ("its name",),
}


def project(arguments: Namespace) -> None:
    what, words = arguments.what, arguments.words
    needs = _NEEDS.get(what, ["its name"])
    if len(words) != len(needs):
        raise Refusal("usage", f"cannot run `hive project {what}`: give {' and '.join(needs) or 'no more words'}")
    if what != "add" and (arguments.key or arguments.token or arguments.host_key):
        raise Refusal("usage", f"cannot run `hive project {what}`: a credential is given with `hive project add`")
    if what == "list":
        result = Client().call("projects")
        none = "there is no project: `hive project add NAME PATH|URL` registers a repository"
        emit(arguments, result, "\n".join(map(_line, result["projects"])) or none)
    elif what == "add":
        import os

        client = Client()
        name, source = words
        # A path is one of this terminal's; the daemon works elsewhere.
        source = os.path.abspath(source) if source.startswith((".", "/")) or ":" not in source else source
        key = None if arguments.key is None else read_secret("key", arguments.key, one_line=False)
        token = None if arguments.token is None else read_secret("token", arguments.token)
        given = {"key": key, "token": token, "host_key": arguments.host_key}
        result = _follow(name, client.stream("project_add", project=name, source=source, **given))
        listed = f'projects = [{{ name = "{name}" }}]'
        emit(arguments, result, f"{_line(result)}\nan agent works on it when its agent.toml says {listed}")
    elif what == "fetch":
        result = _follow(words[0], Client().stream("project_fetch", project=words[0]))
        emit(arguments, result, _line(result))
    else:
        result = Client().call("project_remove", project=words[0])
        emit(arguments, result, f"project {words[0]} is gone, with its mirror and its credential")


def _follow(name: str, answers: Iterator[Any]) -> Any:
    """The last answer; on a terminal those before it tell how much has come."""
    import sys

    answer: Any = None
    line, shows = "\r\x1b[K", sys.stderr.isatty()
    try:
        for answer in answers:
            if shows and "arrived_bytes" in answer:
                said = f"fetching {name}: {mib(answer['arrived_bytes'])} so far; it goes on when you end this"
                print(f"{line}{said}", end="", file=sys.stderr, flush=True)
    finally:
        if shows:
            print(line, end="", file=sys.stderr, flush=True)
    return answer


def _line(row: dict[str, Any]) -> str:
    from hive_core.cli import show

    parts = [show.safe(row["source"]), f"branch {show.safe(row['branch'])}", mib(row["bytes"])]
    parts += [f"with a {row['credential']}"] if row["credential"] != "none" else []
    parts += [f"fetched {show.ago(row['fetched_at_ms'])} ago"]
    if "agents" in row:
        parts.append(f"for {', '.join(row['agents'])}" if row["agents"] else "for nobody yet")
    line = f"project {show.paint(row['name'], 'bold')}: {' · '.join(parts)}"
    return f"{line}\n  {show.paint('! ' + show.safe(row['trouble']), 'amber')}" if row["trouble"] else line
