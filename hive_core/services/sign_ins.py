"""Who may click: browsers sign in with a one-time link and keep a cookie. Only digests are stored."""

from __future__ import annotations

import hashlib
import secrets
import time

from hive_core.protocol.words import OPERATOR
from hive_core.store.door import Store
from hive_core.store.writer import Transaction

LINK_VALID_S = 15 * 60
SIGN_IN_VALID_S = 30 * 24 * 3600
LINKS_LIMIT = 16


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


class SignIns:
    """Links live in memory, so that a restart forgets those nobody used; sign-ins are kept in the database."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._links: dict[str, float] = {}  # digest → valid until, seconds since 1970

    def new_code(self) -> str:
        """A code for one sign-in within 15 minutes."""
        now = time.time()
        self._links = {digest: until for digest, until in self._links.items() if until > now}
        while len(self._links) >= LINKS_LIMIT:
            self._links.pop(next(iter(self._links)))
        code = secrets.token_urlsafe(24)
        self._links[_digest(code)] = now + LINK_VALID_S
        return code

    async def redeem(self, code: str) -> str | None:
        """The cookie for a code, once; None when the code is unknown, used or too old."""
        if self._links.pop(_digest(code), 0.0) < time.time():
            return None
        cookie = secrets.token_urlsafe(32)

        def write(tx: Transaction) -> None:
            tx.execute("DELETE FROM sign_ins WHERE expires_at_ms <= ?", (tx.now_ms,))
            tx.execute(
                "INSERT INTO sign_ins (digest, created_at_ms, expires_at_ms) VALUES (?, ?, ?)",
                (_digest(cookie), tx.now_ms, tx.now_ms + SIGN_IN_VALID_S * 1000),
            )
            tx.emit("operator_signed_in", OPERATOR)

        await self._store.write(write)
        return cookie

    async def valid(self, cookie: str) -> bool:
        """Whether a browser with this cookie is signed in."""
        sql = "SELECT 1 FROM sign_ins WHERE digest = ? AND expires_at_ms > ?"
        return await self._store.row(sql, (_digest(cookie), int(time.time() * 1000))) is not None

    async def sign_out(self, cookie: str) -> None:
        sql = "DELETE FROM sign_ins WHERE digest = ?"
        await self._store.write(lambda tx: tx.execute(sql, (_digest(cookie),)).rowcount)
