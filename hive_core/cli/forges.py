"""Forges: where the pull requests and issues of projects are."""

from __future__ import annotations

from hive_core.cli.client import Client
from hive_core.cli.output import emit
from hive_core.cli.secret_input import read_secret
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.visible import counted
from hive_core.protocol.words import shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from typing import Any

NUMBER_DIGITS = 15


def forge(arguments: Namespace) -> None:
    what, words = arguments.what, arguments.words
    forms = {"add": "PROJECT URL OWNER/REPO with --token FILE", "list": "nothing", "rehearse": "PROJECT NUMBER"}
    form = forms.get(what, "the name of a project")
    if len(words) != {"add": 3, "list": 0, "rehearse": 2}.get(what, 1):
        raise Refusal("usage", f"cannot run `hive forge {what}`: it takes {form}")
    if what != "add" and (arguments.token or arguments.kind):
        raise Refusal("usage", f"cannot run `hive forge {what}`: --token and --kind belong to `hive forge add`")
    if what == "list":
        result = Client().call("forges")
        emit(arguments, result, _table(result["forges"]) or "no project has a forge; `hive forge add` gives it one")
    elif what == "rm":
        result = Client().call("forge_remove", project=words[0])
        emit(arguments, result, f"the forge of {words[0]} is forgotten, and its token with it")
    elif what == "check":
        result = Client().call("forge_check", project=words[0])
        emit(arguments, result, _answers(result))
    elif what == "rehearse":
        if not words[1].isdecimal() or len(words[1]) > NUMBER_DIGITS:
            raise Refusal("usage", f"cannot use {shown(words[1])} as the number of an issue or pull request")
        result = Client().call("forge_rehearse", project=words[0], number=int(words[1]))
        told = (
            f"lane {result['lane']} tells {', '.join(result['agents'])}" if result["lane"] else "no lane tells anybody"
        )
        emit(arguments, result, f"of {result['kind'].replace('_', ' ')} {result['number']} of {words[0]} {told}")
    else:
        if arguments.token is None:
            raise Refusal("usage", f"cannot run `hive forge add`: it takes {form}, or --token - for standard input")
        project, url, repository = words
        kind = arguments.kind or ("github" if url.rstrip("/") == "https://github.com" else "forgejo")
        client = Client()  # before anybody types a secret for nobody
        given = {"project": project, "kind": kind, "url": url, "repository": repository}
        result = client.call("forge_add", **given, token=read_secret("token", arguments.token))
        emit(arguments, result, f"{_answers(result)}; what happens there from now on can be told by lanes")


def _answers(result: dict[str, Any]) -> str:
    from hive_core.cli import show

    login, branch = show.one_line(result["login"]), show.one_line(result["default_branch"])
    unread = counted(result["unread"], "unread notification")
    return f"the forge of {result['project']} answers: it knows the hive as {login}, default branch {branch}, {unread}"


def _table(forges: list[dict[str, Any]]) -> str:
    from hive_core.cli import show

    cells, troubles = [], []
    for one in forges:
        looked = f"{show.ago(one['looked_at_ms'])} ago" if one["looked_at_ms"] else "never"
        state = show.paint(one["state"], {"ok": "green", "failing": "red"}.get(one["state"], "dim"))
        where = f"{one['url']}/{one['repository']}"
        lanes = ", ".join(one["lanes"]) or "none"
        cells.append([one["project"], one["kind"], where, show.one_line(one["login"]), lanes, looked, state])
        if one["error"]:
            until = f", asked again at {show.clock(one['rests_until_ms'])}" if one["rests_until_ms"] else ""
            troubles.append(f"{show.paint(one['project'], 'bold')}: {show.one_line(one['error'])}{until}")
    head = ["project", "kind", "repository", "known as", "lanes", "looked at", "state"]
    return "\n".join([show.table(cells, head), *troubles]) if cells else ""
