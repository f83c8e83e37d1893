"""What the operator can do by a form: write a message, answer, stop the swarm, sign out."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from urllib.parse import parse_qsl

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from dashboard.answers import Unsure, wants_json, yes
from dashboard.door import COOKIE
from hive_core.commands import read_command, run_command
from hive_core.hive import Hive
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import (
    BODY_LIMIT_BYTES,
    OPERATOR,
    AgentName,
    MessageBody,
    parse_agent_name,
    parse_body,
    parse_id,
    shown,
)
from hive_core.services.questions import parse_answer

FORM_LIMIT_BYTES = 3 * BODY_LIMIT_BYTES + 64 * 1024  # each byte of a message may take three in a form
# What is read and dropped of a body over the limit: a browser that still sends would not see the answer.
DRAINED_BYTES = 4 * 1024 * 1024
FIELDS_LIMIT = 128

Mover = Callable[[int, AgentName], Awaitable[list[str]]]


async def read_form(request: Request) -> dict[str, str]:
    """The fields of an urlencoded form, with plain line ends. Raises HTTPException 413 or 415, Refusal, or Unsure.

    `ask` is what its sender is to be asked before it acts. The script does that; a plain form comes here first.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise HTTPException(415, "cannot take this form: send it as application/x-www-form-urlencoded")
    body, size = bytearray(), 0
    async with aclosing(request.stream()) as chunks:
        async for chunk in chunks:
            size += len(chunk)
            if size <= FORM_LIMIT_BYTES:
                body += chunk
            elif size > DRAINED_BYTES:
                break
    if size > FORM_LIMIT_BYTES:
        raise HTTPException(413, f"cannot take this form: the limit is {FORM_LIMIT_BYTES:,} bytes; shorten it")
    try:
        pairs = parse_qsl(body.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=FIELDS_LIMIT)
    except ValueError:
        raise Refusal("usage", "cannot read this form: it is not urlencoded UTF-8") from None
    fields = {name: value.replace("\r\n", "\n") for name, value in pairs}
    ask = fields.pop("ask", "")
    if ask and not wants_json(request.scope):
        raise Unsure(ask, fields)
    return fields


def number(raw: str, what: str) -> int:
    if not re.fullmatch(r"\d{1,18}", raw, re.ASCII):
        raise Refusal("usage", f"cannot use {shown(raw)} as the number of {what}: give a positive whole number")
    return parse_id(int(raw), what)


class Forms:
    def __init__(self, hive: Hive) -> None:
        self._hive = hive

    async def send(self, request: Request) -> Response:
        form = await read_form(request)
        recipient = parse_agent_name(form.get("to"))
        body = parse_body(form.get("body"))
        if form.get("commands"):
            if (command := read_command(body)) is not None:
                return yes(request, form.get("back", "/"), await run_command(self._hive, recipient, *command))
            body = MessageBody(body.removeprefix("/"))  # one that begins with a slash began with two
        in_reply_to = number(form["in_reply_to"], "a message") if form.get("in_reply_to") else None
        sent = await self._hive.broker.send(OPERATOR, recipient, body, in_reply_to)
        return yes(request, form.get("back", "/"), f"message {sent['message']} is on its way to {recipient}")

    async def release(self, request: Request) -> Response:
        return await self._move(request, self._hive.broker.messages.release, "message {} is on its way to {}")

    async def requeue(self, request: Request) -> Response:
        return await self._move(request, self._hive.broker.messages.requeue, "message {} goes to {} again")

    async def drop(self, request: Request) -> Response:
        return await self._move(request, self._hive.broker.messages.drop, "message {} is dropped: {} will not get it")

    async def _move(self, request: Request, move: Mover, said: str) -> Response:
        message_id = number(request.path_params["id"], "a message")
        await read_form(request)
        names = await move(message_id, OPERATOR)
        return yes(request, "/", said.format(message_id, ", ".join(names)))

    async def answer(self, request: Request) -> Response:
        """The operator's answer: `choice-N` for each option that was chosen, by its place, and `text`."""
        question = await self._hive.questions.get(number(request.path_params["id"], "a question"))
        form = await read_form(request)
        choices = [option for place, option in enumerate(question.options, 1) if form.get(f"choice-{place}")]
        answer = parse_answer(choices, form.get("text", "").strip() or None)
        await self._hive.questions.answer(OPERATOR, question.id, answer)
        return yes(request, "/", f"question {question.id} of {question.asker} is answered")

    async def estop(self, request: Request) -> Response:
        await read_form(request)
        await self._hive.freeze.estop(OPERATOR)
        return yes(request, "/", "the swarm is stopped; thaw lets it go on")

    async def thaw(self, request: Request) -> Response:
        await read_form(request)
        await self._hive.freeze.thaw(OPERATOR)
        return yes(request, "/", "the swarm goes on")

    async def sign_out(self, request: Request) -> Response:
        await self._hive.sign_ins.sign_out(request.scope["hive_cookie"])
        answer = yes(request, "/", "signed out")
        answer.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")
        return answer
