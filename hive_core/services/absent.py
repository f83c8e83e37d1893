"""What is said of a name that no agent has: that there never was one, or that it is destroyed and can be revived."""

from __future__ import annotations

from hive_core.protocol.refusal import Refusal
from hive_core.store.door import Store
from hive_core.store.writer import Transaction

_DESTROYED = "SELECT 1 FROM tombstones WHERE name = ? LIMIT 1"


def no_such_agent(tx: Transaction, name: str, deed: str = "find") -> Refusal:
    """cannot DEED NAME: why, and the way out."""
    return _refusal(deed, name, tx.execute(_DESTROYED, (name,)).fetchone() is not None)


async def not_found(store: Store, name: str) -> Refusal:
    """The same for whoever only reads."""
    return _refusal("find", name, await store.row(_DESTROYED, (name,)) is not None)


def _refusal(deed: str, name: str, destroyed: bool) -> Refusal:
    why = "no agent has that name; `list_agents` or `hive list` shows them"
    if destroyed:
        why = f"it is destroyed; `hive tombstones` shows what is kept of it, and `hive revive {name}` brings it back"
    return Refusal("not_found", f"cannot {deed} {name}: {why}")
