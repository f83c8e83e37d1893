"""The real Claude Code reaches what was approved through the hive's proxy, and is told why not of the rest."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.claude.test_story import step
from tests.containers.drivers import need
from tests.daemons import KEY, open_daemon
from tests.git_servers import serve_ssh
from tests.needs import find_claude
from tests.nspawn.test_reach import NAMED
from tests.scripted_model import Answer, Request, ScriptedModel, say, text_of, tool
from tests.swarm.test_egress import deploy

WHEEL = "greeting-1.0-py3-none-any.whl"
PIP = f"{sys.executable} -m pip install --disable-pip-version-check --no-cache-dir --target /tmp/got"
USE = f"{PIP} --quiet --index-url {{page}}simple --trusted-host {NAMED} greeting && PYTHONPATH=/tmp/got python3 -c "
USE += "'import greeting; print(greeting.WORD)'"
COMMANDS = [
    "curl -sS {page}page",
    USE,
    "curl -sS https://unlisted.example/",
    f"{PIP} --retries 1 --index-url https://unlisted.example/simple other 2>&1 | grep -om1 'Tunnel .*decided'",
    "curl -sS --noproxy '*' --max-time 5 {page}page 2>&1",
]


def wheel() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("greeting.py", "WORD = 'hello from a wheel'\n")
        archive.writestr("greeting-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: greeting\nVersion: 1.0\n")
        archive.writestr(
            "greeting-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("greeting-1.0.dist-info/RECORD", "")
    return data.getvalue()


@contextmanager
def registry() -> Iterator[int]:
    """A package index with one package, and a page; its port."""
    package = wheel()
    link = f'<a href="/files/{WHEEL}#sha256={hashlib.sha256(package).hexdigest()}">{WHEEL}</a>'
    pages = {"/page": b"a page\n", "/simple/greeting/": link.encode(), f"/files/{WHEEL}": package}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = pages.get(self.path)
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("0.0.0.0", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def test_claude_fetches_a_page_installs_a_package_and_is_told_what_it_may_not_reach() -> None:
    with registry() as port:
        page, told = f"http://{NAMED}:{port}/", []

        def answer(request: Request) -> Answer:
            if request.is_side or "fetch it" not in request.last_user_text:
                return "ok"
            number = step(request)
            if number:
                told.append(request.tool_results[-1].text + text_of(request.messages[-1]["content"]))
            if number < len(COMMANDS):
                return say(tool("Bash", command=COMMANDS[number].format(page=page), description="try"))
            return say(tool("mcp__hive__send", to="operator", body="fetched")) if number == len(COMMANDS) else "Done."

        with ScriptedModel(answer) as model:
            flags = (f"--claude={find_claude()}", f"--provider-base-url={model.base_url}", f"--sandbox={need('bwrap')}")
            with open_daemon(*flags, "--end-agents-with-daemon", ANTHROPIC_API_KEY=KEY) as daemon:
                client = daemon.start()
                deploy(daemon, client, "hm1nd", [page.removesuffix("/")])
                client.call("send", to="hm1nd", body="fetch it")
                daemon.wait_message(client, "fetched")
                found = client.call("reach", agent="hm1nd")
                wished = [card["payload"]["to"] for card in client.call("pending")["approvals"]]
    fetched, installed, unlisted, pip, around = (one.strip() for one in told[: len(COMMANDS)])
    assert fetched == "a page"
    assert installed == "hello from a wheel"
    refused = "cannot connect: unlisted.example:443 is not in egress of agent.toml; "
    assert f"The hive's proxy refused meanwhile:\n- {refused}asked the operator (approval " in unlisted
    assert "curl: (56)" in unlisted
    assert f"Tunnel connection failed: 403 {refused}the operator is asked already" in pip
    assert "refused meanwhile" not in fetched + installed + pip + around
    assert "Failed to connect" in around
    assert [(row["host"], row["port"]) for row in found["hosts"]] == [(NAMED, port)]
    # Nothing that the program tries of its own accord is wished for: neither its provider, nor what it reports to.
    assert wished == ["unlisted.example:443"], json.dumps(found["refusals"])


@pytest.mark.parametrize("sandbox", ["bwrap", "nspawn"])
def test_git_of_an_agent_reaches_an_ssh_server_that_was_named_through_the_proxy(tmp_path: Path, sandbox: str) -> None:
    with serve_ssh(tmp_path / "sshd") as server:
        subprocess.run(["git", "init", "-q", "--bare", "-b", "trunk", tmp_path / "site.git"], check=True)
        ssh = 'GIT_SSH_COMMAND="$GIT_SSH_COMMAND -i /state/key -o StrictHostKeyChecking=accept-new"'
        command = f"chmod 600 /state/key; {ssh} git ls-remote --symref {server.url}{tmp_path}/site.git HEAD; echo $?"

        def answer(request: Request) -> Answer:
            if request.is_side or "fetch it" not in request.last_user_text:
                return "ok"
            match step(request):
                case 0:
                    return say(tool("Bash", command=command, description="look"))
                case 1:
                    return say(tool("mcp__hive__send", to="operator", body=f"told: {request.tool_results[-1].text}"))
                case _:
                    return "Done."

        with ScriptedModel(answer) as model:
            flags = (f"--claude={find_claude()}", f"--provider-base-url={model.base_url}", f"--sandbox={need(sandbox)}")
            with open_daemon(*flags, "--end-agents-with-daemon", ANTHROPIC_API_KEY=KEY) as daemon:
                client = daemon.start()
                deploy(daemon, client, "hm1nd", [server.url.partition("@")[2]])
                (daemon.state / "agents" / "hm1nd" / "state" / "key").write_text(server.key.read_text())
                client.call("send", to="hm1nd", body="fetch it")
                told = daemon.wait_message(client, "told: ")["body"]
                found = client.call("reach", agent="hm1nd")
    assert told.splitlines()[-1] == "0", told
    assert [(row["host"], str(row["port"])) for row in found["hosts"]] == [
        tuple(server.url.partition("@")[2].split(":"))
    ]
    assert "Accepted publickey" in server.log.read_text()
