"""How Claude Code is started: its flags and its environment, tried with the version in the file claude-version."""

from __future__ import annotations

import json
import os
import shlex
import uuid
from contextlib import suppress
from pathlib import Path

from hive_agent.claude_stream import INTERACTIVE
from hive_agent.git_variables import git_variables
from hive_agent.own_command import own_command
from hive_agent.projects import told_of
from hive_agent.runner import Seat
from hive_core.protocol.harness import OWN_PLUGIN
from hive_core.protocol.lines import encode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hive_core.protocol.harness import McpServer, Offered, Settings

SKILL = "Skill"  # the program's tool by which the model takes up a skill
MAX_RETRIES = 5  # 17 s against 529, which is retried whatever the server says; the default of 10 is 3 minutes
TOOLS_PATIENCE_MS = 60_000  # a daemon that starts anew in that time costs a turn nothing
# The shape of a real credential, so that the program takes it; the host's relay puts the real one in its place.
PLACEHOLDERS = {
    "api_key": ("ANTHROPIC_API_KEY", "sk-ant-api03-" + "placeholder-" * 7 + "placeholderAA"),
    "oauth_token": ("CLAUDE_CODE_OAUTH_TOKEN", "sk-ant-oat01-" + "placeholder-" * 7 + "placeholderAA"),
}


def tried_version() -> str:
    """The version of Claude Code that all this was tried with."""
    return Path(__file__).with_name("claude-version").read_text("ascii").strip()


def flags(seat: Seat, settings: Settings) -> list[str]:
    """All that is the same for every turn of an agent with these settings."""
    python, *arguments = own_command(
        "mcp", "--socket", f"{seat.run_dir}/mcp.sock", *(("--harness", seat.harness) if seat.harness else ())
    )
    extra = {name: _server(server) for name, server in settings.get("mcp_servers", {}).items()}
    servers = {"mcpServers": {**extra, "hive": {"command": python, "args": arguments}}}
    chosen = ["--print", "--verbose", "--input-format", "stream-json", "--output-format", "stream-json"]
    # As short as it can be: one argument has 128 KiB at most.
    chosen += ["--mcp-config", json.dumps(servers, ensure_ascii=False), "--strict-mcp-config"]
    # Only what is listed is on; all others stay off, the program's own messaging, scheduling and web among them.
    offered = settings["extras"]["offered"] if "extras" in settings else []
    more = [SKILL] if offered and SKILL not in settings["tools"] else []
    chosen += ["--tools", ",".join(tool for tool in (*settings["tools"], *more) if tool not in INTERACTIVE)]
    if seat.sandboxed:
        chosen += ["--dangerously-skip-permissions"]
    else:
        chosen += ["--allowedTools", ",".join((*(f"mcp__{name}__*" for name in ("hive", *extra)), *more))]
    chosen += _extras_flags(seat, settings)
    chosen += ["--model", settings["model"]]
    if effort := settings.get("effort"):
        chosen += ["--effort", effort]
    own = told_of(settings.get("projects", []), seat)
    if prompt := [part for part in (settings["prompt"], own, _offer(offered)) if part.strip()]:
        chosen += ["--append-system-prompt", "\n\n".join(prompt)]
    return chosen


def _extras_flags(seat: Seat, settings: Settings) -> list[str]:
    """Where its skills and plugins are: a place for each state of theirs, so that another one is another command.

    Settings, hooks, skills and a CLAUDE.md that the agent wrote itself, wherever it did, are left alone.
    """
    chosen = ["--setting-sources", ""]
    if (extras := settings.get("extras")) is not None:
        place = f"{seat.extras_dir}/{extras['digest']}"
        chosen += ["--add-dir", place]  # to be read without being asked for, and to be worked in
        for plugin in (*([OWN_PLUGIN] if extras["skills"] else ()), *extras["plugins"]):
            chosen += ["--plugin-dir", f"{place}/{plugin}"]
    return chosen


def _offer(offered: Sequence[Offered]) -> str:
    """What tells the model of its skills. The program would do so by an attachment, and those are off."""
    if not offered:
        return ""
    lines = (f"- {one['name']}: {one['description']}" for one in offered)
    return "\n".join(["The following skills are available for use with the Skill tool:", "", *lines])


def _server(server: McpServer) -> dict[str, object]:
    """An entry of --mcp-config. In a sandbox the program asks for no permission, so it is not what allows a tool."""
    command, *arguments = [server["command"], *server["args"]]
    if (allowed := server.get("allowed_tools")) is not None:
        command, *arguments = own_command("only", ",".join(allowed), "--", command, *arguments)
    return {"command": command, "args": arguments, "env": server["env"]}


def make_own_folders(seat: Seat) -> None:
    """Make the directories where links of the program's own lead; others are there."""
    own = Path(seat.config_dir)
    for link in (*own.glob("*"), own / "plugins" / "data"):
        if link.is_symlink():
            with suppress(OSError):  # a file in the way, a full disk: the program says so, or does without
                os.makedirs(os.path.realpath(link), exist_ok=True)


def session_flags(session: str | None) -> list[str]:
    return ["--resume", session] if session else ["--session-id", str(uuid.uuid4())]


def passing_session_flags() -> list[str]:
    """Of a process whose session nobody goes on with."""
    return ["--no-session-persistence"]


def user_line(prompt: str) -> bytes:
    """The line of stdin that begins a turn."""
    return encode({"type": "user", "message": {"role": "user", "content": prompt}})


def proxy_variables(seat: Seat) -> dict[str, str]:
    """What leads programs to the hive's proxy. Both spellings: curl takes http_proxy in small letters alone."""
    if not seat.egress_port:
        return {}
    proxy, own = f"http://127.0.0.1:{seat.egress_port}", "localhost,127.0.0.1,::1"
    connect = shlex.join(own_command("connect", "--socket", f"{seat.run_dir}/egress.sock")).replace("%", "%%")
    names = {"http_proxy": proxy, "https_proxy": proxy, "no_proxy": own}
    return {
        **names,
        **{name.upper(): value for name, value in names.items()},
        # fetch() of node goes by these variables only when it is told to.
        "NODE_USE_ENV_PROXY": "1",
        "GIT_SSH_COMMAND": shlex.join(["ssh", "-o", f"ProxyCommand={connect} %h %p"]),
    }


def environment(seat: Seat, credential: str, chosen: Mapping[str, str] | None = None) -> dict[str, str]:
    """The program's whole environment: nothing of the harness's own reaches it. What we set wins over `chosen`."""
    name, placeholder = PLACEHOLDERS[credential]
    return {
        **(chosen or {}),
        **git_variables(seat),
        "HOME": seat.home,
        "LANG": "C.UTF-8",
        "TERM": "dumb",
        "HIVE_AGENT": seat.agent,
        "HIVE_CONFIGS": seat.configs_dir,
        "CLAUDE_CONFIG_DIR": seat.config_dir,
        "ANTHROPIC_BASE_URL": f"http://127.0.0.1:{seat.model_port}",
        name: placeholder,
        "CLAUDE_CODE_MAX_RETRIES": str(MAX_RETRIES),
        # Otherwise an "@path" in a message makes the program read that file into the turn by itself.
        "CLAUDE_CODE_DISABLE_ATTACHMENTS": "1",
        # Only what is listed is on: the program's own skills are not.
        "CLAUDE_CODE_DISABLE_BUNDLED_SKILLS": "1",
        # What it noted for its later sessions, and turns that it set for a time, are files of the agent's own making.
        "CLAUDE_CODE_DISABLE_AUTO_MEMORY": "1",
        "CLAUDE_CODE_DISABLE_CRON": "1",
        # What runs on behind a turn is the harness's, which outlives this process and tells how it ended.
        "CLAUDE_CODE_DISABLE_BACKGROUND_TASKS": "1",
        # Otherwise a turn begins without the hive's tools when they are not there within 2 s.
        "MCP_CONNECTION_NONBLOCKING": "0",
        "MCP_CONNECT_TIMEOUT_MS": str(TOOLS_PATIENCE_MS),
        "MCP_TIMEOUT": str(TOOLS_PATIENCE_MS),
        # Otherwise each new process puts the git status of its working directory into the system prompt, and a file
        # more or less there throws away the provider's cache of the whole session.
        "CLAUDE_CODE_DISABLE_GIT_INSTRUCTIONS": "1",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        # The harness compacts, visibly and between turns.
        "DISABLE_AUTO_COMPACT": "1",
        "DISABLE_TELEMETRY": "1",
        "DISABLE_ERROR_REPORTING": "1",
        "DISABLE_AUTOUPDATER": "1",
        **proxy_variables(seat),
        **({"IS_SANDBOX": "1"} if seat.sandboxed else {}),
    }
