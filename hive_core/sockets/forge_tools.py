"""The tools that an agent has for the forges of its projects, where one of them has a forge."""

from __future__ import annotations

from hive_core.procedures.forge_work import ForgeWork
from hive_core.protocol.words import AgentName
from hive_core.sockets import forge_forms as forms
from hive_core.sockets import told
from hive_core.sockets.told import Result
from hive_core.sockets.tool import Key, tool


class ForgeTools:
    def __init__(self, name: AgentName, work: ForgeWork) -> None:
        self._name = name
        self._work = work

    async def are_there(self) -> bool:
        """Whether the agent has them now."""
        return bool(await self._work.projects(self._name))

    @tool("Open a pull request.", forms.PullRequestArguments, forms.WrittenResult, told.forge_written, open_world=True)
    async def pull_request_open(self, given: forms.PullRequestArguments, key: Key) -> Result:
        return await self._work.open_pull_request(
            self._name, given.project, given.head, given.base, given.title, given.body, key
        )

    @tool("Open an issue.", forms.IssueArguments, forms.WrittenResult, told.forge_written, open_world=True)
    async def issue_open(self, given: forms.IssueArguments, key: Key) -> Result:
        return await self._work.open_issue(self._name, given.project, given.title, given.body, key)

    @tool(
        "Comment on an issue or pull request.",
        forms.CommentArguments,
        forms.WrittenResult,
        told.forge_written,
        open_world=True,
    )
    async def forge_comment(self, given: forms.CommentArguments, key: Key) -> Result:
        return await self._work.comment(self._name, given.project, given.number, given.body, key)

    @tool(
        "List issues or pull requests.",
        forms.ForgeListArguments,
        forms.ForgeListResult,
        told.forge_listed,
        read_only=True,
        open_world=True,
    )
    async def forge_list(self, given: forms.ForgeListArguments, _: Key) -> Result:
        return await self._work.list(self._name, given.project, given.kind, given.state, given.labels, given.page)

    @tool(
        "Read an issue or pull request.",
        forms.ForgeReadArguments,
        forms.ForgeReadResult,
        told.forge_read,
        read_only=True,
        open_world=True,
    )
    async def forge_read(self, given: forms.ForgeReadArguments, _: Key) -> Result:
        return await self._work.read(self._name, given.project, given.number)
