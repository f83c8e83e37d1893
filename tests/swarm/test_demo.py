"""`hive demo`: the story, both endings, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import pids_naming, wait_gone

WITHIN_S = 120


def start_demo(folder: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "hive_core.cli", "demo", *words],
        env={**os.environ, "TMPDIR": str(folder), "HOME": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def processes_of(folder: Path) -> list[str]:
    """Command lines of processes that still name a demo's directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:
            continue
        if str(folder) in line:
            found.append(line)
    return found


@pytest.fixture
def folder() -> object:
    import tempfile

    # Not tmp_path: a socket's path has to fit into 108 bytes.
    with tempfile.TemporaryDirectory(prefix="hive-t-") as place:
        yield Path(place)


def test_the_story_plays_to_its_end_by_itself(folder: Path) -> None:
    demo = start_demo(folder, "--once", "--json")
    out, err = demo.communicate(timeout=WITHIN_S)
    assert demo.returncode == 0, err
    (line,) = out.splitlines()
    result = json.loads(line)
    assert result["ok"] is True
    assert set(result["agents"]) == {"hm1nd", "iris", "damocles", "argus"}
    assert result["models"]["iris"] == "haiku"
    assert [(row["kind"], row["agent"], row["state"], row["proof"]) for row in result["approvals"]][2:] == [
        ("spawn", "argus", "done", "healthy"),
        ("apply_commit", "iris", "done", "healthy"),
        ("apply_commit", "iris", "failed", None),
    ]
    assert "its program does not come up: cannot follow the script: it is not JSON" in result["approvals"][4]["note"]
    assert result["messages"] >= 12
    assert result["seconds"] > 0
    told = err.splitlines()
    moments = [
        "    model: sonnet → haiku",
        "  ◆ approval 4: done: healthy",
        '    +  "match": "findings|bugs"',
        "  ◆ approval 5: going back",
        f"  ◆ approval 5: failed: {result['approvals'][4]['note']}",
        "    iris here, on haiku as before. Did anything happen?",
    ]
    assert [line for line in told if line in moments] == moments
    assert "sign in: http://hive.localhost:" in err
    assert list(folder.iterdir()) == []
    assert processes_of(folder) == []


def test_deny_has_an_ending_of_its_own(folder: Path) -> None:
    demo = start_demo(folder, "--once", "--deny", "--json")
    out, err = demo.communicate(timeout=WITHIN_S)
    result = json.loads(out)
    assert result["ok"] is True, err
    assert "argus" not in result["agents"]
    assert result["approvals"][-1]["state"] == "denied"


def test_the_sign_in_link_is_the_first_thing_to_act_on_and_ctrl_c_ends_everything(folder: Path) -> None:
    demo = start_demo(folder)
    assert demo.stdout is not None
    for line in demo.stdout:
        if "waiting for your click" in line:
            break
    os.killpg(demo.pid, signal.SIGINT)
    out, err = demo.communicate(timeout=WITHIN_S)
    assert demo.returncode == 0, err
    assert "ending the demo" in out
    assert list(folder.iterdir()) == []
    assert processes_of(folder) == []


def test_a_killed_demo_takes_its_daemon_and_agents_along(folder: Path) -> None:
    demo = start_demo(folder)
    assert demo.stdout is not None
    for line in demo.stdout:
        if "waiting for your click" in line:
            break
    daemons = set(pids_naming("hive_core\0serve")) & set(pids_naming(str(folder)))
    demo.kill()
    demo.communicate()
    assert len(daemons) == 1
    wait_gone(*daemons)
    wait_gone(*pids_naming(str(folder)))  # the agents, which still write there until they have heard of it
