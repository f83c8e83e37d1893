"""`hive-agent rehearse`: a stand-in for Claude Code that needs no account and understands nothing.

It takes claude's flags, speaks claude's stream-json, calls the real tools of the hive through the same configuration,
and follows the script in its system prompt. To a message that no rule fits it says honestly what it is.
Standard library alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import uuid

from hive_agent.rehearsal_script import BadScript, fill, fill_command, find_rules, purpose, steps_for
from hive_agent.tool_server import ToolServer, ToolServerGone, result_fields, result_text
from hive_agent.wake import Wake, parse_wake

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

VERSION = "rehearsal"
MARK = "[rehearsal]"  # such an answer gets no answer: two rehearsals would thank each other for ever
OUTPUT_LIMIT = 30_000
_SWITCHES = frozenset(
    {"--print", "--verbose", "--strict-mcp-config", "--dangerously-skip-permissions", "--no-session-persistence"}
)
_VALUES = frozenset(
    {
        "--input-format",
        "--output-format",
        "--mcp-config",
        "--tools",
        "--allowedTools",
        "--model",
        "--effort",
        "--session-id",
        "--resume",
        "--append-system-prompt",
        "--add-dir",
        "--setting-sources",
        "--plugin-dir",
    }
)


class BadUsage(Exception):
    """The command line is not one of claude's that this stand-in knows."""


def parse_flags(argv: list[str]) -> dict[str, str]:
    """The flags by name, "" for a switch. Raises BadUsage."""
    flags: dict[str, str] = {}
    rest = iter(argv)
    for flag in rest:
        if flag in _SWITCHES:
            flags[flag] = ""
        elif flag in _VALUES:
            try:
                flags[flag] = next(rest)
            except StopIteration:
                raise BadUsage(f"error: option '{flag} <value>' argument missing") from None
        else:
            raise BadUsage(f"error: unknown option '{flag}'")
    streams = {flags.get("--input-format"), flags.get("--output-format")}
    if streams != {"stream-json"} or "--print" not in flags or "--verbose" not in flags:
        needs = "--print --verbose --input-format stream-json --output-format stream-json"
        raise BadUsage(f"error: a rehearsal speaks only with {needs}")
    if "--dangerously-skip-permissions" in flags and os.geteuid() == 0 and not os.environ.get("IS_SANDBOX"):
        raise BadUsage("--dangerously-skip-permissions cannot be used with root/sudo privileges")
    return flags


def find_server(flags: dict[str, str]) -> dict[str, Any] | None:
    """How the hive's MCP server is started, None when the flags name none. Raises BadUsage."""
    cannot = "error: cannot use --mcp-config"
    try:
        config = json.loads(flags.get("--mcp-config") or "{}")
    except ValueError as exc:
        raise BadUsage(f"{cannot}: it is not JSON ({exc})") from None
    except RecursionError:
        raise BadUsage(f"{cannot}: it is not JSON (it is nested too deeply)") from None
    entries = config.get("mcpServers", {}) if isinstance(config, dict) else None
    if not isinstance(entries, dict):
        raise BadUsage(f"{cannot}: it must be an object with an object `mcpServers`")
    entry = entries.get("hive")
    if entry is None:
        return None
    words = [entry.get("command"), *entry.get("args", [])] if _is_entry(entry) else [None]
    if not all(isinstance(word, str) and "\0" not in word for word in words):
        raise BadUsage(f"{cannot}: its server `hive` needs a `command` that is text and a list `args` of texts")
    return {"command": words[0], "args": words[1:]}


def _is_entry(entry: object) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("args", []), list)


class Sessions:
    """The sessions this stand-in has held: a file each, so that an unknown one is refused as claude does."""

    def __init__(self) -> None:
        config = os.environ.get("CLAUDE_CONFIG_DIR") or os.path.expanduser("~/.claude")
        self._folder = os.path.join(config, "projects", "rehearsal-sessions")

    def holds(self, session: str) -> bool:
        return os.path.exists(os.path.join(self._folder, os.path.basename(session)))

    def keep(self, session: str) -> None:
        os.makedirs(self._folder, exist_ok=True)
        with open(os.path.join(self._folder, os.path.basename(session)), "a"):
            pass


class Rehearsal:
    """The turns of one process. Raises BadScript when there is no way to follow its script."""

    def __init__(self, flags: dict[str, str], server: dict[str, Any] | None, session: str) -> None:
        self._flags = flags
        self._server = server
        self._session = session
        self._model = flags.get("--model", "none")
        self._prompt = flags.get("--append-system-prompt", "")
        self._rules = find_rules(self._prompt)
        self._hive: ToolServer | None = None
        self._begin()

    def _begin(self) -> None:
        self._began = time.monotonic()
        self._steps = 0
        self._last_text = ""
        self._words: dict[str, Any] = {"agent": os.environ.get("HIVE_AGENT", "agent"), "model": self._model}

    def play(self, prompt: str) -> int | None:
        """Speak one whole turn. The exit code if the script ends the process with it, None otherwise."""
        self._begin()
        if prompt == "/compact":
            self._compact()
            return None
        self._init()
        if prompt == "/cost":
            self._result("A rehearsal costs nothing.")
            return None
        exit_code = self._follow(prompt)
        if exit_code is None:
            self._result(self._last_text)
        return exit_code

    def _compact(self) -> None:
        """Say what claude says; there is nothing to make smaller."""
        self._emit(type="system", subtype="status", status="compacting")
        self._emit(type="system", subtype="status", status=None, compact_result="success")
        self._init()
        told = {"trigger": "manual", "pre_tokens": 2, "post_tokens": 1}
        self._emit(type="system", subtype="compact_boundary", compact_metadata=told)
        self._result("")

    def interrupted(self) -> None:
        """End the turn as claude does that is told to."""
        self._result("", subtype="error_during_execution", is_error=True, errors=["the turn was interrupted"])

    def close(self) -> None:
        if self._hive is not None:
            self._hive.close()

    def _follow(self, prompt: str) -> int | None:
        """Do the steps for the message. The exit code if the script gives one, None to end as usual."""
        wake = parse_wake(prompt)
        if wake is None:
            self._say("This is a rehearsal: it only follows a script for messages of the hive.")
            return None
        self._words |= {"sender": wake.sender, "body": wake.body, "message_id": wake.message_id}
        self._words |= {"refused": wake.refused, "body_bytes": wake.body_bytes or len(wake.body.encode())}
        steps = steps_for(self._rules, wake)
        if steps is None:
            self._explain(wake)
            return None
        for step in steps:
            if "exit" in step:
                return int(step["exit"])
            self._do(step)
        return None

    def _do(self, step: dict[str, Any]) -> None:
        match step:
            case {"say": text}:
                self._say(str(fill(text, self._words)))
            case {"tool": name}:
                self._call(str(name), fill(step.get("args", {}), self._words), step.get("save"))
            case {"run": command}:
                self._run(fill_command(command, self._words), step.get("save"))
            case {"sleep_s": seconds}:
                time.sleep(float(seconds))
            case {"hang": _}:
                while True:
                    signal.pause()

    def _explain(self, wake: Wake) -> None:
        """Answer a message that no rule fits, unless that would only be answered again."""
        if wake.sender in ("system", "forge") or MARK in wake.body:
            self._say("No rule of my script fits this message, and it needs no answer.")
            return
        role = purpose(self._prompt) or "it says nothing about a purpose"
        answer = (
            f"{MARK} I am only a stand-in for {self._words['agent']}: I follow a script, and no rule of it fits your "
            f'message. My configuration: “{role[:300]}” To get the real agent, set program = "claude" in its '
            "agent.toml and start the hive with `hive up`."
        )
        self._call("send", {"to": wake.sender, "body": answer, "in_reply_to": wake.message_id}, None)

    def _say(self, text: str) -> None:
        self._last_text = text
        self._assistant({"type": "text", "text": text})

    def _call(self, name: str, arguments: dict[str, Any], save: str | None) -> None:
        name = name.removeprefix("mcp__hive__")
        use_id = self._use(f"mcp__hive__{name}", arguments)
        try:
            if self._hive is None:
                raise ToolServerGone("the MCP server is not connected")
            result = self._hive.call(name, arguments, use_id)
        except ToolServerGone as exc:
            result = {"content": [{"type": "text", "text": str(exc)}], "isError": True}
        self._tool_result(use_id, result_text(result), bool(result.get("isError")))
        if save:
            self._words[save] = result_text(result)
            self._words |= {f"{save}.{field}": value for field, value in result_fields(result).items()}

    def _run(self, command: str, save: str | None) -> None:
        use_id = self._use("Bash", {"command": command})
        done = subprocess.run(
            ["/bin/sh", "-c", command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        output = done.stdout.decode("utf-8", "replace").strip()
        self._tool_result(use_id, output[:OUTPUT_LIMIT], done.returncode != 0)
        if save:
            self._words[save] = output

    def _use(self, name: str, arguments: dict[str, Any]) -> str:
        use_id = f"toolu_{uuid.uuid4().hex}"
        self._assistant({"type": "tool_use", "id": use_id, "name": name, "input": arguments})
        return use_id

    def _init(self) -> None:
        servers, tools = self._connect()
        listed = [tool for tool in self._flags.get("--tools", "").split(",") if tool]
        skips = "--dangerously-skip-permissions" in self._flags
        self._emit(
            type="system",
            subtype="init",
            cwd=os.getcwd(),
            tools=sorted(listed) + [f"mcp__hive__{tool}" for tool in tools],
            mcp_servers=servers,
            model=self._model,
            permissionMode="bypassPermissions" if skips else "default",
            claude_code_version=VERSION,
        )

    def _connect(self) -> tuple[list[dict[str, str]], list[str]]:
        """Start the hive's MCP server as claude does: (each server's status, the hive's tools)."""
        if self._server is None:
            return [], []
        try:
            self._hive = self._hive or ToolServer(self._server)
            return [{"name": "hive", "status": "connected"}], self._hive.tools()
        except ToolServerGone:
            self._hive = None
            return [{"name": "hive", "status": "failed"}], []

    def _assistant(self, block: dict[str, Any]) -> None:
        self._steps += 1
        message = {
            "id": f"msg_rehearsal{self._steps}",
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": [block],
            "usage": {"input_tokens": 0, "output_tokens": 0},
        }
        self._emit(type="assistant", message=message, parent_tool_use_id=None)

    def _tool_result(self, use_id: str, text: str, is_error: bool) -> None:
        block: dict[str, Any] = {"tool_use_id": use_id, "type": "tool_result", "content": text}
        if is_error:
            block["is_error"] = True
        self._emit(type="user", message={"role": "user", "content": [block]}, parent_tool_use_id=None)

    def _result(self, text: str, *, subtype: str = "success", is_error: bool = False, **more: Any) -> None:
        self._emit(
            type="result",
            subtype=subtype,
            is_error=is_error,
            api_error_status=None,
            duration_ms=int((time.monotonic() - self._began) * 1000),
            num_turns=self._steps,
            result=text,
            total_cost_usd=0,
            usage=NO_USAGE,
            modelUsage={},
            **more,
        )

    def _emit(self, **event: Any) -> None:
        emit({**event, "session_id": self._session, "uuid": str(uuid.uuid4())})


NO_USAGE = {
    "input_tokens": 0,
    "cache_creation_input_tokens": 0,
    "cache_read_input_tokens": 0,
    "output_tokens": 0,
}


def emit(event: dict[str, Any]) -> None:
    print(json.dumps(event), flush=True)


def refuse_session(session: str) -> int:
    """End as claude does when it knows no session of that id."""
    sentence = f"No conversation found with session ID: {session}"
    print(sentence, file=sys.stderr)
    emit(
        {
            "type": "result",
            "subtype": "error_during_execution",
            "is_error": True,
            "num_turns": 0,
            "duration_ms": 0,
            "session_id": session,
            "total_cost_usd": 0,
            "usage": NO_USAGE,
            "modelUsage": {},
            "errors": [sentence],
        }
    )
    return 1


def _lines_of(descriptor: int) -> Iterator[bytes]:
    """Not through sys.stdin: a thread that reads it when the process ends makes Python die with noise."""
    rest = b""
    while data := os.read(descriptor, 1 << 16):
        *lines, rest = (rest + data).split(b"\n")
        yield from lines


class Orders:
    """What comes on stdin: prompts one after the other, and the order to end the turn that runs."""

    def __init__(self) -> None:
        self._prompts: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._plays = False
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Thread(target=self._read, daemon=True).start()

    def next(self) -> str | None:
        """The next prompt, None behind the last one. From now on a turn can be interrupted."""
        while True:
            with contextlib.suppress(KeyboardInterrupt):  # it came when its turn had just ended
                prompt = self._prompts.get()
                self._plays = prompt is not None
                return prompt

    def done(self) -> None:
        self._plays = False

    def _read(self) -> None:
        for line in _lines_of(0):
            order = json.loads(line)
            if order.get("type") == "user":
                content = order["message"]["content"]
                self._prompts.put(content if isinstance(content, str) else "".join(part["text"] for part in content))
            elif order.get("type") == "control_request":
                response = {"subtype": "success", "request_id": order["request_id"]}
                emit({"type": "control_response", "response": response})
                if self._plays and order["request"]["subtype"] == "interrupt":
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        self._prompts.put(None)


def main(argv: list[str]) -> int:
    try:
        flags = parse_flags(argv)
        server = find_server(flags)
    except BadUsage as exc:
        print(exc, file=sys.stderr)
        return 1
    sessions = Sessions()
    resumed = flags.get("--resume")
    if resumed is not None and not sessions.holds(resumed):
        return refuse_session(resumed)
    session = resumed or flags.get("--session-id") or str(uuid.uuid4())
    if "--no-session-persistence" not in flags:
        sessions.keep(session)
    try:
        rehearsal = Rehearsal(flags, server, session)
    except BadScript as exc:
        # Like a program with settings that it cannot read: it does not come up, and the gate sees that.
        print(exc, file=sys.stderr)
        return 1
    orders = Orders()
    try:
        while (prompt := orders.next()) is not None:
            try:
                exit_code = rehearsal.play(prompt)
            except KeyboardInterrupt:
                rehearsal.interrupted()
            else:
                if exit_code is not None:
                    return exit_code
            orders.done()
        return 0
    finally:
        rehearsal.close()
