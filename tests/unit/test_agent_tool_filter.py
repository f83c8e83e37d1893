"""What keeps a server of tools to some of them, run as the program runs it, and its lines by themselves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from hive_agent.own_command import own_command
from hive_agent.tool_filter import ToolFilter
from tests.processes import PATIENCE_S

# A server that offers two tools, says what it was called for, and batches or babbles when it is told to.
SERVER = """
import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    if "id" not in asked:
        continue
    said = {"jsonrpc": "2.0", "id": asked["id"]}
    if asked["method"] == "tools/list":
        said["result"] = {"tools": [{"name": "get"}, {"name": "drop"}, "junk"], "nextCursor": "more"}
    elif asked["method"] == "tools/call":
        text = asked["params"]["name"] + " was called"
        said["result"] = {"content": [{"type": "text", "text": text}]}
    else:
        said["result"] = {"protocolVersion": "2025-11-25", "capabilities": {}, "serverInfo": {}}
    print(json.dumps(said), flush=True)
"""


def run(tools: str, *command: str, said: list[Any] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        own_command("only", tools, "--", *command),
        input="".join(f"{json.dumps(message)}\n" for message in said or []),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


def test_only_the_tools_that_are_allowed_are_listed_and_called(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(SERVER)
    said = [
        {"id": 0, "method": "initialize"},
        {"method": "notifications/initialized"},
        {"id": "l", "method": "tools/list"},
        {"id": 1, "method": "tools/call", "params": {"name": "get"}},
        {"id": 2, "method": "tools/call", "params": {"name": "drop"}},
    ]
    done = run("get,other", sys.executable, str(tmp_path / "server.py"), said=said)
    heard = {line["id"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert heard.keys() == {0, "l", 1, 2}
    assert heard["l"]["result"] == {"tools": [{"name": "get"}], "nextCursor": "more"}
    assert heard[1]["result"]["content"][0]["text"] == "get was called"
    assert heard[2]["error"]["message"] == "cannot call drop: agent.toml allows get, other of this server"
    assert done.returncode == 0


def test_it_ends_with_the_server_and_as_the_server() -> None:
    assert run("get", "/bin/sh", "-c", "exit 7").returncode == 7


def test_a_server_that_is_not_there_is_told_in_one_line() -> None:
    done = run("get", "/no/such/server")
    assert (done.returncode, done.stderr) == (
        127,
        "hive-agent: cannot start /no/such/server: No such file or directory\n",
    )


def test_tools_are_kept_back_whatever_the_answer_that_lists_them_bears() -> None:
    passing = ToolFilter(["get"])
    passing.to_server(b'{"id":1,"method":"tools/list"}\n')
    for mark in (b'"id":1.0', b'"id":"1"', b'"id":1,"method":"x"'):
        heard = json.loads(passing.to_program(b'{%s,"result":{"tools":[{"name":"drop"},{"name":"get"}]}}\n' % mark))
        assert heard["result"]["tools"] == [{"name": "get"}]


def test_a_call_in_a_batch_or_behind_a_second_key_passes_nothing_else() -> None:
    call = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "drop"}}
    passing = ToolFilter(["get"])
    inwards, answer = passing.to_server(json.dumps([call]).encode() + b"\n")
    assert inwards == b""
    assert json.loads(answer)["error"]["message"] == "one JSON object in a line is needed"
    # Both ends read the last of two keys, whichever the server would take.
    twice = b'{"method":"tools/call","method":"ping","id":1,"params":{"name":"drop"}}\n'
    assert json.loads(passing.to_server(twice)[0]) == {"method": "ping", "id": 1, "params": {"name": "drop"}}
    assert passing.to_server(twice)[0].count(b"method") == 1
    # A call that wants no answer gets none.
    assert passing.to_server(b'{"method":"tools/call","params":{"name":"drop"}}\n') == (b"", b"")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(
    message=st.fixed_dictionaries(
        {"method": st.sampled_from(["tools/call", "tools/list", "ping"]) | JSON},
        optional={
            "id": JSON,
            "params": st.fixed_dictionaries({"name": st.sampled_from(["get", "drop"]) | JSON}) | JSON,
        },
    )
)
def test_whatever_is_called_the_server_hears_of_no_other_tool(message: dict[str, Any]) -> None:
    inwards, _ = ToolFilter(["get"]).to_server(json.dumps(message).encode() + b"\n")
    if inwards and (heard := json.loads(inwards))["method"] == "tools/call":
        assert heard["params"]["name"] == "get"


@given(junk=st.binary(max_size=60))
def test_junk_of_either_side_breaks_nothing(junk: bytes) -> None:
    passing = ToolFilter(["get"])
    passing.to_server(junk)
    passing.to_program(junk)
