"""What the hive does on a forge, behind one Protocol: by the API of Forgejo, which is Gitea's too, and by GitHub's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple, Protocol, TypeVar

import httpx2
from pydantic import TypeAdapter, ValidationError

from hive_core.forge import answers
from hive_core.forge.api import Answer, Api, ForgeTrouble, Quiet
from hive_core.forge.words import Comment, Notification, Place, Thread, ThreadKind
from hive_core.settings import describe

PAGE = 50
PAGES_MOST = 4  # of notifications that one look takes
FILES_MOST = 300  # names of changed files that are asked for; one that is too long is left out
REVIEWS_MOST = 10  # of which is asked what they say of lines
T = TypeVar("T")
_LAST = re.compile(r'[?&]page=([0-9]{1,6})[^>]*>; rel="last"')


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
        return self._one(answers.User, await self._api.call("GET", "/user")).login

    async def default_branch(self) -> str:
        return self._one(answers.Repository, await self._api.call("GET", self._repo)).default_branch

    async def open_issue(self, title: str, body: str) -> Thread:
        given = {"title": title, "body": body}
        return answers.of_issue(
            self._one(answers.Issue, await self._api.call("POST", f"{self._repo}/issues", given=given))
        )

    async def open_pull_request(self, title: str, body: str, head: str, base: str) -> Thread:
        given = {"title": title, "body": body, "head": head, "base": base}
        return answers.of_pull(
            self._one(answers.PullRequest, await self._api.call("POST", f"{self._repo}/pulls", given=given))
        )

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
            pulls = self._many(answers.PullRequest, answer)
            # Its own choice by labels wants their numbers.
            return Listed(
                [one for one in map(answers.of_pull, pulls) if set(labels) <= {*one.labels}], _goes_on(answer, pulls)
            )
        query |= {"type": "issues", **({"labels": ",".join(labels)} if labels else {})}
        answer = await self._api.call("GET", f"{self._repo}/issues", query)
        issues = self._many(answers.Issue, answer)
        return Listed([answers.of_issue(one) for one in issues if one.pull_request is None], _goes_on(answer, issues))

    async def thread(self, number: int) -> Thread:
        issue = self._one(answers.Issue, await self._api.call("GET", f"{self._repo}/issues/{number}"))
        if issue.pull_request is None:
            return answers.of_issue(issue)
        pull = self._one(answers.PullRequest, await self._api.call("GET", f"{self._repo}/pulls/{number}"))
        return answers.of_pull(pull)

    async def comments(self, number: int, since_ms: int = 0) -> list[Comment]:
        path, query = f"{self._repo}/issues/{number}/comments", self._since(since_ms)
        return [
            answers.of_comment(one) for one in self._many(answers.Comment, await self._api.call("GET", path, query))
        ]

    async def reviews(self, number: int, since_ms: int = 0) -> list[Comment]:
        path, found = f"{self._repo}/pulls/{number}/reviews", list[answers.Review]()
        for page in range(1, PAGES_MOST + 1):
            answer = await self._api.call("GET", path, {"page": page, self.per_page: PAGE})
            found += (some := self._many(answers.Review, answer))
            if not _goes_on(answer, some):
                break
        # One that its author has not sent off yet is nobody's to read.
        sent = [one for one in found if one.submitted_at and one.state != "PENDING"]
        reviews = [one for one in map(answers.of_review, sent) if one.at_ms >= since_ms]
        numbers = {one.id for one in reviews}
        with_lines = [one.id for one in sent if one.id in numbers and one.comments_count]
        of_lines = await self._of_lines(number, with_lines[-REVIEWS_MOST:], since_ms)
        return sorted([*reviews, *of_lines], key=lambda one: one.at_ms)

    async def _of_lines(self, number: int, reviews: Sequence[int], since_ms: int) -> list[Comment]:
        """What these reviews say of lines."""
        found: list[Comment] = []
        for review in reviews:
            path = f"{self._repo}/pulls/{number}/reviews/{review}/comments"
            found += map(answers.of_line, self._many(answers.LineComment, await self._api.call("GET", path)))
        return found

    async def comment(self, number: int, body: str) -> Comment:
        path = f"{self._repo}/issues/{number}/comments"
        return answers.of_comment(self._one(answers.Comment, await self._api.call("POST", path, given={"body": body})))

    async def files(self, number: int) -> list[str]:
        names: list[str] = []
        for page in range(1, FILES_MOST // PAGE + 1):
            query: dict[str, str | int] = {"page": page, self.per_page: PAGE}
            answer = await self._api.call("GET", f"{self._repo}/pulls/{number}/files", query)
            found = self._many(answers.File, answer)
            names += [one.filename for one in found if len(one.filename) <= answers.NAME_MOST]
            if not _goes_on(answer, found):
                break
        return names

    async def unread(self, since_ms: int) -> Unread:
        found: list[Notification] = []
        every_s: float | None = None
        for page in range(1, PAGES_MOST + 1):
            query = {"page": page, self.per_page: PAGE, **self._unread_query(), **self._since(since_ms)}
            answer = await self._api.call("GET", f"{self._repo}/notifications", query)
            some = self._many(answers.Notification, answer)
            found += map(answers.of_notification, some)
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
        pulls = self._many(answers.PullRequest, await self._api.call("GET", f"{self._repo}/pulls", query))
        return next(map(answers.of_pull, pulls), None)

    async def comments(self, number: int, since_ms: int = 0) -> list[Comment]:
        """As Forgejo's, which has no pages of them: here the newest PAGES_MOST pages, and the first."""
        path, found, page = f"{self._repo}/issues/{number}/comments", list[Comment](), 1
        while True:
            query = {**self._since(since_ms), "page": page, self.per_page: PAGE}
            answer = await self._api.call("GET", path, query)
            some = self._many(answers.Comment, answer)
            found += map(answers.of_comment, some)
            last = _LAST.search(answer.headers.get("link", "")) if page == 1 else None
            page = max(2, int(last[1]) - PAGES_MOST + 1) if last else page + 1
            if not _goes_on(answer, some) or len(found) >= (PAGES_MOST + 1) * PAGE:
                return found

    async def _of_lines(self, number: int, reviews: Sequence[int], since_ms: int) -> list[Comment]:
        # It says of no review how many there are, but has all of them in one list.
        newest: dict[str, str | int] = {"sort": "created", "direction": "desc", self.per_page: PAGE}
        query = {**newest, **self._since(since_ms)}
        answer = await self._api.call("GET", f"{self._repo}/pulls/{number}/comments", query)
        return [answers.of_line(one) for one in self._many(answers.LineComment, answer)]

    def _unread_query(self) -> dict[str, str | int]:
        return {"all": "false"}


def _goes_on(answer: Answer, page: Sequence[object]) -> bool:
    """Whether there may be another page: the forge says so, or this one is as long as we asked for."""
    return 'rel="next"' in answer.headers.get("link", "") or len(page) == PAGE


def _seconds(raw: str | None) -> float | None:
    return float(raw) if raw and raw.isascii() and raw.isdecimal() and len(raw) < 6 else None
