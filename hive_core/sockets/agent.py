"""mcp.sock: the tools of one agent, as an MCP server over newline-delimited JSON-RPC.

Who calls is the socket, never an argument. A writing call that carries the program's tool-use id counts once, however
often a bridge sends it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import anyio
import mcp_types as types
import trio
from mcp.server.lowlevel import Server
from mcp.shared.exceptions import MCPError
from mcp.shared.message import SessionMessage
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hive_core.agents import Agents
from hive_core.archive import SEARCH_LIMIT, Archive, parse_query
from hive_core.broker import RECV_LIMIT, RECV_WAIT_LIMIT_S, Broker
from hive_core.loose_ends import LooseEnds
from hive_core.procedures.gate import Gate
from hive_core.protocol.held import say_held
from hive_core.protocol.lines import LINE_LIMIT_BYTES, LineSplitter, decode, encode
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.visible import HIDDEN
from hive_core.protocol.words import (
    MANAGER,
    AgentName,
    parse_agent_name,
    parse_body,
    parse_commit_sha,
    parse_recipients,
)
from hive_core.questions import parse_answer, parse_ask
from hive_core.reminders import When
from hive_core.settings import describe
from hive_core.version import __version__
from hive_core.withdrawal import withdraw_thread

Key = str | None
PROGRESS_EVERY_S = 15.0
Result = dict[str, Any]


class _Arguments(BaseModel):
    model_config = ConfigDict(extra="forbid")


ToolKey = Annotated[str | None, Field(min_length=1, max_length=200, description="the same key counts once")]


class SendArguments(_Arguments):
    to: Annotated[str | list[str], Field(description="an agent's name, operator, a list of them, or * for everyone")]
    body: Annotated[str, Field(description="what to say, at most 512 KiB")]
    in_reply_to: Annotated[int | None, Field(gt=0, lt=2**63, description="the number of the message this answers")] = (
        None
    )
    key: ToolKey = None


class RecvArguments(_Arguments):
    wait_seconds: Annotated[float, Field(ge=0, le=RECV_WAIT_LIMIT_S, description="how long to wait for mail")] = 0
    max: Annotated[int, Field(ge=1, le=RECV_LIMIT)] = RECV_LIMIT
    key: ToolKey = None


class ReadBodyArguments(_Arguments):
    id: Annotated[int, Field(gt=0, lt=2**63, description="the message's number")]
    offset: Annotated[
        int, Field(ge=0, lt=2**63, description="the byte to begin with, next_offset of the answer before")
    ] = 0


class NoArguments(_Arguments):
    pass


class SearchArguments(_Arguments):
    text: Annotated[
        str, Field(description='words that must all be there; "two words" together; wor* begins a word')
    ] = ""
    sender: str | None = None
    thread: Annotated[int | None, Field(gt=0, lt=2**63, description="any message of the thread")] = None
    after: Annotated[str | None, Field(description="sent then or later, ISO 8601")] = None
    before: str | None = None
    limit: Annotated[int, Field(ge=1, le=SEARCH_LIMIT)] = 20
    cursor: Annotated[int | None, Field(gt=0, lt=2**63, description="next_cursor of the answer before")] = None


class AskArguments(_Arguments):
    to: Annotated[str, Field(description="an agent's name, or operator")]
    question: str
    options: Annotated[list[str] | None, Field(description="2 to 12 answers to choose from")] = None
    multi: Annotated[bool, Field(description="several may be chosen")] = False
    free_text: Annotated[bool, Field(description="other text is an answer too")] = False
    ttl_s: Annotated[float | None, Field(description="seconds to wait for the answer")] = None
    key: ToolKey = None


class AnswerArguments(_Arguments):
    question: Annotated[int, Field(gt=0, lt=2**63)]
    choices: Annotated[list[str] | None, Field(description="options of the question")] = None
    text: str | None = None
    key: ToolKey = None


class RemindArguments(_Arguments):
    body: str
    at: Annotated[str | None, Field(description="an instant, ISO 8601")] = None
    after_s: Annotated[float | None, Field(description="or seconds from now")] = None
    key: ToolKey = None


class CancelArguments(_Arguments):
    kind: Literal["reminder", "question", "thread"]
    id: Annotated[int, Field(gt=0, lt=2**63)]


class StatusArguments(_Arguments):
    text: Annotated[str, Field(description="at most 200 characters")]


class SpawnArguments(_Arguments):
    name: Annotated[str, Field(description="the new agent's name: a-z, 0-9 and dashes")]
    persona: Annotated[str, Field(description="who it is and how it works: the text of its CLAUDE.md")]
    reason: Annotated[str, Field(description="why the operator should approve it")]
    key: ToolKey = None


class ApplyArguments(_Arguments):
    agent: str
    sha: Annotated[str, Field(description="the whole commit id, 40 hex digits, from /agents/AGENT/config")]
    reason: Annotated[str, Field(description="what the change is for")]
    key: ToolKey = None


class KillArguments(_Arguments):
    agent: str


@dataclass(frozen=True, slots=True)
class Tool:
    name: str
    description: str
    arguments: type[_Arguments]
    call: Callable[[Any, Key], Awaitable[Result]]
    read_only: bool = False
    destructive: bool = False
    waits: bool = False  # it may take minutes: whoever asks to be told that it goes on is told

    def to_mcp(self) -> types.Tool:
        return types.Tool(
            name=self.name,
            description=self.description,
            input_schema=self.arguments.model_json_schema(),
            annotations=types.ToolAnnotations(
                read_only_hint=self.read_only,
                idempotent_hint=True,
                destructive_hint=self.destructive,
                open_world_hint=False,
            ),
        )


class AgentDesk:
    """The tools of one agent; the manager's socket has more of them, and nobody else's has those."""

    def __init__(
        self,
        name: AgentName,
        broker: Broker,
        agents: Agents,
        gate: Gate,
        kill: Callable[[AgentName, AgentName], Awaitable[None]],
        archive: Archive | None = None,
        loose_ends: LooseEnds | None = None,
    ) -> None:
        self.name = name
        self._broker = broker
        self._agents = agents
        self._gate = gate
        self._kill = kill
        tools = [
            Tool("send", "Send a message to an agent or to the operator.", SendArguments, self._send),
            Tool(
                "recv", "Take more of your mail in this turn; waits if asked to.", RecvArguments, self._recv, waits=True
            ),
            Tool("read_body", "Read on in a large message, 64 KiB a call.", ReadBodyArguments, self._read_body, True),
            Tool("whoami", "Your name and role.", NoArguments, self._whoami, read_only=True),
            Tool("list_agents", "The agents of this hive and what they do now.", NoArguments, self._list, True),
        ]
        if archive is not None:
            self._archive = archive
            tools.append(
                Tool("search_messages", "Find messages you sent or received.", SearchArguments, self._search, True)
            )
        if loose_ends is not None:
            self._ends = loose_ends
            tools += [
                Tool("ask", "Ask an agent or the operator; the answer comes as a message.", AskArguments, self._ask),
                Tool("answer", "Answer a question that was put to you.", AnswerArguments, self._answer),
                Tool("remind", "Send yourself a message later.", RemindArguments, self._remind),
                Tool(
                    "cancel",
                    "Take back your reminder, question, or what nobody has read of a thread.",
                    CancelArguments,
                    self._cancel,
                    destructive=True,
                ),
                Tool("loose_ends", "What waits on you, and what you wait for.", NoArguments, self._loose_ends, True),
                Tool("set_status", "Say in one line what you are about.", StatusArguments, self._set_status),
            ]
        if name == MANAGER:
            tools += [
                Tool("request_spawn", "Ask the operator for a new agent.", SpawnArguments, self._spawn),
                Tool(
                    "request_apply_commit",
                    "Ask the operator to run an agent on a commit you made in /agents/AGENT/config.",
                    ApplyArguments,
                    self._apply,
                ),
                Tool(
                    "kill",
                    "Stop an agent now. It stays down until the operator starts it.",
                    KillArguments,
                    self._stop,
                    destructive=True,
                ),
            ]
        self.tools = {tool.name: tool for tool in tools}

    async def call(self, name: str, arguments: dict[str, Any], key: Key) -> Result:
        """The result of one tool call. Raises Refusal with one sentence for the agent."""
        tool = self.tools.get(name)
        if tool is None:
            raise Refusal("not_found", f"cannot call {ascii(name)[:60]}: the tools are {', '.join(self.tools)}")
        try:
            parsed = tool.arguments.model_validate(arguments)
        except ValidationError as exc:
            raise Refusal("usage", f"cannot call {name}: {describe(exc)}") from None
        return await tool.call(parsed, key)

    async def _send(self, arguments: SendArguments, key: Key) -> Result:
        recipients, body = parse_recipients(arguments.to), parse_body(arguments.body)
        return await self._broker.send(self.name, recipients, body, arguments.in_reply_to, key or arguments.key)

    async def _recv(self, arguments: RecvArguments, key: Key) -> Result:
        return await self._broker.recv(self.name, arguments.max, arguments.wait_seconds, key or arguments.key)

    async def _read_body(self, arguments: ReadBodyArguments, _: Key) -> Result:
        return await self._broker.read_body(arguments.id, arguments.offset, self.name)

    async def _whoami(self, _: NoArguments, __: Key) -> Result:
        return {"name": self.name, "role": "manager" if self.name == MANAGER else "agent"}

    async def _list(self, _: NoArguments, __: Key) -> Result:
        return {
            "agents": [
                {
                    "name": agent.name,
                    "state": self._agents.live(agent.name).state,
                    "queued": agent.queued,
                    **({"status": agent.status} if agent.status else {}),
                }
                for agent in await self._agents.all()
            ]
        }

    async def _search(self, arguments: SearchArguments, _: Key) -> Result:
        return await self._archive.search(parse_query(arguments.model_dump(exclude_none=True)), self.name)

    async def _ask(self, given: AskArguments, key: Key) -> Result:
        ask = parse_ask(given.to, given.question, given.options, given.multi, given.free_text, given.ttl_s)
        return await self._ends.questions.ask(self.name, ask, key or given.key)

    async def _answer(self, given: AnswerArguments, key: Key) -> Result:
        answer = parse_answer(given.choices, given.text)
        return await self._ends.questions.answer(self.name, given.question, answer, key or given.key)

    async def _remind(self, given: RemindArguments, key: Key) -> Result:
        return await self._ends.reminders.remind(self.name, When(given.at, given.after_s), given.body, key or given.key)

    async def _cancel(self, given: CancelArguments, _: Key) -> Result:
        match given.kind:
            case "reminder":
                return await self._ends.reminders.cancel(self.name, given.id)
            case "question":
                return await self._ends.questions.cancel(self.name, given.id)
            case "thread":
                return await withdraw_thread(self._ends.store, self.name, given.id)

    async def _loose_ends(self, _: NoArguments, __: Key) -> Result:
        return await self._ends.of(self.name)

    async def _set_status(self, given: StatusArguments, _: Key) -> Result:
        return await self._agents.set_status(self.name, given.text)

    async def _spawn(self, arguments: SpawnArguments, key: Key) -> Result:
        name = parse_agent_name(arguments.name)
        key = key or arguments.key
        return await self._gate.request_spawn(self.name, name, arguments.persona, arguments.reason, key)

    async def _apply(self, arguments: ApplyArguments, key: Key) -> Result:
        name, sha = parse_agent_name(arguments.agent), parse_commit_sha(arguments.sha)
        key = key or arguments.key
        return await self._gate.request_apply_commit(self.name, name, sha, arguments.reason, key)

    async def _stop(self, arguments: KillArguments, _: Key) -> Result:
        name = parse_agent_name(arguments.agent)
        await self._kill(name, self.name)
        return {"killed": name}


def _summary(result: Result) -> str:
    """The result as one line of JSON, in which nothing hides: a body's line ends and marks are escapes there.

    Of a message that is held, a second line says what becomes of it.
    """
    line = HIDDEN.sub(lambda match: json.dumps(match[0])[1:-1], encode(result).decode().strip())
    if "message" in result and isinstance(held := result.get("held"), dict):
        line += f"\n{say_held(result['message'], held)}"
    return line


async def serve_agent(
    desk: AgentDesk, stream: trio.SocketStream, *, progress_every_s: float = PROGRESS_EVERY_S
) -> None:
    """Speak MCP with one client of an agent's socket until it hangs up."""

    async def list_tools(_: object, __: object) -> types.ListToolsResult:
        return types.ListToolsResult(tools=[tool.to_mcp() for tool in desk.tools.values()])

    async def call_tool(context: Any, params: types.CallToolRequestParams) -> types.CallToolResult:
        tool = desk.tools.get(params.name)
        if tool is None or not tool.waits:
            return await answer(context, params)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_keep_awake, context.session, progress_every_s)
            result = await answer(context, params)
            nursery.cancel_scope.cancel()
        return result

    async def answer(context: Any, params: types.CallToolRequestParams) -> types.CallToolResult:
        key = (context.meta or {}).get("claudecode/toolUseId")
        key = key if isinstance(key, str) and 0 < len(key) <= 200 else None
        try:
            result = await desk.call(params.name, params.arguments or {}, key)
        except Refusal as refusal:
            text = types.TextContent(type="text", text=refusal.message)
            return types.CallToolResult(content=[text], is_error=True)
        text = types.TextContent(type="text", text=_summary(result))
        return types.CallToolResult(content=[text], structured_content=result)

    server = Server("hyperhive", version=__version__, on_list_tools=list_tools, on_call_tool=call_tool)
    server.middleware.append(_say_what_is_wrong)
    to_server, from_client = anyio.create_memory_object_stream[SessionMessage | Exception](0)
    to_client, from_server = anyio.create_memory_object_stream[SessionMessage](0)
    lock = trio.Lock()

    async def write_out() -> None:
        async with from_server:
            async for message in from_server:
                line = message.message.model_dump_json(by_alias=True, exclude_unset=True)
                async with lock:
                    await stream.send_all(line.encode() + b"\n")

    async def read_in() -> None:
        splitter = LineSplitter(LINE_LIMIT_BYTES)
        async with to_server:
            async for data in stream:
                for line in splitter.feed(bytes(data)):
                    answer = await _hand_over(line, to_server)
                    if answer is not None:
                        async with lock:
                            await stream.send_all(encode(answer))
            if (half := splitter.end()) is not None:
                async with lock:
                    await stream.send_all(encode(_rpc_error(-32700, half.message)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write_out)
        nursery.start_soon(read_in)
        await server.run(from_client, to_client, server.create_initialization_options())
        nursery.cancel_scope.cancel()


async def _keep_awake(session: Any, every_s: float) -> None:
    """Let a client's idle timer begin anew while its call waits. Without a progress token nothing is sent."""
    for number in itertools.count(1):
        await trio.sleep(every_s)
        await session.report_progress(number, message="still waiting for mail")


async def _say_what_is_wrong(ctx: Any, call_next: Callable[[Any], Awaitable[Any]]) -> Any:
    """The library says of every request that it does not let through no more than that its parameters are invalid."""
    try:
        return await call_next(ctx)
    except ValidationError as exc:
        raise MCPError(types.INVALID_PARAMS, f"cannot answer {ctx.method}: {describe(exc)}") from None
    except MCPError as exc:
        if exc.code != types.INVALID_PARAMS or exc.data != "":
            raise
        why = "this connection is not initialized; send initialize first"
        raise MCPError(types.INVALID_REQUEST, f"cannot answer {ctx.method}: {why}") from None


async def _hand_over(line: bytes | Refusal, to_server: Any) -> dict[str, Any] | None:
    """Give one line to the server; the JSON-RPC error for one that is none, and the connection goes on."""
    if isinstance(line, Refusal):
        return _rpc_error(-32600, line.message)
    if not line.strip():
        return None
    try:
        message = types.jsonrpc_message_adapter.validate_json(line, by_name=False)
    except (ValidationError, ValueError) as exc:
        return _rpc_error(-32700, _trouble_of(line, exc), _id_in(line))
    if isinstance(message, types.JSONRPCNotification) and "id" in json.loads(line):
        # An id that is none makes a notification of it, and whoever asked would wait for ever.
        needs = "a request needs one that is a whole number or text, a notification has none"
        return _rpc_error(-32600, f"cannot answer {ascii(message.method)[:60]}: its id is neither; {needs}")
    await to_server.send(SessionMessage(message))
    return None


def _trouble_of(line: bytes, error: ValueError) -> str:
    """Why a line is no message of JSON-RPC: as host.sock would say it, where it is not even an object."""
    try:
        decode(line)
    except Refusal as refusal:
        return refusal.message
    first = error.errors(include_url=False, include_input=False)[0] if isinstance(error, ValidationError) else None
    if first is not None and first["type"] == "json_invalid":  # of JSON that Python reads, and the library does not
        return f"cannot read the line: {str(first['ctx']['error'])[:200]}; send plain, flat JSON"
    return (
        'cannot read the line as JSON-RPC: it needs "jsonrpc": "2.0", a method that is text, an id that is a whole '
        "number or text where it is a request, and params, if any, that are an object"
    )


def _id_in(line: bytes) -> int | str | None:
    """The id of a request that is no good, so that its caller need not wait for ever."""
    try:
        number = json.loads(line).get("id")
    except (ValueError, AttributeError, RecursionError):
        return None
    return number if isinstance(number, int | str) and not isinstance(number, bool) else None


def _rpc_error(code: int, message: str, number: int | str | None = None) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": number, "error": {"code": code, "message": message}}
