"""A scripted forge: a server that speaks as much of Forgejo's API v1 as the hive uses, and of GitHub's.

    forge = ScriptedForge()
    number = forge.issue("ada", "The page is blank", "It shows nothing.", labels=["bug"])
    forge.comment("bob", number, "Here, too.")
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=forge.app)) as client: ...
    with forge.served() as url: ...   # over TCP, from a thread

Its objects have the fields that Forgejo's swagger document gives PullRequest, Issue, Comment, PullReview, ChangedFile,
NotificationThread and APIError; those that depend on each other do. Whoever acts gets no notification of it.
"""

from __future__ import annotations

import itertools
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import trio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from hive_core.sockets.http import serve_asgi

BOT, TOKEN = "hive-bot", "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "ada/site"
Json = dict[str, Any]
_INSTANT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


@dataclass
class Asked:
    """One request as it came."""

    method: str
    path: str
    query: dict[str, str]
    headers: Mapping[str, str]
    given: Any


@dataclass
class Trouble:
    """An answer in the place of the right one. path: of the requests that get it, by its beginning."""

    status: int
    body: object = None  # bytes as they are, all else as JSON
    headers: dict[str, str] = field(default_factory=dict)
    path: str = "/"
    times: int = 1


@dataclass
class ScriptedForge:
    kind: str = "forgejo"
    repository: str = REPOSITORY
    tokens: dict[str, str] = field(default_factory=lambda: {TOKEN: BOT})
    branches: set[str] = field(default_factory=lambda: {"main"})
    changes: dict[str, list[str]] = field(default_factory=dict)  # branch → the files that it changes
    asked: list[Asked] = field(default_factory=list)
    troubles: list[Trouble] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)  # paths whose next POST is done and answered with 502
    when_done: dict[str, Callable[[], object]] = field(default_factory=dict)  # called once, behind a POST to the path
    poll_interval_s: int | None = None

    def __post_init__(self) -> None:
        self.threads: dict[int, Json] = {}
        self.comments: dict[int, list[Json]] = {}
        self.reviews: dict[int, list[Json]] = {}
        self.files: dict[int, list[str]] = {}
        self.of_lines: dict[int, list[Json]] = {}  # by their review
        self.notifications: dict[int, Json] = {}
        self._ids = itertools.count(1000)
        self.now = datetime.now(UTC).replace(microsecond=0)
        prefix = "/api/v1" if self.kind == "forgejo" else "/api/v3"
        repo = f"{prefix}/repos/{{owner}}/{{name}}"
        self.app = Starlette(
            routes=[
                Route(f"{prefix}/user", self._answer(self._user)),
                Route(repo, self._answer(self._repository)),
                Route(f"{repo}/issues", self._answer(self._issues), methods=["GET", "POST"]),
                Route(f"{repo}/issues/{{number:int}}", self._answer(self._issue)),
                Route(f"{repo}/issues/{{number:int}}/comments", self._answer(self._comments), methods=["GET", "POST"]),
                Route(f"{repo}/pulls", self._answer(self._pulls), methods=["GET", "POST"]),
                Route(f"{repo}/pulls/{{number:int}}", self._answer(self._pull)),
                Route(f"{repo}/pulls/{{number:int}}/reviews", self._answer(self._reviews)),
                Route(f"{repo}/pulls/{{number:int}}/reviews/{{review:int}}/comments", self._answer(self._of_review)),
                Route(f"{repo}/pulls/{{number:int}}/comments", self._answer(self._of_lines)),
                Route(f"{repo}/pulls/{{number:int}}/files", self._answer(self._files)),
                Route(f"{repo}/notifications", self._answer(self._notifications)),
                Route(
                    f"{prefix}/notifications/threads/{{id:int}}", self._answer(self._notification), methods=["PATCH"]
                ),
            ]
        )

    # -- what people do there -----------------------------------------------------------------------------------------

    def issue(self, user: str, title: str, body: str = "", labels: Sequence[str] = ()) -> int:
        return int(self._open(user, title, body, labels)["number"])

    def pull(
        self,
        user: str,
        title: str,
        body: str = "",
        *,
        head: str = "change",
        base: str = "main",
        labels: Sequence[str] = (),
        files: Sequence[str] = (),
    ) -> int:
        thread = self._open(user, title, body, labels, (head, base))
        self.files[thread["number"]] = list(files)
        return int(thread["number"])

    def comment(self, user: str, number: int, body: str) -> int:
        self._tick()
        comment = {
            "id": next(self._ids),
            "html_url": f"{self._page(number)}#issuecomment",
            "pull_request_url": "",
            "issue_url": self._page(number),
            "user": _user(user),
            "original_author": "",
            "original_author_id": 0,
            "body": body,
            "assets": [],
            "created_at": self._at(),
            "updated_at": self._at(),
        }
        self.comments.setdefault(number, []).append(comment)
        self.threads[number] |= {"comments": self.threads[number]["comments"] + 1, "updated_at": self._at()}
        self._notify(user, number)
        return int(comment["id"])

    def review(self, user: str, number: int, state: str, body: str, lines: Sequence[tuple[str, int, str]] = ()) -> None:
        """lines: what it says of them: file, line, text."""
        self._tick()
        review = {"id": next(self._ids), "user": _user(user), "state": state, "body": body, "submitted_at": self._at()}
        counted = {"comments_count": len(lines)} if self.kind == "forgejo" else {}
        more = {"stale": False, "official": True, "dismissed": False, **counted}
        self.reviews.setdefault(number, []).append({**review, **more})
        self.of_lines[review["id"]] = [
            {
                "id": next(self._ids),
                "user": _user(user),
                "body": text,
                "path": path,
                "diff_hunk": "@@ -1 +1 @@",
                "pull_request_review_id": review["id"],
                "created_at": self._at(),
                "updated_at": self._at(),
                **({"position": line, "original_position": 0} if self.kind == "forgejo" else {"line": line}),
            }
            for path, line, text in lines
        ]
        self.threads[number]["updated_at"] = self._at()
        self._notify(user, number)

    def close(self, user: str, number: int) -> None:
        self._tick()
        self.threads[number] |= {"state": "closed", "updated_at": self._at()}
        self._notify(user, number)

    def unread(self) -> list[int]:
        """The numbers of the threads that the bot has a notification of which is not read."""
        return sorted(one["number"] for one in self.notifications.values() if one["unread"])

    @contextmanager
    def served(self) -> Iterator[str]:
        """Its address while it is served over TCP."""
        sock = socket.create_server(("127.0.0.1", 0))
        sock.setblocking(False)
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        begun = threading.Event()
        ends: list[tuple[trio.lowlevel.TrioToken, trio.CancelScope]] = []

        async def serve() -> None:
            with trio.CancelScope() as scope:
                ends.append((trio.lowlevel.current_trio_token(), scope))
                begun.set()
                await serve_asgi(self.app, sock)

        thread = threading.Thread(target=trio.run, args=(serve,), name="scripted forge")
        thread.start()
        begun.wait()
        try:
            yield url
        finally:
            token, scope = ends[0]
            token.run_sync_soon(scope.cancel)
            thread.join()

    # -- its insides --------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        self.now += timedelta(seconds=1)

    def _at(self) -> str:
        return self.now.strftime("%Y-%m-%dT%H:%M:%SZ")

    def _page(self, number: int) -> str:
        kind = "pulls" if self.threads[number]["_pull"] else "issues"
        return f"https://forge.example/{self.repository}/{kind}/{number}"

    def _open(
        self, user: str, title: str, body: str, labels: Sequence[str], branches: tuple[str, str] | None = None
    ) -> Json:
        self._tick()
        number = len(self.threads) + 1
        thread = {
            "id": next(self._ids),
            "url": f"https://forge.example/api/v1/repos/{self.repository}/issues/{number}",
            "number": number,
            "user": _user(user),
            "original_author": "",
            "original_author_id": 0,
            "title": title,
            "body": body,
            "ref": "",
            "assets": [],
            "labels": [{"id": next(self._ids), "name": name, "color": "00aabb", "exclusive": False} for name in labels],
            "milestone": None,
            "assignee": None,
            "assignees": None,
            "state": "open",
            "is_locked": False,
            "comments": 0,
            "created_at": self._at(),
            "updated_at": self._at(),
            "closed_at": None,
            "due_date": None,
            "pin_order": 0,
            "_pull": branches,
        }
        self.threads[number] = thread
        thread["html_url"] = self._page(number)
        self._notify(user, number)
        return thread

    def _notify(self, actor: str, number: int) -> None:
        for login in set(self.tokens.values()) - {actor}:
            found = next((one for one in self.notifications.values() if one["number"] == number), None)
            key = found["id"] if found else next(self._ids)
            self.notifications[key] = {"id": key, "number": number, "unread": True, "at": self._at(), "login": login}

    def _issue_of(self, thread: Json) -> Json:
        public = {key: value for key, value in thread.items() if not key.startswith("_")}
        meta = {"merged": False, "merged_at": None, "draft": False, "html_url": thread["html_url"]}
        owner, _, name = self.repository.partition("/")
        repository = {"id": 1, "name": name, "owner": owner, "full_name": self.repository}
        return {**public, "pull_request": meta if thread["_pull"] else None, "repository": repository}

    def _pull_of(self, thread: Json) -> Json:
        of_issues = ("assets", "original_author", "original_author_id", "ref")
        public = {key: value for key, value in thread.items() if not key.startswith("_") and key not in of_issues}
        head, base = thread["_pull"]
        parts = {
            side: {"label": ref, "ref": ref, "sha": "0" * 40, "repo_id": 1}
            for side, ref in (("head", head), ("base", base))
        }
        return {
            **public,
            **parts,
            "draft": False,
            "merged": False,
            "mergeable": True,
            "merge_base": "0" * 40,
            "merged_at": None,
            "merged_by": None,
            "review_comments": 0,
            "requested_reviewers": [],
        }

    def _answer(self, act: Any) -> Any:
        async def answer(request: Request) -> Response:
            body = await request.body()
            given = json.loads(body) if body else None
            path = request.url.path.split("/", 3)[3] if request.url.path.count("/") > 2 else ""
            self.asked.append(Asked(request.method, f"/{path}", dict(request.query_params), request.headers, given))
            for trouble in self.troubles:
                if trouble.times and f"/{path}".startswith(trouble.path):
                    trouble.times -= 1
                    return _as_it_is(trouble)
            scheme, _, token = request.headers.get("authorization", "").partition(" ")
            login = self.tokens.get(token) if scheme == ("token" if self.kind == "forgejo" else "Bearer") else None
            if login is None:
                return _error(401, "token is required")
            if not _INSTANT.fullmatch(request.query_params.get("since", "2026-01-31T08:30:00Z")):
                return _error(422, "parsing time")
            owner = request.path_params.get("owner")
            if owner is not None and f"{owner}/{request.path_params['name']}" != self.repository:
                return _error(404, "The target couldn't be found.")
            if "number" in request.path_params and request.path_params["number"] not in self.threads:
                return _error(404, "issue does not exist")
            done: Response = act(request, login, given)
            if request.method == "POST" and f"/{path}" in self.when_done:
                self.when_done.pop(f"/{path}")()
            if request.method == "POST" and f"/{path}" in self.lost:
                self.lost.remove(f"/{path}")
                return Response(b"", 502)
            return done

        return answer

    def _user(self, _: Request, login: str, __: Any) -> Response:
        return JSONResponse(_user(login))

    def _repository(self, *_: Any) -> Response:
        found = {"id": 1, "full_name": self.repository, "default_branch": "main", "private": True}
        return JSONResponse({**found, "permissions": {"admin": False, "push": True, "pull": True}})

    def _issues(self, request: Request, login: str, given: Any) -> Response:
        if request.method == "POST":
            thread = self._open(login, given["title"], given.get("body", ""), ())
            return JSONResponse(self._issue_of(thread), 201)
        query = request.query_params
        found = [self._issue_of(one) for one in self._listed(query)]
        if self.kind == "forgejo" and query.get("type") == "issues":
            found = [one for one in found if one["pull_request"] is None]
        wanted = set(filter(None, query.get("labels", "").split(",")))
        found = [one for one in found if wanted <= {label["name"] for label in one["labels"]}]
        return JSONResponse(self._page_of(query, found))

    def _listed(self, query: Mapping[str, str]) -> list[Json]:
        state = query.get("state", "open")
        return [one for one in reversed(self.threads.values()) if state in ("all", one["state"])]

    def _page_of(self, query: Mapping[str, str], found: list[Json]) -> list[Json]:
        size = int(query.get("limit" if self.kind == "forgejo" else "per_page", 30))
        page = int(query.get("page", 1))
        return found[(page - 1) * size : page * size]

    def _issue(self, request: Request, *_: Any) -> Response:
        return JSONResponse(self._issue_of(self.threads[request.path_params["number"]]))

    def _comments(self, request: Request, login: str, given: Any) -> Response:
        number = request.path_params["number"]
        if request.method == "POST":
            self.comment(login, number, given["body"])
            return JSONResponse(self.comments[number][-1], 201)
        since = request.query_params.get("since", "")
        found = [one for one in self.comments.get(number, []) if one["updated_at"] >= since]
        if self.kind == "forgejo":
            return JSONResponse(found)
        size = int(request.query_params.get("per_page", 30))
        page, last = int(request.query_params.get("page", 1)), -(-len(found) // size)
        links = [f'<{request.url.path}?page={at}>; rel="{rel}"' for at, rel in ((page + 1, "next"), (last, "last"))]
        headers = {"link": ", ".join(links)} if page < last else {}
        return JSONResponse(self._page_of(request.query_params, found), headers=headers)

    def _pulls(self, request: Request, login: str, given: Any) -> Response:
        if request.method == "GET":
            found = [self._pull_of(one) for one in self._listed(request.query_params) if one["_pull"]]
            if self.kind == "github" and (head := request.query_params.get("head")):
                found = [one for one in found if one["head"]["ref"] == head.partition(":")[2]]
            return JSONResponse(self._page_of(request.query_params, found))
        head, base = given["head"], given["base"]
        if not {head, base} <= self.branches:
            return _error(404, "The target couldn't be found.")
        for number, one in self.threads.items():
            if one["_pull"] == (head, base) and one["state"] == "open":
                ids = f"[id: {one['id']}, issue_id: {one['id']}, head_repo_id: 1, base_repo_id: 1, head_branch: {head}"
                status = 409 if self.kind == "forgejo" else 422
                return _error(status, f"pull request already exists for these targets {ids}, number: {number}]")
        thread = self._open(login, given["title"], given.get("body", ""), (), (head, base))
        self.files[thread["number"]] = self.changes.get(head, [])
        return JSONResponse(self._pull_of(thread), 201)

    def _pull(self, request: Request, *_: Any) -> Response:
        thread = self.threads[request.path_params["number"]]
        if not thread["_pull"]:
            return _error(404, "The target couldn't be found.")
        return JSONResponse(self._pull_of(thread))

    def _reviews(self, request: Request, *_: Any) -> Response:
        return JSONResponse(self._page_of(request.query_params, self.reviews.get(request.path_params["number"], [])))

    def _of_review(self, request: Request, *_: Any) -> Response:
        return JSONResponse(self.of_lines.get(request.path_params["review"], []))

    def _of_lines(self, request: Request, *_: Any) -> Response:
        """GitHub's."""
        reviews = [one["id"] for one in self.reviews.get(request.path_params["number"], [])]
        since = request.query_params.get("since", "")
        found = [one for review in reviews for one in self.of_lines[review] if one["updated_at"] >= since]
        return JSONResponse(self._page_of(request.query_params, found[::-1]))

    def _files(self, request: Request, *_: Any) -> Response:
        names = self.files.get(request.path_params["number"], [])
        found = [{"filename": name, "status": "changed", "additions": 1, "deletions": 0} for name in names]
        return JSONResponse(self._page_of(request.query_params, found))

    def _notifications(self, request: Request, login: str, __: Any) -> Response:
        query = request.query_params
        found = []
        for one in self.notifications.values():
            if one["login"] == login and one["unread"] and one["at"] >= query.get("since", ""):
                found.append(self._notification_of(one))
        found.sort(key=lambda one: one["updated_at"], reverse=True)
        headers = {"x-poll-interval": str(self.poll_interval_s)} if self.poll_interval_s else {}
        return JSONResponse(self._page_of(query, found), headers=headers)

    def _notification_of(self, one: Json) -> Json:
        thread = self.threads[one["number"]]
        api = f"https://forge.example/api/v1/repos/{self.repository}"
        forgejo = self.kind == "forgejo"
        subject = {
            "title": thread["title"],
            "url": f"{api}/{'pulls' if thread['_pull'] and not forgejo else 'issues'}/{one['number']}",
            "latest_comment_url": "",
            "type": ("Pull" if forgejo else "PullRequest") if thread["_pull"] else "Issue",
            **({"state": thread["state"], "html_url": thread["html_url"]} if forgejo else {}),
        }
        return {
            "id": one["id"] if forgejo else str(one["id"]),
            "repository": {"id": 1, "full_name": self.repository},
            "subject": subject,
            "unread": one["unread"],
            "pinned": False,
            "updated_at": one["at"],
            "url": f"https://forge.example/api/v1/notifications/threads/{one['id']}",
        }

    def _notification(self, request: Request, *_: Any) -> Response:
        found = self.notifications.get(request.path_params["id"])
        if found is None:
            return _error(404, "notification does not exist")
        found["unread"] = False
        return JSONResponse(self._notification_of(found), 205)


def _user(login: str) -> Json:
    named = {"id": sum(login.encode()), "login": login, "full_name": "", "email": f"{login}@noreply.forge.example"}
    return {**named, "is_admin": False, "html_url": f"https://forge.example/{login}"}


def _error(status: int, message: str) -> Response:
    return JSONResponse({"message": message, "url": "https://forge.example/api/swagger"}, status)


def _as_it_is(trouble: Trouble) -> Response:
    body = trouble.body if isinstance(trouble.body, bytes) else json.dumps(trouble.body).encode()
    return Response(body, trouble.status, trouble.headers)
