"""What is known of each credential: whether the provider takes it, until when it is limited, how much is used.

A row per credential; the breaker (breaker.py) decides, this is the form and how it is kept.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

from hive_core.credentials import Credential, Credentials
from hive_core.limits import Limits
from hive_core.protocol.words import MessageBody
from hive_core.provider_limits import FAR_MS, WINDOWS, Window
from hive_core.services.notices import tell_manager
from hive_core.store.bus import CREDENTIALS
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
        return {key: one for key, one in self.windows.items() if not one.is_over(key, now_ms)}

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
                f"it is tried again {at_instant(self.until_ms, now_ms)}, {again}"
            )
        if self.stays:
            return (
                f"the credential {self.name} reached a limit of the provider's ({self.status}) and stays stopped "
                f"(after_limit); `hive credentials resume {self.name}` lets its agents go on"
            )
        what = "is overloaded" if self.status == 529 else f"limits the credential {self.name}"
        return f"the provider {what} ({self.status}); agents on it go on {at_instant(self.until_ms, now_ms)}, {again}"


def at_instant(at_ms: int | None, now_ms: int) -> str:
    """When something is tried again, as words in a sentence."""
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


class News(NamedTuple):
    """An event to be written with a state, and what hm1nd is told of it."""

    kind: str
    actor: str
    agent: str | None
    data: dict[str, Any]
    message: MessageBody | None = None  # for the manager


class Unsaved(NamedTuple):
    """What one transaction writes down."""

    states: dict[str, CredentialState]
    news: dict[str, list[News]]


class CredentialStates:
    """The states in memory, which go first, and what of them is still to be written down."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._states: dict[str, CredentialState] = {}
        self._unsaved: dict[str, list[News]] = {}

    def load(self, rows: Iterable[sqlite3.Row], credentials: Credentials) -> None:
        """Take up what was written down, but of a secret that was changed meanwhile."""
        for state in map(state_from_row, rows):
            credential = credentials.find(state.name)
            if credential is None or credential.fingerprint == state.fingerprint:
                self._states[state.name] = state

    def all(self) -> list[CredentialState]:
        return list(self._states.values())

    def of(self, credential: Credential) -> CredentialState:
        """What is known of a credential: nothing, when what was known is of another secret."""
        known = self._states.get(credential.name)
        if known is None or known.fingerprint != credential.fingerprint:
            return CredentialState(credential.name, credential.fingerprint)
        return known

    def note(self, state: CredentialState) -> None:
        """Know this, but write it down only with the next that counts."""
        self._states[state.name] = state

    def put(self, state: CredentialState, *news: News) -> None:
        self._states[state.name] = state
        self._unsaved.setdefault(state.name, []).extend(news)

    def forget(self, name: str) -> None:
        self._states.pop(name, None)
        self._unsaved.pop(name, None)

    def unsaved(self) -> Unsaved | None:
        """What is to be written down now; None when nothing is."""
        if not self._unsaved:
            return None
        states = {name: self._states[name] for name in self._unsaved}
        return Unsaved(states, {name: list(news) for name, news in self._unsaved.items()})

    def write(self, tx: Transaction, unsaved: Unsaved | None) -> None:
        if unsaved is None:
            return
        for name, state in unsaved.states.items():
            keep_state(tx, state)
            for one in unsaved.news[name]:
                tx.emit(one.kind, one.actor, one.agent, credential=name, **one.data)
                if one.message:
                    tell_manager(tx, one.message, self._limits)
            tx.wake(CREDENTIALS)

    def saved(self, unsaved: Unsaved | None) -> None:
        """That was committed; what came meanwhile is still to be written down."""
        if unsaved is None:
            return
        for name, news in unsaved.news.items():
            left = self._unsaved.get(name, [])[len(news) :]
            if left or self._states.get(name, unsaved.states[name]) != unsaved.states[name]:
                self._unsaved[name] = left
            else:
                self._unsaved.pop(name, None)
