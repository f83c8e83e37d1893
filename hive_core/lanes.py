"""The lanes of the configuration: which agents hear of what happens on a forge. Pure: the same news, the same lane.

The lanes are looked at in their order, and the first that fits takes it. What none takes nobody hears of.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from pydantic.functional_validators import AfterValidator, BeforeValidator
from pydantic_core import PydanticCustomError

from hive_core.distinct import distinct
from hive_core.protocol.visible import named
from hive_core.protocol.words import NAME_LIMIT, OPERATOR, RESERVED

LANES_LIMIT = 100
EVERY = "*"
KINDS: tuple[Literal["issue", "pull_request"], ...] = ("issue", "pull_request")
Agent = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]*\z", max_length=NAME_LIMIT)]
Project = Annotated[str, StringConstraints(pattern=r"^([a-z][a-z0-9-]*|\*)\z", max_length=63)]
Label = Annotated[str, StringConstraints(min_length=1, max_length=100)]
Path = Annotated[str, StringConstraints(pattern=r"^[^/\x00-\x1f][^\x00-\x1f]*\z", max_length=200)]


def _addresses(names: list[str]) -> list[str]:
    for name in names:
        if name in RESERVED and name != OPERATOR:
            raise PydanticCustomError("reserved", "{name} is no agent's name", {"name": name})
    return names


class Lane(BaseModel):
    """A table [[lane]] of the configuration.

    projects  of whose forges; "*" is every one
    kinds     issues, pull requests, or both
    labels    it has one of these; none: whatever it has
    paths     it is a pull request that changes a file like one of these: `*` is anything within a name, `**` any
              folders; none: whatever it changes
    agents    whom it is told to; `operator` too
    per_hour  how much is told by it in an hour; the rest waits at the forge. None: the hive's lane_per_hour
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, StringConstraints(pattern=r"^\w[\w .,:'-]*\z", max_length=60)]
    agents: Annotated[list[Agent], Field(min_length=1, max_length=50), AfterValidator(_addresses)]
    projects: Annotated[
        list[Project],
        Field(min_length=1, max_length=200),
        BeforeValidator(lambda given: [EVERY] if given == EVERY else given),
    ] = [EVERY]
    kinds: Annotated[list[Literal["issue", "pull_request"]], Field(min_length=1, max_length=2)] = list(KINDS)
    labels: Annotated[list[Label], Field(max_length=50)] = []
    paths: Annotated[list[Path], Field(max_length=50)] = []
    per_hour: Annotated[int, Field(ge=1, le=100_000, strict=True)] | None = None


Lanes = Annotated[list[Lane], Field(max_length=LANES_LIMIT), distinct("lanes")]


class News(NamedTuple):
    """What a lane is chosen by. files: the names of those that a pull request changes."""

    project: str
    kind: str
    labels: Collection[str]
    files: Sequence[str] = ()


def lane_of(lanes: Sequence[Lane], news: News) -> Lane | None:
    """The first lane that takes it; None: nobody hears of it."""
    return next((lane for lane in lanes if _fits(lane, news)), None)


def may_take(lanes: Sequence[Lane], project: str) -> bool:
    """Whether anything that happens there can be told to anybody."""
    return any(_is_of(lane, project) for lane in lanes)


def asks_for_files(lanes: Sequence[Lane], news: News) -> bool:
    """Whether the choice depends on the files that are changed: the first lane that else fits names paths."""
    for lane in lanes:
        if _fits_but_paths(lane, news):
            return bool(lane.paths)
    return False


def troubles(lane: Lane, agents: Collection[str]) -> Iterator[str]:
    """Why a lane tells nobody. agents: those that there are."""
    if gone := [name for name in lane.agents if name not in agents and name != OPERATOR]:
        yield f"agents names {', '.join(map(named, gone[:6]))}, which no agent is called"
    if lane.paths and "pull_request" not in lane.kinds:
        yield "paths are those of pull requests, which kinds leaves out"


def matches(pattern: str, path: str) -> bool:
    """Whether a path is like a pattern: part by part, and `**` as a part of its own is any number of them.

    It takes a time that grows with both lengths alone, whatever the path.
    """
    parts = pattern.split("/")

    def reached(states: set[int]) -> set[int]:
        """With what is reached by letting `**` be nothing."""
        found = set(states)
        for state in sorted(states):
            while state < len(parts) and parts[state] == "**":
                state += 1
                found.add(state)
        return found

    states = reached({0})
    for name in path.split("/"):
        here = {state for state in states if state < len(parts)}
        stays = {state for state in here if parts[state] == "**"}
        goes_on = {state + 1 for state in here - stays if fnmatchcase(name, parts[state])}
        states = reached(stays | goes_on)
        if not states:
            return False
    return len(parts) in states


def _fits(lane: Lane, news: News) -> bool:
    if not _fits_but_paths(lane, news):
        return False
    return not lane.paths or any(matches(pattern, file) for pattern in lane.paths for file in news.files)


def _fits_but_paths(lane: Lane, news: News) -> bool:
    if not _is_of(lane, news.project) or news.kind not in lane.kinds or (lane.paths and news.kind != "pull_request"):
        return False
    return not lane.labels or not set(lane.labels).isdisjoint(news.labels)


def _is_of(lane: Lane, project: str) -> bool:
    return EVERY in lane.projects or project in lane.projects
