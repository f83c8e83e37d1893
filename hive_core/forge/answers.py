"""What of a forge's answers is used: their forms, and what they are in our words."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import datetime
from typing import Annotated

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field

from hive_core.forge import words

NAME_MOST = 1_024  # characters of a file's name
LATEST_MS = 253_000_000_000_000  # in the year 9987: a little later, and no calendar has the instant
_NUMBER = re.compile(r"/(?:issues|pulls)/([1-9][0-9]{0,14})\Z")
_KINDS: dict[str, words.ThreadKind] = {"Issue": "issue", "Pull": "pull_request", "PullRequest": "pull_request"}
Number = Annotated[int, Field(gt=0, lt=2**53)]
Count = Annotated[int, Field(ge=0, lt=2**53)]
Text = Annotated[str, BeforeValidator(lambda given: given or "")]  # an empty body may be null


class Form(BaseModel):
    """A part of an answer: what we use of it, and nothing is said of the rest."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class User(Form):
    login: str


class Label(Form):
    name: str


class Ref(Form):
    ref: str = ""


class PullRequestMeta(Form):
    merged: bool = False
    merged_at: AwareDatetime | None = None
    draft: bool = False


class Thread(Form):
    number: Number
    state: str
    title: Text
    body: Text = ""
    user: User | None = None  # None: its account is gone
    labels: list[Label] | None = None
    updated_at: AwareDatetime
    comments: Count = 0
    draft: bool = False


class Issue(Thread):
    pull_request: PullRequestMeta | None = None


class PullRequest(Thread):
    merged: bool = False
    merged_at: AwareDatetime | None = None  # in a list GitHub says this alone
    head: Ref = Ref()
    base: Ref = Ref()


class Comment(Form):
    id: Number
    body: Text = ""
    user: User | None = None
    created_at: AwareDatetime


class Review(Form):
    id: Number
    body: Text = ""
    user: User | None = None
    state: str = ""
    submitted_at: AwareDatetime | None = None
    comments_count: Count = 0


class LineComment(Form):
    id: Number
    body: Text = ""
    user: User | None = None
    created_at: AwareDatetime
    path: Text = ""
    line: Count | None = None
    position: Count | None = None  # by Forgejo the line


class Subject(Form):
    title: Text = ""
    type: str
    url: Text = ""


class Notification(Form):
    id: Annotated[str, BeforeValidator(str), Field(pattern=r"^[0-9]{1,20}\z")]
    updated_at: AwareDatetime
    subject: Subject | None = None


class File(Form):
    filename: str


class Repository(Form):
    full_name: str
    default_branch: str = ""


def of_issue(one: Issue) -> words.Thread:
    meta = one.pull_request
    if meta is None:
        return _of_thread(one, "issue", merged=False, draft=one.draft)
    return _of_thread(one, "pull_request", merged=_is_merged(meta), draft=one.draft or meta.draft)


def of_pull(one: PullRequest) -> words.Thread:
    thread = _of_thread(one, "pull_request", merged=_is_merged(one), draft=one.draft)
    return replace(thread, head=one.head.ref, base=one.base.ref)


def _is_merged(one: PullRequest | PullRequestMeta) -> bool:
    return one.merged or one.merged_at is not None


def _of_thread(one: Thread, kind: words.ThreadKind, *, merged: bool, draft: bool) -> words.Thread:
    return words.Thread(
        one.number,
        kind,
        one.state,
        one.title,
        one.body,
        _name(one.user),
        tuple(label.name for label in one.labels or ()),
        _ms(one.updated_at),
        one.comments,
        merged,
        draft,
    )


def of_comment(one: Comment) -> words.Comment:
    return words.Comment(one.id, _name(one.user), one.body, _ms(one.created_at))


def of_review(one: Review) -> words.Comment:
    at_ms = _ms(one.submitted_at) if one.submitted_at else 0
    return words.Comment(one.id, _name(one.user), one.body, at_ms, one.state)


def of_line(one: LineComment) -> words.Comment:
    line = one.line or one.position
    return words.Comment(one.id, _name(one.user), one.body, _ms(one.created_at), "", one.path[:NAME_MOST], line)


def of_notification(one: Notification) -> words.Notification:
    """Of the addresses in it only the number is taken: whom we ask is ours to say."""
    subject = one.subject
    kind: words.ThreadKind | None = _KINDS.get(subject.type) if subject else None
    found = _NUMBER.search(subject.url) if subject and kind else None
    number = int(found[1]) if found else None
    title = subject.title if subject else ""
    return words.Notification(one.id, _ms(one.updated_at), kind if number else None, number, title)


def _name(user: User | None) -> str:
    return user.login if user else ""


def _ms(at: datetime) -> int:
    return min(max(int(at.timestamp() * 1000), 0), LATEST_MS)
