"""A proposed repository that changes while it is looked at: what is deployed is, bit for bit, what was shown.

Whoever writes there does it right before the daemon opens its k-th file or directory, or starts its k-th program: for
some of these moments, and with HIVE_LONG=1 for every one.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from hive_core.git.repos import Repos
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import OPERATOR, AgentName, CommitSha
from tests.checkouts import Checkout
from tests.git.raw_objects import blob, loose
from tests.hives import PATIENCE_S, Services, open_gate

LONG = os.environ.get("HIVE_LONG") == "1"
IRIS = AgentName("iris")
FILES = {"agent.toml": 'program = "rehearsal"\n', "CLAUDE.md": "You read.\n"}
SHOWN = "\n-You read.\n+You read slowly.\n"

_watcher: Callable[[str, str], None] | None = None


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if _watcher is not None and event in ("open", "os.scandir", "subprocess.Popen"):
        # Of programs what they are started with, as one text.
        _watcher(event, " ".join(map(str, args[1])) if event == "subprocess.Popen" else str(args[0]))


sys.addaudithook(_hook)


@contextmanager
def watching(watch: Callable[[str, str], None]) -> Iterator[None]:
    """Call `watch` right before this process opens something, or starts something."""
    global _watcher
    _watcher = watch
    try:
        yield
    finally:
        _watcher = None


class Scene:
    """The state directory of a hive with iris; her proposed repository with a commit that is fine, and others that can
    be put in its place at once. sha: that commit."""

    def __init__(self, folder: Path) -> None:
        self.state, self.aside = folder / "state", folder / "aside"
        self.config = self.state / "proposed" / "iris" / "config"
        self.dot_git = self.config / ".git"
        self.secret, self.rewritten, self.packed = folder / "secret", folder / "rewritten", folder / "packed"
        checkout = Checkout(self.config)
        self.sha = checkout.head()
        self.prompt, self.evil = (loose(checkout, blob(checkout, text)) for text in (b"You read slowly.\n", b"Obey.\n"))

    @classmethod
    def make(cls, folder: Path) -> Scene:
        """Of a state directory that has iris."""
        config = folder / "state" / "proposed" / "iris" / "config"
        checkout = Checkout(config)
        checkout.git("config", "gc.auto", "0")
        checkout.commit(CLAUDE__md="You read slowly.\n")
        for name in ("secret", "rewritten", "packed"):
            shutil.copytree(config, folder / name)
        Checkout(folder / "secret").commit(secret="the host's own\n")
        Checkout(folder / "rewritten").git("reset", "-q", "--hard", "HEAD~1")
        for name in ("rewritten", "packed"):
            Checkout(folder / name).git("reflog", "expire", "--expire=now", "--all")
            Checkout(folder / name).git("gc", "-q", "--prune=now")
        return cls(folder)

    def meddle(self, how: str) -> None:
        match how:
            case "the repository is another by a link":
                self._put(self.dot_git, self.secret / ".git")
            case "the folder is another by a link":
                self._put(self.config, self.secret)
            case "the objects are others by a link":
                self._put(self.dot_git / "objects", self.secret / ".git" / "objects")
            case "the branch is rewritten":
                self._put(self.dot_git, self.rewritten / ".git", move=True)
            case "all is packed":
                self._put(self.dot_git / "objects", self.packed / ".git" / "objects", move=True)
            case "a file is another":
                self._put(self.prompt, self.evil, move=True)
            case _:
                self.dot_git.rename(self.aside)

    def _put(self, place: Path, other: Path, move: bool = False) -> None:
        place.rename(self.aside)
        if move:
            other.rename(place)
        else:
            place.symlink_to(other)


HOW = [
    "the repository is another by a link",
    "the folder is another by a link",
    "the objects are others by a link",
    "the branch is rewritten",
    "all is packed",
    "a file is another",
    "the repository is gone",
]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scene, to be copied for each moment."""
    folder = tmp_path_factory.mktemp("template")
    (folder / "state").mkdir()
    trio.run(Repos(folder / "state").create, IRIS, FILES)
    Scene.make(folder)
    return folder


def moments(events: list[tuple[str, str]], how: str) -> list[int]:
    """Before which of what happened to meddle: the first, the last, and two between, which are others for each way."""
    if LONG:
        return list(range(len(events)))
    # Of the 256 directories that objects may lie in, few are there.
    telling = [n for n, (event, what) in enumerate(events) if not (event == "open" and len(what) == 2)]
    step = len(telling) // 3
    return [telling[0], *(telling[part * step + HOW.index(how) + 1] for part in (0, 1)), telling[-1]]


@pytest.mark.parametrize("how", HOW)
async def test_whatever_is_put_in_its_place_in_the_middle_what_is_taken_is_what_was_asked_for(
    template: Path, tmp_path: Path, how: str
) -> None:
    events: list[tuple[str, str]] = []

    async def fetch(at: int | None) -> bool:
        """Whether it is taken, when somebody meddles at a moment."""
        scene = Scene(await trio.to_thread.run_sync(shutil.copytree, template, tmp_path / str(at)))
        count = -1

        def watch(event: str, what: str) -> None:
            nonlocal count
            if threading.current_thread() is not threading.main_thread():
                count += 1
                if at is None:
                    events.append((event, what))
                elif count == at:
                    scene.meddle(how)

        with watching(watch):
            taken = await is_taken_as_it_is(scene)
        await trio.to_thread.run_sync(shutil.rmtree, tmp_path / str(at))
        return taken

    assert await fetch(None)
    ends = [await fetch(at) for at in moments(events, how)]
    # Both happened: too late, after all was copied, nobody looks any more.
    assert True in ends
    assert False in ends or how == "all is packed"


async def is_taken_as_it_is(scene: Scene) -> bool:
    """Fetch and deploy the commit of a scene: whole, or refused and nothing of it."""
    repos, main = Repos(scene.state), "refs/heads/main"
    try:
        proposal = await repos.fetch(IRIS, scene.sha)
    except Refusal as refusal:
        assert (refusal.code, "cannot fetch" in refusal.message) == ("refused", True), refusal.message
        assert Checkout(scene.state / "applied" / "iris.git").git("rev-parse", main) != scene.sha
        return False
    assert SHOWN in proposal.diff
    assert proposal.diff.count("diff --git") == 1
    await repos.deploy(IRIS, 1, scene.sha, proposal.base)
    # A commit is named by all that it holds; that all of it is there, and is that, is git's to say.
    checkout = Checkout(scene.state / "applied" / "iris.git")
    assert checkout.git("rev-parse", main) == scene.sha
    assert checkout.git("fsck", "--strict", "--no-dangling", "--no-progress") == ""
    return True


# -- after the request ------------------------------------------------------------------------------------------------


@pytest.fixture
async def hive(tmp_path: Path) -> AsyncIterator[Services]:
    (tmp_path / "state").mkdir()
    async with open_gate(tmp_path / "state") as services:
        yield services


@pytest.mark.parametrize("how", HOW)
async def test_after_the_request_nothing_of_the_proposed_repository_is_opened_again(
    hive: Services, tmp_path: Path, how: str
) -> None:
    scene = Scene.make(tmp_path)
    number = (await hive.gate.apply_commit.request(OPERATOR, IRIS, CommitSha(scene.sha), "r"))["approval"]
    scene.meddle(how)
    opened: list[str] = []
    with watching(lambda event, what: opened.append(what)), trio.fail_after(PATIENCE_S):
        card = await hive.approvals.get(number)
        assert (await hive.gate.approve(number, card.digest, OPERATOR)).state == "done"
    assert opened
    assert not [what for what in opened if str(hive.repos.proposed_dir) in what]
    agent = await hive.agents.get("iris")
    assert (agent.deployed_sha, (agent.settings or {})["prompt"]) == (scene.sha, "You read slowly.\n")
