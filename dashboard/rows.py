"""One template per thing that is shown, rendered here for the whole page and for the live fragment alike."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from functools import cache, lru_cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dashboard.diff import diff_files, read_diff
from dashboard.terminal import read_line, tokens
from dashboard.visible import plain, visible
from hive_core.hive import Hive
from hive_core.protocol.effect import builds_line, effect_line, is_for_itself
from hive_core.protocol.held import WHY_HELD
from hive_core.protocol.money import about
from hive_core.protocol.visible import counted
from hive_core.protocol.words import FORGE, MANAGER, OPERATOR, SYSTEM
from hive_core.services.agents import Agent
from hive_core.services.approvals import Approval
from hive_core.services.question_words import Question
from hive_core.settings import EFFORTS

MODELS = ("opus", "sonnet", "haiku")  # that the page offers; any other can be chosen by name
NAMES_SHOWN = 6
FILES_UNFOLDED = 20  # in a diff whose files are all open
DIFF_UNFOLDED = 64 * 1024  # its characters
REASONS_SHOWN = 6
VOICES: dict[str, str] = {OPERATOR: "by-operator", SYSTEM: "by-system", FORGE: "by-system", MANAGER: "by-manager"}
ASSETS = {"style.css": "text/css", "live.js": "text/javascript", "favicon.svg": "image/svg+xml"}


@cache
def asset_bytes(name: str) -> bytes:
    return resources.files("dashboard").joinpath("static", name).read_bytes()


@cache
def asset_hash(name: str) -> str:
    return hashlib.sha256(asset_bytes(name)).hexdigest()[:16]


def asset_url(name: str) -> str:
    """The address changes with the content, so a browser may keep what it has for ever."""
    return f"/static/{name}?v={asset_hash(name)}"


def clock(at_ms: int) -> Markup:
    """An instant, in UTC; the script shows the reader's own time."""
    at = datetime.fromtimestamp(at_ms / 1000, UTC)
    return Markup('<time datetime="{}" title="{} UTC">{}</time>').format(
        f"{at:%Y-%m-%dT%H:%M:%SZ}", f"{at:%Y-%m-%d %H:%M:%S}", f"{at:%H:%M:%S}"
    )


def day(at_ms: int) -> Markup:
    """An instant that may be long ago, in UTC."""
    at = datetime.fromtimestamp(at_ms / 1000, UTC)
    return Markup('<time datetime="{}">{} UTC</time>').format(f"{at:%Y-%m-%dT%H:%M:%SZ}", f"{at:%Y-%m-%d %H:%M:%S}")


def measure(text: str) -> str:
    """How much there is to read, so that what lies below the fold is not missed."""
    lines = len(text.removesuffix("\n").split("\n"))
    return f"{counted(lines, 'line')} · {counted(len(text.encode('utf-8', 'replace')), 'byte')}"


def brief(count: int) -> Markup:
    """A large count at a glance, and whole where somebody points at it."""
    size, unit = next((one for one in ((10**9, "G"), (10**6, "M"), (10**3, "k")) if count >= one[0]), (1, ""))
    text = f"{count / size:.1f}{unit}" if unit else str(count)
    return Markup('<span title="{:,}">{}</span>').format(count, text)


def voice(name: str) -> str:
    """The class that colours a name: who speaks is seen before it is read."""
    return VOICES.get(name, "by-agent")


def state_word(state: str) -> str:
    """What a delivery's state is called in a chip."""
    return "in turn" if state == "leased" else state


def deed(approval: Approval) -> str:
    """What approving it does, before the agent's name."""
    return {"spawn": "spawn", "apply_commit": "change", "egress": "wish of"}.get(
        approval.kind, approval.kind.replace("_", " ")
    )


def decided(state: str) -> str:
    """What has become of an approval, in a chip."""
    return {"approved": "under way", "done": "approved", "cancelled": "taken back"}.get(state, state)


@cache
def templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("dashboard"),
        autoescape=True,
        auto_reload=False,
        undefined=StrictUndefined,
        finalize=plain,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(visible=visible, clock=clock, day=day)
    environment.filters.update(
        counted=counted,
        measure=measure,
        read_diff=read_diff,
        diff_files=diff_files,
        tokens=tokens,
        about=about,
        brief=brief,
    )
    environment.filters.update(deed=deed, decided=decided, effect_line=effect_line, builds_line=builds_line)
    environment.filters.update(for_itself=is_for_itself)
    environment.globals.update(changes=changes, asset=asset_url, voice=voice, state_word=state_word)
    return environment


def render(template: str, **values: object) -> Markup:
    """The template as markup: everything in it was escaped on the way."""
    return Markup(templates().get_template(template).render(**values).strip())


@lru_cache(maxsize=8)
def changes(diff: str) -> Markup:
    """A diff as it stands on a card. Kept for the next page, since a long one takes a quarter of a second."""
    files = diff_files(diff)
    folded = len(files) > FILES_UNFOLDED or len(diff) > DIFF_UNFOLDED
    return render("changes.html", files=files, folded=folded)


class Rows:
    """Every row that a page or a fragment can hold. All of them are idempotent: a row again replaces itself."""

    def __init__(self, hive: Hive) -> None:
        self._hive = hive

    def agent(self, agent: Agent, alone: bool = False) -> Markup:
        live = self._hive.agents.live(agent.name)
        return render("rows/agent.html", agent=agent, live=live, hive=self._hive, alone=alone)

    def choice(self, agent: Agent, command: str) -> Markup:
        """The form that chooses an agent's `model` or `effort`, on its page."""
        chosen, values = {"model": (agent.chosen_model, MODELS), "effort": (agent.chosen_effort, EFFORTS)}[command]
        return render("rows/choice.html", agent=agent, command=command, chosen=chosen, values=values)

    def freeze(self) -> Markup:
        """The switch that stops the whole swarm, or lets it go on."""
        return render("rows/freeze.html", frozen_since_ms=self._hive.freeze.since_ms)

    def credential(self, row: dict[str, Any]) -> Markup:
        return render("rows/credential.html", row=row)

    def message(self, message: dict[str, Any]) -> Markup:
        rest_bytes = message["body_bytes"] - len(message["body"].encode("utf-8", "replace"))
        return render("rows/message.html", message=message, rest_bytes=rest_bytes, **self._cause(message))

    def aside(self, message: dict[str, Any]) -> Markup:
        """The card of a message that is held or dead for somebody; empty when it is neither."""
        held = [one for one in message["deliveries"] if one["state"] == "held"]
        dead = [one for one in message["deliveries"] if one["state"] == "dead"]
        if not held and not dead:
            return Markup("")
        reasons = sorted({WHY_HELD.get(one["held"], one["held"]) for one in held})
        reasons += [f"{one['recipient']}{_turns(one['failures'])}: {one['note'] or 'no reason'}" for one in dead]
        return render(
            "rows/aside.html",
            message=message,
            held=held,
            dead=dead,
            names=_some([one["recipient"] for one in held + dead]),
            reasons=reasons[:REASONS_SHOWN],
            **self._cause(message),
        )

    def _cause(self, message: dict[str, Any]) -> dict[str, str]:
        """What set a message off, and where that is shown. The operator and the hive speak for themselves."""
        if message["cause"] in (OPERATOR, SYSTEM) or message["cause_id"] is None:
            return {"cause": "", "cause_link": ""}
        of_turn = message["cause"] == "turn" and message["sender"] not in (OPERATOR, SYSTEM)
        link = f"{self._hive.page_url(message['sender'])}#turn-{message['cause_id']}" if of_turn else ""
        return {"cause": f"{message['cause']} {message['cause_id']}", "cause_link": link}

    def approval(self, approval: Approval) -> Markup:
        return render("rows/approval.html", approval=approval)

    def question(self, question: Question) -> Markup:
        return render("rows/question.html", question=question)

    def decision(self, approval: Approval) -> Markup:
        return render("rows/decision.html", approval=approval)

    def recipient(self, name: str, list_: str = "to") -> Markup:
        return Markup('<option id="{1}-{0}" value="{0}">{0}</option>').format(name, list_)

    def turn(self, turn: dict[str, Any], lines: list[dict[str, Any]]) -> Markup:
        return render("rows/turn.html", turn=turn, head=self.turn_head(turn), lines=lines, rows=self)

    def turn_head(self, turn: dict[str, Any]) -> Markup:
        return render("rows/turn_head.html", turn=turn)

    def line(self, line: dict[str, Any]) -> Markup:
        return render("rows/line.html", line=line, parts=read_line(line["line"]))


def _turns(failures: int) -> str:
    return f", after {counted(failures, 'failed turn')}" if failures else ""


def _some(names: list[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
