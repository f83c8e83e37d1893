"""The agents: what is wanted of each (rows) and what is seen of each now (in memory, gone with the daemon)."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import trio

from hive_core.protocol.container_id import container_id
from hive_core.protocol.harness import STATES
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import MANAGER, OPERATOR, SYSTEM, AgentName, Network
from hive_core.services.absent import no_such_agent, not_found
from hive_core.services.access import ACCESS, Access, Closed
from hive_core.services.container_states import forgive
from hive_core.services.notices import notice, tell_manager
from hive_core.store.bus import DEPLOYED, WANTED, mail, stream
from hive_core.store.door import Store
from hive_core.store.writer import Transaction

LIVE = "live"  # the bus topic: what is seen of some agent changed
SHUT = ("paused", "frozen", "over_budget", "rate_limited", "needs_login")  # between turns, and none may begin
AT_REST = ("idle", "waiting", *SHUT)
IN_TURN = STATES - {"starting"}
# What the lines take that are kept of ?1.
LINE_BYTES = "(SELECT coalesce(sum(length(CAST(line AS BLOB))), 0) FROM turn_lines WHERE agent = ?1)"


@dataclass(frozen=True, slots=True)
class Live:
    """What an agent is doing as far as the host can see.

    state     down, starting, idle, thinking, tool, stopping, crashed, quarantined (it crashed too often), waiting (for
              what its last turn lacked), or why its way to the model is closed: the states of `access.Closed`
    detail    which tool; why it is down or waits; why its last turn failed
    until_ms  when it ends by itself, where that is known
    """

    state: str = "starting"
    detail: str = ""
    since_ms: int = field(default_factory=lambda: int(time.time() * 1000))
    sandbox: str = "bwrap"
    until_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Agent:
    name: AgentName
    role: str
    wanted: str
    page_port: int
    deployed_sha: str | None
    settings: dict[str, Any] | None  # the forms of protocol.harness.Settings; None until it is first deployed
    session: str | None
    created_at_ms: int
    queued: int  # messages that wait for it
    refused: int  # messages that its full inbox did not take, ever
    held: int = 0  # messages to it that wait for the operator
    dead: int = 0  # messages to it that were given up
    status: str | None = None  # what it says that it is about
    pronouns: str | None = None  # these three it says of itself
    icon: str | None = None
    about: str | None = None
    context_tokens: int | None = None  # how full its session is; None: nobody knows
    context_window: int | None = None  # how many fit
    errand: str | None = None  # what its next turn does with its session
    chosen_model: str | None = None  # by the operator, in the place of agent.toml's
    chosen_effort: str | None = None
    network: Network = "private"  # as agent.toml has it; "host": its container has the host's own
    egress: tuple[str, ...] = ()  # the destinations and presets of agent.toml
    rests_until_ms: int | None = None  # its last turn had to wait, and no other begins before; None when that is over


def pick_port(name: str, ports: range, taken: Iterable[int]) -> int:
    """The port of an agent's page: its name's hash first, the next free one otherwise. Raises Refusal when full."""
    used = set(taken)
    first = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % len(ports)
    for step in range(len(ports)):
        port = ports[(first + step) % len(ports)]
        if port not in used:
            return port
    raise Refusal("refused", f"cannot create {name}: all {len(ports)} page ports are allocated; widen agent_ports")


def check_free(tx: Transaction, name: AgentName, deed: str) -> None:
    """Raise Refusal("conflict") when an agent has this name, or one that is or is to be a container of the same id."""
    if tx.execute("SELECT 1 FROM agents WHERE name = ?", (name,)).fetchone():
        raise Refusal("conflict", f"cannot {deed} {name}: an agent of that name exists")
    ours = container_id(name)
    for row in tx.execute("SELECT name FROM agents UNION ALL SELECT name FROM configured").fetchall():
        if row["name"] != name and container_id(row["name"]) == ours:
            why = f"its container would be called {ours}, as that of {row['name']} is"
            raise Refusal("conflict", f"cannot {deed} {name}: {why}; choose another name")


class Agents:
    def __init__(
        self,
        store: Store,
        *,
        manager_port: int,
        agent_ports: range,
        sandbox: str = "bwrap",
        access: Access | None = None,
    ) -> None:
        self._store = store
        self.access = access or Access(store.bus)
        self.access.add(self.reason)
        self._manager_port = manager_port
        self._ports = agent_ports
        self._live: dict[str, Live] = {}
        self._unseen = Live(sandbox=sandbox)  # of whom nothing was seen yet: the same at every look
        self._paused: set[str] = set()

    async def load(self) -> None:
        """Know who is paused, as the daemon before left it."""
        rows = await self._store.rows("SELECT name FROM agents WHERE wanted = 'paused'")
        self._paused = {row["name"] for row in rows}

    def reason(self, name: AgentName) -> Closed | None:
        """That the agent is paused."""
        sentence = f"{name} is paused by the operator; `hive start {name}` lets it go on"
        return Closed("paused", sentence) if name in self._paused else None

    async def serve(self) -> None:
        """Show of each agent between turns what its way to the model is, until cancelled."""
        with self._store.bus.listen(ACCESS) as listener:
            while True:
                for name in list(self._live):
                    state = self.live(name).state
                    if state in SHUT or (state in AT_REST and self.access.closed(AgentName(name)) is not None):
                        self.observe_rest(name)
                await listener.wait()

    def live(self, name: str) -> Live:
        return self._live.get(name, self._unseen)

    def observe(
        self, name: str, state: str, detail: str = "", sandbox: str | None = None, until_ms: int | None = None
    ) -> None:
        """Note what is seen of an agent; who watches is woken. The same again changes nothing."""
        before = self.live(name)
        seen = replace(before, state=state, detail=detail, until_ms=until_ms, sandbox=sandbox or before.sandbox)
        if name in self._live and seen == before:
            return
        self._live[name] = replace(seen, since_ms=int(time.time() * 1000))
        self._store.bus.publish([LIVE, stream(name)])

    def create(self, tx: Transaction, name: AgentName, actor: str) -> None:
        """Make the agent's row, wanted up, with a page port of its own.

        Raises Refusal("conflict") when its name or its container's is taken.
        """
        check_free(tx, name, "create")
        if name == MANAGER:
            role, port = "manager", self._manager_port
        else:
            taken = [row["page_port"] for row in tx.execute("SELECT page_port FROM agents").fetchall()]
            role, port = "agent", pick_port(name, self._ports, taken)
        tx.execute(
            "INSERT INTO agents (name, role, wanted, page_port, created_at_ms, line_bytes)"
            f" VALUES (?1, ?2, 'up', ?3, ?4, {LINE_BYTES})",
            (name, role, port, tx.now_ms),
        )
        tx.emit("agent_created", actor, name, page_port=port)
        tx.wake(WANTED)

    def forget(self, name: AgentName) -> None:
        """It is no agent any more: what was seen of it goes."""
        self._live.pop(name, None)
        self._paused.discard(name)
        self._store.bus.publish([LIVE, stream(name)])

    @property
    def ports(self) -> range:
        """Those that pages of agents have."""
        return self._ports

    async def want(self, name: AgentName, wanted: str, actor: str) -> None:
        """Set what is wanted of an agent: up, paused (runs, but takes no turn) or down.

        Raises Refusal: "not_found", "conflict" for one that is being destroyed or revived, which stays down, and
        "refused" where hm1nd would undo what the operator did.
        """

        def write(tx: Transaction) -> None:
            sql = "SELECT state FROM tombstones WHERE name = ? AND state IN ('destroying', 'reviving')"
            if wanted != "down" and (row := tx.execute(sql, (name,)).fetchone()) is not None:
                done = "destroyed" if row["state"] == "destroying" else "revived"
                raise Refusal("conflict", f"cannot start {name}: it is being {done}; wait until that is done")
            was = tx.execute("SELECT wanted, wanted_by FROM agents WHERE name = ?", (name,)).fetchone()
            if was and actor == MANAGER and was["wanted"] != "up" and was["wanted_by"] == OPERATOR:
                kept = "paused" if was["wanted"] == "paused" else "ended"
                raise Refusal("refused", f"cannot start {name}: the operator {kept} it; ask the operator to start it")
            # Whoever starts or resumes an agent may have mended what it rests for.
            sql = """
                UPDATE agents SET wanted = ?1, wanted_by = ?3, rests_until_ms = iif(?1 = 'up', NULL, rests_until_ms)
                WHERE name = ?2
            """
            if tx.execute(sql, (wanted, name, actor)).rowcount == 0:
                raise no_such_agent(tx, name)
            if wanted == "up":
                forgive(tx, name)
            if wanted == "down" != was["wanted"] and MANAGER not in (name, actor):
                text = f"{name} was ended by {actor}, and stays down until it is started"
                tell_manager(tx, notice("killed", text, agent=name, by=actor))
            tx.emit("agent_wanted", actor, name, wanted=wanted)
            tx.wake(WANTED)
            tx.wake(mail(name))

        with trio.CancelScope(shield=True):  # else what is written and what holds could be two things
            await self._store.write(write)
        if wanted == "paused":
            self._paused.add(name)
        else:
            self._paused.discard(name)
        self.access.changed(name)
        if wanted != "down" and self.live(name).state in AT_REST:
            self.observe_rest(name)

    async def tell_outdated(self, name: AgentName, version: int, current: int, turn: int | None) -> None:
        """Note that an agent's harness speaks an older version and ends at the edge of its `turn`, or at once."""
        data = {"version": version, "current": current, "turn": turn}
        await self._store.write(lambda tx: tx.emit("harness_outdated", SYSTEM, name, **data))

    def observe_rest(self, name: str, state: str = "idle", detail: str = "") -> None:
        """Note that an agent is between turns: `state`, or why it may not begin one."""
        if (closed := self.access.closed(AgentName(name))) is None:
            self.observe(name, state, detail)
        else:
            self.observe(name, closed.state, closed.sentence, until_ms=closed.until_ms)

    def observe_silence(self, name: str, silence_s: float) -> None:
        """Note that a turn was taken away from a silent harness: what that said of it last is not so any more."""
        if self.live(name).state in IN_TURN:
            then = "if it goes on so, it is ended and started again"
            self.observe(name, "stuck", f"its harness said nothing for {silence_s:.0f} s and lost its turn; {then}")

    async def all(self) -> list[Agent]:
        """Every agent, the manager first, then by name."""
        return await self._select("")

    async def get(self, name: str) -> Agent:
        """One agent. Raises Refusal("not_found")."""
        found = await self._select("WHERE name = ?", (name,))
        if not found:
            raise await not_found(self._store, name)
        return found[0]

    async def _select(self, where: str, parameters: tuple[Any, ...] = ()) -> list[Agent]:
        sql = f"""
            SELECT agents.*, coalesce(held.n, 0) AS held, coalesce(dead.n, 0) AS dead,
                   (SELECT count(*) FROM deliveries INDEXED BY deliveries_queued
                    WHERE recipient = name AND state = 'queued') AS queued
            FROM agents
            LEFT JOIN (SELECT recipient, count(*) AS n FROM deliveries INDEXED BY deliveries_held
                       WHERE state = 'held' GROUP BY recipient) held
                   ON held.recipient = name
            LEFT JOIN (SELECT recipient, count(*) AS n FROM deliveries INDEXED BY deliveries_dead
                       WHERE state = 'dead' GROUP BY recipient) dead
                   ON dead.recipient = name
            {where} ORDER BY role = 'agent', name
        """
        now_ms = int(time.time() * 1000)
        return [
            Agent(
                name=AgentName(row["name"]),
                role=row["role"],
                wanted=row["wanted"],
                page_port=row["page_port"],
                deployed_sha=row["deployed_sha"],
                settings=json.loads(row["settings"]) if row["settings"] else None,
                session=row["session"],
                created_at_ms=row["created_at_ms"],
                queued=row["queued"],
                refused=row["refused"],
                status=row["status"],
                pronouns=row["pronouns"],
                icon=row["icon"],
                about=row["about"],
                held=row["held"],
                dead=row["dead"],
                context_tokens=row["context_tokens"],
                context_window=row["context_window"],
                errand=row["errand"],
                chosen_model=row["chosen_model"],
                chosen_effort=row["chosen_effort"],
                network=(policy := json.loads(row["policy"] or "{}")).get("network", "private"),
                egress=tuple(one["to"] for one in policy.get("egress", [])),
                rests_until_ms=row["rests_until_ms"] if (row["rests_until_ms"] or 0) > now_ms else None,
            )
            for row in await self._store.rows(sql, parameters)
        ]


def set_deployed(tx: Transaction, name: str, sha: str, settings: dict[str, Any]) -> None:
    """What the agent runs on from its next turn: a commit, and its contents as `Repos.read` gives them."""
    policy = json.dumps(settings.get("policy", {}))
    harness = json.dumps({key: value for key, value in settings.items() if key != "policy"}, ensure_ascii=False)
    tx.execute(
        "UPDATE agents SET deployed_sha = ?, settings = ?, policy = ? WHERE name = ?", (sha, harness, policy, name)
    )
    tx.emit("settings_deployed", SYSTEM, name, sha=sha)
    tx.wake(DEPLOYED)
