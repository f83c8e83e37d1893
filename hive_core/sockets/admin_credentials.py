"""The operator's verbs about credentials, on host.sock. No answer carries a secret."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from hive_core.credentials import DEFAULT, SUFFIXES, parse_credential_name
from hive_core.hive import Hive
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import OPERATOR, shown

Args = dict[str, Any]
Verbs = dict[str, tuple[Callable[[Args], Awaitable[Any]], set[str]]]


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

    return {
        "credentials": (rows, set()),
        "credentials_resume": (resume, {"credential"}),
        "credentials_remove": (remove, {"credential"}),
        "credentials_give": (give, {"credential", "kind", "secret"}),
    }


def _name(args: Args) -> str:
    return parse_credential_name(args.get("credential") or DEFAULT)
