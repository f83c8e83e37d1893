"""How a credential comes into the hive and goes: by the operator's word alone, one login of a credential at a time.

A login runs the agent program's own in a throw-away sandbox (containers/login_program.py): it shows a link, the
operator brings the code back, the token is stored. It is bounded in time, and ends with the daemon.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from hive_core.containers.login_program import CODE_LIMIT, LoginProgram, open_login_program
from hive_core.credentials import Credentials, parse_secret
from hive_core.protocol.paths import explain
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import OPERATOR, AgentName
from hive_core.services.breaker import Breaker
from hive_core.store.bus import CREDENTIALS, Bus

LOGIN_WITHIN_S = 600.0
LINK_WITHIN_S = 60.0
ENDED = ("done", "failed")


@dataclass(slots=True)
class Login:
    """A login of one credential.

    state     starting, link (the operator is asked for the code), code (it is being checked), done or failed
    sentence  why it failed
    told      when done: {credential, kind, source, agents: who goes on}
    stores    the token has come, and nothing cancels the login any more
    """

    name: str
    by: str  # where the operator began it, for people
    since_ms: int = field(default_factory=lambda: int(time.time() * 1000))
    state: str = "starting"
    link: str | None = None
    sentence: str = ""
    told: dict[str, Any] = field(default_factory=dict)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    program: LoginProgram | None = None
    stores: bool = False

    def to_wire(self) -> dict[str, Any]:
        shown = {"credential": self.name, "state": self.state, "link": self.link, "sentence": self.sentence or None}
        return {**shown, "by": self.by, "since_ms": self.since_ms, **self.told}


class Logins:
    """trouble: why no login can run on this host, asked when one is begun; None: it can."""

    def __init__(
        self, bus: Bus, credentials: Credentials, breaker: Breaker, claude: Path | None, trouble: str | None
    ) -> None:
        self._bus = bus
        self._credentials = credentials
        self._breaker = breaker
        self.claude = claude
        self._trouble = trouble
        self._nursery: trio.Nursery | None = None
        self.all: dict[str, Login] = {}  # credential → its login that runs, or the last one that failed

    # -- without the program ------------------------------------------------------------------------------------------

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

    # -- with the program's own login ---------------------------------------------------------------------------------

    async def serve(self) -> None:
        """Run what is begun, until cancelled; that ends every login with its sandbox."""
        async with trio.open_nursery() as self._nursery:
            await trio.sleep_forever()

    def begin(self, name: str, by: str) -> Login:
        """Begin a login; it goes on by itself. Raises Refusal when it cannot, or another of this credential runs."""
        running = self.running(name)
        if running is not None:
            since = time.strftime("%H:%M:%S UTC", time.gmtime(running.since_ms / 1000))
            raise Refusal(
                "conflict",
                f"cannot log in: a login of {name} runs already, begun from {running.by} at {since}; finish it "
                f"there, or `hive login {name} --cancel`",
            )
        self._credentials.check_writable(name)
        other = (
            "run `claude setup-token` as yourself, here or elsewhere, and give its token to "
            f"`hive login {name} --token`, or an API key to `hive login {name} --api-key`"
        )
        if self.claude is None:
            raise Refusal("refused", f"cannot log in: claude is not installed here; install it, or {other}")
        if self._trouble:
            raise Refusal("refused", f"cannot log in: it needs a sandbox, and {self._trouble}; {other}")
        if self._nursery is None:
            raise Refusal("unavailable", "cannot log in: the hive has not started yet; try again")
        login = self.all[name] = Login(name, by)
        self._nursery.start_soon(self._run, login, self.claude)
        self._tell()
        return login

    def running(self, name: str) -> Login | None:
        login = self.all.get(name)
        return login if login is not None and login.state not in ENDED else None

    async def enter_code(self, name: str, given_code: object) -> Login:
        """Give a login the code that the provider's page showed. Raises Refusal when none waits for it."""
        login = self.running(name)
        if login is None or login.state != "link" or login.program is None:
            raise Refusal("conflict", f"cannot take the code: no login of {name} waits for one; `hive login {name}`")
        code = given_code.strip() if isinstance(given_code, str) else ""
        # Printable: what it is typed into is a terminal.
        if not 0 < len(code) <= CODE_LIMIT or not code.isascii() or not code.isprintable() or " " in code:
            raise Refusal("usage", "cannot take the code: copy it whole from the provider's page, as one word")
        login.state = "code"
        self._tell()
        await login.program.type_code(code)
        return login

    def cancel(self, name: str) -> Login:
        """End a login that runs. Raises Refusal when none does, or its token is being stored."""
        login = self.running(name)
        if login is None:
            raise Refusal("not_found", f"cannot cancel: no login of {name} runs")
        if login.stores:
            way_out = f"`hive credentials remove {name}` takes it away again"
            raise Refusal(
                "conflict", f"cannot cancel: the login of {name} is done, its token is being stored; {way_out}"
            )
        self._fail(login, "it was cancelled")
        login.scope.cancel()
        return login

    async def _run(self, login: Login, claude: Path) -> None:
        try:
            with login.scope, trio.move_on_after(LOGIN_WITHIN_S) as patience:
                async with open_login_program(claude) as login.program:
                    token = await self._talk(login, login.program)
                await trio.lowlevel.checkpoint()  # the last moment in which it can be cancelled
                login.stores = True
                login.told = await self.give(login.name, "oauth_token", token, OPERATOR)
                login.state = "done"
                del self.all[login.name]
            if patience.cancelled_caught:
                self._fail(login, f"it was not finished within {LOGIN_WITHIN_S / 60:.0f} minutes; begin again")
        except Refusal as refusal:
            self._fail(login, refusal.message)
        except OSError as exc:
            self._fail(login, f"the program's login cannot be run: {explain(exc)}")
        finally:
            login.program = None
            self._tell()

    async def _talk(self, login: Login, program: LoginProgram) -> str:
        """Show its link, and wait for its token. Raises Refusal."""
        with trio.move_on_after(LINK_WITHIN_S) as patience:
            goes_on = True
            while goes_on:
                goes_on = await program.read()
                screen = program.screen
                if (error := screen.error) is not None:
                    raise Refusal("unavailable", f"the program says: {error}; begin again")
                if (token := screen.token) is not None:
                    return token
                if login.link is None and (link := screen.link) is not None:
                    login.link, login.state = link, "link"
                    patience.deadline = float("inf")
                    self._tell()
            raise Refusal("unavailable", "the program's login ended without a token of the known form; begin again")
        raise Refusal("unavailable", f"the program's login showed no link within {LINK_WITHIN_S:.0f} s; begin again")

    def _fail(self, login: Login, why: str) -> None:
        if login.state not in ENDED:
            login.state, login.link, login.sentence = "failed", None, f"the login of {login.name} failed: {why}"
            self._tell()

    def _tell(self) -> None:
        self._bus.publish([CREDENTIALS])
