"""Files through the page: what the composer's form brings, and what a browser gets back."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hive_core.limits import Limits
from hive_core.protocol.file_names import FileName
from hive_core.protocol.words import OPERATOR, AgentName, parse_body
from hive_core.services.attachments import Upload
from hive_core.services.question_words import parse_ask
from tests.dashboards import OURS, browse, hive_of
from tests.hives import Services, open_services, run_in_hive

IRIS = AgentName("iris")
SCRIPT = {**OURS, "Accept": "application/json"}
PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)


async def post(client: httpx2.AsyncClient, *files: tuple[str, bytes], **fields: str) -> Any:
    """What the script's fetch gets for a form with files."""
    parts = [("files", (name, data, "image/png")) for name, data in files]
    answer = await client.post("/messages", headers=SCRIPT, data={"to": "iris", **fields}, files=parts)
    return answer.status_code, answer.json()


async def attach(hive: Services, name: str, data: bytes) -> None:
    upload = Upload(FileName(name), io.BytesIO(data))
    await hive.broker.send(OPERATOR, IRIS, parse_body("look"), files=[upload])


def raw(parts: bytes) -> tuple[dict[str, str], bytes]:
    return {**SCRIPT, "Content-Type": "multipart/form-data; boundary=x"}, parts.replace(b"\n", b"\r\n")


async def test_a_form_with_files_is_a_message_with_them(hive: Services) -> None:
    (hive.state_dir / "agents/iris/state").mkdir(parents=True)
    async with browse(hive_of(hive)) as client:
        answer = await post(client, ("image.png", PNG), ("image.png", b"x" * 2_000_000), body="two\r\nlines")
    assert answer == (200, {"ok": True, "said": "message 1 is on its way to iris with 2 files"})
    leased = await hive.broker.lease(IRIS)
    assert (leased.message["body"], leased.message["sender"]) == ("two\nlines", "operator")
    inbox = hive.state_dir / "agents/iris/state/inbox/1"
    assert {path.name: path.stat().st_size for path in inbox.iterdir()} == {"image.png": 108, "image-2.png": 2_000_000}


async def test_the_form_of_a_question_takes_files_too(hive: Services) -> None:
    (hive.state_dir / "agents/iris/state").mkdir(parents=True)
    await hive.questions.ask(IRIS, parse_ask("operator", "which?"))
    parts = {"files": ("plan.png", PNG, "image/png")}
    async with browse(hive_of(hive)) as client:
        answer = await client.post("/questions/1/answer", headers=SCRIPT, data={"text": "this"}, files=parts)
        assert answer.json() == {"ok": True, "said": "question 1 of iris is answered"}
    leased = await hive.broker.lease(IRIS)
    assert (hive.state_dir / f"agents/iris/state/inbox/{leased.message['id']}/plan.png").read_bytes() == PNG


async def test_a_plain_form_without_files_or_text_with_them_is_one_too(hive: Services) -> None:
    none = (
        b'--x\nContent-Disposition: form-data; name="files"; filename=""\nContent-Type: application/octet-stream\n\n\n'
    )
    fields = b"".join(
        b'--x\nContent-Disposition: form-data; name="%s"\n\n%s\n' % pair
        for pair in ((b"to", b"iris"), (b"body", b"hello"), (b"back", b"/agents/iris"))
    )
    async with browse(hive_of(hive)) as client:
        headers, content = raw(fields + none + b"--x--\n")
        answer = await client.post("/messages", headers={**headers, "Accept": "text/html"}, content=content)
        assert (answer.status_code, answer.headers["location"]) == (303, "/agents/iris")
        assert (await post(client, ("a.txt", b"1"), body="  "))[0] == 200
    bodies = [row["body"] for row in await hive.broker.messages.newest()]
    assert bodies == ["hello", "1 file attached"]


@pytest.mark.parametrize(
    ("files", "fields", "status", "words"),
    [
        ([("a", b"1")] * 3, {}, 400, "cannot attach 3 files: the limit is 2 a message (files_per_message)"),
        ([("a", b"1")] * 1001, {}, 400, "it is not multipart/form-data with at most 1,000 files"),
        ([("a", b"x" * 101)], {}, 400, "the limit is 100 (file_bytes)"),
        ([("a", b"x" * 90), ("b", b"x" * 90)], {}, 400, "the limit is 150 (message_files_bytes)"),
        ([("a", b"x" * 3_000_000)], {}, 413, "message_files_bytes"),
        ([("a/..", b"1")], {}, 400, "give its name without the folder"),
        ([("a\u202eb", b"1")], {"to": "nobody"}, 404, "no agent has that name"),
        ([("a", b"1")], {"body": "/compact", "commands": "1"}, 400, "cannot send files with /compact"),
    ],
)
async def test_what_cannot_be_taken_says_why_and_sends_nothing(
    tmp_path: Path, files: list[tuple[str, bytes]], fields: dict[str, str], status: int, words: str
) -> None:
    limits = Limits(files_per_message=2, file_bytes=100, message_files_bytes=150)
    async with open_services(tmp_path, limits=limits) as hive:
        await hive.add_agents("iris")
        async with browse(hive_of(hive)) as client:
            answer = await post(client, *files, **{"body": "look", **fields})
        assert (answer[0], words in answer[1]["error"]["message"]) == (status, True), answer
        assert await hive.states() == {}
        assert [path for path in (tmp_path / "bodies").rglob("*") if path.is_file()] == []


async def test_a_form_with_files_that_another_site_sends_is_refused(hive: Services) -> None:
    headers, content = raw(b'--x\nContent-Disposition: form-data; name="to"\n\niris\n--x--\n')
    for lie in ({"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        async with browse(hive_of(hive)) as client:
            assert (await client.post("/messages", headers={**headers, **lie}, content=content)).status_code == 403


PIECES = st.sampled_from(
    [
        *(
            b"--x\n",
            b"--x--\n",
            b"\n",
            b"\n\n",
            b'Content-Disposition: form-data; name="files"; filename="a"\n',
            b"--x--",
        ),
        *(b'Content-Disposition: form-data; name="to"\n', b"iris", b"Content-Disposition: form-data\n", b"\0", b"\xff"),
        *(b'Content-Disposition: form-data; name="files"; filename="../a"\n', b": ", b"Content-Type: text/\n"),
    ]
)


@given(st.lists(PIECES, max_size=12).map(b"".join), st.sampled_from(["", "; boundary=x", "; boundary=x; charset=hex"]))
def test_no_junk_in_such_a_form_is_more_than_refused(junk: bytes, more: str) -> None:
    async def ask(hive: Services) -> None:
        async with browse(hive_of(hive)) as client:
            headers = {**SCRIPT, "Content-Type": f"multipart/form-data{more}"}
            answer = await client.post("/messages", headers=headers, content=junk.replace(b"\n", b"\r\n"))
            assert answer.status_code in (400, 200)

    run_in_hive(ask, "iris")


async def test_a_file_comes_back_as_a_download_that_can_do_nothing(hive: Services) -> None:
    page = b"<script>alert(1)</script>"
    await attach(hive, 'ü";a.html', page)
    async with browse(hive_of(hive)) as client:
        answer = await client.get("/messages/1/files/1")
        assert (answer.status_code, answer.content) == (200, page)
        for name, value in {
            "content-type": "application/octet-stream",
            "content-length": str(len(page)),
            "content-disposition": "attachment; filename*=utf-8''%C3%BC%22%3Ba.html",
            "content-security-policy": "sandbox; default-src 'none'",
            "x-content-type-options": "nosniff",
            "cache-control": "no-store",
        }.items():
            assert answer.headers[name] == value
        head = await client.head("/messages/1/files/1")
        assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", str(len(page)))


async def test_a_file_is_there_for_who_signed_in_and_only_as_it_was_sent(hive: Services) -> None:
    await attach(hive, "a.txt", b"as sent")
    async with browse(hive_of(hive), headers={}) as stranger:
        assert (await stranger.get("/messages/1/files/1")).status_code == 401
    async with browse(hive_of(hive)) as client:
        for path in ("/messages/1/files/2", "/messages/9/files/1"):
            assert (await client.get(path)).status_code == 404
        for path in ("/messages/1/files/0", "/messages/1/files/x", "/messages/..%2f1/files/1"):
            assert (await client.get(path)).status_code in (400, 404)
        (kept,) = [path for path in (hive.state_dir / "bodies").rglob("*") if path.is_file()]
        kept.write_bytes(b"spoiled")
        assert (await client.get("/messages/1/files/1")).status_code == 503
        kept.unlink()
        assert (await client.get("/messages/1/files/1")).status_code == 503


async def test_every_page_that_shows_a_message_names_its_files(hive: Services) -> None:
    await attach(hive, "a<b>.txt", b"1234")
    await hive.sql("UPDATE deliveries SET state = 'held', held = 'rate'")
    async with browse(hive_of(hive)) as client:
        for path, times in (("/", 2), ("/agents/iris", 1), ("/threads/1", 1)):
            page = (await client.get(path)).text
            shown = '<a href="/messages/1/files/1" download>a&lt;b&gt;.txt</a> <span class="facts">text/plain · 4 bytes'
            assert page.count(shown) == times, path
