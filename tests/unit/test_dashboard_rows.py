"""What an agent wrote is shown, never obeyed: every row against a corpus of hostile text."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dashboard.diff import compare, diff_files, read_diff
from dashboard.rows import Rows
from dashboard.terminal import read_line, tokens
from dashboard.visible import SHOWN_CHARACTERS, visible
from hive_core.cli import show
from hive_core.containers import nixos_container, nspawn
from hive_core.procedures.supervise import Supervisor
from hive_core.protocol.words import AgentName
from hive_core.services.agents import Agent, Live, set_deployed
from hive_core.services.approvals import Approval
from hive_core.sockets.admin import AdminDesk
from tests.dashboards import hive_of
from tests.hives import SETTINGS, Services

CORPUS = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</textarea></pre></details><script src=//evil.example></script>",
    "<!-- --><![CDATA[<svg onload=alert(1)>]]>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "javascript:alert(1)",
    "{{ 7*7 }}{% raw %}{%- endraw %}",
    "</template><iframe srcdoc='<script>alert(1)</script>'>",
    "<style>*{display:none}</style><base href=//evil.example>",
    "\u202egnp.exe\u202c \u2066hidden\u2069 a\u200bb\ufeff \U000e0041\U000e0042",
    "\x1b[2J\x1b]0;title\x07\x00\x08\r overwritten",
    "half a pair \ud83d",
]


class Shape(HTMLParser):
    """The elements of a fragment with the names of their attributes, the marks of hidden characters left out."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, ...]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if ("class", "mark") not in attrs:
            self.elements.append((tag, *sorted(name for name, _ in attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def message(body: str) -> dict[str, Any]:
    return {
        "id": 7,
        "sender": "iris",
        "in_reply_to": 3,
        "sent_at_ms": 1_700_000_000_000,
        "cause": "turn",
        "cause_id": 4,
        "chain_id": 2,
        "hops": 3,
        "body": body,
        "body_bytes": 99_999,
        "deliveries": [delivery("hm1nd", "queued", body), delivery("iris", "dead", body)],
        "files": [{"name": body, "type": "image/png", "bytes": 7}],
    }


def delivery(recipient: str, state: str, note: str) -> dict[str, Any]:
    return {
        "recipient": recipient,
        "state": state,
        "attempts": 2,
        "failures": 5,
        "held": "rate" if state == "held" else None,
        "note": note,
        "turn_id": None,
    }


def change(text: str, weight: str) -> dict[str, Any]:
    return {"what": text, "before": text, "after": text, "weight": weight}


def approval(text: str, kind: str = "spawn", state: str = "pending") -> Approval:
    payload: dict[str, Any] = {"files": {"CLAUDE.md": text, "agent.toml": text}}
    if kind == "apply_commit":
        head = "diff --git a/x b/x\n--- a/x\n+++ b/x\n"
        payload = {"sha": "a" * 40, "base": "b" * 40, "diff": f"{head}@@ -1,2 +1,2 @@\n-{text}\n+{text}\n same\n"}
    return Approval(
        id=5,
        kind=kind,
        agent=AgentName("argus"),
        requested_by=AgentName("hm1nd"),
        reason=text,
        payload=payload,
        effect={"lines": [change(text, "wide"), change(text, "plain")], "unknown": [text]},
        digest="d" * 64,
        state=state,
        step=text,
        step_at_ms=1,
        proof=text,
        note=text,
        requested_at_ms=1_700_000_000_000,
        expires_at_ms=1_700_000_900_000,
        resolved_at_ms=1,
        resolved_by="operator",
        resolved_from=text,
        rule=text,
    )


def turn(text: str) -> dict[str, Any]:
    times = {"started_at_ms": 1_700_000_000_000, "ended_at_ms": 1_700_000_002_000}
    told = {"error": text, "reason": text, "usage": {"input_tokens": text}, "cost_micro_usd": None}
    told |= {"unknown_calls": 0, "estimated_micro_usd": 0}
    return {"id": 4, "state": "failed", **times, **told, "errand": text, "errand_by": text}


def said(*blocks: dict[str, Any], speaker: str = "assistant") -> str:
    return json.dumps({"type": speaker, "message": {"content": list(blocks)}})


def stream_lines(text: str) -> list[str]:
    """One line of each kind that a program's stream can hold, with `text` wherever there is text."""
    tools: list[dict[str, Any]] = [
        {"command": f"echo {text}"},
        {"file_path": text, "old_string": f"{text}\nold", "new_string": f"{text}\nnew"},
        {"file_path": text, "content": text},
        {"file_path": text},
        {"pattern": text},
        {"to": text, "body": text},
        {text: text},
    ]
    return [
        text,
        json.dumps([text]),
        said({"type": "text", "text": text}),
        said({"type": "thinking", "thinking": f"{text}\nmore"}),
        said({"type": text}),
        *(said({"type": "tool_use", "name": f"mcp__{text}", "input": given}) for given in tools),
        said({"type": "tool_result", "content": f"{text}\nmore"}, speaker="user"),
        said({"type": "tool_result", "is_error": True, "content": [{"text": text}, text, 3]}, speaker="user"),
        json.dumps({"type": "user", "message": {"content": text}}),
        json.dumps({"type": "system", "subtype": "init", "model": text, "session_id": text, "tools": [text]}),
        json.dumps({"type": "system", "subtype": text, "more": text}),
        json.dumps({"type": "result", "is_error": True, "result": text, "api_error_status": text}),
        json.dumps({"type": "rate_limit_event", "rate_limit_info": {"status": text}}),
        json.dumps({"type": "hive", "subtype": "stderr", "text": text}),
        json.dumps({"type": "hive", "subtype": "malformed", "text": f"{text}\n{text}", "error": text}),
        json.dumps({"type": text}),
    ]


def every_row(services: Services, text: str) -> list[str]:
    """Every kind of row there is, with `text` in every place that an agent can fill."""
    hive = hive_of(services)
    rows = Rows(hive)
    settings: dict[str, Any] = {"program": text, "model": text, "effort": text, "tools": [text]}
    settings["projects"] = [{"name": text, "path": text, "push": text}]
    settings["mcp_servers"] = {text: {"allowed_tools": [text]}}
    agent = Agent(AgentName("iris"), "agent", "down", 8100, text, settings, None, 1_700_000_000_000, 3, 2)
    services.agents._live["iris"] = Live("tool", text, 1_700_000_000_000, "none")
    kinds = [(kind, state) for kind in ("spawn", "apply_commit") for state in ("approved", "done", "failed", "denied")]
    return [
        *(rows.agent(agent, alone) for alone in (False, True)),
        rows.message(message(text)),
        rows.aside(message(text)),
        rows.aside({**message(text), "deliveries": [delivery("iris", "held", text)]}),
        *(rows.approval(approval(text, kind)) for kind in ("spawn", "apply_commit")),
        *(rows.decision(approval(text, kind, state)) for kind, state in kinds),
        rows.turn(turn(text), [{"id": 9, "line": text}]),
        *(rows.line({"id": n, "line": line}) for n, line in enumerate(stream_lines(text))),
    ]


@pytest.mark.parametrize("text", CORPUS)
async def test_hostile_text_adds_no_element_and_no_attribute_to_any_row(hive: Services, text: str) -> None:
    for hostile, plain in zip(every_row(hive, text), every_row(hive, "plain"), strict=True):
        shape = Shape(hostile)
        assert shape.elements == Shape(plain).elements
        hostile.encode()  # a lone surrogate would end the page here
        assert not set(shape.text) & set("\x00\x07\x08\r\x1b\u200b\u202e\u202c\u2066\u2069\ufeff\U000e0041\ud83d")


async def test_a_page_tells_where_an_agents_clones_are_and_what_it_may_push(hive: Services) -> None:
    listed = [{"name": "site"}, {"name": "docs", "path": "/projects/www", "push": ""}]
    settings = {"program": "claude", "projects": listed}
    agent = Agent(AgentName("iris"), "agent", "down", 8100, None, settings, None, 1_700_000_000_000, 3, 2)
    rows = Rows(hive_of(hive))
    told = "projects: site in /projects/site (push: iris/*); docs in /projects/www (push: nothing)"
    assert told in Shape(rows.agent(agent, alone=True)).text
    assert "projects:" not in rows.agent(agent, alone=False)


async def test_a_page_tells_what_an_agent_reaches_and_which_servers_of_tools_it_has(hive: Services) -> None:
    rows = Rows(hive_of(hive))
    policy = {"egress": [{"to": "python"}, {"to": "git.lan:3000", "addresses": ["10.0.0.7"]}]}
    servers = {"maps": {"command": "maps", "allowed_tools": ["find", "route"]}, "notes": {"command": "notes"}}
    for deployed, told in (
        ({**SETTINGS, "policy": policy, "mcp_servers": servers}, "egress: python, git.lan:3000"),
        ({**SETTINGS, "policy": {**policy, "network": "host"}}, "egress: whatever this machine reaches"),
        ({**SETTINGS, "policy": {}}, "egress: nothing beside its model"),
    ):
        await hive.store.write(lambda tx, deployed=deployed: set_deployed(tx, AgentName("iris"), "0" * 40, deployed))
        agent = await hive.agents.get(AgentName("iris"))
        page = Shape(rows.agent(agent, alone=True)).text
        assert told in page
        assert ("servers of tools: maps (find, route); notes (all of its tools)" in page) == ("mcp_servers" in deployed)
        assert "egress:" not in rows.agent(agent, alone=False)


async def test_a_page_tells_which_skills_and_plugins_an_agent_has(hive: Services) -> None:
    extras = {"digest": "d", "skills": ["review", "tidy"], "plugins": ["fmt"], "offered": []}
    settings = {"program": "claude", "extras": extras}
    agent = Agent(AgentName("iris"), "agent", "down", 8100, None, settings, None, 1_700_000_000_000, 3, 2)
    rows = Rows(hive_of(hive))
    assert "skills: review, tidy · plugins: fmt" in Shape(rows.agent(agent, alone=True)).text
    assert "skills:" not in rows.agent(agent, alone=False)


async def test_a_whole_row_keeps_its_ids_and_hooks(hive: Services) -> None:
    rows = Rows(hive_of(hive))
    assert rows.message(message("hi")).startswith(
        '<li class="message" id="message-7" data-message="7" data-from="iris"'
    )
    assert 'id="approval-5"' in rows.approval(approval("hi"))
    assert f'name="digest" value="{"d" * 64}"' in rows.approval(approval("hi"))
    assert 'id="decision-5"' in rows.decision(approval("hi", state="done"))


async def test_a_decision_tells_the_rule_by_which_it_passed_or_else_who_decided(hive: Services) -> None:
    rows, passed = Rows(hive_of(hive)), replace(approval("hi", state="done"), rule="own prompt")
    assert "· by rule own prompt, without a click</span>" in rows.decision(passed)
    assert "by operator" not in rows.decision(passed)
    clicked = rows.decision(replace(passed, rule=None, resolved_from="host.sock, uid 0"))
    assert "· by operator, host.sock, uid 0</span>" in clicked
    assert "without a click" not in clicked


def test_hidden_characters_are_shown_for_what_they_are() -> None:
    assert visible("a\u202eb") == 'a<span class="mark">⟨U+202E⟩</span>b'
    assert visible("\x1b[31m") == '<span class="mark">⟨U+001B⟩</span>[31m'
    assert visible("tab\tand\nnewline, ❤️ and é and 漢字") == "tab\tand\nnewline, ❤️ and é and 漢字"
    assert visible("a\u0336b\xa0c").count('class="mark"') == 2


def test_words_from_right_to_left_move_nothing_that_is_around_them() -> None:
    assert visible("model: אב גד → <הו>") == "model: <bdi>אב גד</bdi> → &lt;<bdi>הו</bdi>&gt;"
    assert visible("א\u202eב") == '<bdi>א</bdi><span class="mark">⟨U+202E⟩</span><bdi>ב</bdi>'


@given(st.text(st.characters(categories=["Cc", "Cf", "Co", "Cs", "Zl", "Zp"]), min_size=1))
def test_no_control_or_format_character_is_shown_as_itself(text: str) -> None:
    shown = Shape(visible(text)).text
    assert not [character for character in shown if character in text and character not in "\t\n"]


def test_long_text_is_cut_and_says_how_much_is_missing() -> None:
    shown = visible("é" * (SHOWN_CHARACTERS + 1_234))
    assert shown.endswith('<span class="more">… 1,234 more characters</span>')
    assert visible("x" * (SHOWN_CHARACTERS + 1)).endswith("… 1 more character</span>")
    assert visible("x" * (SHOWN_CHARACTERS + 1), None) == "x" * (SHOWN_CHARACTERS + 1)


async def test_what_is_to_be_approved_is_never_cut(hive: Services) -> None:
    text = "\n".join(f"line {n}" for n in range(5_000)) + "\nthe end of it"
    for kind in ("spawn", "apply_commit"):
        card = Rows(hive_of(hive)).approval(approval(text, kind))
        assert card.count("the end of it") >= 2
        assert "more characters" not in card.replace(str(visible(approval(text).reason, None)), "")


def test_a_line_of_a_diff_is_what_the_hunk_says_not_what_it_looks_like() -> None:
    head = "diff --git a/x b/x\n--- a/x\n+++ b/x\n"
    diff = f"{head}@@ -1,3 +1,3 @@ f\n--- a/y\n+++ b/y\n @@ -1 +1 @@\n same\n@@ -9 +9 @@\n-a\n+b\n"
    assert [line.kind for line in read_diff(diff)] == (
        ["meta", "meta", "meta", "hunk", "del", "add", "same", "same", "hunk", "del", "add"]
    )
    assert [line.kind for line in compare("a\nb\n", "a\nc\n")] == ["hunk", "same", "del", "add"]
    assert [line.kind for line in compare("same", "same")] == ["same"]


def test_a_diff_is_told_file_by_file_in_runs_of_lines_that_lose_nothing() -> None:
    diff = (
        "diff --git a/a b.md b/a b.md\n--- a/a b.md\n+++ b/a b.md\n@@ -1,2 +1,2 @@\n-diff --git a/no b/no\n-x\n+y\n+z\n"
        "diff --git a/new b/new\nnew file mode 100644\n--- /dev/null\n+++ b/new\n@@ -0,0 +1,2 @@\n+1\n+2\n"
    )
    first, second = diff_files(diff)
    assert (first.path, first.added, first.removed) == ("a b.md", 2, 2)
    assert [run.kind for run in first.runs] == ["meta", "hunk", "del", "add"]
    assert (second.path, second.added, second.removed) == ("new", 2, 0)
    assert "\n".join(run.text for one in (first, second) for run in one.runs) + "\n" == diff


async def test_what_widens_and_what_is_unknown_is_said_in_words(hive: Services) -> None:
    text = Shape(Rows(hive_of(hive)).approval(approval("x"))).text
    assert text.index("▲ widens") < text.index("? unknown")
    assert "x: x → x" in text


KEYS = [
    *("type", "subtype", "message", "content", "text", "thinking", "name", "input", "is_error", "usage", "tools"),
    *("model", "command", "body", "to", "file_path", "old_string", "new_string", "duration_ms", "result"),
]
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    "type",
                    "subtype",
                    "message",
                    "content",
                    "text",
                    "thinking",
                    "name",
                    "input",
                    "is_error",
                    "usage",
                    "tools",
                    "model",
                    "command",
                    "body",
                    "to",
                ]
            ),
            inner
            | st.sampled_from(["assistant", "user", "system", "result", "init", "text", "tool_use", "tool_result"]),
            max_size=6,
        )
    ),
    max_leaves=20,
)


@given(junk | st.dictionaries(st.just("type"), st.sampled_from(["assistant", "result", "hive"]), min_size=1))
def test_a_line_of_any_shape_is_read_into_at_least_one_part(event: object) -> None:
    assert read_line(json.dumps(event))


@pytest.mark.parametrize("line", ["", "{", "[" * 60_000, "1" * 60_000, '{"type":"assistant"}', "null", "\x00"])
def test_a_line_that_is_not_understood_is_shown_as_it_came(line: str) -> None:
    (part,) = read_line(line)
    assert (part.kind, part.text) == ("raw", line)


def test_the_lines_of_a_turn_read_as_a_person_would_tell_them() -> None:
    shell, edit, send = (
        read_line(said({"type": "tool_use", "name": name, "input": given}))[0]
        for name, given in (
            ("Bash", {"command": "ls -l"}),
            ("Edit", {"file_path": "/state/a.py", "old_string": "a", "new_string": "b"}),
            ("mcp__hive__send", {"to": "iris", "body": "hello"}),
        )
    )
    assert (shell.title, shell.short) == ("Bash", "ls -l")
    assert (edit.short, [line.kind for line in edit.diff]) == ("/state/a.py", ["hunk", "del", "add"])
    assert (send.title, send.short, send.text) == ("hive · send", "→ iris", "hello")
    usage = {"input_tokens": 1_200, "cache_read_input_tokens": 800, "output_tokens": 50}
    (end,) = read_line(json.dumps({"type": "result", "duration_ms": 1_500, "usage": usage, "num_turns": 3}))
    assert (end.title, end.short) == ("turn done", "1.5 s · 2,000 in / 50 out · 3 steps")
    (note,) = read_line(json.dumps({"type": "hive", "subtype": "lines_dropped", "count": 12}))
    assert (note.kind, note.title, note.short) == ("note", "lines dropped", '{"count": 12}')


@pytest.mark.parametrize(
    ("models", "said"),
    [
        ({"a": {"inputTokens": 50_000, "cacheReadInputTokens": 2_000, "outputTokens": 800}}, "52,000 in / 800 out"),
        ({"a": {"inputTokens": 1, "outputTokens": 2}, "b": {"inputTokens": 3, "outputTokens": 4}}, "4 in / 6 out"),
        ({"a": {"inputTokens": "x", "outputTokens": True}}, ""),
        ({"a": None}, ""),
        ({"a": {"inputTokens": 5, "outputTokens": 0}}, "5 in / 0 out"),
        ({}, ""),
        ([], ""),
    ],
)
def test_the_tokens_of_a_turn_are_those_of_all_its_models(models: object, said: str) -> None:
    """A turn's own counts leave out what the program does by itself, as to compact a session."""
    assert tokens({"input_tokens": 0, "output_tokens": 0, "models": models}) == said


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"input_tokens": 0, "output_tokens": 0}, "? in / ? out"),
        ({"input_tokens": None, "models": None}, "? in / ? out"),
        ({"input_tokens": 1_200, "output_tokens": 0}, "1,200 + ? in / ? out"),
        (None, ""),
    ],
)
def test_where_a_call_told_no_tokens_those_of_its_turn_are_not_all(told: object, said: str) -> None:
    assert tokens(told, 1) == said


async def test_an_agent_that_rests_says_until_when(hive: Services) -> None:
    iris = await hive.agents.get("iris")
    assert "rests until" not in Rows(hive_of(hive)).agent(iris)
    assert "rests until <time" in Rows(hive_of(hive)).agent(replace(iris, rests_until_ms=1_700_000_000_000))


async def test_an_agent_without_a_sandbox_is_red_wherever_it_is_shown(hive: Services) -> None:
    iris = await hive.agents.get("iris")
    assert "bare" not in Rows(hive_of(hive)).agent(iris)
    assert 'class="agent bare"' in Rows(hive_of(hive, sandbox="none")).agent(iris)
    hive.agents.observe("iris", "idle", sandbox="none")
    assert 'class="agent bare"' in Rows(hive_of(hive)).agent(replace(iris, queued=2))


async def test_an_agent_of_which_nothing_was_seen_yet_has_the_same_row_at_every_look(
    hive: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, iris = Rows(hive_of(hive)), await hive.agents.get("iris")
    before = rows.agent(iris)
    monkeypatch.setattr(time, "time", lambda: 2e9)
    assert rows.agent(iris) == before


async def test_a_quarantined_agent_can_be_started_by_its_row(hive: Services) -> None:
    agent = await hive.agents.get("iris")
    assert "ST4RT" not in Rows(hive_of(hive)).agent(agent)
    hive.agents.observe("iris", "quarantined", "it crashed")
    row = Rows(hive_of(hive)).agent(agent)
    assert 'action="/agents/iris/command"' in row
    assert 'value="resume"' in row


@pytest.mark.parametrize(
    ("sandbox", "told"),
    [("nspawn", False), (nspawn.HOST_UIDS, True), ("nixos-container", False), (nixos_container.HOST_UIDS, True)],
)
async def test_an_agent_whose_container_has_the_hosts_uids_has_a_badge(
    hive: Services, sandbox: str, told: bool
) -> None:
    hive.agents.observe("iris", "idle", sandbox=sandbox)
    assert (">host uids</span>" in Rows(hive_of(hive)).agent(await hive.agents.get("iris"))) == told


@pytest.mark.parametrize("state", ["idle", "down", "quarantined"])
async def test_an_agent_that_has_the_hosts_network_has_a_badge_on_its_page_too(hive: Services, state: str) -> None:
    hive.agents.observe("iris", state, sandbox="bwrap")
    for network, told in (("host", True), ("private", False)):
        policy = json.dumps({"network": network})
        await hive.store.write(lambda tx, policy=policy: tx.execute("UPDATE agents SET policy = ?", (policy,)).rowcount)  # type: ignore[misc]
        iris, rows = await hive.agents.get("iris"), Rows(hive_of(hive))
        for row in (rows.agent(iris), rows.agent(iris, alone=True)):
            assert (">host network</span>" in row) == told
        listed = show.agents(await AdminDesk(hive_of(hive))._list({}))
        assert (", host network" in listed) == told


async def test_an_outdated_agent_can_be_updated_by_its_row_and_one_that_failed_says_that_the_others_wait(
    hive: Services,
) -> None:
    agent, whole = await hive.agents.get("iris"), hive_of(hive)
    assert "outdated" not in Rows(whole).agent(agent)
    one = Supervisor(whole.reconciler._tools, agent.name, cast("Any", None))
    one.running, one.outdated = cast("Any", object()), True
    whole.reconciler._supervised[agent.name] = one
    row = Rows(whole).agent(agent)
    assert 'value="update"' in row
    assert ">outdated</span>" in row
    assert "/updates" not in row
    whole.reconciler.updates._failed[agent.name] = "another"
    row = Rows(whole).agent(agent)
    assert ">update failed</span>" in row
    assert 'action="/updates"' in row
