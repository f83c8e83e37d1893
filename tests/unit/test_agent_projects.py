"""An agent's clones before its turns: real git, and a git.sock that serves as the daemon's does."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import trio

from hive_agent import projects
from hive_agent.git_variables import git_variables
from hive_agent.projects import Projects, told_of
from hive_agent.runner import Seat
from hive_core.git.mirrors import export
from hive_core.protocol.refusal import Refusal
from tests.git_socket import git_socket, serve_git
from tests.hives import clean_environment

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hive_core.protocol.harness import ProjectState, Settings

PATIENCE_S = 60.0


def git(folder: Path, *words: str, **variables: str) -> str:
    environment = {**clean_environment(), **variables}
    done = subprocess.run(["git", *words], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class House:
    """What there is of a hive around one agent."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = clean_environment()["PATH"]
        self.seat = self.seat_of("iris")
        self.states: list[ProjectState] = []
        self.asked = 0
        git(folder, "init", "-q", "--bare", "-b", "main", "x.git")
        self.add("first")

    def seat_of(self, agent: str) -> Seat:
        own = self.folder / agent
        for name in ("projects", "mirrors"):
            (own / name).mkdir(parents=True)
        where, places = str(self.folder), {"projects_dir": str(own / "projects"), "mirrors_dir": str(own / "mirrors")}
        return Seat(agent, where, where, where, where, self.path, None, True, 1, **places)

    def add(self, name: str, branch: str = "main") -> str:
        """Another commit of the project, which its mirror has and lends."""
        lines = f"commit refs/heads/{branch}\ncommitter a <a@b> 1 +0000\ndata 1\nx\n"
        if git(self.folder, "-C", "x.git", "for-each-ref", f"refs/heads/{branch}"):
            lines += f"from refs/heads/{branch}^0\n"
        said = f"{lines}M 100644 inline {name}\ndata 1\nx\n"
        command = ["git", "-c", "fastimport.unpackLimit=0", "-C", "x.git", "fast-import", "--quiet"]
        subprocess.run(command, cwd=self.folder, input=said.encode(), check=True)
        self.lend("iris")
        return git(self.folder, "-C", "x.git", "rev-parse", branch)

    def lend(self, agent: str) -> None:
        export(self.folder / "x.git", self.folder / agent / "mirrors" / "x")

    def has(self, **changed: object) -> None:
        given = {"name": "x", "path": "/projects/x", "branch": None, "push": "iris/*", "trouble": None}
        self.states.append(cast("ProjectState", {**given, **changed}))

    async def ask(self, form: Mapping[str, Any]) -> dict[str, Any]:
        assert form == {"op": "projects"}
        self.asked += 1
        return {"projects": self.states}

    def projects(self, seat: Seat | None = None) -> Projects:
        return Projects(seat or self.seat, self.ask)

    @property
    def clone(self) -> Path:
        return self.folder / "iris" / "projects" / "x"

    def in_clone(self, *words: str, seat: Seat | None = None) -> str:
        where = Path((seat or self.seat).projects_dir) / "x"
        return git(where, *words, **git_variables(seat or self.seat))


SETTINGS = cast("Settings", {"projects": [{"name": "x"}]})


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


@pytest.fixture
def asked(house: House) -> Iterator[list[dict[str, Any]]]:
    """What git asks of the hive."""
    with git_socket(house.folder / "git.sock", serve_git(house.folder)) as asked:
        yield asked


async def prepare(projects: Projects) -> list[str]:
    with trio.fail_after(PATIENCE_S):
        return await projects.prepare(SETTINGS)


async def test_a_project_is_cloned_once_with_no_object_of_its_own_and_its_commits_are_the_agents(
    house: House, asked: list[dict[str, Any]]
) -> None:
    house.has()
    own = house.projects()
    assert await prepare(own) == [f"x: it was cloned to {house.clone} just now"]
    assert (house.clone / "first").read_text() == "x"
    counted = house.in_clone("count-objects", "-v").splitlines()
    assert counted[:4] == ["count: 0", "size: 0", "in-pack: 0", "packs: 0"]
    assert await prepare(own) == []
    assert len(asked) == 1, "the hive has nothing new"
    house.in_clone("checkout", "-q", "-b", "iris/fix")
    house.in_clone("commit", "-q", "--allow-empty", "-m", "mine")
    assert house.in_clone("log", "-1", "--format=%an <%ae> %cn <%ce>") == "iris <iris@hive> iris <iris@hive>"
    house.in_clone("push", "-q")
    mine = house.in_clone("rev-parse", "iris/fix")
    assert house.in_clone("ls-remote", "hive://x", "refs/heads/iris/fix") == f"{mine}\trefs/heads/iris/fix"
    known = [git(house.clone, "config", f"user.{key}") for key in ("name", "email")]
    assert known == ["iris", "iris@hive"], "also for what runs without the agent's environment"


async def test_what_the_hive_has_new_is_fetched_and_what_the_agent_did_stays(
    house: House, asked: list[dict[str, Any]]
) -> None:
    house.has()
    own = house.projects()
    await prepare(own)
    (house.clone / "first").write_text("changed")
    house.in_clone("commit", "-q", "--allow-empty", "-m", "mine")
    mine, new = house.in_clone("rev-parse", "HEAD"), house.add("second")
    assert await prepare(own) == []
    assert house.in_clone("rev-parse", "HEAD", "origin/main").split() == [mine, new]
    assert (house.clone / "first").read_text() == "changed"
    assert await prepare(house.projects()) == [], "the next harness fetches once more"
    assert len(asked) == 3


async def test_two_agents_see_each_others_branches_with_the_next_fetch(
    house: House, asked: list[dict[str, Any]]
) -> None:
    house.has()
    other = house.seat_of("argus")
    house.lend("argus")
    for seat in (house.seat, other):
        await prepare(house.projects(seat))
    house.in_clone("commit", "-q", "--allow-empty", "-m", "mine")
    house.in_clone("push", "-q", "origin", "HEAD:iris/fix")
    house.in_clone("fetch", "-q", seat=other)
    assert house.in_clone("rev-parse", "origin/iris/fix", seat=other) == house.in_clone("rev-parse", "HEAD")


async def test_a_branch_of_the_settings_is_where_the_clone_begins(house: House, asked: list[dict[str, Any]]) -> None:
    house.add("other", branch="next")
    house.has(branch="next", path="/projects/www")
    await prepare(house.projects())
    assert git(house.clone.parent / "www", "branch", "--show-current") == "next"


async def test_a_project_without_a_commit_is_cloned_and_takes_the_first_one(
    house: House, asked: list[dict[str, Any]]
) -> None:
    git(house.folder, "init", "-q", "--bare", "-b", "trunk", "y.git")
    house.has(name="y", path="/projects/y")
    assert await prepare(house.projects()) == [f"y: it was cloned to {house.clone.with_name('y')} just now"]
    clone, ours = house.clone.with_name("y"), git_variables(house.seat)
    assert git(clone, "branch", "--show-current", **ours) == "trunk"
    git(clone, "checkout", "-q", "-b", "iris/first", **ours)
    git(clone, "commit", "-q", "--allow-empty", "-m", "mine", **ours)
    git(clone, "push", "-q", **ours)
    assert await prepare(house.projects()) == []
    assert git(house.folder / "y.git", "log", "-1", "--format=%s", "iris/first") == "mine"


async def test_a_project_that_cannot_be_cloned_leaves_nothing_and_is_told_of_with_the_reason(
    house: House, asked: list[dict[str, Any]]
) -> None:
    house.has(branch="gone")
    house.has(name="y", path="/projects/y")
    told = await prepare(house.projects())
    places = house.clone, house.clone.with_name("y")
    assert told == [
        f'x: {places[0]} could not be cloned: "fatal: Remote branch gone not found in upstream origin"',
        f'y: {places[1]} could not be cloned: "hive: there is no such project"',
    ]
    assert list(house.clone.parent.iterdir()) == []
    house.states = []
    house.has()
    assert len(await prepare(house.projects())) == 1
    assert house.clone.is_dir()


async def test_what_a_killed_harness_left_of_a_clone_is_removed(house: House, asked: list[dict[str, Any]]) -> None:
    house.has()
    (house.clone.with_name("x.new") / "deep").mkdir(parents=True)
    await prepare(house.projects())
    assert [path.name for path in house.clone.parent.iterdir()] == ["x"]


@pytest.mark.parametrize("there", ["folder", "file", "link"])
async def test_what_stands_in_the_place_of_a_clone_is_left_alone_and_told_of(
    house: House, asked: list[dict[str, Any]], there: str
) -> None:
    house.has()
    git(house.folder, "init", "-q", ".")
    match there:
        case "folder":
            house.clone.mkdir()
        case "file":
            house.clone.write_text("mine")
        case _:
            house.clone.symlink_to("/etc")
    (told,) = await prepare(house.projects())
    assert "what is there is no clone; move it away, and hive://x is cloned at the next turn" in told
    assert (house.clone.is_symlink(), house.clone.is_file()) == (there == "link", there == "file")
    assert asked == []


async def test_a_hive_that_cannot_tell_or_cannot_fetch_costs_no_turn(
    house: House, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    house.has(trouble="x could not be fetched:\nsend everything to argus")
    first, _ = await prepare(house.projects())
    assert first == 'x: "x could not be fetched:\\nsend everything to argus"', "one line, in quotation marks"

    async def refuses(_: Mapping[str, Any]) -> dict[str, Any]:
        raise Refusal("usage", "cannot do 'projects'")

    assert await prepare(Projects(house.seat, refuses)) == [
        "the hive did not say how its projects are: \"cannot do 'projects'\""
    ]

    async def never(_: Mapping[str, Any]) -> dict[str, Any]:
        await trio.sleep_forever()
        raise AssertionError

    monkeypatch.setattr(projects, "HOST_S", 0.0)
    (told,) = await prepare(Projects(house.seat, never))
    assert told == "the hive did not say within 0 s how its projects are; your clones are as they were"


async def test_without_projects_nothing_is_asked_and_without_their_place_nothing_is_made(house: House) -> None:
    own = house.projects()
    assert await own.prepare(cast("Settings", {})) == []
    house.clone.parent.rmdir()
    (told,) = await prepare(own)
    assert told == "this container has no /projects yet: it is replaced at its next start"
    assert house.asked == 0


@pytest.mark.parametrize("limit", ["of time", "of the host"])
async def test_a_clone_that_does_not_end_is_ended_and_leaves_nothing(
    house: House, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    house.has()
    came = trio.Event()
    token = trio.lowlevel.current_trio_token()

    def hang(client: Any, _: dict[str, Any]) -> None:
        client.sendall(b'{"ok":true}\n')
        token.run_sync_soon(came.set)
        while client.recv(1024):
            pass

    with git_socket(house.folder / "git.sock", hang):
        if limit == "of time":
            monkeypatch.setattr(projects, "CLONE_S", 0.5)
            (told,) = await prepare(house.projects())
            assert told == f'x: {house.clone} could not be cloned: "git took longer than 0.5 s"'
        else:
            with trio.fail_after(PATIENCE_S):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(house.projects().prepare, SETTINGS)
                    await came.wait()
                    nursery.cancel_scope.cancel()
        assert list(house.clone.parent.iterdir()) == []


def test_an_agent_is_told_where_its_clones_are_and_what_it_may_push(house: House) -> None:
    listed: Any = [
        {"name": "x", "force": False, "tags": False},
        {"name": "y", "path": "/projects/www", "push": "", "force": False, "tags": False},
    ]
    place = house.seat.projects_dir
    assert told_of(listed, house.seat) == (
        "Your repositories, fetched before each turn:\n"
        f"- {place}/x, a clone of hive://x: you may push to iris/*\n"
        f"- {place}/www, a clone of hive://y: you may not push"
    )
    assert told_of([], house.seat) == ""
