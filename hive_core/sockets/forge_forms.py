"""The forms of the tools that an agent has for the forges of its projects."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field, StringConstraints
from pydantic.json_schema import SkipJsonSchema

from hive_core.sockets.forms import Arguments, UntoldKey

Number = Annotated[int, Field(gt=0, lt=2**53)]
Label = Annotated[str, StringConstraints(min_length=1, max_length=100, pattern=r"^[^,\x00-\x1f]*\z")]
ProjectWord = Annotated[str | None, Field(max_length=63)]


class PullRequestArguments(Arguments):
    title: str
    body: str
    head: Annotated[str, Field(max_length=200, description="the branch that you pushed")]
    base: Annotated[str | None, Field(max_length=200)] = None
    project: ProjectWord = None
    key: UntoldKey = None


class IssueArguments(Arguments):
    title: str
    body: str
    project: ProjectWord = None
    key: UntoldKey = None


class CommentArguments(Arguments):
    number: Number
    body: str
    project: ProjectWord = None
    key: UntoldKey = None


class ForgeListArguments(Arguments):
    kind: Literal["issue", "pull_request"]
    state: Literal["open", "closed", "all"] = "open"
    labels: Annotated[list[Label], Field(max_length=10, default_factory=list)]
    page: SkipJsonSchema[Annotated[int, Field(ge=1, le=1000)]] = 1
    project: ProjectWord = None


class ForgeReadArguments(Arguments):
    number: Number
    project: ProjectWord = None


class WrittenResult(BaseModel):
    project: str
    number: int
    url: str


class ListedThread(BaseModel):
    number: int
    kind: Literal["issue", "pull_request"]
    state: str
    title: str
    author: str
    labels: list[str]
    updated_at_ms: int
    comments: int


class ForgeListResult(BaseModel):
    project: str
    threads: list[ListedThread]
    next_page: Annotated[int | None, Field(description="null: there are no more")]


class Below(BaseModel):
    id: int
    author: str
    body: str
    at_ms: int
    verdict: Annotated[str, Field(description="of a review")] = ""
    path: Annotated[str, Field(description="of a changed file that it is about")] = ""
    line: int | None = None


class ForgeReadResult(BaseModel):
    project: str
    number: int
    kind: Literal["issue", "pull_request"]
    state: str
    title: str
    body: str
    author: str
    labels: list[str]
    updated_at_ms: int
    comments: int
    merged: bool
    draft: bool
    head: Annotated[str, Field(description="of a pull request: its branch")]
    base: str
    url: str
    below: Annotated[list[Below], Field(description="comments and reviews, the oldest first")]
    earlier: Annotated[int, Field(description="how many more there are before these")]
    files: Annotated[list[str], Field(description="that a pull request changes")]
    more_files: int
