"""Claude Code: its flags, its environment, its stream. All that is particular to it stands here.

Tried with 2.1.197. The rehearsal takes the same flags and speaks the same stream, so it differs in nothing but the
executable.
"""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hive_agent.program import Command, run_program
from hive_agent.turn_lines import hive_line
from hive_agent.wake import wake_prompt
from hive_core.protocol.harness import STREAM_LINE_LIMIT_BYTES
from hive_core.protocol.lines import decode
from hive_core.protocol.refusal import Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hive_core.protocol.harness import Lease, Outcome, Settings

# Errors that are not the turn's own fault: no login, no credit, an overloaded or unreachable provider.
WAITING_ERRORS = frozenset({"authentication_failed", "billing_error", "rate_limit", "server_error", "overloaded"})
WAITING_STATUSES = frozenset({401, 402, 403, 408, 429})
MAX_RETRIES = 5  # 17 s against 529, which is retried whatever the server says; the default of 10 is 3 minutes
TOOLS_PATIENCE_MS = 60_000  # a daemon that starts anew in that time costs a turn nothing
ERROR_LIMIT = 500
# The shape of a real credential, so that the program takes it; the host's relay puts the real one in its place.
PLACEHOLDERS = {
    "api_key": ("ANTHROPIC_API_KEY", "sk-ant-api03-" + "placeholder-" * 7 + "placeholderAA"),
    "oauth_token": ("CLAUDE_CODE_OAUTH_TOKEN", "sk-ant-oat01-" + "placeholder-" * 7 + "placeholderAA"),
}


@dataclass(frozen=True, slots=True)
class Seat:
    """Where the program works."""

    agent: str
    run_dir: str  # the host's sockets
    state_dir: str  # its working directory
    home: str
    config_dir: str  # its sessions and settings
    path: str  # PATH
    claude: str | None  # the executable, None where there is none
    sandboxed: bool
    model_port: int  # of the loopback that leads to the model
    configs_dir: str = "/agents"  # every agent's configuration, where this is the manager


@dataclass(frozen=True, slots=True)
class Ending:
    """How a turn ended, for the host's ack."""

    outcome: Outcome
    session: str | None
    error: str | None = None
    usage: dict[str, Any] | None = None


async def run_turn(seat: Seat, lease: Lease, pass_on: Callable[[str], None]) -> Ending:
    """Run the agent's program for one message; each line it prints goes to `pass_on` as it comes."""
    ending, lost = await _attempt(seat, lease, lease["session"], pass_on)
    if lost:
        pass_on(hive_line("session_lost", session=lease["session"]))
        ending, _ = await _attempt(seat, lease, None, pass_on)
    return ending


async def _attempt(
    seat: Seat, lease: Lease, session: str | None, pass_on: Callable[[str], None]
) -> tuple[Ending, bool]:
    """One process: how it ended, and whether that was only because it does not know the session."""
    executable = find_executable(seat, lease["settings"])
    if executable is None:
        return Ending("waiting", session, "cannot start claude: this host has no claude program; install it"), False
    report = Report()
    command = Command(
        argv=[*executable, *flags(seat, lease["settings"], session)],
        env=environment(seat, lease["credential"]),
        cwd=seat.state_dir,
        prompt=wake_prompt(lease["message"], lease["waiting"], lease["refused"]).encode("utf-8", "replace"),
    )
    try:
        exit_code = await run_program(
            command,
            lambda line: pass_on(report.read_stdout(line)),
            lambda line: pass_on(report.read_stderr(line)),
            lambda: report.result is not None,
        )
    except OSError as exc:
        return Ending("waiting", session, f"cannot start {executable[0]}: {exc.strerror}"), False
    return report.ending(exit_code), session is not None and report.session_lost


def own_command(*arguments: str) -> list[str]:
    """A command of this package, by the path of its file: it works however the package was installed."""
    return [sys.executable, "-I", "-S", str(Path(__file__).with_name("__main__.py")), *arguments]


def find_executable(seat: Seat, settings: Settings) -> list[str] | None:
    """The only place that knows a rehearsal from the real program."""
    if settings["program"] == "rehearsal":
        return own_command("rehearse")
    return [seat.claude] if seat.claude else None


def flags(seat: Seat, settings: Settings, session: str | None) -> list[str]:
    python, *arguments = own_command("mcp", "--socket", f"{seat.run_dir}/mcp.sock")
    servers = {"mcpServers": {"hive": {"command": python, "args": arguments}}}
    chosen = ["--print", "--verbose", "--output-format", "stream-json"]
    chosen += ["--mcp-config", json.dumps(servers), "--strict-mcp-config"]
    # Only what is listed is on; all others stay off, the program's own messaging, scheduling and web among them.
    chosen += ["--tools", ",".join(settings["tools"])]
    if seat.sandboxed:
        chosen += ["--dangerously-skip-permissions"]
    else:
        chosen += ["--allowedTools", "mcp__hive__*"]
    chosen += ["--model", settings["model"]]
    if effort := settings.get("effort"):
        chosen += ["--effort", effort]
    chosen += ["--resume", session] if session else ["--session-id", str(uuid.uuid4())]
    if settings["prompt"].strip():
        chosen += ["--append-system-prompt", settings["prompt"]]
    return chosen


def environment(seat: Seat, credential: str) -> dict[str, str]:
    """The program's whole environment: nothing of the harness's own reaches it."""
    name, placeholder = PLACEHOLDERS[credential]
    email = f"{seat.agent}@hive"
    return {
        "PATH": seat.path,
        "HOME": seat.home,
        "LANG": "C.UTF-8",
        "TERM": "dumb",
        "HIVE_AGENT": seat.agent,
        "HIVE_CONFIGS": seat.configs_dir,
        "GIT_AUTHOR_NAME": seat.agent,
        "GIT_AUTHOR_EMAIL": email,
        "GIT_COMMITTER_NAME": seat.agent,
        "GIT_COMMITTER_EMAIL": email,
        "CLAUDE_CONFIG_DIR": seat.config_dir,
        "ANTHROPIC_BASE_URL": f"http://127.0.0.1:{seat.model_port}",
        name: placeholder,
        "CLAUDE_CODE_MAX_RETRIES": str(MAX_RETRIES),
        # Otherwise an "@path" in a message makes the program read that file into the turn by itself.
        "CLAUDE_CODE_DISABLE_ATTACHMENTS": "1",
        # Otherwise a turn begins without the hive's tools when they are not there within 2 s.
        "MCP_CONNECTION_NONBLOCKING": "0",
        "MCP_CONNECT_TIMEOUT_MS": str(TOOLS_PATIENCE_MS),
        "MCP_TIMEOUT": str(TOOLS_PATIENCE_MS),
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_TELEMETRY": "1",
        "DISABLE_ERROR_REPORTING": "1",
        "DISABLE_AUTOUPDATER": "1",
        **({"IS_SANDBOX": "1"} if seat.sandboxed else {}),
    }


class Report:
    """Reads along one process's output: gives each line the form in which it is passed on, and knows the ending."""

    def __init__(self) -> None:
        self.result: dict[str, Any] | None = None
        self._session: str | None = None
        self._api_error: str | None = None
        self._last_stderr: str | None = None
        self._began = False
        self._has_tools = True

    def read_stdout(self, line: bytes | Refusal) -> str:
        if isinstance(line, Refusal):
            return hive_line("line_too_long", error=line.message)
        text = line.decode("utf-8", "replace")
        try:
            self._take(decode(line))
        except Refusal as refusal:
            return hive_line("malformed", text=text[:2000], error=refusal.message)
        if len(line) > STREAM_LINE_LIMIT_BYTES:
            return hive_line("line_too_long", bytes=len(line))
        return text

    def read_stderr(self, line: bytes | Refusal) -> str:
        text = line.message if isinstance(line, Refusal) else line.decode("utf-8", "replace")
        if text.strip():
            self._last_stderr = text.strip()
        return hive_line("stderr", text=text[:4000])

    @property
    def session_lost(self) -> bool:
        """The session to resume is unknown: the program ended before it began."""
        errors = self.result.get("errors") if self.result else None
        told = " ".join(str(error) for error in errors) if isinstance(errors, list) else ""
        return not self._began and ("No conversation found" in told or "--resume requires a valid session" in told)

    def ending(self, exit_code: int | None) -> Ending:
        """`exit_code` is None for a program that was killed because it went on after its result."""
        if self.result is None:
            return Ending("failed", self._session, shortened(self._last_stderr or describe_exit(exit_code)))
        usage = summed_usage(self.result)
        if self.result.get("is_error"):
            return Ending(self._error_outcome(), self._session, shortened(error_sentence(self.result)), usage)
        if exit_code not in (0, None):
            return Ending("failed", self._session, shortened(self._last_stderr or describe_exit(exit_code)), usage)
        if not self._has_tools:
            # It could not answer anybody, so nobody may take the message for handled.
            return Ending("waiting", self._session, "the hive's tools could not be reached from the turn", usage)
        return Ending("done", self._session, None, usage)

    def _take(self, event: dict[str, Any]) -> None:
        match event.get("type"):
            case "system" if event.get("subtype") == "init":
                self._began = True
                self._session = text_or_none(event.get("session_id"))
                self._has_tools = hive_connected(event.get("mcp_servers"))
            case "assistant":
                self._api_error = text_or_none(event.get("error"))
            case "result":
                self.result = event

    def _error_outcome(self) -> Outcome:
        assert self.result is not None
        status = self.result.get("api_error_status")
        not_its_fault = self._api_error in WAITING_ERRORS
        if isinstance(status, int):
            not_its_fault = not_its_fault or status in WAITING_STATUSES or status >= 500
        return "waiting" if not_its_fault else "failed"


def hive_connected(servers: object) -> bool:
    """Whether the stream's list of MCP servers says that the hive's own is there."""
    found = [server for server in servers if isinstance(server, dict)] if isinstance(servers, list) else []
    return any(server.get("name") == "hive" and server.get("status") == "connected" for server in found)


def error_sentence(result: dict[str, Any]) -> str:
    errors = result.get("errors")
    if isinstance(errors, list) and errors:
        return str(errors[0])
    return str(result.get("result") or result.get("subtype") or "the program gave no reason")


def summed_usage(result: dict[str, Any]) -> dict[str, Any]:
    """What the turn took. The cost is this process's own, also with a resumed session."""
    usage = result.get("usage")
    tokens = usage if isinstance(usage, dict) else {}
    kinds = ("input_tokens", "output_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
    return {
        **{kind: whole_number(tokens.get(kind)) for kind in kinds},
        "cost_usd": result.get("total_cost_usd"),
        "num_turns": result.get("num_turns"),
        "duration_ms": result.get("duration_ms"),
        "models": result.get("modelUsage"),
    }


def describe_exit(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"the program was ended by signal {-exit_code} before its result"
    return f"the program ended with exit code {exit_code} before its result"


def shortened(text: str) -> str:
    return text if len(text) <= ERROR_LIMIT else text[: ERROR_LIMIT - 1] + "…"


def text_or_none(value: object) -> str | None:
    return value if isinstance(value, str) else None


def whole_number(value: object) -> int:
    return value if isinstance(value, int) else 0
