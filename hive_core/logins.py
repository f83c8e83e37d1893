"""How a credential comes into the hive and goes: by the operator's word alone, one change of a credential at a time."""

from __future__ import annotations

from typing import Any

import trio

from hive_core.breaker import Breaker
from hive_core.credentials import Credentials, parse_secret
from hive_core.protocol.paths import explain
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName


class Logins:
    def __init__(self, credentials: Credentials, breaker: Breaker) -> None:
        self._credentials = credentials
        self._breaker = breaker

    async def give(self, name: str, kind: str, given_secret: object, actor: AgentName) -> dict[str, Any]:
        """Store an API key or a token under a name: {credential, kind, source, agents: who goes on}. Raises Refusal."""
        secret = parse_secret(kind, given_secret)
        with trio.CancelScope(shield=True):  # else what is stored and what is known could be two things
            try:
                await trio.to_thread.run_sync(self._credentials.put, name, kind, secret)
            except OSError as exc:
                raise Refusal("unavailable", f"cannot store the credential {name}: {explain(exc)}") from None
            told = await self._breaker.renewed(name, actor)
        return {"credential": name, **told}

    async def remove(self, name: str, actor: AgentName) -> dict[str, Any]:
        """Take a credential away: {credential, agents: who waits from now on}. Raises Refusal."""
        with trio.CancelScope(shield=True):
            try:
                await trio.to_thread.run_sync(self._credentials.remove, name)
            except OSError as exc:
                raise Refusal("unavailable", f"cannot remove the credential {name}: {explain(exc)}") from None
            told = await self._breaker.removed(name, actor)
        return {"credential": name, **told}
