"""`hive project`: a repository is registered, told, fetched and forgotten, and a credential is shown nowhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from tests.daemons import NO_CLAUDE, Daemon, open_daemon
from tests.git_servers import serve_http
from tests.project_hives import commit, git, make_source

TOKEN = "a-token-of-the-project-0123456789"


def hive(daemon: Daemon, *words: str, given: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hive_core.cli", "project", *words],
        cwd=daemon.folder,
        env={**os.environ, "HIVE_RUNTIME_DIR": str(daemon.runtime), "PYTHONPATH": os.pathsep.join(sys.path)},
        input=given,
        capture_output=True,
        text=True,
        timeout=60,
    )


def told(daemon: Daemon, *words: str, given: str = "") -> Any:
    done = hive(daemon, *words, "--json", given=given)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_projects_are_registered_told_fetched_and_forgotten() -> None:
    with open_daemon(NO_CLAUDE) as daemon:
        daemon.start()
        source = make_source(daemon.folder / "source")
        assert "there is no project" in hive(daemon).stdout
        added = hive(daemon, "add", "site", "source")
        assert added.returncode == 0, added.stderr
        assert 'projects = [{ name = "site" }]' in added.stdout
        assert hive(daemon, "add", "site", "./source").returncode == 4  # it is there
        assert hive(daemon, "add", "Site", "./source").returncode == 2
        assert hive(daemon, "add", "other", "ext::sh -c id").returncode == 2
        assert hive(daemon, "add", "other").returncode == 2
        assert hive(daemon, "list", "--token", "-").returncode == 2
        (row,) = told(daemon)["projects"]
        assert (row["source"], row["agents"], row["credential"]) == (str(source), [], "none")
        git(source, "checkout", "--quiet", "-b", "next")
        commit(source)
        assert told(daemon, "fetch", "site")["branch"] == "next"  # which is checked out there now
        assert told(daemon, "rm", "site") == {"project": "site"}
        assert hive(daemon, "fetch", "site").returncode == 3

        git(daemon.folder, "clone", "--quiet", "--bare", "source", "served/site.git")
        with serve_http(daemon.folder / "served", TOKEN) as server:
            done = hive(daemon, "add", "site", f"{server.url}/site.git", "--token", "-", given=f"{TOKEN}\n")
            assert done.returncode == 0, done.stderr
            assert "with a token" in hive(daemon).stdout
        assert TOKEN not in done.stdout + done.stderr + json.dumps(told(daemon)) + daemon.log.read_text()
        assert daemon.stop() == 0
        daemon.start()
        assert [row["name"] for row in told(daemon)["projects"]] == ["site"]
