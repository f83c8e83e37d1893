"""One more entry in `egress` of an agent.toml, which stays as whoever wrote it wrote it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hive_core.egress_edit import add_to_egress
from hive_core.egress_rules import Rule
from hive_core.protocol.refusal import Refusal
from hive_core.settings import AgentSettings, parse_agent_toml

HOST = Rule(to="git.lan:443")
POST = Rule(to="http://repo.lan", methods=["GET", "HEAD", "POST"])
PIECES = [
    "# a comment\n",
    'model = "opus" # why\n',
    "\n",
    "effort = 'low'\r\n",
    'description = """a\n[env]\negress = []\n"""\n',
    'tools = [ "Bash",\n  # one\n  "Read" ]\n',
]
ENTRIES = [
    "",
    "egress = []\n",
    'egress = ["a.lan:1"]  # kept\n',
    'egress = [\n  "a.lan:1", # why\n  { to = "b.lan:1", addresses = ["10.0.0.7"] },\n  # the end\n]\n',
    "'egress' = [ 'a.lan:1' , ]\n",
    '[[egress]]\nto = "a.lan:1" # why\n',
]
TABLES = ["", '[env]\nA = "b" # c\n', 'env.A = "b"\n', '[mcp_servers.maps]\ncommand = "maps"\n']


def comments(text: str) -> list[str]:
    return [line.partition("#")[2] for line in text.splitlines() if "#" in line]


@given(
    st.lists(st.sampled_from(PIECES), unique=True),
    st.sampled_from(ENTRIES),
    st.sampled_from(TABLES),
    st.sampled_from([HOST, POST]),
)
def test_all_else_is_what_it_was_and_every_comment_stays(
    pieces: list[str], entries: str, table: str, entry: Rule
) -> None:
    if entries.startswith("[[") and table.startswith("env."):
        table = ""  # it would be of the entry's table
    text = "".join(pieces) + entries + table
    before, edited = parse_agent_toml(text.encode()), add_to_egress(text, entry)
    after = parse_agent_toml(edited.encode())
    assert after.egress == [*before.egress, entry]
    assert after.model_copy(update={"egress": []}) == before.model_copy(update={"egress": []})
    assert isinstance(after, AgentSettings)
    assert comments(text) == comments(edited)


def test_what_is_there_already_is_said() -> None:
    with pytest.raises(Refusal, match=r"to egress of agent\.toml: it is there already"):
        add_to_egress('egress = ["git.lan:443"]\n', HOST)


def test_a_list_without_room_for_one_more_is_refused_with_a_way_out() -> None:
    full = [f"h{number}.lan:1" for number in range(200)]
    with pytest.raises(Refusal, match="let hm1nd propose it"):
        add_to_egress(f"egress = {full}\n", HOST)
