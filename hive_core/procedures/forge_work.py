"""What agents do on the forges of their projects: read, and write in their own name, by the hive's account.

An agent may do so where its deployed settings list the project; a pull request may come from the branches alone that it
may push.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import trio

from hive_core.forge.adapter import Forge
from hive_core.forge.api import ForgeTrouble
from hive_core.forge.words import TITLE_LIMIT, WRITTEN_LIMIT_BYTES, Thread, ThreadKind
from hive_core.git.hive_secrets import find_secret, forms_of
from hive_core.limits import Limits
from hive_core.procedures.forges import Forges
from hive_core.project_rules import Project, is_branch
from hive_core.protocol.frame import LINE_END
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName, parse_text, shown
from hive_core.services.access import Access
from hive_core.services.forge_writes import Begun, What, begin_write, end_write, refuse_write
from hive_core.services.forges import Registered, all_forges

HOUR_S = 3600.0
COMMENTS_SHOWN = 20
FILES_SHOWN, LABELS_SHOWN = 100, 20
BODY_SHOWN, COMMENT_SHOWN, NAME_SHOWN = 16_000, 4_000, 300  # characters
CLOCKS_APART_MS = 10 * 60_000  # by which a forge's may differ from ours
STOPPED = ("paused", "frozen")  # of an agent, in which it writes nothing either
Find = Callable[[Forge, Begun], Awaitable[int | None]]
Do = Callable[[Forge, str], Awaitable[int]]  # with the line that goes below what is written; the thread's number


class ForgeWork:
    def __init__(
        self, forges: Forges, access: Access, limits: Limits, secrets: Callable[[], Mapping[str, bytes]] = dict
    ) -> None:
        """secrets: what nobody may write there, by what each is called."""
        self._forges = forges
        self._store = forges.store
        self._access = access
        self._limits = limits
        self._secrets = secrets
        self._locks: dict[AgentName, trio.Lock] = {}
        self._reads: dict[AgentName, deque[float]] = {}

    async def projects(self, agent: AgentName) -> dict[str, tuple[Project, Registered]]:
        """Those of the agent's projects that have a forge, in the order of its settings."""
        row = await self._store.row("SELECT policy FROM agents WHERE name = ?", (agent,))
        listed = json.loads(row["policy"]).get("projects", []) if row else []
        if not listed:
            return {}
        forges: dict[str, Registered] = {forge.project: forge for forge in await all_forges(self._store)}
        projects = (Project.model_validate(one) for one in listed)
        return {one.name: (one, forges[one.name]) for one in projects if one.name in forges}

    # -- reading ------------------------------------------------------------------------------------------------------

    async def list(
        self, agent: AgentName, project: str | None, kind: ThreadKind, state: str, labels: Sequence[str], page: int
    ) -> dict[str, Any]:
        """{"project", "threads", "next_page"}; next_page None: there are no more."""
        _, forge = await self._project(agent, project)
        ours = self._look(agent, forge)
        found, more = await ours.threads(kind, state, labels, page)
        keys = ("number", "kind", "state", "title", "author", "labels", "updated_at_ms", "comments")
        threads = [{key: value for key, value in _shown(one).items() if key in keys} for one in found]
        return {"project": forge.project, "threads": threads, "next_page": page + 1 if more else None}

    async def read(self, agent: AgentName, project: str | None, number: int) -> dict[str, Any]:
        """One thread with the newest of what was written below it, the oldest first; of a pull request its files."""
        _, forge = await self._project(agent, project)
        ours = self._look(agent, forge)
        thread = await ours.thread(number)
        comments = await ours.comments(number)
        files: list[str] = []
        if thread.kind == "pull_request":
            comments = sorted([*comments, *await ours.reviews(number)], key=lambda one: one.at_ms)
            files = await ours.files(number)
        told = [{**one.to_wire(), "body": _cut(one.body, COMMENT_SHOWN)} for one in comments[-COMMENTS_SHOWN:]]
        return {
            "project": forge.project,
            **_shown(thread),
            "body": _cut(thread.body, BODY_SHOWN),
            "url": forge.place.page(thread.kind, number),
            "below": told,
            "earlier": max(len(comments), thread.comments) - len(told),
            "files": [_cut(name, NAME_SHOWN) for name in files[:FILES_SHOWN]],
            "more_files": max(0, len(files) - FILES_SHOWN),
        }

    # -- writing ------------------------------------------------------------------------------------------------------

    async def open_pull_request(
        self,
        agent: AgentName,
        project: str | None,
        head: str,
        base: str | None,
        title: str,
        body: str,
        key: str | None,
    ) -> dict[str, Any]:
        """{"project", "number", "url"}. Raises Refusal, ForgeTrouble too."""
        rules, forge = await self._project(agent, project)
        if (why := rules.refuses(agent, f"refs/heads/{head}")) is not None:
            raise Refusal("refused", f"cannot open a pull request from {shown(head)}: {why}")
        if base is not None and not is_branch(base):
            raise Refusal("usage", f"cannot open a pull request into {shown(base)}: that is no branch's name")
        title, body = _parse_title(title), _parse_body(body)
        onto = base or rules.branch

        async def do(ours: Forge, line: str) -> int:
            into = onto or await ours.default_branch()
            try:
                return (await ours.open_pull_request(title, f"{body}{line}", head, into)).number
            except ForgeTrouble as trouble:
                if trouble.status in (409, 422) and (found := await ours.find_pull_request(head, into)) is not None:
                    why = f"pull request {found.number} from there is open; comment on it with `forge_comment`"
                    raise ForgeTrouble("conflict", f"cannot open a pull request: {why}", trouble.status) from None
                raise

        async def find(ours: Forge, begun: Begun) -> int | None:
            found = await ours.find_pull_request(head, onto or await ours.default_branch())
            return found.number if found is not None and begun.mark in found.body else None

        given = {"head": head, "base": base, "title": title, "body": body}
        return await self._write(agent, forge, "pull_request", given, key, do, find)

    async def open_issue(
        self, agent: AgentName, project: str | None, title: str, body: str, key: str | None
    ) -> dict[str, Any]:
        """As open_pull_request."""
        _, forge = await self._project(agent, project)
        title, body = _parse_title(title), _parse_body(body)

        async def do(ours: Forge, line: str) -> int:
            return (await ours.open_issue(title, f"{body}{line}")).number

        async def find(ours: Forge, begun: Begun) -> int | None:
            newest = await ours.threads("issue", "all", (), 1)
            return next((one.number for one in newest.threads if begun.mark in one.body), None)

        return await self._write(agent, forge, "issue", {"title": title, "body": body}, key, do, find)

    async def comment(
        self, agent: AgentName, project: str | None, number: int, body: str, key: str | None
    ) -> dict[str, Any]:
        """As open_pull_request; the number is the thread's."""
        _, forge = await self._project(agent, project)
        body = _parse_body(body)

        async def do(ours: Forge, line: str) -> int:
            await ours.comment(number, f"{body}{line}")
            return number

        async def find(ours: Forge, begun: Begun) -> int | None:
            below = await ours.comments(number, begun.at_ms - CLOCKS_APART_MS)
            return number if any(begun.mark in one.body for one in below) else None

        return await self._write(agent, forge, "comment", {"number": number, "body": body}, key, do, find)

    async def _write(
        self,
        agent: AgentName,
        forge: Registered,
        what: What,
        given: dict[str, Any],
        key: str | None,
        do: Do,
        find: Find,
    ) -> dict[str, Any]:
        if (closed := self._access.closed(agent)) is not None and closed.state in STOPPED:
            raise Refusal("refused", f"cannot write on the forge of {forge.project}: {closed.sentence}")
        self._check_secrets(forge, given)
        ours, digest, tool = self._forges.open(forge), _digest(given), f"forge {what}"
        async with self._locks.setdefault(agent, trio.Lock()):
            begun = await self._store.write(
                lambda tx: begin_write(tx, agent, forge, what, digest, key, tool, self._limits)
            )
            if not isinstance(begun, Begun):
                return begun
            try:
                number = await find(ours, begun) if begun.again else None
                if number is None:
                    number = await do(ours, f"\n\n---\n{_signature(agent, begun.mark)}\n")
            except ForgeTrouble as trouble:
                # After any other end it may be there, and the next try of the same looks for it.
                if 400 <= trouble.status < 500:
                    await self._store.write(lambda tx: refuse_write(tx, begun))
                raise
            kind: ThreadKind = "pull_request" if what == "pull_request" else "issue"  # a page of either leads to both
            result = {"project": forge.project, "number": number, "url": forge.place.page(kind, number)}
            return await self._store.write(lambda tx: end_write(tx, agent, begun, key, tool, what, result))

    def _check_secrets(self, forge: Registered, given: dict[str, Any]) -> None:
        """Raises Refusal where a text holds one, as it is or in base64."""
        forms = forms_of(self._secrets())
        for value in given.values():
            if (name := find_secret(str(value).encode(), forms)) is not None:
                why = f"it holds {name}, a secret of the hive; take it out"
                raise Refusal("refused", f"cannot write on the forge of {forge.project}: {why}")

    # -- what both need -----------------------------------------------------------------------------------------------

    async def _project(self, agent: AgentName, name: str | None) -> tuple[Project, Registered]:
        """The project that is named; the only one where none is. Raises Refusal."""
        found = await self.projects(agent)
        if not found:
            raise Refusal("not_found", "cannot use a forge: no project of yours has one; ask hm1nd or the operator")
        if name is None and len(found) == 1:
            return next(iter(found.values()))
        if name is None:
            raise Refusal("usage", f"cannot choose a project: give `project`, one of {', '.join(found)}")
        if name not in found:
            raise Refusal("not_found", f"cannot use {shown(name)}: those of yours with a forge are {', '.join(found)}")
        return found[name]

    def _look(self, agent: AgentName, forge: Registered) -> Forge:
        """Raises Refusal when the agent has looked too often."""
        reads, now = self._reads.setdefault(agent, deque()), trio.current_time()
        while reads and now - reads[0] >= HOUR_S:
            reads.popleft()
        if len(reads) >= self._limits.forge_reads_per_hour:
            why = f"{agent} has looked {len(reads)} times within an hour, which is the limit (forge_reads_per_hour)"
            raise Refusal("refused", f"cannot look at the forge of {forge.project}: {why}; do it later")
        reads.append(now)
        return self._forges.open(forge)


def _signature(agent: AgentName, mark: str) -> str:
    return f"*Written by the agent `{agent}` of a hive ({mark}).*"


def _parse_title(raw: str) -> str:
    title = parse_text(raw, "title", TITLE_LIMIT).strip()
    if LINE_END.search(title):
        raise Refusal("usage", "cannot take the title: it has more than one line; what else there is belongs into body")
    return title


def _parse_body(raw: str) -> str:
    return parse_text(raw, "body", WRITTEN_LIMIT_BYTES)


def _digest(given: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()


def _shown(thread: Thread) -> dict[str, Any]:
    """A thread with as much of its names as a model needs."""
    labels = [_cut(label, NAME_SHOWN) for label in thread.labels[:LABELS_SHOWN]]
    return {**thread.to_wire(), "title": _cut(thread.title, NAME_SHOWN), "labels": labels}


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}…"
