"""The operator's hand on an agent's session: compact it, begin another, choose the model and its effort.

Each is written down and holds from the edge of a turn on: a turn that runs is never changed, and a restart of the
harness, its container or the daemon forgets nothing.
"""

from __future__ import annotations

import json
from typing import Any

from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName, shown
from hive_core.services.absent import no_such_agent
from hive_core.settings import EFFORTS, parse_model
from hive_core.store.bus import mail
from hive_core.store.door import Store
from hive_core.store.writer import Transaction

DEFAULT = "default"  # what agent.toml says


class Steering:
    def __init__(self, store: Store) -> None:
        self._store = store

    async def compact(self, name: AgentName, actor: str) -> dict[str, Any]:
        """Let the agent's next turn compact its session, before any message. {"agent"}; Refusal when it has none."""

        def write(tx: Transaction) -> dict[str, Any]:
            if _row(tx, name)["session"] is None:
                raise Refusal("conflict", f"cannot compact {name}: it has no session yet; its next turn begins one")
            sql = "UPDATE agents SET errand = 'compact', errand_by = ? WHERE name = ? AND errand IS NULL"
            if tx.execute(sql, (actor, name)).rowcount:
                tx.emit("errand_set", actor, name, errand="compact")
                tx.wake(mail(name))
            return {"agent": name}

        return await self._store.write(write)

    async def new_session(self, name: AgentName, actor: str) -> dict[str, Any]:
        """Forget the agent's session: its next turn begins another. {"agent", "turn"}: the one that runs, or None.

        That turn ends in the old session, which its ack does not bring back.
        """

        def write(tx: Transaction) -> dict[str, Any]:
            turn = _row(tx, name)["turn_id"]
            tx.execute(
                "UPDATE agents SET session = NULL, new_session_turn = ?, context_tokens = NULL, errand = NULL"
                " WHERE name = ?",
                (turn or 0, name),
            )
            tx.emit("new_session", actor, name, turn=turn)
            return {"agent": name, "turn": turn}

        return await self._store.write(write)

    async def choose(self, name: AgentName, what: str, raw: object, actor: str) -> dict[str, Any]:
        """Choose the `model` or the `effort` in the place of agent.toml's, or its own again with "default".

        {"agent", "chosen"}: None for agent.toml's. Raises Refusal("usage") for what can be neither, and
        Refusal("refused") for a model that agent.toml does not make available.
        """
        chosen = None if raw == DEFAULT else (parse_model(raw) if what == "model" else _effort(raw))

        def write(tx: Transaction) -> dict[str, Any]:
            available = json.loads(_row(tx, name)["policy"]).get("available_models", [])
            if what == "model" and chosen is not None and available and chosen not in available:
                raise Refusal(
                    "refused",
                    f"cannot use {shown(raw)} as the model of {name}: its agent.toml makes {', '.join(available)} "
                    "available (available_models); choose one of them, or let hm1nd change it",
                )
            sql = f"UPDATE agents SET chosen_{what} = ?1 WHERE name = ?2 AND chosen_{what} IS NOT ?1"
            if tx.execute(sql, (chosen, name)).rowcount:
                tx.emit(f"{what}_chosen", actor, name, chosen=chosen)
            return {"agent": name, "chosen": chosen}

        assert what in ("model", "effort")
        return await self._store.write(write)


def _row(tx: Transaction, name: str) -> Any:
    sql = """
        SELECT session, policy, (SELECT id FROM turns WHERE agent = name AND state = 'running') AS turn_id
        FROM agents WHERE name = ?
    """
    row = tx.execute(sql, (name,)).fetchone()
    if row is None:
        raise no_such_agent(tx, name)
    return row


def _effort(raw: object) -> str:
    if raw not in EFFORTS:
        raise Refusal("usage", f"cannot use {shown(raw)} as the effort: give {', '.join(EFFORTS)} or {DEFAULT}")
    return str(raw)
