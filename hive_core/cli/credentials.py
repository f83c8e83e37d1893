"""Credentials of the host: what they are, how much of them is left, and how they come and go."""

from __future__ import annotations

from hive_core.cli.client import Client
from hive_core.cli.output import emit
from hive_core.cli.secret_input import read_secret
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.visible import named as safe

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from typing import Any

CODE_LIMIT = 4096


def credentials(arguments: Namespace) -> None:
    what, name = arguments.what, arguments.name
    if what == "list":
        if name is not None:
            raise Refusal("usage", "cannot run `hive credentials list`: it takes no name")
        from hive_core.cli import show

        result = Client().call("credentials")
        emit(arguments, result, "\n".join(map(show.credential, result["credentials"])))
        return
    if name is None:
        raise Refusal("usage", f"cannot run `hive credentials {what}`: give the credential's name")
    result = Client().call(f"credentials_{what}", credential=name)
    who = named_agents(result["agents"])
    done = {"resume": f"is tried again at once by the first of {who}", "remove": f"is gone, and waiting for it: {who}"}
    emit(arguments, result, f"credential {name} {done[what]}")


def login(arguments: Namespace) -> None:
    if arguments.api_key + arguments.token + arguments.cancel > 1:
        raise Refusal("usage", "cannot take them together: give --api-key, --token or --cancel")
    name = "default" if arguments.credential is None else arguments.credential
    if arguments.api_key or arguments.token:
        kind = "api_key" if arguments.api_key else "oauth_token"
        what = "API key" if arguments.api_key else "token"
        client = Client()  # before anybody types a secret for nobody
        result = client.call("credentials_give", credential=name, kind=kind, secret=read_secret(what))
        emit(arguments, result, logged_in(result))
        return
    if arguments.cancel:
        emit(arguments, Client().call("login_cancel", credential=name), f"the login of {name} is cancelled")
        return
    result, asked = {}, False
    try:
        for result in Client().stream("login", credential=name):
            if result["state"] == "link" and not asked:
                asked = True
                _ask_for_code(name, result["link"])
    except KeyboardInterrupt:
        raise Refusal("failed", f"the login of {name} is cancelled: nothing has changed") from None
    emit(arguments, result, logged_in(result))


def _ask_for_code(name: str, link: str) -> None:
    """What is asked goes to standard error, so that standard output has the result alone."""
    import sys

    print(f"log in here, and bring back the code that is shown:\n\n  {safe(link)}\n", file=sys.stderr)
    print("code: ", end="", file=sys.stderr, flush=True)
    if code := sys.stdin.buffer.readline(CODE_LIMIT).decode(errors="replace").strip():
        # A connection of its own: on the other one the login goes on.
        Client().call("login_code", credential=name, code=code)
        return
    raise Refusal("usage", f"cannot log in: no code was given; the login of {name} is cancelled")


def logged_in(result: dict[str, Any]) -> str:
    where = f"credential {result['credential']} is stored in {result['source']}"
    return f"{where}; agents on it that go on: {named_agents(result['agents'])}"


def named_agents(names: list[str]) -> str:
    return ", ".join(names) or "none"
