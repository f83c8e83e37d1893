"""Files of messages: those that the composer sends, and their way back to a browser, as a download and nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any, BinaryIO
from urllib.parse import quote

import trio
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dashboard.forms_read import DRAINED_BYTES, FIELDS_LIMIT, FORM_LIMIT_BYTES, as_fields, kind_of, number, read_form
from hive_core.hive import Hive
from hive_core.limits import Limits
from hive_core.protocol.file_names import parse_file_name
from hive_core.protocol.paths import explain
from hive_core.protocol.refusal import Refusal
from hive_core.services.attachments import Upload, check_count
from hive_core.services.bodies import FILE_PIECE_BYTES, open_kept

# A page of its own that can do nothing, should a browser ever show what it is told to save.
_POLICY = "sandbox; default-src 'none'"


@asynccontextmanager
async def read_files_form(request: Request, limits: Limits) -> AsyncIterator[tuple[dict[str, str], list[Upload]]]:
    """The fields of a form and its `files`, which may be used inside. Raises as `read_form`, and for what is too much.

    Larger files lie in the system's folder for temporary ones meanwhile.
    """
    if kind_of(request) != "multipart/form-data":
        yield await read_form(request), []
        return
    most = limits.message_files_bytes + FORM_LIMIT_BYTES
    try:
        async with aclosing(_bounded(request, most)) as chunks:
            form = await _parsed(request, chunks)
    except OSError as exc:
        raise Refusal("unavailable", f"cannot take the files: {explain(OSError(exc.errno, exc.strerror))}") from None
    try:
        pairs = [(name, value) for name, value in form.multi_items() if isinstance(value, str)]
        yield as_fields(request, pairs), _uploads(form, limits)
    finally:
        await form.close()


async def _parsed(request: Request, chunks: AsyncGenerator[bytes, None]) -> FormData:
    parser = MultiPartParser(request.headers, chunks, max_fields=FIELDS_LIMIT, max_part_size=FORM_LIMIT_BYTES)
    try:
        return await parser.parse()
    except (MultiPartException, LookupError):
        async for _ in chunks:
            pass  # a browser that still sends would not see the answer
    raise Refusal("usage", "cannot read this form: it is not multipart/form-data with at most 1,000 files")


def _uploads(form: FormData, limits: Limits) -> list[Upload]:
    given = [one for one in form.getlist("files") if isinstance(one, UploadFile)]
    given = [one for one in given if one.filename or one.size]  # a field where none was chosen is one without a name
    check_count(len(given), limits)
    return [Upload(parse_file_name(one.filename), one.file) for one in given]


async def _bounded(request: Request, most: int) -> AsyncGenerator[bytes, None]:
    size = 0
    async with aclosing(request.stream()) as chunks:
        async for chunk in chunks:
            size += len(chunk)
            if size <= most:
                yield chunk
            elif size > most + DRAINED_BYTES:
                break
    if size > most:
        raise HTTPException(413, f"cannot take this form: the limit is {most:,} bytes (message_files_bytes); send less")


class Files:
    def __init__(self, hive: Hive) -> None:
        self._hive = hive

    async def download(self, request: Request) -> Response:
        message = number(request.path_params["id"], "a message")
        position = number(request.path_params["n"], "a file")
        files = await self._hive.broker.messages.files(message)
        if position > len(files):
            raise Refusal(
                "not_found", f"cannot find file {position} of message {message}: it is gone, or there was none"
            )
        file = files[position - 1]
        kept = await trio.to_thread.run_sync(_whole, self._hive, file["sha256"])
        return _Download(kept, file)


def _whole(hive: Hive, sha256: str) -> BinaryIO:
    """A kept file that holds what was sent, at its beginning. Raises Refusal."""
    kept, digest = open_kept(hive.config.bodies_dir, sha256), hashlib.sha256()
    while data := kept.read(FILE_PIECE_BYTES):
        digest.update(data)
    if digest.hexdigest() != sha256:
        kept.close()
        raise Refusal("unavailable", "cannot give this file: it was changed on the hive's disk; a backup may have it")
    kept.seek(0)
    return kept


class _Download(Response):
    """Sent in pieces. (Starlette's own stream leaves the connection open behind its end.)"""

    def __init__(self, kept: BinaryIO, file: dict[str, Any]) -> None:
        self.status_code, self.background, self._kept = 200, None, kept
        self.init_headers(
            {
                "Content-Type": "application/octet-stream",
                "Content-Length": str(file["bytes"]),
                "Content-Disposition": f"attachment; filename*=utf-8''{quote(file['name'], safe='')}",
                "Content-Security-Policy": _POLICY,
            }
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._kept as kept:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            while scope["method"] != "HEAD" and (data := await trio.to_thread.run_sync(kept.read, FILE_PIECE_BYTES)):
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
