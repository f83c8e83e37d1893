"""Work from its beginning to its end, by the real Claude Code in each kind of container: a clone of a project, a
package of the machine's registry, a build, a branch on a git server, a pull request. All else stays closed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.checkouts import Checkout
from tests.claude.test_story import play, result_text
from tests.containers.drivers import need
from tests.daemons import open_daemon
from tests.git_servers import serve_http
from tests.needs import find_claude
from tests.registries import entries_for, python_registry, trusted
from tests.scripted_forge import BOT, TOKEN, ScriptedForge
from tests.scripted_model import ScriptedModel, say, tool
from tests.swarm.test_projects import git

PACKAGE = "sniffio"  # small, and in need of nothing else
GIT_TOKEN, KEY = "canary-of-the-git-server-0123456789", "sk-ant-api03-canary-of-the-provider"
SECRETS = [secret.encode() for secret in (KEY, TOKEN)]
FILES = {
    "site/__main__.py": f"import {PACKAGE}\nprint('built with', {PACKAGE}.__name__)\n",
    "README": "of the site\n",
}
PYTHON = f"{sys.executable} -P"
PIP = f"{PYTHON} -m pip install -q --no-deps --no-cache-dir --disable-pip-version-check --retries 1 --index-url"
WORK = f"""set -e; cd /projects/site; git checkout -q -b iris/fix
{PIP} {{index}} --target site {PACKAGE}
{PYTHON} -m zipapp site -o site.pyz; {PYTHON} site.pyz > built; cat built; rm -r site/{PACKAGE}* site.pyz
git add built; git commit -qm 'Build it'; git push -q origin HEAD:iris/fix; env | grep -c canary || true"""
# How it came by that is another question; it leaves by no push.
LEAK = f"""cd /projects/site; git checkout -q -b iris/leak; echo 'url = https://x:{GIT_TOKEN}@git.example' > settings
git add . && git commit -qm 'Set it up' && git push -q; git push -q origin iris/fix:main"""
CLOSED = f"{PIP} https://elsewhere.example/simple --target /state/other {PACKAGE} 2>&1"


def repository(folder: Path) -> Path:
    """A folder of a git server with the bare repository site.git."""
    git(folder, "init", "-q", "-b", "main", "work")
    for path, text in FILES.items():
        (folder / "work" / path).parent.mkdir(exist_ok=True)
        (folder / "work" / path).write_text(text)
    git(folder / "work", "add", ".")
    git(folder / "work", "commit", "-qm", "first")
    served = folder / "served"
    served.mkdir()
    git(folder, "clone", "-q", "--bare", "work", "served/site.git")
    return served


def scenes(index: str) -> dict[tuple[str, str], list[Any]]:
    ask = {"title": "Build it", "body": "It was not built.", "head": "iris/fix"}
    return {
        ("iris", "Please build the site"): [
            say(tool("Bash", command=WORK.format(index=index), description="work")),
            lambda request: say(tool("mcp__hive__send", to="operator", body=f"worked: {result_text(request)}")),
            say(tool("mcp__hive__pull_request_open", **ask)),
            lambda request: say(tool("mcp__hive__send", to="operator", body=f"asked: {result_text(request)}")),
            say(tool("Bash", command=LEAK, description="leak")),
            lambda request: say(tool("mcp__hive__send", to="operator", body=f"leaked: {result_text(request)}")),
            say(tool("Bash", command=CLOSED, description="what is closed")),
            lambda request: say(tool("mcp__hive__send", to="operator", body=f"closed: {result_text(request)}")),
        ]
    }


@pytest.mark.parametrize("sandbox", ["bwrap", "nspawn"])
def test_an_agent_clones_installs_builds_pushes_and_asks_for_its_work_to_be_merged(
    sandbox: str, tmp_path: Path
) -> None:
    need(sandbox)
    index, urls = python_registry(PACKAGE)
    served = repository(tmp_path)
    forge = ScriptedForge(branches={"main", "iris/fix"})
    with (
        ScriptedModel(lambda request: play(scenes(index), request)) as model,
        forge.served() as forge_url,
        serve_http(served, GIT_TOKEN) as server,
        open_daemon(
            f"--claude={find_claude()}",
            f"--provider-base-url={model.base_url}",
            f"--sandbox={sandbox}",
            ANTHROPIC_API_KEY=KEY,
        ) as daemon,
    ):
        client = daemon.start()
        client.call("project_add", project="site", source=f"{server.url}/site.git", token=GIT_TOKEN)
        place = {"kind": "forgejo", "url": forge_url, "repository": forge.repository, "token": TOKEN}
        client.call("forge_add", project="site", **place)
        asked = client.call("request_spawn", agent="iris", persona="You write code.", reason="a test")
        digest = client.call("show", approval=asked["approval"])["digest"]
        assert client.call("approve", approval=asked["approval"], digest=digest)["state"] == "done"
        checkout = Checkout(daemon.state / "proposed" / "iris" / "config")
        egress = ", ".join(
            f"{{ to = {json.dumps(one['to'])}, addresses = {json.dumps(one['addresses'])} }}"
            for one in entries_for(urls)
        )
        env = ", ".join(f"{name} = {json.dumps(path)}" for name, path in trusted().items())
        reach = f'projects = [{{ name = "site" }}]\negress = [{egress}]\nenv = {{ {env} }}\n'
        sha = checkout.commit(agent__toml=reach + (checkout.path / "agent.toml").read_text())
        asked = client.call("request_apply_commit", agent="iris", sha=sha, reason="a test")
        digest = client.call("show", approval=asked["approval"])["digest"]
        assert client.call("approve", approval=asked["approval"], digest=digest)["state"] == "done"

        client.call("send", to="iris", body="Please build the site")
        worked = daemon.wait_message(client, "worked: ")["body"]
        assert worked.startswith(f"worked: built with {PACKAGE}\n0\n"), worked  # and no secret in the environment
        assert git(served / "site.git", "log", "-1", "--format=%s %an", "iris/fix") == "Build it iris"
        said = daemon.wait_message(client, "asked: ")["body"].removeprefix("asked: ")
        assert json.loads(said)["number"] == 1
        (made,) = forge.threads.values()
        assert (made["title"], made["_pull"], made["user"]["login"]) == ("Build it", ("iris/fix", "main"), BOT)

        leaked = daemon.wait_message(client, "leaked: ")["body"]
        assert "settings holds a secret of the hive's (credentials/projects/site.token); take it out" in leaked
        assert "main cannot be pushed: only iris/* may be pushed" in leaked
        heads = git(served / "site.git", "for-each-ref", "--format=%(refname)").splitlines()
        assert heads == ["refs/heads/iris/fix", "refs/heads/main"]

        closed = daemon.wait_message(client, "closed: ")["body"]
        assert "403 cannot connect: elsewhere.example:443 is not in egress of agent.toml; asked the operator" in closed
        (card,) = [one for one in client.call("pending")["approvals"] if one["kind"] == "egress"]
        assert card["agent"] == "iris"
        found = client.call("reach", agent="iris")
        assert found["total"]["connections"] >= 1
        assert [one["host"] for one in found["refusals"]] == ["elsewhere.example"]
        assert "canary" not in daemon.log.read_text()
        for path in (daemon.state / "agents" / "iris").rglob("*"):
            assert not path.is_file() or not any(secret in path.read_bytes() for secret in SECRETS), path
        (system,) = {request.system[-200:] for request in model.turns if "Please build" in request.last_user_text}
        assert "- /projects/site, a clone of hive://site: you may push to iris/*" in system
