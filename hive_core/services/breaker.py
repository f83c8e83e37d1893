"""The breaker: one per credential, for all agents on it, so that a limit is found out once and not by each of them.

    works ── 429, 529 ──▶ limited ──┐  until the reset that was told, else after a rest that doubles
      ▲  └──── 401 ─────▶ refused ──┤  after a rest that doubles, or with another secret
      │                             ▼
      └──── first success ──── tried by one agent; then the others follow, spread by chance

A 403 rests the agent that got it, and refuses the credential when another one gets it, too (own_refusals.py).

It is fed by the relay, from the provider's own answers; what an agent claims closes that agent alone. Its memory goes
first, since the next call must be refused at once; `serve` writes it down and wakes whoever may go on.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import trio

from hive_core.credentials import DEFAULT, Credential, Credentials
from hive_core.limits import Limits
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import SYSTEM, AgentName
from hive_core.provider_limits import FAR_MS, Window, reset_of, windows_of
from hive_core.services.access import Access, Closed
from hive_core.services.credential_states import (
    LIMITED,
    REFUSED,
    CredentialState,
    CredentialStates,
    News,
    Unsaved,
    at_instant,
    forget_state,
)
from hive_core.services.notices import notice
from hive_core.services.own_refusals import OwnRefusals
from hive_core.services.reopening import Reopening
from hive_core.services.rests import IS_DUE, REST_MOST_S, far_ms
from hive_core.store.bus import CREDENTIALS, DEPLOYED
from hive_core.store.door import BUSY_REST_S, Store
from hive_core.store.errors import StoreBusy
from hive_core.store.writer import Transaction

log = logging.getLogger(__name__)
LOOK_AGAIN_S = 30.0  # the clock may be set, and a credential's file changed by hand
WORKED_EVERY_MS = 600_000  # that it still works is written down no more often
BREAKER = "breaker"  # bus topic: there is something to write down


# The call that found it out has its answer coming, and those of others under way may well succeed.
_Wait = partial(Closed, cuts=False)


class _Use(NamedTuple):
    """What an agent needs: the name of its credential, and whether it has something to do with it now."""

    credential: str
    waits: bool


class Breaker:
    """chance: for jitter; given by a test that wants the same again."""

    def __init__(
        self,
        store: Store,
        credentials: Credentials,
        access: Access,
        limits: Limits | None = None,
        chance: random.Random | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._credentials = credentials
        self._access = access
        access.add(self.closed)
        self._limits = limits or Limits()
        self._chance = chance or random.Random()
        self._reopening = Reopening(self._limits, self._chance)
        self._clock = clock
        self._uses: dict[AgentName, _Use] = {}
        self._states = CredentialStates(self._limits)
        self._found: dict[str, str | None] = {}  # credential → the fingerprint that agents were last woken for
        self._claims: dict[AgentName, int] = {}
        self._own = OwnRefusals(partial(self._rest_ms, self._limits.refused_rest_s))
        self._one_writes = trio.Lock()  # else two would write the same news

    async def load(self) -> None:
        """Take up what an earlier daemon knew. To be awaited before anything is asked."""
        self._states.load(await self._store.rows("SELECT * FROM credential_states"), self._credentials)
        await self.tick()

    # -- what others ask ----------------------------------------------------------------------------------------------

    def name_of(self, agent: AgentName) -> str | None:
        """The credential that an agent's settings name; None when its program needs none."""
        use = self._uses.get(agent)
        return use.credential if use else None

    def kind_for(self, agent: AgentName) -> str:
        """The kind of placeholder that an agent's program needs."""
        found = self._credentials.find(self.name_of(agent) or DEFAULT)
        return found.kind if found else "api_key"

    def closed(self, agent: AgentName) -> Closed | None:
        """Why an agent may not call the model now, as far as its credential goes (access.Reason)."""
        name, now_ms = self.name_of(agent), self._now_ms()
        if name is None:
            return None
        if now_ms < (until_ms := self._claims.get(agent, 0)) <= now_ms + FAR_MS:
            return _Wait(LIMITED, f"the program of {agent} says that it is limited; it goes on then", until_ms)
        credential = self._credentials.find(name)
        if credential is None:
            return _Wait(REFUSED, f"no credential for the model provider: {self._credentials.missing(name)}")
        if (own_ms := self._own.until_ms(agent, name, now_ms)) is not None:
            why = f"the provider refuses what {agent} asks for (403), and of no other agent on the credential {name}"
            again = f"it tries again {at_instant(own_ms, now_ms)}, `hive credentials resume {name}` lets it at once"
            return _Wait(REFUSED, f"{why}; {again}", own_ms, own=self._own.failures(agent))
        state = self._states.of(credential)
        if state.reason is not None:
            return self._closed_by(state, agent, now_ms)
        if (at_ms := self._reopening.follows_at(agent, now_ms)) is not None:
            return _Wait(LIMITED, f"the credential {name} works again; its agents go on one after another", at_ms)
        return None

    def _closed_by(self, state: CredentialState, agent: AgentName, now_ms: int) -> Closed | None:
        trial = self._reopening.trial(state.name)
        if trial is None or state.rests(now_ms):
            until_ms = None if state.stays else state.until_ms
            own = state.failures if state.agent == agent else 0
            return _Wait(state.reason or LIMITED, state.sentence(now_ms), until_ms, own=own)
        if trial.agent in (None, agent):
            return None
        return _Wait(
            state.reason or LIMITED,
            f"{trial.agent} tries the credential {state.name} after its rest; the others follow when it works",
        )

    def credential_for(self, agent: AgentName) -> Credential | None:
        """The credential for a call of an agent's that begins now, where `closed` says nothing against it."""
        name = self.name_of(agent)
        if name is None:
            return None
        self._reopening.called(name, agent, self._now_ms())
        return self._credentials.find(name)

    def windows_used(self, agent: AgentName) -> dict[str, float]:
        """Of the account that an agent uses: window → the share that is used, of those that are told and not over."""
        name = self.name_of(agent)
        credential = self._credentials.find(name) if name is not None else None
        windows = self._states.of(credential).windows_at(self._now_ms()) if credential is not None else {}
        return {key: one.used for key, one in windows.items()}

    def users(self, name: str) -> list[AgentName]:
        return sorted(agent for agent, use in self._uses.items() if use.credential == name)

    def rows(self) -> list[dict[str, Any]]:
        """Every credential for the operator: what it is, what is known of it, who uses it. Never the secret."""
        names = dict.fromkeys([*self._credentials.names(), *sorted(use.credential for use in self._uses.values())])
        return [self.row(name) for name in names]

    def row(self, name: str) -> dict[str, Any]:
        """The same of one."""
        now_ms = self._now_ms()
        credential = self._credentials.find(name)
        state = self._states.of(credential) if credential else None
        windows = state.windows_at(now_ms) if state else {}
        return {
            "name": name,
            "kind": credential.kind if credential else None,
            "source": credential.source if credential else None,
            "agents": self.users(name),
            "state": state.word if state else "missing",
            "sentence": self._credentials.missing(name) or (state.sentence(now_ms) if state and state.reason else ""),
            "since_ms": state.since_ms if state else None,
            "until_ms": state.until_ms if state and not state.stays else None,
            "stays": bool(state and state.stays),
            "worked_at_ms": state.worked_at_ms if state else None,
            "windows": {key: window.to_wire() for key, window in windows.items()},
        }

    # -- what the relay tells -----------------------------------------------------------------------------------------

    def answered(self, agent: AgentName, credential: Credential, status: int, headers: Mapping[str, str]) -> None:
        """Take in one answer of the provider's to a call of `agent` with this credential."""
        now_ms = self._now_ms()
        current = self._credentials.find(credential.name)
        if current is None or current.fingerprint != credential.fingerprint:
            return  # another was put in its place while the call ran
        state = self._states.of(credential)
        self._note_windows(state, windows_of(headers, now_ms))
        state = self._states.of(credential)
        if status in (429, 529):
            self._limited(state, agent, status, reset_of(headers, now_ms), now_ms)
        elif status == 401 or (status == 403 and not self._refused_alone(state, agent, now_ms)):
            self._refused(state, agent, status, now_ms)
        elif 200 <= status < 300:
            self._worked(state, agent, now_ms)

    def claimed(self, agent: AgentName, until_ms: int) -> None:
        """An agent says itself that it is limited until an instant: that closes it alone, for 8 days at most."""
        now_ms = self._now_ms()
        if now_ms < until_ms:
            self._claims[agent] = min(until_ms, now_ms + FAR_MS)
            self._access.changed(agent)
            self._wake()

    def _note_windows(self, state: CredentialState, told: dict[str, Window]) -> None:
        if not told:
            return
        windows = {**state.windows, **told}
        if _as_shown(windows) != _as_shown(state.windows):
            self._put(replace(state, windows=windows))
        else:
            self._states.note(replace(state, windows=windows))

    def _limited(
        self, state: CredentialState, agent: AgentName, status: int, reset_ms: int | None, now_ms: int
    ) -> None:
        if state.reason == LIMITED and state.rests(now_ms):
            # Of a call that was under way with the first one: it is the same event.
            if reset_ms is not None and reset_ms > (state.until_ms or 0):
                self._put(replace(state, until_ms=reset_ms))
            return
        failures = state.failures + 1 if state.reason == LIMITED else 1
        until_ms = reset_ms or now_ms + self._rest_ms(self._limits.limit_rest_s, failures)
        stays = status == 429 and self._limits.after_limit == "stay"
        self._close(replace(state, status=status, failures=failures, until_ms=until_ms, stays=stays), LIMITED, agent)

    def _refused_alone(self, state: CredentialState, agent: AgentName, now_ms: int) -> bool:
        """Whether a 403 is about the agent that got it, as far as anybody knows: then that rests by itself."""
        if state.reason == REFUSED:
            return False
        before = self._own.until_ms(agent, state.name, now_ms)
        until_ms = self._own.refused(agent, state.name, self.users(state.name), now_ms)
        if until_ms is None:
            return False
        if until_ms != before:
            self._reopening.passes(state.name, agent, now_ms)
            data = {"status": 403, "until_ms": until_ms}
            self._put(state, News("credential_refused_to_agent", SYSTEM, agent, data))
            self._tell([agent])
        return True

    def _refused(self, state: CredentialState, agent: AgentName, status: int, now_ms: int) -> None:
        if state.reason == REFUSED and state.rests(now_ms):
            return
        failures = state.failures + 1 if state.reason == REFUSED else 1
        until_ms = now_ms + self._rest_ms(self._limits.refused_rest_s, failures)
        if state.rests(now_ms):  # until a limit's reset that the provider told: it holds all the same
            until_ms = max(until_ms, state.until_ms or 0)
        self._close(replace(state, status=status, failures=failures, until_ms=until_ms, stays=False), REFUSED, agent)

    def _close(self, state: CredentialState, reason: str, agent: AgentName) -> None:
        first = state.reason != reason
        since_ms = self._now_ms() if first else state.since_ms
        state = replace(state, reason=reason, since_ms=since_ms, agent=agent)
        kind = "credential_limited" if reason == LIMITED else "credential_refused"
        said = None
        if reason == REFUSED and first:
            text = f"agents wait: {state.sentence(self._now_ms())}. Only the operator can log in"
            said = notice("needs_login", text, credential=state.name, agents=self.users(state.name))
        data = {"status": state.status, "until_ms": state.until_ms, "stays": state.stays or None}
        self._reopening.failed(state.name, agent, self.users(state.name))
        if reason == REFUSED:
            self._own.forget(self.users(state.name))  # it was the credential
        self._put(state, News(kind, SYSTEM, agent, data, said))
        self._tell(self.users(state.name))

    def _worked(self, state: CredentialState, agent: AgentName, now_ms: int) -> None:
        self._own.worked(agent, state.name)
        if state.reason is None:
            if state.worked_at_ms is None or not 0 <= now_ms - state.worked_at_ms < WORKED_EVERY_MS:
                self._put(replace(state, worked_at_ms=now_ms))
            return
        if self._reopening.trial(state.name) is None or state.rests(now_ms):
            return  # of a call that began before the limit was reached
        again = notice(
            "logged_in",
            f"the credential {state.name} works again; agents go on by themselves",
            credential=state.name,
        )
        self._reopening.worked(state.name, [name for name in self.users(state.name) if name != agent], now_ms)
        fresh = CredentialState(state.name, state.fingerprint, worked_at_ms=now_ms, windows=state.windows)
        self._put(fresh, News("credential_reopened", SYSTEM, agent, {}, again if state.reason == REFUSED else None))

    def _rest_ms(self, first_s: float, failures: int) -> int:
        rest_s = min(first_s * 2 ** min(failures - 1, 30), max(first_s, REST_MOST_S))
        return int(rest_s * 1000 * (0.5 + self._chance.random()))

    # -- what the operator does ---------------------------------------------------------------------------------------

    async def resume(self, name: str, actor: AgentName) -> dict[str, Any]:
        """Try a limited or refused credential at once. Raises Refusal when there is none, or it is not stopped."""
        credential = self._credentials.find(name)
        if credential is None:
            raise Refusal("not_found", f"cannot resume the credential {name}: {self._credentials.missing(name)}")
        state = self._states.of(credential)
        claims = [agent for agent in self.users(name) if self._claims.pop(agent, None)]
        claims += self._own.forget(self.users(name))
        if state.reason is None and not claims:
            raise Refusal("conflict", f"cannot resume the credential {name}: nothing stops it")
        self._put(replace(state, stays=False, until_ms=self._now_ms()), News("credential_resumed", actor, None, {}))
        self._tell(claims)
        await self.tick()
        return {"credential": name, "agents": self.users(name)}

    async def renewed(self, name: str, actor: AgentName) -> dict[str, Any]:
        """A credential was given: forget what was known of the one before, and let its agents go on."""
        credential = self._credentials.find(name)
        if credential is None:
            raise Refusal("conflict", f"cannot use the credential {name}: {self._credentials.missing(name)}")
        self._forget(name)
        self._found[name] = credential.fingerprint
        data = {"credential_kind": credential.kind}
        text = f"the operator gave the credential {name}; agents on it go on by themselves"
        said = notice("logged_in", text, credential=name)
        self._put(CredentialState(name, credential.fingerprint), News("credential_logged_in", actor, None, data, said))
        self._tell(self.users(name))
        await self.tick()
        return {"kind": credential.kind, "source": credential.source, "agents": self.users(name)}

    async def removed(self, name: str, actor: AgentName) -> dict[str, Any]:
        """A credential was taken away."""
        self._forget(name)
        self._states.forget(name)

        def write(tx: Transaction) -> None:
            forget_state(tx, name)
            tx.emit("credential_removed", actor, credential=name)
            tx.wake(CREDENTIALS)

        async with self._one_writes:
            await self._store.write(write)
        self._tell(self.users(name))
        return {"agents": self.users(name)}

    def _forget(self, name: str) -> None:
        self._reopening.forget(name, self.users(name))
        self._own.forget(self.users(name))
        for agent in self.users(name):
            self._claims.pop(agent, None)

    # -- time ---------------------------------------------------------------------------------------------------------

    async def serve(self) -> None:
        """Write down what is known and let agents go on when their time comes, until cancelled."""
        with self._store.bus.listen(BREAKER, DEPLOYED) as listener:
            while True:
                rest_s = await self.tick()
                with trio.move_on_after(min(max(rest_s, 0.0), LOOK_AGAIN_S)):
                    await listener.wait()

    async def tick(self) -> float:
        """Do what is due now; how many seconds later to look again."""
        least_s = 0.0
        async with self._one_writes:
            unsaved = self._states.unsaved()
            with trio.CancelScope(shield=True):  # else what was written down would be so again
                try:
                    self._uses = await self._store.write(lambda tx: self._save(tx, unsaved))
                    self._states.saved(unsaved)
                except StoreBusy as busy:
                    log.warning("cannot write down what is known of credentials: %s", busy.message)
                    least_s = BUSY_REST_S
        now_ms = self._now_ms()
        self._look_at_files()
        for state in self._states.all():
            if state.reason is not None and not state.rests(now_ms):
                self._tell(self._reopening.hand_on(state, self.users(state.name), self._waits, now_ms))
        self._tell(self._reopening.let_follow(now_ms))
        self._tell(self._end_claims(now_ms))
        self._tell(self._own.end_rests(now_ms))
        return max(least_s, (min(self._instants(now_ms), default=now_ms + FAR_MS) - now_ms) / 1000)

    def _save(self, tx: Transaction, unsaved: Unsaved | None) -> dict[AgentName, _Use]:
        self._states.write(tx, unsaved)
        return {
            AgentName(row["name"]): _Use(row["credential"], bool(row["waits"]))
            for row in tx.execute(_USES, {"now": tx.now_ms, "far": far_ms(self._limits)}).fetchall()
        }

    def _waits(self, agent: AgentName) -> bool:
        """Whether an agent has something to do with its credential, and nothing else keeps it from that."""
        return self._uses[agent].waits and self._access.closed(agent) is None

    def _look_at_files(self) -> None:
        """Wake the agents of each credential that came, went or changed since they were woken last."""
        for name in {use.credential for use in self._uses.values()}:
            credential = self._credentials.find(name)
            mark = credential.fingerprint if credential else None
            if self._found.get(name, mark) != mark:
                self._forget(name)
                if credential is not None:
                    # Nothing is known of the new one, but where a call with it was quicker than this look.
                    self._put(self._states.of(credential), News("credential_changed", SYSTEM, None, {}))
                self._store.bus.publish([CREDENTIALS])
                self._tell(self.users(name))
            self._found[name] = mark

    def _end_claims(self, now_ms: int) -> list[AgentName]:
        over = [agent for agent, at_ms in self._claims.items() if not now_ms < at_ms <= now_ms + FAR_MS]
        for agent in over:
            del self._claims[agent]
        return over

    def _instants(self, now_ms: int) -> Iterable[int]:
        yield from self._reopening.instants()
        yield from self._claims.values()
        yield from self._own.instants()
        for state in self._states.all():
            if state.rests(now_ms) and state.until_ms is not None and not state.stays:
                yield state.until_ms
        if self._states.unsaved():
            yield now_ms

    # -- its own memory -----------------------------------------------------------------------------------------------

    def _put(self, state: CredentialState, *news: News) -> None:
        self._states.put(state, *news)
        self._wake()

    def _tell(self, agents: list[AgentName]) -> None:
        if agents:  # without a name it would be everybody
            self._access.changed(*agents)

    def _wake(self) -> None:
        self._store.bus.publish([BREAKER])

    def _now_ms(self) -> int:
        return int(self._clock() * 1000)


# Whether an agent has something to do with its credential: a turn that runs, or a message for the next one.
_USES = f"""
    SELECT name, coalesce(policy ->> 'credential', 'default') AS credential,
           wanted = 'up' AND (
             EXISTS (SELECT 1 FROM turns WHERE agent = name AND state = 'running')
             OR EXISTS (SELECT 1 FROM deliveries INDEXED BY deliveries_queued
                        WHERE recipient = name AND state = 'queued' AND {IS_DUE})) AS waits
    FROM agents WHERE settings ->> 'program' != 'rehearsal'
"""


def _as_shown(windows: dict[str, Window]) -> dict[str, tuple[int, int | None]]:
    return {name: (round(window.used * 100), window.reset_ms) for name, window in windows.items()}
