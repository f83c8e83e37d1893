"""What is known of each credential: whether the provider takes it, until when it is limited, how much is used.

A row per credential; the breaker (breaker.py) decides, this is the form and how it is kept.
"""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from hive_core.provider_limits import FAR_MS, WINDOWS, Window
from hive_core.store.writer import Transaction

LIMITED, REFUSED = "rate_limited", "needs_login"  # as the agents' state is called meanwhile


@dataclass(frozen=True, slots=True)
class CredentialState:
    """reason  why no agent may use it: LIMITED, REFUSED, or None: nothing is known against it"""

    name: str
    fingerprint: str  # of the secret that all this is about
    reason: str | None = None
    status: int | None = None  # of the answer that closed it
    since_ms: int | None = None
    until_ms: int | None = None  # when it is tried again
    failures: int = 0  # in a row, for the doubling of rests
    stays: bool = False  # until somebody resumes it
    agent: str | None = None  # whose call found it out
    worked_at_ms: int | None = None
    windows: dict[str, Window] = field(default_factory=dict)

    def rests(self, now_ms: int) -> bool:
        """Whether nobody may try it now. An instant further away than any limit was told before the clock went back."""
        return self.reason is not None and (self.stays or now_ms < (self.until_ms or 0) <= now_ms + FAR_MS)

    def windows_at(self, now_ms: int) -> dict[str, Window]:
        """Those that are not over: of another nothing is known until the provider tells it."""
        return {key: one for key, one in self.windows.items() if one.reset_ms is None or now_ms < one.reset_ms}

    @property
    def word(self) -> str:
        """works, untried, limited or refused."""
        if self.reason is None:
            return "works" if self.worked_at_ms else "untried"
        return {LIMITED: "limited", REFUSED: "refused"}[self.reason]

    def sentence(self, now_ms: int) -> str:
        """Why agents on it wait, until when, and who can change that."""
        again = f"`hive credentials resume {self.name}` tries it at once"
        if self.reason == REFUSED:
            return (
                f"the provider refuses the credential {self.name} ({self.status}); `hive login {self.name}` renews it, "
                f"it is tried again {_at(self.until_ms, now_ms)}, {again}"
            )
        if self.stays:
            return (
                f"the credential {self.name} reached a limit of the provider's ({self.status}) and stays stopped "
                f"(after_limit); `hive credentials resume {self.name}` lets its agents go on"
            )
        what = "is overloaded" if self.status == 529 else f"limits the credential {self.name}"
        return f"the provider {what} ({self.status}); agents on it go on {_at(self.until_ms, now_ms)}, {again}"


def _at(at_ms: int | None, now_ms: int) -> str:
    if at_ms is None or at_ms <= now_ms:
        return "now"
    return f"at {datetime.fromtimestamp(at_ms / 1000, UTC):%Y-%m-%d %H:%M:%S} UTC"


_COLUMNS = (
    "name",
    "fingerprint",
    "reason",
    "status",
    "since_ms",
    "open_until_ms",
    "failures",
    "stays",
    "agent",
    "worked_at_ms",
    "windows",
)
_KEEP = f"INSERT OR REPLACE INTO credential_states ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})"


def keep_state(tx: Transaction, state: CredentialState) -> None:
    windows = json.dumps({name: window._asdict() for name, window in state.windows.items()})
    values = (state.name, state.fingerprint, state.reason, state.status, state.since_ms, state.until_ms)
    tx.execute(_KEEP, (*values, state.failures, state.stays, state.agent, state.worked_at_ms, windows))


def forget_state(tx: Transaction, name: str) -> None:
    tx.execute("DELETE FROM credential_states WHERE name = ?", (name,))


def state_from_row(row: sqlite3.Row) -> CredentialState:
    windows: dict[str, Any] = json.loads(row["windows"])
    return CredentialState(
        name=row["name"],
        fingerprint=row["fingerprint"],
        reason=row["reason"],
        status=row["status"],
        since_ms=row["since_ms"],
        until_ms=row["open_until_ms"],
        failures=row["failures"],
        stays=bool(row["stays"]),
        agent=row["agent"],
        worked_at_ms=row["worked_at_ms"],
        windows={name: Window(**window) for name, window in windows.items() if name in WINDOWS},
    )
