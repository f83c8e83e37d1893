"""The pages: each is a snapshot and the position from which its live stream goes on."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from dashboard.answers import notice
from dashboard.configured import configured_rows
from dashboard.credentials import credential_rows, lacks_credential
from dashboard.deploys import deploys_now
from dashboard.door import COOKIE
from dashboard.live import Position, live_response
from dashboard.projects import projects_now
from dashboard.reach import reach_now
from dashboard.rows import ASSETS, Rows, asset_bytes, asset_hash, render
from dashboard.snapshots import snapshots_now
from dashboard.spend import spend_now
from dashboard.tombstones import tombstone_rows
from hive_core.hive import Hive
from hive_core.procedures.kinds.apply_commit import BASES
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import OPERATOR, AgentName, parse_agent_name, parse_id
from hive_core.services.agents import Agent
from hive_core.services.approvals import COMMITS
from hive_core.services.archive import parse_query
from hive_core.services.events import timeline
from hive_core.services.flow import messages_aside, newest_messages
from hive_core.services.sign_ins import SIGN_IN_VALID_S

MESSAGES_SHOWN = 100
ASIDE_SHOWN = 50
LINES_SHOWN = 300
TURNS_SHOWN = 12
HOME = "hive_home"  # in the scope: the agent whose page is at "/"
SEARCHED = ("text", "sender", "thread", "after", "before", "cursor")


class Pages:
    def __init__(self, hive: Hive) -> None:
        self._hive = hive
        self._rows = Rows(hive)

    async def front(self, request: Request) -> Response:
        home: AgentName | None = request.scope.get(HOME)
        return await (self._dashboard() if home is None else self._agent_page(home))

    async def agent(self, request: Request) -> Response:
        return await self._agent_page(_existing_name(request))

    async def live(self, request: Request) -> Response:
        return live_response(self._hive, None, _after(request), request.scope["hive_cookie"])

    async def agent_live(self, request: Request) -> Response:
        agent = await self._hive.agents.get(_existing_name(request))
        return live_response(self._hive, agent.name, _after(request), request.scope["hive_cookie"])

    async def sign_in(self, request: Request) -> Response:
        """Redeem a link. Answers with a page that moves on: a Strict cookie is not sent along a chain of redirects."""
        # Only a person's own click may use the code up: not a HEAD, nor a browser that fetches ahead.
        if request.method == "HEAD" or "prefetch" in request.headers.get("sec-purpose", ""):
            return Response(status_code=204)
        cookie = await self._hive.sign_ins.redeem(request.query_params.get("code", ""))
        if cookie is None:
            return notice(
                403,
                "this link is spent",
                "it was used already, is older than 15 minutes, or the hive was started again since",
                way_out="another one is printed by:",
                command="hive dashboard",
                onward=("/", "signed in already? go on"),
            )
        answer = notice(200, "welcome home", "this browser is signed in", moves_on=True)
        answer.set_cookie(COOKIE, cookie, max_age=SIGN_IN_VALID_S, path="/", httponly=True, samesite="strict")
        return answer

    async def search(self, request: Request) -> Response:
        """What was found, and the same box to go on from. A search that makes no sense says why, on this page."""
        asked = {key: value for key in SEARCHED if (value := request.query_params.get(key, "").strip())}
        answer: dict[str, Any] = {"messages": [], "next_cursor": None}
        trouble = ""
        try:
            numbers: dict[str, Any] = {key: _number(asked[key]) for key in ("thread", "cursor") if key in asked}
            if asked:
                answer = await self._hive.archive.search(parse_query({**asked, **numbers}))
        except Refusal as refusal:
            trouble = refusal.message
        more = urlencode({**asked, "cursor": answer["next_cursor"]}) if answer["next_cursor"] else ""
        return self._page(
            "search.html",
            [],
            asked={key: asked.get(key, "") for key in SEARCHED},
            searched=bool(asked) and not trouble,
            answer={"unindexed": 0, **answer},
            more=more and f"/search?{more}",
            trouble=trouble,
        )

    async def projects(self, request: Request) -> Response:
        return self._page("projects.html", [], **await projects_now(self._hive))

    async def thread(self, request: Request) -> Response:
        number, after = request.path_params["id"], request.query_params.get("after", "0")
        if not (after.isascii() and after.isdigit()) or len(after) > 18:
            after = "0"
        try:
            found = await self._hive.archive.thread(_number(number), int(after))
        except Refusal as refusal:
            raise Refusal("not_found", refusal.message) from None
        return self._page("thread.html", [], thread=found)

    async def approval(self, request: Request) -> Response:
        """One approval whole, with a page of its own: for what was decided too."""
        try:
            approval = await self._hive.approvals.get(_number(request.path_params["id"], "an approval"))
        except Refusal as refusal:
            raise Refusal("not_found", refusal.message) from None
        against, compared, trouble = request.query_params.get("against", ""), None, ""
        if approval.kind in COMMITS and against in BASES:
            try:
                compared = await self._hive.gate.apply_commit.diff(approval, against)
            except Refusal as refusal:
                trouble = refusal.message
        told = {"against": against, "compared": compared, "trouble": trouble}
        return self._page("approval.html", [], approval=approval, **told)

    async def asset(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in ASSETS:
            raise Refusal("not_found", "there is no such file here")
        tag = f'"{asset_hash(name)}"'
        fresh = request.query_params.get("v") == asset_hash(name)
        headers = {"ETag": tag, "Cache-Control": "public, max-age=31536000, immutable" if fresh else "no-cache"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(asset_bytes(name), media_type=ASSETS[name], headers=headers)

    async def _dashboard(self) -> Response:
        hive = self._hive
        # The number first: what happens while the rows are read is told again by the stream, and does no harm.
        position = Position(await timeline(hive.store), await hive.store.last_seq())
        return self._page(
            "dashboard.html",
            await hive.agents.all(),
            live="/live",
            after=position,
            credentials=credential_rows(hive).values(),
            pending=await hive.approvals.pending(),
            questions=await hive.questions.open_to(OPERATOR),
            decided=await hive.approvals.recent(),
            aside=await messages_aside(hive.store, ASIDE_SHOWN),
            messages=await newest_messages(hive.store, None, MESSAGES_SHOWN),
            spend=await spend_now(hive, None),
            configured=(await configured_rows(hive)).values(),
            tombstones=(await tombstone_rows(hive)).values(),
        )

    async def _agent_page(self, name: AgentName) -> Response:
        hive = self._hive
        agent = await hive.agents.get(name)
        seq = await hive.store.last_seq()
        gone = await hive.turns.lines_gone(name)
        lines = await hive.turns.newest_lines(name, LINES_SHOWN)
        turns = await hive.turns.recent(name, TURNS_SHOWN)
        return self._page(
            "agent.html",
            [agent],
            live=f"/agents/{name}/live",
            after=Position(await timeline(hive.store), seq, lines[-1]["id"] if lines else gone),
            agent=agent,
            turns=[(turn, [line for line in lines if line["turn"] == turn["id"]]) for turn in reversed(turns)],
            messages=await newest_messages(hive.store, name, MESSAGES_SHOWN),
            spend=await spend_now(hive, name),
            reach=await reach_now(hive, name),
            snapshots=await snapshots_now(hive, name),
            deploys=await deploys_now(hive, name),
        )

    def _page(self, template: str, agents: list[Agent], **values: Any) -> Response:
        hive = self._hive
        html = render(
            template,
            hive=hive,
            rows=self._rows,
            agents=agents,
            lacks_credential=next((why for one in agents if (why := lacks_credential(hive, one.name))), ""),
            # A page of an agent has a port of its own: the dashboard is on another.
            dashboard_link=f"{hive.dashboard_url()}/" if hive.dashboard_port else "/",
            **values,
        )
        return HTMLResponse(html)


def _after(request: Request) -> str:
    """Where the browser's own memory of the stream, when it comes back, wins over the page's."""
    return request.headers.get("last-event-id") or request.query_params.get("after", "")


def _number(text: str, what: str = "a message") -> int:
    """A number as an address has it."""
    return parse_id(int(text) if text.isascii() and text.isdigit() and len(text) < 20 else text, what)


def _existing_name(request: Request) -> AgentName:
    """The name in the path. One that no agent can have is one that no agent has."""
    try:
        return parse_agent_name(request.path_params["name"])
    except Refusal as refusal:
        raise Refusal("not_found", refusal.message) from None
