"""The log of an agent's deployments, and which of them set what it runs on now."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any, NamedTuple

from hive_core.effects import lines_of
from hive_core.git.repos import Repos
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import MANAGER, SYSTEM, AgentName, CommitSha, shown
from hive_core.services.absent import not_found
from hive_core.services.approvals import COMMITS
from hive_core.store.door import Store

FIRST = "deployed/0"  # the tag of what its repositories began with
HISTORY_LIMIT = 100
BLAME_MOST = 500  # deployments that one look goes back


class Deployment(NamedTuple):
    """A row of the log. id: of the approval; what: its kind; tag: the tag of its commit; at_ms: of the click.

    state: done, failed, or approved of one that is on trial; that has no tag yet, and its note is its step.
    """

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

    @property
    def is_there(self) -> bool:
        """Whether it came to be, as a commit."""
        return self.state == "done" and self.sha is not None

    def to_wire(self) -> dict[str, Any]:
        return self._asdict()


class DeployLog:
    def __init__(self, store: Store, repos: Repos) -> None:
        self._store = store
        self._repos = repos

    async def of(self, name: AgentName, limit: int = HISTORY_LIMIT) -> list[Deployment]:
        """What was deployed, and what was to be and failed, newest first; behind the last the first commit. What the
        agent runs on is always there: before all others while it is on trial, behind them where it is older.

        Among them are newer inputs, which are every agent's: they have no commit and no tag. Another agent that had the
        name before is not told of. Raises Refusal("not_found") where there is no such agent.
        """
        row = await self._store.row("SELECT deployed_sha FROM agents WHERE name = ?", (name,))
        if row is None:
            raise await not_found(self._store, name)
        begun = next(iter(await self._rows(_BEGUN, {"name": name})), None)
        after = 0 if begun is None else begun["id"]
        found = await self._rows(_LOG, (name, after, MANAGER, after, limit))
        tags = await self._repos.deployments(name)
        log = [_deployment(each, _tag(each)) for each in found if _is_its_own(each, tags)]
        if len(found) < limit:
            log.append(_of_the_hive() if begun is None else _deployment(begun, FIRST))
            log[-1] = log[-1]._replace(sha=tags[FIRST])
        return await self._with_what_runs(name, log, row["deployed_sha"], after)

    async def _with_what_runs(
        self, name: AgentName, log: list[Deployment], now: str | None, after: int
    ) -> list[Deployment]:
        # Of several with the commit that is deployed, it is the newest.
        place = next((place for place, each in enumerate(log) if each.is_there and each.sha == now), None)
        if place is not None:
            return [each._replace(runs=True) if at == place else each for at, each in enumerate(log)]
        for row in await self._rows(_RUNS, (name, after, now)):
            if row["state"] == "done":
                return [*log, _deployment(row, _tag(row))._replace(runs=True)]
            on_trial = _deployment(row, "")._replace(state="approved", tag=None, note=row["step"], runs=True)
            return [on_trial, *log]
        return log

    async def proposed_before(self, name: AgentName, approval_id: int, *, approved: bool) -> CommitSha | None:
        """The newest commit that was proposed, or approved, for an agent before an approval of it; None without one.
        Another agent that had the name before had none. Raises Refusal where it has no repository."""
        begun = await self._rows(_BEGUN, {"name": name})
        tags = await self._repos.deployments(name)
        given = {
            "name": name,
            "before": approval_id,
            "after": begun[0]["id"] if begun else 0,
            "states": json.dumps(["approved", "done"] if approved else _ALL),
            "tags": json.dumps([*tags]),
            "commits": json.dumps([*tags.values()]),
        }
        found = await self._rows(_PROPOSED_BEFORE, given)
        return CommitSha(found[0]["sha"]) if found else None

    async def _rows(self, sql: str, values: Sequence[object] | Mapping[str, object]) -> list[dict[str, Any]]:
        return [dict(row) for row in await self._store.rows(sql, values)]

    async def former(self, name: AgentName) -> str:
        """The tag of what an agent ran on before what it runs on now. Raises Refusal("conflict") where it is new."""
        # What was only seeded has never run.
        deployed = [each for each in await self.of(name) if each.is_there and each.what != "init_config"]
        now = next((place for place, each in enumerate(deployed) if each.runs), 0)
        if len(deployed) <= now + 1 or (tag := deployed[now + 1].tag) is None:
            raise Refusal("conflict", f"cannot roll {name} back: it runs on its first commit; `hive history {name}`")
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
                why = "agent.toml does not set it, so it is what it is by default; for a file give FILE:LINE"
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
            lines = lines_of(text)
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
        deployed = [each for each in await self.of(name, BLAME_MOST) if each.is_there]
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


def _tag(row: Mapping[str, Any]) -> str:
    return f"{'deployed' if row['state'] == 'done' else 'failed'}/{row['id']}"


def _is_its_own(row: Mapping[str, Any], tags: Mapping[str, CommitSha]) -> bool:
    """Whether it is of this agent, and not of one that had its name while it was destroyed: its repository knows what
    was deployed to it, and what else was proposed on that."""
    if row["kind"] == "update_meta_inputs":
        return True
    return _tag(row) in tags if row["state"] == "done" else row["base"] in tags.values()


def _deployment(row: Mapping[str, Any], tag: str) -> Deployment:
    return Deployment(
        id=row["id"],
        state="failed" if row["state"] == "failed" else "done",
        what=row["kind"],
        sha=row["sha"],
        tag=None if row["kind"] == "update_meta_inputs" else tag,
        at_ms=row["resolved_at_ms"],
        by=row["resolved_by"],
        requested_by=row["requested_by"],
        reason=row["reason"],
        proof=row["proof"],
        note=row["note"],
        rule=row["rule"],
        runs=False,
    )


def _of_the_hive() -> Deployment:
    """Of an agent that nobody had to approve."""
    return Deployment(
        id=None,
        state="done",
        what="spawn",
        sha=None,
        tag=FIRST,
        at_ms=None,
        by=SYSTEM,
        requested_by=SYSTEM,
        reason="",
        proof=None,
        note=None,
        rule=None,
        runs=False,
    )


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


_COLUMNS = """
    id, kind, state, step, requested_by, resolved_by, resolved_at_ms, reason, proof, note, rule,
    payload ->> 'sha' AS sha, payload ->> 'base' AS base
"""
_ALL = ("pending", "approved", "done", "failed", "denied", "cancelled", "expired")
# What an agent, or one to be, began with: the last that made its repositories before it was created.
_BEGUN = f"""
    SELECT {_COLUMNS} FROM approvals INDEXED BY approvals_of
    WHERE agent = :name AND kind IN ('spawn', 'init_config') AND state IN ('approved', 'done')
      AND resolved_at_ms <= coalesce((SELECT created_at_ms FROM agents WHERE name = :name), resolved_at_ms)
    ORDER BY id DESC LIMIT 1
"""
# Of what an agent of the same name had that was destroyed, its repository knows nothing: see _is_its_own.
_PROPOSED_BEFORE = f"""
    SELECT payload ->> 'sha' AS sha FROM approvals INDEXED BY approvals_of
    WHERE agent = :name AND id > :after AND id < :before AND kind IN {COMMITS}
      AND state IN (SELECT value FROM json_each(:states))
      AND CASE state WHEN 'done' THEN 'deployed/' || id IN (SELECT value FROM json_each(:tags))
          ELSE payload ->> 'base' IN (SELECT value FROM json_each(:commits)) END
    ORDER BY id DESC LIMIT 1
"""
_LOG = f"""
    SELECT {_COLUMNS} FROM approvals INDEXED BY approvals_of
    WHERE agent = ? AND id > ? AND kind IN {COMMITS} AND state IN ('done', 'failed')
    UNION ALL
    SELECT {_COLUMNS} FROM approvals INDEXED BY approvals_of
    WHERE agent = ? AND id > ? AND kind = 'update_meta_inputs' AND state IN ('done', 'failed')
    ORDER BY id DESC LIMIT ?
"""
# A commit that an agent runs on.
_RUNS = f"""
    SELECT {_COLUMNS} FROM approvals INDEXED BY approvals_of
    WHERE agent = ? AND id > ? AND kind IN {COMMITS} AND state IN ('approved', 'done') AND payload ->> 'sha' = ?
    ORDER BY id DESC LIMIT 1
"""
