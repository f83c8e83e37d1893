"""The operator's verbs about credentials, on host.sock. No answer carries a secret."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import trio

from hive_core.credentials import DEFAULT, SUFFIXES, parse_credential_name
from hive_core.hive import Hive
from hive_core.procedures.logins import ENDED
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import OPERATOR, shown
from hive_core.store.bus import CREDENTIALS

Args = dict[str, Any]
Tell = Callable[[Any], Awaitable[None]]
LOOK_S = 5.0
Verbs = dict[str, tuple[Callable[[Args], Awaitable[Any]], set[str]]]
Streams = dict[str, tuple[Callable[[Args, Tell], Awaitable[None]], set[str]]]


def credential_verbs(hive: Hive) -> Verbs:
    """verb → (what answers it, the arguments it takes)."""

    async def rows(_: Args) -> Any:
        await hive.breaker.tick()  # what was changed by hand counts from here on
        return {"credentials": hive.breaker.rows(), "after_limit": hive.config.after_limit}

    async def resume(args: Args) -> Any:
        return await hive.breaker.resume(_name(args), OPERATOR)

    async def remove(args: Args) -> Any:
        return await hive.logins.remove(_name(args), OPERATOR)

    async def give(args: Args) -> Any:
        kind = args.get("kind")
        if not isinstance(kind, str) or kind not in SUFFIXES:
            raise Refusal(
                "usage", f"cannot use {shown(kind)} as the kind of a credential: give {' or '.join(SUFFIXES)}"
            )
        return await hive.logins.give(_name(args), kind, args.get("secret"), OPERATOR)

    async def login_code(args: Args) -> Any:
        return (await hive.logins.enter_code(_name(args), args.get("code"))).to_wire()

    async def login_cancel(args: Args) -> Any:
        return hive.logins.cancel(_name(args)).to_wire()

    return {
        "login_code": (login_code, {"credential", "code"}),
        "login_cancel": (login_cancel, {"credential"}),
        "credentials": (rows, set()),
        "credentials_resume": (resume, {"credential"}),
        "credentials_remove": (remove, {"credential"}),
        "credentials_give": (give, {"credential", "kind", "secret"}),
    }


def credential_streams(hive: Hive) -> Streams:
    """verb → (what goes on, the arguments it takes)."""

    async def login(args: Args, tell: Tell) -> None:
        """Each state of a login up to its end; it ends with who asked for it."""
        with hive.store.bus.listen(CREDENTIALS) as listener:
            login = hive.logins.begin(_name(args), "the command line")
            try:
                while login.state not in ENDED:
                    await tell(login.to_wire())  # also now and then, so that a hang-up is seen
                    with trio.move_on_after(LOOK_S):
                        await listener.wait()
            finally:
                if login.state not in ENDED and not login.stores:
                    hive.logins.cancel(login.name)
        if login.state == "failed":
            raise Refusal("unavailable", login.sentence)
        await tell(login.to_wire())

    return {"login": (login, {"credential"})}


def _name(args: Args) -> str:
    # An empty name is none: a shell makes it of a variable that nobody set.
    given = args.get("credential")
    return parse_credential_name(DEFAULT if given is None else given)
