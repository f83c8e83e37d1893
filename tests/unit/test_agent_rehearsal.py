"""The rehearsal: claude's flags and claude's stream, with a script instead of a mind."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hive_agent.claude_command import environment, flags, session_flags, user_line
from hive_agent.claude_stream import Report
from hive_agent.own_command import own_command
from hive_agent.rehearsal_script import BadScript, fill, fill_command, find_rules, purpose
from hive_agent.rehearse import MARK
from hive_agent.runner import Seat
from hive_agent.wake import wake_prompt
from tests.harness_host import a_lease
from tests.processes import PATIENCE_S, PROGRAMS
from tests.scripted_tools import ScriptedTools

FIXTURE = Path(__file__).parent / "fixtures" / "claude" / "success.jsonl"


def script(*rules: dict[str, Any]) -> str:
    return f"# iris\n\nYou write code.\n\n```rehearsal\n{json.dumps(rules, indent=1)}\n```\nThe end."


@dataclass
class Stage:
    """Where a rehearsal plays: run as the harness runs it."""

    folder: Path
    tools: ScriptedTools

    def command(self, prompt: str = "", session: str | None = None) -> list[str]:
        lease = cast("Any", a_lease(prompt=prompt))
        return [*own_command("rehearse"), *flags(self.seat, lease["settings"]), *session_flags(session)]

    @property
    def seat(self) -> Seat:
        folder = str(self.folder)
        return Seat("iris", folder, folder, folder, f"{folder}/.claude", PROGRAMS, None, True, 1)

    def play(
        self, prompt: str, body: str = "hello", sender: str = "operator", session: str | None = None, code: int = 0
    ) -> list[dict[str, Any]]:
        done = self.run(prompt, body, sender, session)
        assert done.returncode == code
        return [json.loads(line) for line in done.stdout.splitlines()]

    def run(
        self, prompt: str, body: str = "hello", sender: str = "operator", session: str | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        lease = cast("Any", a_lease(body=body, sender=sender))
        return subprocess.run(
            self.command(prompt, session),
            input=user_line(wake_prompt(lease["message"], 0)),
            env=environment(self.seat, "api_key"),
            cwd=self.folder,
            capture_output=True,
            timeout=PATIENCE_S,
            check=False,
        )


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with ScriptedTools(tmp_path / "mcp.sock") as tools:
        yield Stage(tmp_path, tools)


def blocks(events: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    messages = (event["message"]["content"] for event in events if event["type"] in ("assistant", "user"))
    return [block for content in messages for block in content if block["type"] == kind]


def test_its_events_have_the_fields_of_claudes(stage: Stage) -> None:
    real = [json.loads(line) for line in FIXTURE.read_text().splitlines()[:-1]]
    steps = [{"say": "I look."}, {"run": "echo seen"}, {"tool": "send", "args": {"to": "operator", "body": "I look."}}]
    played = stage.play(script({"do": [*steps, {"say": "It is there."}]}))

    def kinds(events: list[dict[str, Any]]) -> list[str]:
        return [
            event["type"] + ":" + ",".join(block["type"] for block in event.get("message", {}).get("content", []))
            for event in events
        ]

    assert sorted(kinds(played)) == sorted(kinds(real))
    assert set(played[0]) <= set(real[0])
    assert set(played[-1]) <= set(real[-1])
    assert {tuple(sorted(block)) for block in blocks(played, "tool_use")} == {("id", "input", "name", "type")}
    assert played[0]["mcp_servers"] == [{"name": "hive", "status": "connected"}]
    assert set(played[0]["tools"]) == set(real[0]["tools"])


def test_the_harness_reads_it_as_a_good_turn(stage: Stage) -> None:
    report = Report()
    for event in stage.play(script({"do": [{"say": "done"}]}), session=None):
        report.read_stdout(json.dumps(event).encode())
    ending = report.ending(0)
    assert (ending.outcome, ending.error) == ("done", None)
    assert ending.session


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("{", "it is not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))"),
        ("[" * 100_000, "it is not JSON (it is nested too deeply)"),
        ("[]", "it must be an object with an object `mcpServers`"),
        ('{"mcpServers": 7}', "it must be an object with an object `mcpServers`"),
        ('{"mcpServers": {"hive": 7}}', "its server `hive` needs a `command` that is text and a list `args`"),
        (
            '{"mcpServers": {"hive": {"args": []}}}',
            "its server `hive` needs a `command` that is text and a list `args`",
        ),
        ('{"mcpServers": {"hive": {"command": "\\u0000"}}}', "its server `hive` needs a `command`"),
    ],
    ids=lambda value: value[:30],
)
def test_a_configuration_of_servers_that_is_none_is_one_error(stage: Stage, given: str, why: str) -> None:
    streams = ["--input-format", "stream-json", "--output-format", "stream-json"]
    words = [*own_command("rehearse"), "--print", "--verbose", *streams, "--mcp-config", given]
    done = subprocess.run(
        words, input=b"", env=environment(stage.seat, "api_key"), capture_output=True, timeout=PATIENCE_S
    )
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.decode().startswith(f"error: cannot use --mcp-config: {why}")
    assert done.stderr.count(b"\n") == 1


def test_the_first_rule_that_fits_runs(stage: Stage) -> None:
    rules = (
        {"from": "hm1nd", "do": [{"say": "for hm1nd"}]},
        {"match": "^review (this|that)$", "do": [{"say": "a review"}]},
        {"do": [{"say": "anything"}]},
    )
    assert stage.play(script(*rules), "review that")[-1]["result"] == "a review"
    assert stage.play(script(*rules), "review that", sender="hm1nd")[-1]["result"] == "for hm1nd"
    assert stage.play(script(*rules), "else")[-1]["result"] == "anything"


def test_tools_are_called_as_claude_calls_them(stage: Stage) -> None:
    arguments = {"to": "{sender}", "body": "{agent} on {model} heard: {body} {unknown}", "in_reply_to": "{message_id}"}
    events = stage.play(script({"do": [{"tool": "send", "args": arguments}]}), "hi")
    told = {"to": "operator", "body": "iris on sonnet heard: hi {unknown}", "in_reply_to": 101}
    assert stage.tools.calls == [("send", told)]
    (use,) = blocks(events, "tool_use")
    assert (use["name"], use["input"]) == ("mcp__hive__send", told)
    assert stage.tools.metas[0]["claudecode/toolUseId"] == use["id"]
    (back,) = blocks(events, "tool_result")
    assert (back["tool_use_id"], json.loads(back["content"])) == (use["id"], {"message": 41})


def test_what_a_step_saves_the_next_can_use(stage: Stage) -> None:
    steps = [
        {"run": "printf ' one\\n'", "save": "word"},
        {"tool": "send", "args": {"to": "a", "body": "{word}"}, "save": "sent"},
        {"say": "{word} as {sent.message}"},
    ]
    assert stage.play(script({"do": steps}))[-1]["result"] == "one as 41"


def test_a_body_cannot_become_a_command(stage: Stage) -> None:
    stage.play(script({"do": [{"run": "echo {body} > heard"}]}), "x; touch pwned; $(touch pwned) 'q'")
    assert (stage.folder / "heard").read_text() == "x; touch pwned; $(touch pwned) 'q'\n"
    assert not (stage.folder / "pwned").exists()


def test_a_failed_command_and_a_refused_tool_are_errors_and_the_script_goes_on(stage: Stage) -> None:
    events = stage.play(script({"do": [{"run": "echo no >&2; false"}, {"tool": "fail"}, {"say": "still here"}]}))
    assert [(back["is_error"], back["content"]) for back in blocks(events, "tool_result")] == [
        (True, "no"),
        (True, "cannot do it: a rule says no"),
    ]
    assert events[-1]["result"] == "still here"


def test_exit_ends_without_a_result(stage: Stage) -> None:
    events = stage.play(script({"do": [{"say": "bye"}, {"exit": 7}]}), code=7)
    assert [event["type"] for event in events] == ["system", "assistant"]


def test_hang_hangs(stage: Stage) -> None:
    lease = cast("Any", a_lease())
    process = subprocess.Popen(
        stage.command(script({"do": [{"say": "now"}, {"hang": True}]})),
        env=environment(stage.seat, "api_key"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            process.communicate(wake_prompt(lease["message"], 0).encode(), timeout=0.5)
    finally:
        process.kill()
        process.communicate()


def test_a_message_that_no_rule_fits_is_told_what_this_is(stage: Stage) -> None:
    stage.play(script(), "what do you think?", sender="hm1nd")
    ((name, arguments),) = stage.tools.calls
    assert (name, arguments["to"], arguments["in_reply_to"]) == ("send", "hm1nd", 101)
    for word in (MARK, "stand-in", "follow a script", "You write code.", 'program = "claude"', "`hive up`"):
        assert word in arguments["body"]


@pytest.mark.parametrize(("sender", "body"), [("system", "hello"), ("hm1nd", f"{MARK} I am only a stand-in")])
def test_two_rehearsals_never_answer_each_other_for_ever(stage: Stage, sender: str, body: str) -> None:
    assert stage.play("", body, sender=sender)[-1]["is_error"] is False
    assert stage.tools.calls == []


def test_an_unknown_session_is_refused_as_claude_refuses_it(stage: Stage) -> None:
    real = json.loads((FIXTURE.parent / "session_lost.jsonl").read_text().splitlines()[0])
    (played,) = stage.play("", session=real["session_id"], code=1)
    assert set(played) <= set(real)
    assert played["errors"] == real["errors"]


def test_a_session_goes_on(stage: Stage) -> None:
    session = stage.play("")[-1]["session_id"]
    assert stage.play("", session=session)[-1]["session_id"] == session


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--print", "--verbose", "--output-format", "stream-json", "--continue"], "unknown option '--continue'"),
        (["--model"], "argument missing"),
        (["--print"], "stream-json"),
    ],
)
def test_flags_it_does_not_know_are_refused(arguments: list[str], said: str) -> None:
    done = subprocess.run(own_command("rehearse", *arguments), capture_output=True, check=False, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert said in done.stderr


@pytest.mark.parametrize(
    ("rules", "why"), [("[{]", "it is not JSON (Expecting property name"), ("[" * 100_000, "it is nested too deeply")]
)
def test_with_a_script_that_cannot_be_followed_it_does_not_come_up_and_says_why(
    stage: Stage, rules: str, why: str
) -> None:
    done = stage.run(f"```rehearsal\n{rules}\n```\n")
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.decode().startswith("cannot follow the script: ")
    assert why in done.stderr.decode()


@pytest.mark.parametrize(
    "rules", ["{}", "[3]", '[{"do":1}]', '[{"do":[{"sya":"x"}]}]', '[{"match":"(","do":[]}]', '[{"match":1,"do":[]}]']
)
def test_a_malformed_rule_is_named(rules: str) -> None:
    with pytest.raises(BadScript, match="cannot follow"):
        find_rules(f"```rehearsal\n{rules}\n```")


def test_a_prompt_without_a_script_has_no_rules() -> None:
    assert find_rules("You are iris. ```rehearsal is only a word here.") == []


def test_the_script_of_another_agent_stays_as_it_is() -> None:
    persona = "You are {agent}.\n```rehearsal\n[{sender}]\n```\nBye {agent}."
    assert fill({"persona": persona}, {"sender": "x", "agent": "hm1nd"}) == {
        "persona": "You are hm1nd.\n```rehearsal\n[{sender}]\n```\nBye hm1nd."
    }


def test_a_persona_with_a_script_inside_a_script_is_found_whole() -> None:
    persona = script({"do": [{"say": "{sender}"}]})
    (rule,) = find_rules(script({"do": [{"tool": "request_spawn", "args": {"persona": persona}}]}))
    assert rule["do"][0]["args"]["persona"] == persona


@given(st.text())
def test_text_without_known_words_stays(text: str) -> None:
    assert fill(text, {}) == text


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_any_word_is_one_argument_of_a_command(word: str) -> None:
    command = fill_command("printf %s {word}", {"word": word})
    assert subprocess.run(["/bin/sh", "-c", command], capture_output=True, check=True).stdout == word.encode()


def test_the_purpose_is_the_first_line_that_says_something() -> None:
    assert purpose(script()) == "You write code."
    assert purpose("# only a heading") == ""
