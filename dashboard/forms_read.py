"""What comes in a form: its fields, bounded and checked."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import aclosing
from urllib.parse import parse_qsl

from starlette.exceptions import HTTPException
from starlette.requests import Request

from dashboard.answers import Unsure, wants_json
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import BODY_LIMIT_BYTES, parse_id, shown

FORM_LIMIT_BYTES = 3 * BODY_LIMIT_BYTES + 64 * 1024  # each byte of a message may take three in a form
# What is read and dropped of a body over the limit: a browser that still sends would not see the answer.
DRAINED_BYTES = 4 * 1024 * 1024
FIELDS_LIMIT = 128


async def read_form(request: Request) -> dict[str, str]:
    """The fields of an urlencoded form, with plain line ends. Raises HTTPException 413 or 415, Refusal, or Unsure.

    `ask` is what its sender is to be asked before it acts. The script does that; a plain form comes here first.
    """
    if kind_of(request) != "application/x-www-form-urlencoded":
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
    return as_fields(request, pairs)


def kind_of(request: Request) -> str:
    """In which of their forms a form's fields come."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def as_fields(request: Request, pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The fields with plain line ends. Raises Unsure where their sender is to be asked."""
    fields = {name: value.replace("\r\n", "\n") for name, value in pairs}
    ask = fields.pop("ask", "")
    if ask and not wants_json(request.scope):
        raise Unsure(ask, fields)
    return fields


def number(raw: str, what: str) -> int:
    if not re.fullmatch(r"\d{1,18}", raw, re.ASCII):
        raise Refusal("usage", f"cannot use {shown(raw)} as the number of {what}: give a positive whole number")
    return parse_id(int(raw), what)
