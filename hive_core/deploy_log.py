"""The log of an agent's deployments, and which of them set what it runs on now."""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any, NamedTuple

from hive_core.absent import not_found
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import SYSTEM, AgentName, CommitSha, shown
from hive_core.repos import Repos
from hive_core.store.door import Store

HISTORY_LIMIT = 100
BLAME_MOST = 500  # deployments that one look goes back


class Deployment(NamedTuple):
    """A row of the log. id: of the approval; tag: the tag of its commit; at_ms: of the click."""

    id: int | None
    state: str
    what: str
    sha: str | None
    tag: str | None
    at_ms: int | None
    by: str | None
    requested_by: str
    reason: str
    proof: str | None
    note: str | None
    rule: str | None
    runs: bool  # the agent runs on it now

    def to_wire(self) -> dict[str, Any]:
        return self._asdict()


class DeployLog:
    def __init__(self, store: Store, repos: Repos) -> None:
        self._store = store
        self._repos = repos

    async def of(self, name: AgentName, limit: int = HISTORY_LIMIT) -> list[Deployment]:
        """What was deployed, and what was to be and failed, newest first; behind the last the first commit.

        Raises Refusal("not_found") where there is no such agent.
        """
        row = await self._store.row("SELECT deployed_sha, created_at_ms FROM agents WHERE name = ?", (name,))
        if row is None:
            raise await not_found(self._store, name)
        tags = await self._repos.deployments(name)
        first = tags["deployed/0"]
        rows = [dict(each) for each in await self._store.rows(_LOG, (name, limit))]
        found = _of_this_one(rows, tags, row["created_at_ms"])
        log = [_deployment(each, first, row["deployed_sha"]) for each in found]
        if len(rows) < limit and all(each.what != "spawn" for each in log):
            log.append(_of_the_hive(first, row["deployed_sha"]))
        return _runs_once(log)

    async def former(self, name: AgentName) -> str:
        """The tag of what an agent ran on before what it runs on now. Raises Refusal("conflict") where it is new."""
        deployed = [each for each in await self.of(name) if each.state == "done"]
        now = next((place for place, each in enumerate(deployed) if each.runs), 0)
        if len(deployed) <= now + 1 or (tag := deployed[now + 1].tag) is None:
            raise Refusal("conflict", f"cannot roll {name} back: it runs on its first commit")
        return tag

    async def blame(self, name: AgentName, key: str) -> dict[str, Any]:
        """Which deployment set a setting of agent.toml (`model`, `env.LANG`), or a line of a file (`CLAUDE.md:12`):
        its row, with `key` and `value`. Raises Refusal when nothing is set there.
        """
        file, _, line = key.rpartition(":")
        if file and line.isdigit():
            return await self._blame_line(name, key, file, int(line))
        return await self._blame_key(name, key)

    async def _blame_key(self, name: AgentName, key: str) -> dict[str, Any]:
        setter: Deployment | None = None
        value: Any = None
        for deployment, text in await self._versions(name, "agent.toml"):
            found = _look_up(text, key)
            if setter is None and found is None:
                why = "agent.toml does not set it, so it is as docs/defaults says"
                raise Refusal("not_found", f"cannot blame anybody for {shown(key)} of {name}: {why}")
            if setter is not None and found != value:
                break
            setter, value = deployment, found
        return _blamed(name, key, value, setter)

    async def _blame_line(self, name: AgentName, key: str, file: str, line: int) -> dict[str, Any]:
        setter: Deployment | None = None
        newer: list[str] = []
        at = line - 1
        value = ""
        for deployment, text in await self._versions(name, file):
            lines = text.splitlines()
            if setter is None:
                if not 0 <= at < len(lines):
                    why = f"{shown(file)} has {len(lines)} lines"
                    raise Refusal("not_found", f"cannot blame anybody for line {line} of {name}: {why}")
                value = lines[at]
            else:
                place = _place_before(lines, newer, at)
                if place is None:
                    break
                at = place
            setter, newer = deployment, lines
        return _blamed(name, key, value, setter)

    async def _versions(self, name: AgentName, file: str) -> list[tuple[Deployment, str]]:
        """Of what was deployed, newest first, with that file of it, as far back as it holds one."""
        deployed = [each for each in await self.of(name, BLAME_MOST) if each.state == "done" and each.sha]
        now = next((place for place, each in enumerate(deployed) if each.runs), 0)
        found: list[tuple[Deployment, str]] = []
        for each in deployed[now:]:
            text = await self._repos.text(name, CommitSha(str(each.sha)), file)
            if text is None:
                break
            found.append((each, text))
        if not found:
            raise Refusal("not_found", f"cannot blame anybody: what {name} runs on holds no {shown(file)}")
        return found


def _of_this_one(
    rows: Sequence[dict[str, Any]], tags: Mapping[str, CommitSha], created_at_ms: int
) -> list[dict[str, Any]]:
    """The rows of an agent that are not of another one that had its name: those of which its repository knows."""
    commits = frozenset(tags.values())

    def is_known(row: dict[str, Any]) -> bool:
        return f"deployed/{row['id']}" in tags if row["state"] == "done" else row["base"] in commits

    changes = [row for row in rows if row["kind"] == "apply_commit"]
    ours = {row["id"] for row in changes if is_known(row)}
    spawns = [row for row in rows if row["kind"] == "spawn"]
    if not any(row["creates"] for row in changes if row["id"] in ours):
        made = (row["id"] for row in spawns if row["state"] == "done" and row["resolved_at_ms"] <= created_at_ms)
        ours |= set(itertools.islice(made, 1))
    others = [row["id"] for row in rows if row["state"] == "done" and row["id"] not in ours]
    ours |= {row["id"] for row in spawns if row["state"] == "failed" and row["id"] > max(others, default=0)}
    return [row for row in rows if row["id"] in ours]


def _deployment(row: dict[str, Any], first: CommitSha, now: str | None) -> Deployment:
    sha, tag = row["sha"], f"deployed/{row['id']}"
    if row["kind"] == "spawn":
        sha, tag = first, "deployed/0"
    return Deployment(
        id=row["id"],
        state=row["state"],
        what=row["kind"],
        sha=sha if row["state"] == "done" or row["kind"] != "spawn" else None,
        tag=tag if row["state"] == "done" else f"failed/{row['id']}",
        at_ms=row["resolved_at_ms"],
        by=row["resolved_by"],
        requested_by=row["requested_by"],
        reason=row["reason"],
        proof=row["proof"],
        note=row["note"],
        rule=row["rule"],
        runs=row["state"] == "done" and sha == now,
    )


def _of_the_hive(first: CommitSha, now: str | None) -> Deployment:
    """Of an agent that nobody had to approve."""
    return Deployment(
        id=None,
        state="done",
        what="spawn",
        sha=first,
        tag="deployed/0",
        at_ms=None,
        by=SYSTEM,
        requested_by=SYSTEM,
        reason="",
        proof=None,
        note=None,
        rule=None,
        runs=first == now,
    )


def _runs_once(log: list[Deployment]) -> list[Deployment]:
    """Of several with the commit that is deployed, it is the newest."""
    seen = False
    once = []
    for each in log:
        once.append(each._replace(runs=each.runs and not seen))
        seen = seen or each.runs
    return once


def _look_up(text: str, key: str) -> Any:
    """What agent.toml says of a key, whose parts dots divide; None where it says nothing."""
    try:
        found: Any = tomllib.loads(text)
    except ValueError:
        return None
    for part in key.split("."):
        if not isinstance(found, dict) or part not in found:
            return None
        found = found[part]
    return found


def _place_before(older: Sequence[str], newer: Sequence[str], at: int) -> int | None:
    """Where a line of the newer text was in the older one; None for one that came with the newer."""
    for block in SequenceMatcher(None, older, newer, autojunk=False).get_matching_blocks():
        if block.b <= at < block.b + block.size:
            return block.a + at - block.b
    return None


def _blamed(name: AgentName, key: str, value: Any, setter: Deployment | None) -> dict[str, Any]:
    assert setter is not None
    return {"agent": name, "key": key, "value": value, **setter.to_wire()}


_LOG = """
    SELECT id, kind, state, requested_by, resolved_by, resolved_at_ms, reason, proof, note, rule,
           json_extract(payload, '$.sha') AS sha, json_extract(payload, '$.base') AS base,
           json_extract(payload, '$.creates') AS creates
    FROM approvals INDEXED BY approvals_of
    WHERE agent = ? AND kind IN ('spawn', 'apply_commit') AND state IN ('done', 'failed') ORDER BY id DESC LIMIT ?
"""
