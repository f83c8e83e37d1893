"""A scripted model: a local HTTP endpoint that speaks enough of the Anthropic API to drive the real Claude Code.

    def answer(request):
        if request.tool_results:
            return say("done: " + request.tool_results[-1].text)
        return say("I look around.", tool("Bash", command="ls"))

    with ScriptedModel(answer) as model:
        run_claude(ANTHROPIC_BASE_URL=model.base_url)
    assert model.turns[0].last_user_text == "…"

The answer function sees one request at a time (a lock is held, so it may keep state without one of its own) and
returns a Reply, a Failure, or a string, which is a Reply of that text. A list of answers instead of a function is
given out in order to the requests of the conversation; side requests (see Request.is_side) never consume one.
"""

from __future__ import annotations

import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True)
class ToolUse:
    name: str
    input: dict[str, Any]
    id: str = ""  # "" takes the next number


@dataclass(frozen=True, slots=True)
class Reply:
    """One assistant message. `cut_after` closes the connection after that many events, as a crash would.

    claude asks again without a stream when one was cut, and after a 404: the answer function sees that request too.
    """

    blocks: tuple[Text | ToolUse, ...]
    input_tokens: int = 10
    output_tokens: int = 5
    cut_after: int | None = None
    stop: str | None = None  # the stop_reason, where it is another than the blocks say: "refusal"


@dataclass(frozen=True, slots=True)
class Failure:
    """An error instead of a message. `x-should-retry: false` among the headers keeps the client from trying again."""

    status: int
    message: str = ""
    headers: tuple[tuple[str, str], ...] = (("x-should-retry", "false"),)


Answer = Reply | Failure | str
_message_numbers = itertools.count(1)
AnswerFunction = Callable[["Request"], Answer]

ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    529: "overloaded_error",
}


def say(*blocks: str | Text | ToolUse, **fields: Any) -> Reply:
    """A reply of these blocks; plain strings are text."""
    return Reply(tuple(Text(block) if isinstance(block, str) else block for block in blocks), **fields)


def tool(name: str, /, **arguments: Any) -> ToolUse:
    """A block that calls a tool: `tool("mcp__hive__send", to="operator", body="hello")`."""
    return ToolUse(name, arguments)


def fail(status: int, message: str = "", *, retry: bool = False, **headers: str) -> Failure:
    """An error answer; header names are written with underscores: `fail(429, retry_after="60")`."""
    pairs = [(name.replace("_", "-"), value) for name, value in headers.items()]
    return Failure(status, message, tuple(pairs) if retry else (("x-should-retry", "false"), *pairs))


@dataclass(frozen=True, slots=True)
class ToolResult:
    tool_use_id: str
    text: str
    is_error: bool


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it came. Header names are in lower case; `body` is {} when there was none."""

    method: str
    path: str  # with its query
    headers: dict[str, str]
    body: dict[str, Any]
    came_at: float = field(default=0.0, compare=False)  # time.monotonic() at its first bytes
    answered_with: list[Answer] = field(default_factory=list, compare=False, repr=False)

    @property
    def route(self) -> str:
        """The path without its query."""
        return urlsplit(self.path).path

    @property
    def model(self) -> str:
        return str(self.body.get("model", ""))

    @property
    def system(self) -> str:
        """The whole system prompt as one text."""
        return text_of(self.body.get("system", ""))

    @property
    def tools(self) -> list[str]:
        return [str(tool.get("name")) for tool in self.body.get("tools") or []]

    @property
    def messages(self) -> list[dict[str, Any]]:
        return list(self.body.get("messages") or [])

    @property
    def user_texts(self) -> list[str]:
        """What the person said, turn after turn: no tool results, and none of the client's own reminders."""
        spoken = (spoken_text(message) for message in self.messages if message.get("role") == "user")
        return [text for text in spoken if text]

    @property
    def last_user_text(self) -> str:
        return self.user_texts[-1] if self.user_texts else ""

    @property
    def tool_results(self) -> list[ToolResult]:
        """The results in the last message: empty when it is something said."""
        blocks = blocks_of(self.messages[-1].get("content")) if self.messages else []
        return [
            ToolResult(
                str(block.get("tool_use_id")), text_of(block.get("content", "")), bool(block.get("is_error", False))
            )
            for block in blocks
            if block.get("type") == "tool_result"
        ]

    @property
    def is_side(self) -> bool:
        """Whether this is the client's own business (a title, a probe, a count) and no step of the conversation."""
        return self.route != "/v1/messages" or not self.tools


def blocks_of(content: object) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [block for block in content if isinstance(block, dict)] if isinstance(content, list) else []


def text_of(content: object) -> str:
    return "\n".join(str(block["text"]) for block in blocks_of(content) if block.get("type") == "text")


def spoken_text(message: dict[str, Any]) -> str:
    texts = [str(block["text"]) for block in blocks_of(message.get("content")) if block.get("type") == "text"]
    return "\n".join(text for text in texts if not text.lstrip().startswith("<system-reminder>"))


class ScriptedModel:
    """The server, open inside `with`; its threads end with it.

    base_url   what ANTHROPIC_BASE_URL takes
    requests   everything that came, in order
    turns      those that are steps of a conversation
    errors     exceptions of the answer function; leaving the `with` raises the first
    """

    def __init__(self, answer: AnswerFunction | Iterable[Answer]) -> None:
        self._answer = answer if callable(answer) else in_order(answer)
        self._lock = threading.Lock()
        self._tool_ids = itertools.count(1)
        self.requests: list[Request] = []
        self.errors: list[Exception] = []

    def __enter__(self) -> Self:
        self._server = Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="scripted model")
        self._thread.start()
        return self

    def __exit__(self, exc_type: object, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.hang_up()
        self._server.server_close()
        if self.errors and exc_type is None:
            raise self.errors[0]

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def turns(self) -> list[Request]:
        return [request for request in self.requests if not request.is_side]

    def answer(self, request: Request) -> Reply | Failure:
        """Record a request for a message and decide its answer."""
        with self._lock:
            self.requests.append(request)
            try:
                answer: Answer = "ok" if request.is_side else self._answer(request)
            except Exception as exc:
                self.errors.append(exc)
                answer = fail(500, f"the script failed: {exc!r}")
            answer = say(answer) if isinstance(answer, str) else answer
            request.answered_with.append(answer)
            return answer if isinstance(answer, Failure) else self._numbered(answer)

    def record(self, request: Request) -> None:
        with self._lock:
            self.requests.append(request)

    def _numbered(self, reply: Reply) -> Reply:
        blocks = tuple(
            ToolUse(block.name, block.input, block.id or f"toolu_scripted{next(self._tool_ids):04}")
            if isinstance(block, ToolUse)
            else block
            for block in reply.blocks
        )
        return replace(reply, blocks=blocks)


def in_order(answers: Iterable[Answer]) -> AnswerFunction:
    rest = iter(answers)

    def answer(request: Request) -> Answer:
        try:
            return next(rest)
        except StopIteration:
            raise AssertionError(f"the script has no answer left for {request.last_user_text[:200]!r}") from None

    return answer


class Server(ThreadingHTTPServer):
    daemon_threads = False

    def __init__(self, model: ScriptedModel) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model = model
        self._open: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """Close the connections that clients keep alive, so that no thread waits for another request."""
        for connection in list(self._open):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # it was closed already

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up in the middle is an ordinary end here."""


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    came_at = 0.0

    def parse_request(self) -> bool:
        self.came_at = time.monotonic()
        return super().parse_request()

    def do_HEAD(self) -> None:
        self.server.model.record(self._request())
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        self.server.model.record(self._request())
        self._send_failure(fail(404, "there is nothing here"))

    def do_POST(self) -> None:
        request = self._request()
        if request.route == "/v1/messages/count_tokens":
            self.server.model.record(request)
            self._send_json(200, {"input_tokens": max(1, len(json.dumps(request.body)) // 4)})
        elif request.route == "/v1/messages":
            self._send_answer(request, self.server.model.answer(request))
        else:
            self.server.model.record(request)
            self._send_failure(fail(404, f"there is nothing at {request.route}"))

    def _request(self) -> Request:
        data = self.rfile.read(int(self.headers.get("content-length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        return Request(self.command, self.path, headers, json.loads(data) if data else {}, self.came_at)

    def _send_answer(self, request: Request, answer: Reply | Failure) -> None:
        if isinstance(answer, Failure):
            self._send_failure(answer)
        elif request.body.get("stream"):
            self._stream(request, answer)
        elif answer.cut_after is not None:
            self.close_connection = True
        else:
            self._send_json(200, whole_message(request, answer))

    def _send_failure(self, failure: Failure) -> None:
        message = failure.message or f"scripted {failure.status}"
        error = {"type": ERROR_TYPES.get(failure.status, "api_error"), "message": message}
        self._send_json(failure.status, {"type": "error", "error": error}, failure.headers)

    def _send_json(self, status: int, body: dict[str, Any], headers: Iterable[tuple[str, str]] = ()) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in (("content-type", "application/json"), ("content-length", str(len(data))), *headers):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, request: Request, reply: Reply) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for sent, event in enumerate(events(request, reply)):
            if sent == reply.cut_after:
                self.close_connection = True
                return
            data = f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, format: str, *args: object) -> None:
        """Requests are kept in `requests`; stderr stays the test's own."""


def whole_message(request: Request, reply: Reply) -> dict[str, Any]:
    """The answer to a request that did not ask for a stream."""
    return {
        **message_head(request, reply),
        "content": [block_form(block, filled=True) for block in reply.blocks],
        "stop_reason": stop_reason(reply),
        "usage": {"input_tokens": reply.input_tokens, "output_tokens": reply.output_tokens},
    }


def events(request: Request, reply: Reply) -> Iterator[dict[str, Any]]:
    """A reply as the events of the streaming API."""
    yield {"type": "message_start", "message": message_head(request, reply)}
    for index, block in enumerate(reply.blocks):
        yield {"type": "content_block_start", "index": index, "content_block": block_form(block, filled=False)}
        if isinstance(block, Text):
            delta = {"type": "text_delta", "text": block.text}
        else:
            delta = {"type": "input_json_delta", "partial_json": json.dumps(block.input)}
        yield {"type": "content_block_delta", "index": index, "delta": delta}
        yield {"type": "content_block_stop", "index": index}
    yield {
        "type": "message_delta",
        "delta": {"stop_reason": stop_reason(reply), "stop_sequence": None},
        "usage": {"output_tokens": reply.output_tokens},
    }
    yield {"type": "message_stop"}


def message_head(request: Request, reply: Reply) -> dict[str, Any]:
    return {
        # One of its own for each: a resumed session merges messages of one id, as if they were one answer.
        "id": f"msg_scripted{next(_message_numbers):06}",
        "type": "message",
        "role": "assistant",
        "model": request.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": reply.input_tokens, "output_tokens": 1},
    }


def block_form(block: Text | ToolUse, filled: bool) -> dict[str, Any]:
    if isinstance(block, Text):
        return {"type": "text", "text": block.text if filled else ""}
    return {"type": "tool_use", "id": block.id, "name": block.name, "input": block.input if filled else {}}


def stop_reason(reply: Reply) -> str:
    if reply.stop is not None:
        return reply.stop
    return "tool_use" if any(isinstance(block, ToolUse) for block in reply.blocks) else "end_turn"
