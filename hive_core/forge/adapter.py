"""What the hive does on a forge, behind one Protocol: by the API of Forgejo, which is Gitea's too, and by GitHub's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, NamedTuple, Protocol, TypeVar

import httpx2
from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from hive_core.forge.api import Answer, Api, ForgeTrouble, Quiet
from hive_core.forge.words import Comment, Notification, Place, Thread, ThreadKind
from hive_core.settings import describe

PAGE = 50
PAGES_MOST = 4  # of notifications that one look takes
FILES_MOST = 300  # names of changed files that are asked for
REVIEWS_MOST = 10  # of which is asked what they say of lines
LATEST_MS = 253_000_000_000_000  # in the year 9987: a little later, and no calendar has the instant
NAME_MOST = 1_024  # characters of such a name; longer ones are left out
T = TypeVar("T")
Number = Annotated[int, Field(gt=0, lt=2**53)]
Count = Annotated[int, Field(ge=0, lt=2**53)]
Text = Annotated[str, BeforeValidator(lambda given: given or "")]  # an empty body may be null
_LAST = re.compile(r'[?&]page=([0-9]{1,6})[^>]*>; rel="last"')
_NUMBER = re.compile(r"/(?:issues|pulls)/([1-9][0-9]{0,14})\Z")


class _Form(BaseModel):
    """A part of an answer: what we use of it, and nothing is said of the rest."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class _User(_Form):
    login: str


class _Label(_Form):
    name: str


class _Ref(_Form):
    ref: str = ""


class _PullRequestMeta(_Form):
    merged: bool = False
    merged_at: AwareDatetime | None = None
    draft: bool = False


class _Thread(_Form):
    number: Number
    state: str
    title: Text
    body: Text = ""
    user: _User | None = None  # None: its account is gone
    labels: list[_Label] | None = None
    updated_at: AwareDatetime
    comments: Count = 0
    draft: bool = False


class _Issue(_Thread):
    pull_request: _PullRequestMeta | None = None


class _PullRequest(_Thread):
    merged: bool = False
    merged_at: AwareDatetime | None = None  # in a list GitHub says this alone
    head: _Ref = _Ref()
    base: _Ref = _Ref()


class _Comment(_Form):
    id: Number
    body: Text = ""
    user: _User | None = None
    created_at: AwareDatetime


class _Review(_Form):
    id: Number
    body: Text = ""
    user: _User | None = None
    state: str = ""
    submitted_at: AwareDatetime | None = None
    comments_count: Count = 0


class _LineComment(_Form):
    id: Number
    body: Text = ""
    user: _User | None = None
    created_at: AwareDatetime
    path: Text = ""
    line: Count | None = None
    position: Count | None = None  # by Forgejo the line


class _Subject(_Form):
    title: Text = ""
    type: str
    url: Text = ""


class _Notification(_Form):
    id: Annotated[str, BeforeValidator(str), Field(pattern=r"^[0-9]{1,20}\z")]
    updated_at: AwareDatetime
    subject: _Subject | None = None


class _File(_Form):
    filename: str


class _Repository(_Form):
    full_name: str
    default_branch: str = ""


class Unread(NamedTuple):
    """The notifications that were not read yet, the oldest first. every_s: how often the forge wants to be asked."""

    notifications: list[Notification]
    every_s: float | None


class Listed(NamedTuple):
    """A page of a list; more: there may be another behind it."""

    threads: list[Thread]
    more: bool


class Forge(Protocol):
    """One repository of one forge. Each call raises ForgeTrouble."""

    place: Place

    async def login(self) -> str:
        """Whose token it is."""

    async def default_branch(self) -> str: ...

    async def open_issue(self, title: str, body: str) -> Thread: ...

    async def open_pull_request(self, title: str, body: str, head: str, base: str) -> Thread: ...

    async def find_pull_request(self, head: str, base: str) -> Thread | None:
        """The open one between these two branches of the repository."""

    async def threads(self, kind: ThreadKind, state: str, labels: Sequence[str], page: int) -> Listed:
        """Those with all these labels, the newest first; page from 1, state open, closed or all."""

    async def thread(self, number: int) -> Thread: ...

    async def comments(self, number: int, since_ms: int = 0) -> list[Comment]:
        """Those written or changed since then, the oldest first."""

    async def reviews(self, number: int, since_ms: int = 0) -> list[Comment]:
        """The reviews of a pull request since then and what they say of lines, the oldest first."""

    async def comment(self, number: int, body: str) -> Comment: ...

    async def files(self, number: int) -> list[str]:
        """The names of the files that a pull request changes, FILES_MOST at most."""

    async def unread(self, since_ms: int) -> Unread:
        """What was not read and has changed since then."""

    async def mark_read(self, notification: str) -> None: ...


def open_forge(client: httpx2.AsyncClient, place: Place, token: str, quiet: Quiet | None = None) -> Forge:
    return (Forgejo if place.kind == "forgejo" else GitHub)(Api(client, place, token, quiet))


class Forgejo:
    """API version 1 of Forgejo and Gitea, as its swagger document has it."""

    per_page = "limit"

    def __init__(self, api: Api) -> None:
        self.place = api.place
        self._api = api
        self._repo = f"/repos/{api.place.repository}"

    async def login(self) -> str:
        return self._one(_User, await self._api.call("GET", "/user")).login

    async def default_branch(self) -> str:
        return self._one(_Repository, await self._api.call("GET", self._repo)).default_branch

    async def open_issue(self, title: str, body: str) -> Thread:
        given = {"title": title, "body": body}
        return _of_issue(self._one(_Issue, await self._api.call("POST", f"{self._repo}/issues", given=given)))

    async def open_pull_request(self, title: str, body: str, head: str, base: str) -> Thread:
        given = {"title": title, "body": body, "head": head, "base": base}
        return _of_pull(self._one(_PullRequest, await self._api.call("POST", f"{self._repo}/pulls", given=given)))

    async def find_pull_request(self, head: str, base: str) -> Thread | None:
        for page in range(1, PAGES_MOST + 1):
            listed = await self.threads("pull_request", "open", (), page)
            for thread in listed.threads:
                if (thread.head, thread.base) == (head, base):
                    return thread
            if not listed.more:
                break
        return None

    async def threads(self, kind: ThreadKind, state: str, labels: Sequence[str], page: int) -> Listed:
        query: dict[str, str | int] = {"state": state, "page": page, self.per_page: PAGE}
        if kind == "pull_request":
            answer = await self._api.call("GET", f"{self._repo}/pulls", query)
            pulls = self._many(_PullRequest, answer)
            # Its own choice by labels wants their numbers.
            return Listed(
                [one for one in map(_of_pull, pulls) if set(labels) <= {*one.labels}], _goes_on(answer, pulls)
            )
        query |= {"type": "issues", **({"labels": ",".join(labels)} if labels else {})}
        answer = await self._api.call("GET", f"{self._repo}/issues", query)
        issues = self._many(_Issue, answer)
        return Listed([_of_issue(one) for one in issues if one.pull_request is None], _goes_on(answer, issues))

    async def thread(self, number: int) -> Thread:
        issue = self._one(_Issue, await self._api.call("GET", f"{self._repo}/issues/{number}"))
        if issue.pull_request is None:
            return _of_issue(issue)
        pull = self._one(_PullRequest, await self._api.call("GET", f"{self._repo}/pulls/{number}"))
        return _of_pull(pull)

    async def comments(self, number: int, since_ms: int = 0) -> list[Comment]:
        path, query = f"{self._repo}/issues/{number}/comments", self._since(since_ms)
        return [_of_comment(one) for one in self._many(_Comment, await self._api.call("GET", path, query))]

    async def reviews(self, number: int, since_ms: int = 0) -> list[Comment]:
        path, found = f"{self._repo}/pulls/{number}/reviews", list[_Review]()
        for page in range(1, PAGES_MOST + 1):
            answer = await self._api.call("GET", path, {"page": page, self.per_page: PAGE})
            found += (some := self._many(_Review, answer))
            if not _goes_on(answer, some):
                break
        # One that its author has not sent off yet is nobody's to read.
        sent = [one for one in found if one.submitted_at and one.state != "PENDING"]
        reviews = [_of_review(one) for one in sent if one.submitted_at and _ms(one.submitted_at) >= since_ms]
        numbers = {one.id for one in reviews}
        with_lines = [one.id for one in sent if one.id in numbers and one.comments_count]
        of_lines = await self._of_lines(number, with_lines[-REVIEWS_MOST:], since_ms)
        return sorted([*reviews, *of_lines], key=lambda one: one.at_ms)

    async def _of_lines(self, number: int, reviews: Sequence[int], since_ms: int) -> list[Comment]:
        """What these reviews say of lines."""
        found: list[Comment] = []
        for review in reviews:
            path = f"{self._repo}/pulls/{number}/reviews/{review}/comments"
            found += map(_of_line, self._many(_LineComment, await self._api.call("GET", path)))
        return found

    async def comment(self, number: int, body: str) -> Comment:
        path = f"{self._repo}/issues/{number}/comments"
        return _of_comment(self._one(_Comment, await self._api.call("POST", path, given={"body": body})))

    async def files(self, number: int) -> list[str]:
        names: list[str] = []
        for page in range(1, FILES_MOST // PAGE + 1):
            query: dict[str, str | int] = {"page": page, self.per_page: PAGE}
            answer = await self._api.call("GET", f"{self._repo}/pulls/{number}/files", query)
            found = self._many(_File, answer)
            names += [one.filename for one in found if len(one.filename) <= NAME_MOST]
            if not _goes_on(answer, found):
                break
        return names

    async def unread(self, since_ms: int) -> Unread:
        found: list[Notification] = []
        every_s: float | None = None
        for page in range(1, PAGES_MOST + 1):
            query = {"page": page, self.per_page: PAGE, **self._unread_query(), **self._since(since_ms)}
            answer = await self._api.call("GET", f"{self._repo}/notifications", query)
            some = self._many(_Notification, answer)
            found += map(_of_notification, some)
            every_s = _seconds(answer.headers.get("x-poll-interval")) or every_s
            if not _goes_on(answer, some):
                break
        return Unread(sorted(found, key=lambda one: one.updated_at_ms), every_s)

    def _unread_query(self) -> dict[str, str | int]:
        return {"status-types": "unread"}

    async def mark_read(self, notification: str) -> None:
        await self._api.call("PATCH", f"/notifications/threads/{notification}")

    def _since(self, since_ms: int) -> dict[str, str | int]:
        if since_ms <= 0:  # whatever a forge says of its times
            return {}
        return {"since": datetime.fromtimestamp(since_ms // 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")}

    def _one(self, form: type[T], answer: Answer) -> T:
        found: T = self._parsed(form, answer)
        return found

    def _many(self, form: type[T], answer: Answer) -> list[T]:
        # Of nothing at all it may answer null.
        return self._parsed(list[form], answer) if answer.data is not None else []  # type: ignore[valid-type]

    def _parsed(self, form: Any, answer: Answer) -> Any:
        """The answer in one of our forms; typed by whoever asks."""
        try:
            return TypeAdapter(form).validate_python(answer.data)
        except ValidationError as exc:
            why = f"its answer is not of the form that it is known to have ({describe(exc)}); is its kind right?"
            raise ForgeTrouble("unavailable", f"cannot use the forge at {self.place.url}: {why}") from None


class GitHub(Forgejo):
    """GitHub's REST API, in what differs."""

    per_page = "per_page"

    async def find_pull_request(self, head: str, base: str) -> Thread | None:
        owner = self.place.repository.partition("/")[0]
        query: dict[str, str | int] = {"state": "open", "head": f"{owner}:{head}", "base": base}
        pulls = self._many(_PullRequest, await self._api.call("GET", f"{self._repo}/pulls", query))
        return next(map(_of_pull, pulls), None)

    async def comments(self, number: int, since_ms: int = 0) -> list[Comment]:
        """As Forgejo's, which has no pages of them: here the newest PAGES_MOST pages, and the first."""
        path, found, page = f"{self._repo}/issues/{number}/comments", list[Comment](), 1
        while True:
            query = {**self._since(since_ms), "page": page, self.per_page: PAGE}
            answer = await self._api.call("GET", path, query)
            some = self._many(_Comment, answer)
            found += map(_of_comment, some)
            last = _LAST.search(answer.headers.get("link", "")) if page == 1 else None
            page = max(2, int(last[1]) - PAGES_MOST + 1) if last else page + 1
            if not _goes_on(answer, some) or len(found) >= (PAGES_MOST + 1) * PAGE:
                return found

    async def _of_lines(self, number: int, reviews: Sequence[int], since_ms: int) -> list[Comment]:
        # It says of no review how many there are, but has all of them in one list.
        newest: dict[str, str | int] = {"sort": "created", "direction": "desc", self.per_page: PAGE}
        query = {**newest, **self._since(since_ms)}
        answer = await self._api.call("GET", f"{self._repo}/pulls/{number}/comments", query)
        return [_of_line(one) for one in self._many(_LineComment, answer)]

    def _unread_query(self) -> dict[str, str | int]:
        return {"all": "false"}


def _of_issue(one: _Issue) -> Thread:
    meta = one.pull_request
    return Thread(
        one.number,
        "issue" if meta is None else "pull_request",
        one.state,
        one.title,
        one.body,
        _name(one.user),
        _names(one.labels),
        _ms(one.updated_at),
        one.comments,
        meta is not None and (meta.merged or meta.merged_at is not None),
        one.draft or (meta is not None and meta.draft),
    )


def _of_pull(one: _PullRequest) -> Thread:
    return Thread(
        one.number,
        "pull_request",
        one.state,
        one.title,
        one.body,
        _name(one.user),
        _names(one.labels),
        _ms(one.updated_at),
        one.comments,
        one.merged or one.merged_at is not None,
        one.draft,
        one.head.ref,
        one.base.ref,
    )


def _of_comment(one: _Comment) -> Comment:
    return Comment(one.id, _name(one.user), one.body, _ms(one.created_at))


def _of_review(one: _Review) -> Comment:
    at_ms = _ms(one.submitted_at) if one.submitted_at else 0
    return Comment(one.id, _name(one.user), one.body, at_ms, one.state)


def _of_line(one: _LineComment) -> Comment:
    line = one.line or one.position
    return Comment(one.id, _name(one.user), one.body, _ms(one.created_at), "", one.path[:NAME_MOST], line)


def _of_notification(one: _Notification) -> Notification:
    """Of the addresses in it only the number is taken: whom we ask is ours to say."""
    subject = one.subject
    kind: ThreadKind | None = _KINDS.get(subject.type) if subject else None
    found = _NUMBER.search(subject.url) if subject and kind else None
    number = int(found[1]) if found else None
    return Notification(one.id, _ms(one.updated_at), kind if number else None, number, subject.title if subject else "")


_KINDS: dict[str, ThreadKind] = {"Issue": "issue", "Pull": "pull_request", "PullRequest": "pull_request"}


def _goes_on(answer: Answer, page: Sequence[object]) -> bool:
    """Whether there may be another page: the forge says so, or this one is as long as we asked for."""
    return 'rel="next"' in answer.headers.get("link", "") or len(page) == PAGE


def _name(user: _User | None) -> str:
    return user.login if user else ""


def _names(labels: Sequence[_Label] | None) -> tuple[str, ...]:
    return tuple(label.name for label in labels or ())


def _ms(at: datetime) -> int:
    return min(max(int(at.timestamp() * 1000), 0), LATEST_MS)


def _seconds(raw: str | None) -> float | None:
    return float(raw) if raw and raw.isascii() and raw.isdecimal() and len(raw) < 6 else None
