"""What the operator can do by a form: write a message, answer, stop the swarm, sign out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response

from dashboard.answers import yes
from dashboard.door import COOKIE
from dashboard.files import read_files_form
from dashboard.forms_read import number, read_form
from hive_core.commands import read_command, run_command
from hive_core.hive import Hive
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.visible import counted
from hive_core.protocol.words import (
    OPERATOR,
    AgentName,
    MessageBody,
    parse_agent_name,
)
from hive_core.services.attachments import body_with
from hive_core.services.question_words import parse_answer

Mover = Callable[[int, AgentName], Awaitable[list[str]]]


class Forms:
    def __init__(self, hive: Hive) -> None:
        self._hive = hive

    async def send(self, request: Request) -> Response:
        async with read_files_form(request, self._hive.broker.limits) as (form, files):
            recipient = parse_agent_name(form.get("to"))
            body = body_with(form.get("body"), len(files))
            if form.get("commands"):
                if (command := read_command(body)) is not None:
                    if files:
                        raise Refusal("usage", f"cannot send files with /{command[0]}: send them with a message")
                    return yes(request, form.get("back", "/"), await run_command(self._hive, recipient, *command))
                body = MessageBody(body.removeprefix("/"))  # one that begins with a slash began with two
            in_reply_to = number(form["in_reply_to"], "a message") if form.get("in_reply_to") else None
            sent = await self._hive.broker.send(OPERATOR, recipient, body, in_reply_to, files=files)
        and_files = f" with {counted(len(files), 'file')}" if files else ""
        return yes(request, form.get("back", "/"), f"message {sent['message']} is on its way to {recipient}{and_files}")

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
        """The operator's answer: `choice-N` for each option that was chosen, by its place, `text`, and `files`."""
        question = await self._hive.questions.get(number(request.path_params["id"], "a question"))
        async with read_files_form(request, self._hive.broker.limits) as (form, files):
            choices = [option for place, option in enumerate(question.options, 1) if form.get(f"choice-{place}")]
            answer = parse_answer(choices, form.get("text", "").strip() or None)
            await self._hive.questions.answer(OPERATOR, question.id, answer, files=files)
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
