"""The adapter on a real Forgejo or Gitea: what the scripted one was written after."""

from __future__ import annotations

import base64
import os
import secrets
from typing import Any

import httpx2

from hive_core.forge.words import parse_place
from tests.forge_story import play


async def made(client: httpx2.AsyncClient, method: str, path: str, token: str, **given: Any) -> Any:
    url = f"{os.environ['HIVE_TEST_FORGEJO'].rstrip('/')}/api/v1{path}"
    answer = await client.request(method, url, headers={"authorization": f"token {token}"}, json=given)
    assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text[:300]}"
    return answer.json() if answer.content else None


async def test_a_pull_request_and_an_issue_from_one_end_to_the_other() -> None:
    ours, other = os.environ["HIVE_TEST_FORGEJO_TOKENS"].split(",")
    name = f"hive-test-{secrets.token_hex(4)}"
    async with httpx2.AsyncClient(timeout=30) as client:
        us = (await made(client, "GET", "/user", ours))["login"]
        them = (await made(client, "GET", "/user", other))["login"]
        await made(client, "POST", "/user/repos", ours, name=name, auto_init=True, default_branch="main")
        try:
            repo = f"/repos/{us}/{name}"
            await made(client, "PUT", f"{repo}/collaborators/{them}", ours, permission="write")
            text = base64.b64encode(b"mended\n").decode()
            change = {"content": text, "message": "Mend it", "branch": "main", "new_branch": "iris/fix"}
            await made(client, "POST", f"{repo}/contents/mended.txt", ours, **change)
            place = parse_place("forgejo", os.environ["HIVE_TEST_FORGEJO"], f"{us}/{name}")
            await play(client, place, ours, other, "iris/fix")
        finally:
            await made(client, "DELETE", f"/repos/{us}/{name}", ours)
