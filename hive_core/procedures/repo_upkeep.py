"""The upkeep of the applied repositories: they say what the rows say, and do not grow without end."""

from __future__ import annotations

import logging

import trio

from hive_core.git.repo_upkeep import Needed, Tag
from hive_core.git.repos import Repos
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import SYSTEM, AgentName, CommitSha
from hive_core.services.agents import Agents
from hive_core.services.approvals import COMMITS, TOPIC
from hive_core.store.door import Store

log = logging.getLogger(__name__)
# Of an agent's newest approvals all tags stay, and so the commits that were not deployed; of older ones the row tells.
TAGGED = 100
TIDY_AFTER = 50  # commits that were fetched
TIDY_EVERY_S = 3600.0


class RepoUpkeep:
    def __init__(self, store: Store, agents: Agents, repos: Repos) -> None:
        self._store = store
        self._agents = agents
        self._repos = repos

    async def serve(self) -> None:
        """Set what a daemon that died left out, then tidy: every hour, and whenever many proposals came."""
        for name in await self._names():
            await self._try(name, mend=True)
        with self._store.bus.listen(TOPIC) as listener:
            while True:
                due: list[AgentName] = []
                with trio.move_on_after(TIDY_EVERY_S):
                    while not due:
                        await listener.wait()
                        due = self._repos.untidy(TIDY_AFTER)
                for name in due or await self._names():
                    await self._try(name)

    async def _names(self) -> list[AgentName]:
        return [agent.name for agent in await self._agents.all()]

    async def _try(self, name: AgentName, mend: bool = False) -> None:
        try:
            if mend:
                await self.mend(name)
            await self.tidy(name)
        except Refusal as refusal:  # its repository's own trouble, or it is being destroyed
            log.warning("the applied repository of %s was not tidied: %s", name, refusal.message, extra={"agent": name})

    async def mend(self, name: AgentName) -> None:
        """Set the tags that the rows speak of and that are missing. Raises Refusal as `Repos` does."""
        sql = f"""
            SELECT id, state, note, resolved_by, json_extract(payload, '$.sha') AS sha
            FROM approvals INDEXED BY approvals_of
            WHERE agent = ? AND kind IN {COMMITS} ORDER BY id DESC LIMIT ?
        """
        rows = await self._store.rows(sql, (name, TAGGED))
        await self._repos.mend(name, [tag for row in reversed(rows) for tag in _tags(dict(row))])

    async def tidy(self, name: AgentName) -> None:
        """Drop what nobody needs any more. Raises Refusal as `Repos` does."""

        async def needed() -> Needed:
            return await self._needed(name)

        await self._repos.tidy(name, needed)

    async def _needed(self, name: AgentName) -> Needed:
        sql = """
            SELECT id, json_extract(payload, '$.sha') AS sha FROM approvals INDEXED BY approvals_open
            WHERE agent = ? AND state IN ('pending', 'approved')
        """
        waiting = await self._store.rows(sql, (name,))
        sql = "SELECT id FROM approvals INDEXED BY approvals_of WHERE agent = ? ORDER BY id DESC LIMIT ?"
        newest = await self._store.rows(sql, (name, TAGGED))
        sql = "SELECT deployed_sha AS sha FROM agents WHERE name = ? UNION SELECT sha FROM systems WHERE agent = ?"
        built = await self._store.rows(sql, (name, name))
        commits = frozenset(row["sha"] for row in (*waiting, *built) if row["sha"])
        return Needed(commits, frozenset(row["id"] for row in (*waiting, *newest)))


def _tags(row: dict[str, object]) -> list[Tag]:
    """What an approval's state says of its commit."""
    number, state, sha = row["id"], row["state"], CommitSha(str(row["sha"]))
    tags = [Tag(f"proposal/{number}", sha)]
    # One that failed while it was still pending was never approved.
    if state in ("approved", "done") or (state == "failed" and row["resolved_by"] != SYSTEM):
        tags.append(Tag(f"approved/{number}", sha))
    if state == "done":
        tags.append(Tag(f"deployed/{number}", sha))
    elif state in ("denied", "failed"):
        tags.append(Tag(f"{state}/{number}", sha, str(row["note"] or "")))
    return tags
