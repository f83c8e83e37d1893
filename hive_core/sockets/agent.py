"""mcp.sock: the tools of one agent, as an MCP server over newline-delimited JSON-RPC.

Who calls is the socket, never an argument. A writing call that carries the program's tool-use id counts once, however
often a bridge sends it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import anyio
import mcp_types as types
import trio
from mcp.server.lowlevel import Server
from mcp.shared.message import SessionMessage
from pydantic import ValidationError

from hive_core.protocol.call_key import CallKey
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import (
    MANAGER,
    AgentName,
    parse_body,
    parse_recipients,
)
from hive_core.services.agents import Agents
from hive_core.services.archive import Archive, parse_query
from hive_core.services.broker import Broker
from hive_core.services.configured import all_configured
from hive_core.services.loose_ends import LooseEnds
from hive_core.services.profiles import set_profile, set_status
from hive_core.services.question_words import parse_answer, parse_ask
from hive_core.services.refused_requests import noting_a_refusal
from hive_core.services.reminders import When
from hive_core.services.withdrawal import withdraw_thread
from hive_core.settings import describe
from hive_core.sockets import forms, told
from hive_core.sockets.forge_tools import ForgeTools
from hive_core.sockets.rpc import Wire, say_what_is_wrong
from hive_core.sockets.told import Result
from hive_core.sockets.tool import Key, Tool, tool, tools_of
from hive_core.sockets.unix import Connection
from hive_core.version import __version__

PROGRESS_EVERY_S = 15.0
WAITS_LIMIT = 16  # calls of one agent that wait for mail at once: each is run again with every message
SEARCHES_LIMIT = 4  # of one agent at once: all searches of a hive wait for each other


_SAID = ("status", "pronouns", "icon", "about")


class AgentDesk:
    """The tools of one agent; the manager's socket has more of them, and nobody else's has those."""

    def __init__(
        self,
        name: AgentName,
        broker: Broker,
        agents: Agents,
        archive: Archive,
        loose_ends: LooseEnds,
        manager: object = None,
        forge: ForgeTools | None = None,
    ) -> None:
        """manager: an object whose methods are tools too, for the agent that has them.

        forge: those that it has as long as one of its projects has a forge
        """
        self.name = name
        self._broker = broker
        self._agents = agents
        self._archive = archive
        self._ends = loose_ends
        self.tools = tools_of(self) | ({} if manager is None else tools_of(manager))
        self._forge = forge
        self._forges = {} if forge is None else tools_of(forge)
        self.waits = trio.Semaphore(WAITS_LIMIT)
        self._searches = trio.Semaphore(SEARCHES_LIMIT)

    def find(self, name: str) -> Tool | None:
        """The tool of that name; one of a forge's is there also while the agent has none, and refuses."""
        return self.tools.get(name) or self._forges.get(name)

    async def listed(self) -> list[Tool]:
        """The tools that the agent has now."""
        there = self._forge is not None and await self._forge.are_there()
        return [*self.tools.values(), *(self._forges.values() if there else ())]

    async def call(
        self, name: str, arguments: dict[str, Any], key: str | None, taken_back: Callable[[], bool] = lambda: False
    ) -> Result:
        """The result of one tool call. Raises Refusal with one sentence for the agent.

        taken_back: whether the client has cancelled it, for a tool that waits.
        """
        found = self.find(name)
        if found is None:
            raise Refusal("not_found", f"cannot call {ascii(name)[:60]}: the tools are {', '.join(self.tools)}")
        if found.asks_for:
            async with noting_a_refusal(self._ends.store, self.name, found.asks_for, arguments):
                return await self._call(found, arguments, key, taken_back)
        return await self._call(found, arguments, key, taken_back)

    async def _call(
        self, found: Tool, arguments: dict[str, Any], key: str | None, taken_back: Callable[[], bool]
    ) -> Result:
        try:
            parsed = found.takes.model_validate(arguments)
        except ValidationError as exc:
            raise Refusal("usage", f"cannot call {found.name}: {describe(exc)}") from None
        given = parsed.model_dump()
        # What the agent chose holds in every turn (but of mail in the one that took it), the tool-use id in one call.
        key = given.get("key") or key
        call = partial(found.call, taken_back=taken_back) if found.waits else found.call
        return await call(parsed, None if key is None else CallKey(key, {**given, "key": None}))

    @tool("Send a message.", forms.SendArguments, forms.SendResult, told.sent)
    async def send(self, given: forms.SendArguments, key: Key) -> Result:
        recipients, body = parse_recipients(given.to), parse_body(given.body)
        return await self._broker.send(self.name, recipients, body, given.in_reply_to, key)

    @tool(
        "Take more of your mail.",
        forms.RecvArguments,
        forms.RecvResult,
        told.received,
        waits=True,
    )
    async def recv(self, given: forms.RecvArguments, key: Key, taken_back: Callable[[], bool]) -> Result:
        return await self._broker.recv(self.name, given.max, given.wait_seconds, key, taken_back)

    @tool(
        "Read on in a large message.",
        forms.ReadBodyArguments,
        forms.ReadBodyResult,
        told.read,
        read_only=True,
    )
    async def read_body(self, given: forms.ReadBodyArguments, _: Key) -> Result:
        return await self._broker.messages.read_body(given.id, given.offset, self.name)

    @tool("Your name and role.", forms.NoArguments, forms.WhoamiResult, told.whoami, read_only=True)
    async def whoami(self, _: forms.NoArguments, __: Key) -> Result:
        return {"name": self.name, "role": "manager" if self.name == MANAGER else "agent"}

    @tool(
        "The agents now.",
        forms.NoArguments,
        forms.ListResult,
        told.agents,
        read_only=True,
    )
    async def list_agents(self, _: forms.NoArguments, __: Key) -> Result:
        return {
            "agents": [
                {
                    "name": agent.name,
                    "state": self._agents.live(agent.name).state,
                    "queued": agent.queued,
                    **{key: said for key in _SAID if (said := getattr(agent, key))},
                }
                for agent in await self._agents.all()
            ]
            + [
                {"name": one["name"], "state": "configured", "queued": 0}
                for one in await all_configured(self._ends.store)
            ]
        }

    @tool(
        "Find messages of yours.",
        forms.SearchArguments,
        forms.SearchResult,
        told.found,
        read_only=True,
    )
    async def search_messages(self, given: forms.SearchArguments, _: Key) -> Result:
        query = parse_query(given.model_dump(exclude_none=True))
        try:
            self._searches.acquire_nowait()
        except trio.WouldBlock:
            why = (
                f"{SEARCHES_LIMIT} searches of {self.name} wait already, which is the limit; let one of them end first"
            )
            raise Refusal("refused", f"cannot search: {why}") from None
        try:
            return await self._archive.search(query, self.name)
        finally:
            self._searches.release()

    @tool(
        "Ask somebody; a message answers.",
        forms.AskArguments,
        forms.AskResult,
        told.asked,
    )
    async def ask(self, given: forms.AskArguments, key: Key) -> Result:
        ask = parse_ask(given.to, given.question, given.options, given.multi, given.free_text, given.ttl_s)
        return await self._ends.questions.ask(self.name, ask, key)

    @tool("Answer a question.", forms.AnswerArguments, forms.AnswerResult, told.answered)
    async def answer(self, given: forms.AnswerArguments, key: Key) -> Result:
        answer = parse_answer(given.choices, given.text)
        return await self._ends.questions.answer(self.name, given.question, answer, key)

    @tool("Message yourself later.", forms.RemindArguments, forms.RemindResult, told.reminded)
    async def remind(self, given: forms.RemindArguments, key: Key) -> Result:
        return await self._ends.reminders.remind(self.name, When(given.at, given.after_s), given.body, key)

    @tool(
        "Take back a reminder, question or thread.",
        forms.CancelArguments,
        forms.CancelResult,
        told.cancelled,
        destructive=True,
    )
    async def cancel(self, given: forms.CancelArguments, _: Key) -> Result:
        match given.kind:
            case "reminder":
                return await self._ends.reminders.cancel(self.name, given.id)
            case "question":
                return await self._ends.questions.cancel(self.name, given.id)
            case "thread":
                return await withdraw_thread(self._ends.store, self.name, given.id)

    @tool(
        "What waits on you, or you for.",
        forms.NoArguments,
        forms.LooseEndsResult,
        told.loose_ends,
        read_only=True,
    )
    async def loose_ends(self, _: forms.NoArguments, __: Key) -> Result:
        return await self._ends.of(self.name)

    @tool("Say who you are.", forms.ProfileArguments, forms.ProfileResult, told.profile)
    async def set_profile(self, given: forms.ProfileArguments, _: Key) -> Result:
        store, limits = self._ends.store, self._broker.limits
        return await set_profile(store, limits, self.name, given.pronouns, given.icon, given.about)

    @tool("Say what you are about.", forms.StatusArguments, forms.StatusResult, told.status)
    async def set_status(self, given: forms.StatusArguments, _: Key) -> Result:
        return await set_status(self._ends.store, self._broker.limits, self.name, given.text)


async def serve_agent(desk: AgentDesk, stream: Connection, *, progress_every_s: float = PROGRESS_EVERY_S) -> None:
    """Speak MCP with one client of an agent's socket until it hangs up."""
    wire = Wire(stream)

    async def list_tools(_: object, __: object) -> types.ListToolsResult:
        return types.ListToolsResult(tools=[one.to_mcp() for one in await desk.listed()])

    async def call_tool(context: Any, params: types.CallToolRequestParams) -> types.CallToolResult:
        called = desk.find(params.name)
        if called is None or not called.waits:
            return await answer(context, params)
        try:
            desk.waits.acquire_nowait()
        except trio.WouldBlock:
            why = f"{WAITS_LIMIT} calls of {desk.name} wait already, which is the limit; let one of them end first"
            return _as_error(f"cannot call {params.name}: {why}")
        awake = trio.CancelScope()
        # Beside the call and not around it, where it would wait once more when mail was taken, and could be cancelled.
        nursery.start_soon(_keep_awake, context.session, progress_every_s, awake)
        try:
            return await answer(context, params, lambda: wire.was_cancelled(context.request_id))
        finally:
            awake.cancel()
            desk.waits.release()

    async def answer(
        context: Any, params: types.CallToolRequestParams, taken_back: Callable[[], bool] = lambda: False
    ) -> types.CallToolResult:
        key = (context.meta or {}).get("claudecode/toolUseId")
        key = key if isinstance(key, str) and 0 < len(key) <= 200 and key.isprintable() else None
        try:
            result = await desk.call(params.name, params.arguments or {}, key, taken_back)
        except Refusal as refusal:
            return _as_error(refusal.message)
        called = desk.find(params.name)
        assert called is not None
        text = types.TextContent(type="text", text=called.told(result))
        return types.CallToolResult(content=[text], structured_content=result)

    server = Server("hyperhive", version=__version__, on_list_tools=list_tools, on_call_tool=call_tool)
    server.middleware += [wire.leave_when_answered, say_what_is_wrong]
    to_server, from_client = anyio.create_memory_object_stream[SessionMessage | Exception](0)
    to_client, from_server = anyio.create_memory_object_stream[SessionMessage](0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wire.write_out, from_server)
        nursery.start_soon(wire.read_in, to_server)
        await server.run(from_client, to_client, server.create_initialization_options())
        nursery.cancel_scope.cancel()


def _as_error(message: str) -> types.CallToolResult:
    return types.CallToolResult(content=[types.TextContent(type="text", text=message)], is_error=True)


async def _keep_awake(session: Any, every_s: float, awake: trio.CancelScope) -> None:
    """Let a client's idle timer begin anew while its call waits. Without a progress token nothing is sent."""
    with awake:
        for number in itertools.count(1):
            await trio.sleep(every_s)
            await session.report_progress(number, message="still waiting for mail")
