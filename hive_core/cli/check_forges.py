"""What `hive doctor` says of forges and of the lanes that tell of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from hive_core.cli.doctor import Finding
from hive_core.lanes import Lane, may_take, troubles
from hive_core.protocol.visible import counted

LIST = "`hive forge list` shows them"


def look_at_forges(
    name: str, lanes: Sequence[Lane], forges: Sequence[dict[str, Any]] | None, agents: Collection[str]
) -> Iterator[Finding]:
    """Nothing where there is neither a forge nor a lane. forges: as the daemon tells them; None: none runs."""
    said = [
        f"lane {lane.name}: {why}; mend it in the configuration" for lane in lanes for why in troubles(lane, agents)
    ]
    said += [f"{one['project']}: {one['error']}" for one in forges or () if one["error"]]
    for lane in lanes:
        if forges is not None and not any(may_take([lane], one["project"]) for one in forges):
            said.append(f"lane {lane.name}: no project that it names has a forge; `hive forge add` gives it one")
    for text in said:
        yield Finding(name, "warning", text)
    if not said and (forges or lanes):
        known = f"{counted(len(forges), 'forge')}, " if forges is not None else ""
        yield Finding(name, "ok", f"{known}{counted(len(lanes), 'lane')}; {LIST}")
