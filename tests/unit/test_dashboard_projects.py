"""The page of projects: what each mirror is, who has it, its forge, and what was pushed of late."""

from __future__ import annotations

from typing import Any

from hive_core.forge.words import Place
from hive_core.protocol.words import ProjectName
from hive_core.services.agents import set_deployed
from hive_core.services.forges import forge_of, note_look, put_forge
from hive_core.services.projects import Projects
from hive_core.store.writer import Transaction
from tests.dashboards import browse, hive_of
from tests.hives import SETTINGS, Services
from tests.project_hives import register

SITE = ProjectName("site")


def push(tx: Transaction, kind: str, ref: str, **more: Any) -> None:
    refs = [{"ref": ref, "old": "0" * 40, "new": "1" * 40}]
    tx.emit(kind, "iris", "iris", None, project="site", refs=refs, **more)


async def test_the_page_tells_of_each_project_who_has_it_what_was_pushed_and_what_went_wrong(hive: Services) -> None:
    async with browse(hive_of(hive)) as client:
        page = (await client.get("/projects")).text
        assert "no project: " in page
        assert 'href="/projects"' in (await client.get("/")).text
        await register(hive)
        await register(hive, "notes")
        settings = {**SETTINGS, "policy": {"projects": [{"name": "site", "force": True}]}}
        await hive.store.write(lambda tx: set_deployed(tx, "iris", "0" * 40, settings))
        await Projects(hive.store).note_trouble(SITE, "fatal: <b>gone</b>\u202e")
        await hive.store.write(lambda tx: put_forge(tx, SITE, Place("forgejo", "https://forge.example", "a/b"), "bot"))
        forge = await forge_of(hive.store, SITE)
        await hive.store.write(lambda tx: note_look(tx, forge, "it refuses the token", 1_900_000_000_000))
        await hive.store.write(lambda tx: push(tx, "project_pushed", "refs/heads/iris/fix"))
        await hive.store.write(lambda tx: push(tx, "push_refused", "refs/heads/<i>", reason="a <script>", untold=3))
        page = (await client.get("/projects")).text
    first, second = page.index('id="project-notes"'), page.index('id="project-site"')
    assert "no agent lists it" in page[first:second]
    site = page[second:]
    assert "/srv/site.git" in site
    assert 'href="/agents/iris">iris</a> pushes iris/*, <b>by force</b>' in site
    assert "cannot be fetched since: fatal: &lt;b&gt;gone&lt;/b&gt;" in site
    assert "U+202E" in site
    assert "https://forge.example/a/b, forgejo, as bot · no lane tells of it" in site
    assert "the last look failed: it refuses the token; again at" in site
    assert site.index("a &lt;script&gt;") < site.index("iris/fix")  # the newest first
    assert "(and 3 more that no event tells of)" in site


async def test_who_is_not_signed_in_sees_no_project(hive: Services) -> None:
    async with browse(hive_of(hive), headers={}) as client:
        assert (await client.get("/projects")).status_code in (401, 403)
