from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from hive_core.config import Config
from hive_core.credentials import Credentials
from hive_core.hive import Hive
from hive_core.kept import Keeper
from hive_core.procedures.pinned_claude import PinnedClaude
from hive_core.procedures.updates import Updates
from hive_core.protocol.admin import PROTOCOL_VERSION
from hive_core.protocol.lines import LINE_LIMIT_BYTES
from hive_core.protocol.words import BODY_LIMIT_BYTES, AgentName, parse_body
from hive_core.services.approvals import Request, Shown, put_request
from hive_core.services.post import put_message
from hive_core.services.sign_ins import SignIns
from hive_core.sockets.admin import AdminDesk
from tests.hives import PATIENCE_S, Peer, Services, connect, run_in_hive, serve

IRIS, HM1ND = AgentName("iris"), AgentName("hm1nd")
EYES = Request("spawn", AgentName("argus"), HM1ND, "eyes", Shown({"files": {}}))


@dataclass
class Drained:
    """Stands where the reconciler does: its agents end when the test says so."""

    end: trio.Event = field(default_factory=trio.Event)
    patience_s: float | None = None
    updates: Updates = field(default_factory=lambda: Updates(cast("Any", None), {}))

    def running(self) -> list[AgentName]:
        return [] if self.end.is_set() else [IRIS]

    def trouble(self, name: AgentName) -> str:
        return ""

    async def drain(self, patience_s: float) -> dict[str, str]:
        self.patience_s = patience_s
        await self.end.wait()
        return {"iris": "finished"}


def whole(services: Services, **environment: str) -> Hive:
    reconciler: Any = Drained()
    return Hive(
        config=Config(state_dir=services.state_dir, runtime_dir=services.state_dir),
        store=services.store,
        broker=services.broker,
        turns=services.turns,
        agents=services.agents,
        approvals=services.approvals,
        gate=services.gate,
        reconciler=reconciler,
        keeper=Keeper(services.state_dir, lambda name: services.state_dir / "run" / name),
        sign_ins=SignIns(services.store),
        credentials=Credentials(services.state_dir, environment),
        claude=None,
        pinned=PinnedClaude(services.store, services.state_dir, Path("/dev/null")),
        sandbox="none",
        sandbox_trouble="bubblewrap is not installed",
        dashboard_port=7000,
    )


@pytest.fixture
async def house(hive: Services) -> Hive:
    return whole(hive)


@pytest.fixture
async def peer(house: Hive, tmp_path: Path) -> AsyncIterator[Peer]:
    async with serve(tmp_path / "host.sock", AdminDesk(house).serve) as door, connect(door) as peer:
        yield peer


def request(verb: object, **args: Any) -> dict[str, Any]:
    return {"v": PROTOCOL_VERSION, "verb": verb, "args": args}


async def ask(peer: Peer, verb: str, **args: Any) -> Any:
    answer = await peer.ask(request(verb, **args))
    assert answer["ok"], answer
    assert answer["v"] == PROTOCOL_VERSION
    return answer["result"]


async def refusal(peer: Peer, obj: object, code: str = "usage") -> str:
    """The sentence with which a request is refused; the next one is answered."""
    answer = await peer.ask(obj)
    assert (answer["v"], answer["ok"]) == (PROTOCOL_VERSION, False)
    assert answer["error"]["code"] == code, answer
    assert len(answer["error"]["message"]) < 2000
    await ask(peer, "pending")
    message: str = answer["error"]["message"]
    return message


async def test_status_tells_what_is_missing_and_what_waits(hive: Services, peer: Peer) -> None:
    await hive.store.write(lambda tx: put_request(tx, EYES, 60.0))
    await hive.say("iris", "operator", "hi")
    status = await ask(peer, "status")
    assert status["credential"] is None
    assert "claude setup-token" in status["credential_missing"]
    assert status["dashboard"] == "http://hive.localhost:7000"
    assert status["pending"] == [{"id": 1, "kind": "spawn", "agent": "argus", "reason": "eyes"}]
    assert status["unread"] == 1


async def test_no_answer_carries_the_credential(hive: Services, tmp_path: Path) -> None:
    house = whole(hive, ANTHROPIC_API_KEY="sk-canary")
    async with serve(tmp_path / "host.sock", AdminDesk(house).serve) as door, connect(door) as peer:
        status = await ask(peer, "status")
        assert (status["credential"], status["credential_missing"]) == ("ANTHROPIC_API_KEY", None)
        assert "canary" not in json.dumps([status, await ask(peer, "list")])


async def test_list_shows_every_agent_the_manager_first(hive: Services, peer: Peer) -> None:
    hive.agents.observe("iris", "tool", "Bash", sandbox="bwrap")
    agents = (await ask(peer, "list"))["agents"]
    assert [agent["name"] for agent in agents] == ["hm1nd", "damocles", "iris"]
    assert (agents[2]["state"], agents[2]["detail"], agents[2]["model"]) == ("tool", "Bash", "sonnet")
    assert agents[2]["page"] == "http://hive.localhost:7000/agents/iris"


async def test_the_operator_sends_and_reads(hive: Services, peer: Peer) -> None:
    sent = await ask(peer, "send", to="iris", body="hello", key="k")
    assert await ask(peer, "send", to="iris", body="hello", key="k") == sent
    await hive.say("iris", "operator", "yes", in_reply_to=sent["message"])
    assert [m["body"] for m in (await ask(peer, "messages", agent="iris"))["messages"]] == ["hello", "yes"]
    assert [(m["body"], m["unread"]) for m in (await ask(peer, "inbox"))["messages"]] == [("yes", True)]
    assert (await ask(peer, "status"))["unread"] == 0


async def test_a_sender_is_never_an_argument(peer: Peer) -> None:
    said = await refusal(peer, request("send", to="iris", body="hello", sender="hm1nd"))
    assert "no argument 'sender'; it takes body, files, in_reply_to, key, to" in said


async def test_a_card_is_shown_and_denied_with_a_reason(hive: Services, peer: Peer) -> None:
    await hive.store.write(lambda tx: put_request(tx, EYES, 60.0))
    shown = await ask(peer, "show", approval=1)
    assert (await ask(peer, "pending"))["approvals"] == [shown]
    assert "digest of what was shown" in await refusal(peer, request("approve", approval=1))
    await refusal(peer, request("approve", approval=1, digest="0" * 64), "conflict")
    assert "empty" in await refusal(peer, request("deny", approval=1, reason=" "))
    denied = await ask(peer, "deny", approval=1, reason="not now")
    assert (denied["state"], denied["resolved_from"]) == ("denied", f"host.sock, uid {os.getuid()}")
    assert (await ask(peer, "deny", approval=1, reason="again"))["note"] == "not now"
    await refusal(peer, request("approve", approval=1, digest=shown["digest"]), "conflict")


async def test_a_link_signs_in_once(house: Hive, peer: Peer) -> None:
    url = (await ask(peer, "dashboard"))["url"]
    code = re.fullmatch(r"http://hive\.localhost:7000/sign-in\?code=([\w-]+)", url)
    assert code is not None
    cookie = await house.sign_ins.redeem(code[1])
    assert cookie is not None
    assert await house.sign_ins.valid(cookie)
    assert await house.sign_ins.redeem(code[1]) is None
    await house.sign_ins.sign_out(cookie)
    assert not await house.sign_ins.valid(cookie)


async def test_a_start_wants_the_agent_up(hive: Services, peer: Peer) -> None:
    await hive.agents.want(IRIS, "down", "operator")
    assert await ask(peer, "start", agent="iris") == {"agent": "iris", "wanted": "up"}
    assert (await hive.agents.get("iris")).wanted == "up"


async def test_events_end_at_the_newest_unless_followed(hive: Services, peer: Peer) -> None:
    await peer.send(request("events", limit=2))
    answers = [await peer.read() for _ in range(3)]
    assert [answer.get("more", False) for answer in answers] == [True, True, False]
    await peer.send(request("events", after=answers[0]["result"]["seq"]))
    assert (await peer.read())["result"] == answers[1]["result"]
    assert await peer.read() == {"v": PROTOCOL_VERSION, "ok": True, "result": None}
    assert (await peer.ask(request("events", after=10**6)))["result"] is None


async def test_events_that_are_followed_come_as_they_happen(hive: Services, peer: Peer) -> None:
    await peer.send(request("events", follow=True, after=await hive.store.last_seq()))
    for body in ("one", "two"):
        message = await hive.say("hm1nd", "iris", body)
        event = (await peer.read())["result"]
        assert (event["kind"], event["data"]) == ("message_sent", {"message": message})


async def test_down_tells_whom_it_waits_for_then_how_they_ended_then_stops(
    hive: Services, house: Hive, peer: Peer
) -> None:
    reconciler: Any = house.reconciler
    await peer.send(request("down", patience_s=5))
    assert (await peer.read())["result"] == {"waiting": ["iris"]}
    assert not house.stopping.is_set()
    reconciler.end.set()
    while "ends" not in (answer := await peer.read())["result"]:
        assert answer["more"]
    assert answer["result"]["ends"] == {"iris": "finished"}
    assert (await peer.read())["result"] is None
    assert house.stopping.is_set()
    assert reconciler.patience_s == 5


async def test_down_goes_on_when_whoever_asked_has_left(hive: Services, house: Hive, peer: Peer) -> None:
    reconciler: Any = house.reconciler
    await peer.send(request("down"))
    await peer.read()
    await peer.stream.aclose()
    for _ in range(3):  # something to tell to nobody
        await hive.say("hm1nd", "iris", "hello")
        await trio.testing.wait_all_tasks_blocked()
    reconciler.end.set()
    with trio.fail_after(PATIENCE_S):
        await house.stopping.wait()


@pytest.mark.parametrize("patience_s", [-1, 86401, 1e300, "5", True, [], None])
async def test_a_patience_out_of_bounds_is_refused_before_anything_ends(
    house: Hive, peer: Peer, patience_s: object
) -> None:
    reconciler: Any = house.reconciler
    assert await refusal(peer, request("down", patience_s=patience_s))
    assert reconciler.patience_s is None


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("obj", "cause"),
    [
        (request("fly"), "cannot do 'fly': the verbs are status, list"),
        (request(None), "cannot do None"),
        (request(["list"]), "cannot do ['list']"),
        (request("x" * 10_000), "characters"),
        ({"v": PROTOCOL_VERSION}, "cannot do None"),
        ({"verb": "list"}, "says v=None"),
        ({**request("list"), "v": 2}, f"says v=2, this daemon speaks {PROTOCOL_VERSION}"),
        ({**request("list"), "v": "1"}, "says v='1'"),
        ({**request("list"), "v": True}, "says v=True"),
        ({**request("list"), "v": 1.0}, f"says v=1.0, this daemon speaks {PROTOCOL_VERSION}; give just that number"),
        ({**request("list"), "args": []}, "object is needed"),
        ({**request("list"), "args": None}, "object is needed"),
        (request("list", agent="iris"), "no argument 'agent'; it takes none"),
        (request("send", to="iris"), "the message"),
        (request("send", to="..", body="hi"), "cannot use '..'"),
        (request("send", to="a/b", body="hi"), "cannot use 'a/b'"),
        (request("send", to="a" * 300, body="hi"), "characters"),
        (request("send", to="iris\n", body="hi"), "cannot use"),
        (request("send", to="operator", body="hi"), "reserved"),
        (request("send", to="iris", body="x" * (BODY_LIMIT_BYTES + 1)), "limit is 524,288; shorten it"),
        (request("send", to="iris", body="a\0"), "NUL"),
        (request("send", to="iris", body="\ud800"), "surrogate"),
        (request("send", to="iris", body="hi", in_reply_to=10**30), "a message"),
        (request("send", to="iris", body="hi", in_reply_to=True), "a message"),
        (request("send", to="iris", body="hi", key=""), "key"),
        (request("send", to="iris", body="hi", key="x" * 201), "key"),
        (request("send", to="iris", body="hi", key="\ud800"), "key"),
        (request("send", to="iris", body="hi", key=7), "key"),
        (request("messages", limit=0), "give 1 to 1000"),
        (request("messages", limit=1001), "give 1 to 1000"),
        (request("messages", limit=10**400), "give 1 to 1000"),
        (request("messages", limit=1.5), "give 1 to 1000"),
        (request("inbox", limit=True), "give 1 to 1000"),
        (request("messages", agent=7), "cannot use 7"),
        (request("show"), "cannot use None"),
        (request("show", approval="1"), "an approval"),
        (request("message", message=2**63), "a message"),
        (request("deny", approval=1.0, reason="no"), "an approval"),
        (request("request_spawn", agent="argus", persona=7, reason="r"), "persona"),
        (request("request_spawn", agent="argus", persona="p"), "reason"),
        (request("request_apply_commit", agent="iris", sha="main", reason="r"), "40 hex digits"),
        (request("events", after=-1), "`after`"),
        (request("events", after=2**70), "`after`"),
        (request("events", after="1"), "`after`"),
        (request("events", limit=0), "give 1 to 1000"),
    ],
    ids=lambda value: (json.dumps(value) if isinstance(value, dict) else value)[:60],
)
async def test_a_request_that_cannot_be_is_refused_with_its_cause(peer: Peer, obj: object, cause: str) -> None:
    assert cause in await refusal(peer, obj)


@pytest.mark.parametrize(
    "obj",
    [
        request("send", to="argus", body="hi"),
        request("send", to="iris", body="hi", in_reply_to=77),
        request("show", approval=2**63 - 1),
        request("message", message=2**63 - 1),
        request("deny", approval=77, reason="no"),
        request("approve", approval=77, digest="x"),
        request("start", agent="argus"),
        request("request_apply_commit", agent="argus", sha="0" * 40, reason="r"),
    ],
    ids=lambda obj: str(obj["verb"]),
)
async def test_what_is_not_there_is_refused_by_name(peer: Peer, obj: dict[str, Any]) -> None:
    said = await refusal(peer, obj, "not_found")
    assert re.search(r"argus|77|approval \d+|message \d+", said)


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"{\n", "not JSON"),
        (b"\xff\n", "not UTF-8"),
        (b"[]\n", "an object is needed"),
        (b'{"v":NaN}\n', "not JSON"),
        (b'{"v":Infinity}\n', "not JSON"),
        (b'{"v":1e999}\n', "v=inf"),
        (b'{"v":1,"verb":"list","args":' + b"[" * 10_000 + b"\n", "nested too deep"),
        (b"x" * 10_000_000 + b"\n", f"the limit of {LINE_LIMIT_BYTES:,} bytes; send less in one line"),
    ],
    ids=lambda value: repr(value)[:30],
)
async def test_a_line_that_is_no_request_is_refused_and_the_next_one_is_answered(
    peer: Peer, data: bytes, cause: str
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(peer.send_bytes, data)
        answer = await peer.read()
    assert cause in answer["error"]["message"]
    assert len((await ask(peer, "list"))["agents"]) == 3


async def test_a_line_of_just_the_limit_is_read(peer: Peer) -> None:
    line = json.dumps(request("list")).encode()
    await peer.send_bytes(line[:-1] + b" " * (LINE_LIMIT_BYTES - len(line)) + b"}\n")
    assert (await peer.read())["ok"]


async def test_a_body_of_just_its_limit_is_taken_however_json_spells_it(hive: Services, peer: Peer) -> None:
    spelled = r"\u0041" * BODY_LIMIT_BYTES  # an A takes six bytes; no spelling of one byte is longer
    args = '{"to":"iris","body":"' + spelled + '"}'
    async with trio.open_nursery() as nursery:
        nursery.start_soon(peer.send_bytes, f'{{"v":1,"verb":"send","args":{args}}}\n'.encode())
        assert (await peer.read())["ok"]
    assert await hive.value("SELECT body_bytes FROM messages") == BODY_LIMIT_BYTES


async def test_half_a_line_and_a_hang_up_does_nothing_and_harms_nobody(
    hive: Services, house: Hive, tmp_path: Path
) -> None:
    async with serve(tmp_path / "host.sock", AdminDesk(house).serve) as door:
        whole_line = json.dumps(request("send", to="iris", body="hello")).encode()
        for cut in (1, len(whole_line) // 2, len(whole_line)):
            async with connect(door) as peer:
                await peer.send_bytes(whole_line[:cut])
        async with connect(door) as peer:
            await ask(peer, "list")
    assert await hive.value("SELECT count(*) FROM messages") == 0


async def test_half_a_line_of_a_peer_that_still_reads_is_answered_with_its_cause_then_the_end(peer: Peer) -> None:
    half = json.dumps(request("list")).encode()
    await peer.send(request("list"))
    await peer.send_bytes(half)
    await peer.stream.send_eof()
    assert (await peer.read())["ok"]
    error = (await peer.read())["error"]
    assert error["code"] == "usage"
    assert f"its newline is missing after {len(half)} bytes" in error["message"]
    with pytest.raises(trio.EndOfChannel):
        await peer.read()


async def test_a_character_split_across_two_writes_arrives_whole(peer: Peer) -> None:
    line = json.dumps(request("send", to="iris", body="é😀"), ensure_ascii=False).encode() + b"\n"
    cut = line.index("😀".encode()) + 2
    await peer.send_bytes(line[:cut])
    await trio.testing.wait_all_tasks_blocked()
    await peer.send_bytes(line[cut:])
    assert (await peer.read())["ok"]
    assert (await ask(peer, "messages"))["messages"][0]["body"] == "é😀"


async def test_requests_sent_in_one_breath_are_answered_in_order(peer: Peer) -> None:
    await peer.send_bytes(
        b"".join(json.dumps(request("send", to="iris", body=str(n))).encode() + b"\n" for n in range(50))
    )
    assert [(await peer.read())["result"]["message"] for _ in range(50)] == list(range(1, 51))


async def test_one_who_never_reads_holds_up_only_himself(hive: Services, house: Hive, tmp_path: Path) -> None:
    await hive.store.write(lambda tx: [put_message(tx, HM1ND, IRIS, parse_body("x" * 60_000)) for _ in range(50)])
    async with (
        serve(tmp_path / "host.sock", AdminDesk(house).serve) as door,
        connect(door) as deaf,
        connect(door) as peer,
    ):
        for _ in range(20):
            await deaf.send(request("messages", limit=1000))
        await trio.testing.wait_all_tasks_blocked()
        assert len((await ask(peer, "list"))["agents"]) == 3


VERBS = [
    "status",
    "list",
    "send",
    "messages",
    "message",
    "inbox",
    "request_spawn",
    "pending",
    "show",
    "approve",
    "deny",
    "start",
    "events",
    "fly",
]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(["iris", "argus"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
ARGUMENTS = [
    "to",
    "body",
    "in_reply_to",
    "key",
    "agent",
    "limit",
    "message",
    "persona",
    "reason",
    "approval",
    "digest",
    "after",
]
JUNK = st.one_of(
    st.binary(max_size=80),
    VALUES.map(lambda value: json.dumps(value).encode()),
    st.builds(
        lambda verb, args: json.dumps({"v": 1, "verb": verb, "args": args}).encode(),
        st.sampled_from(VERBS),
        st.dictionaries(st.sampled_from(ARGUMENTS), VALUES, max_size=4) | VALUES,
    ),
)


@settings(deadline=None, max_examples=25)
@given(st.lists(JUNK, max_size=15), st.integers(1, 200))
def test_after_any_junk_the_next_request_is_answered(junk: list[bytes], chunk: int) -> None:
    async def check(hive: Services) -> None:
        lines = [*(line.replace(b"\n", b" ") for line in junk), json.dumps(request("dashboard")).encode()]
        with tempfile.TemporaryDirectory() as folder:
            door = Path(folder) / "host.sock"
            async with (
                serve(door, AdminDesk(whole(hive)).serve),
                connect(door) as peer,
                trio.open_nursery() as nursery,
            ):
                nursery.start_soon(send_in_chunks, peer, b"".join(line + b"\n" for line in lines), chunk)
                while "url" not in ((await peer.read()).get("result") or {}):
                    pass

    run_in_hive(check, "hm1nd", "iris")


async def send_in_chunks(peer: Peer, data: bytes, chunk: int) -> None:
    for start in range(0, len(data), chunk):
        await peer.send_bytes(data[start : start + chunk])
