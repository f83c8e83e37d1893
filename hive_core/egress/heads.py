"""The head of a request to the proxy: read from its bytes into what is asked for; and the answers that are a no.

A head that two programs could read differently is refused, not mended.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

import h11

from hive_core.destinations import HTTP_PORT, METHODS, TUNNEL, destination, parse_authority
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import shown

HEAD_LIMIT_BYTES = 32 * 1024
SENTENCE_LIMIT = 500
_END = re.compile(rb"\n\r?\n")
_FIRST = re.compile(rb"([A-Za-z]{1,20}) ([^ ]+) HTTP/1\.([01])")
_URL = re.compile(r"([a-z][a-z0-9+.-]*)://([^/?]*)(.*)", re.IGNORECASE)
# Of one connection alone (RFC 9110, 7.6.1), with those that everybody knows by that name.
_OF_THE_HOP = {
    *(b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te"),
    *(b"trailer", b"transfer-encoding", b"upgrade", b"http2-settings"),
    b"expect",  # the proxy itself tells a client to go on
}


class No(Exception):
    """What is not passed on. status: of HTTP. verdict: what the daemon is told."""

    def __init__(self, status: int, sentence: str, verdict: str = "refused") -> None:
        super().__init__(sentence)
        self.status = status
        self.sentence = sentence
        self.verdict = verdict

    def answer(self, *, with_body: bool) -> bytes:
        """A whole answer. Its sentence is the reason phrase too: pip, curl, git and npm show that."""
        line = " ".join(self.sentence.split())[:SENTENCE_LIMIT]
        phrase = re.sub(rb"[^\x20-\x7e]", b"?", line.encode("ascii", "replace"))
        body = f"{line}\n".encode()
        kind = b"Content-Type: text/plain; charset=utf-8\r\nX-Content-Type-Options: nosniff\r\n"
        rest = b"Content-Length: %d\r\nConnection: close\r\n\r\n%b" % (len(body), body)
        return b"HTTP/1.1 %d %b\r\n%b%b" % (self.status, phrase, kind, rest if with_body else rest[: -len(body)])


@dataclass(frozen=True, slots=True)
class Asked:
    """A request. target: of a plain one, the path and what is behind it. headers: for the host, all but Host."""

    how: str
    host: str
    port: int
    target: bytes = b""
    headers: tuple[tuple[bytes, bytes], ...] = ()

    def __str__(self) -> str:
        return destination(self.how, self.host, self.port)


class Head(NamedTuple):
    """asked: what for. conn: h11's of this side, with what came behind the head."""

    asked: Asked
    conn: h11.Connection


def end_of_head(data: bytearray, begin: int = 0) -> int | None:
    """How many bytes a head has, its empty line with it; None while that is not there. begin: of what is new.

    Raises No of a head that is too long.
    """
    found = _END.search(data, max(0, begin - 2))
    if (found.end() if found else len(data)) > HEAD_LIMIT_BYTES:
        raise No(400, f"cannot read the request: its head is longer than {HEAD_LIMIT_BYTES:,} bytes")
    return found.end() if found else None


def parse_head(data: bytearray, end: int) -> Head:
    """What a request asks for. data: from its first byte on, its head up to `end`. Raises No."""
    first = bytes(data[: data.index(b"\n")]).removesuffix(b"\r")
    matched = _FIRST.fullmatch(first)
    if matched is None:
        raise No(400, f"cannot read the request: {shown(first, 60)} is no request line of HTTP/1.1")
    try:
        where = _where(matched[1].decode(), matched[2].decode("utf-8", "replace"))
    except Refusal as refusal:
        raise No(400, refusal.message) from None
    if re.search(rb"\n[ \t]", data[:end]):
        raise No(400, "cannot read the request: a header goes on in the next line, which is obsolete")
    conn = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_LIMIT_BYTES)
    try:
        conn.receive_data(bytes(data))
        event = conn.next_event()
    except h11.RemoteProtocolError as exc:
        raise No(400, f"cannot read the request: {exc}") from None
    assert isinstance(event, h11.Request)
    return Head(Asked(*where, _framed(event)), conn)


def _where(method: str, target: str) -> tuple[str, str, int, bytes]:
    if method == "CONNECT":
        return (TUNNEL, *parse_authority(target), b"")
    if method not in METHODS:
        raise Refusal("usage", f"cannot pass on {method}: of plain requests {', '.join(METHODS)} are known here")
    url = _URL.fullmatch(target)
    if url is None:
        why = "a request to a proxy names its whole address, http://host/path"
        raise Refusal("usage", f"cannot use {shown(target, 60)}: {why}")
    if url[1].lower() != "http":
        raise Refusal("usage", f"cannot pass on {method} {url[1]}://: only http is plain; use CONNECT for others")
    if not target.isascii() and url[2].isascii():
        raise Refusal("usage", f"cannot use {shown(target, 60)}: a path is ASCII; write %XX for other characters")
    if "#" in target:
        raise Refusal("usage", f"cannot use {shown(target, 60)}: leave out the # and what is behind it")
    host, port = parse_authority(url[2], HTTP_PORT)
    path = url[3] if url[3].startswith("/") else f"/{url[3]}"
    return method, host, port, path.encode()


def _framed(request: h11.Request) -> tuple[tuple[bytes, bytes], ...]:
    """The headers for the host, with the one that frames the body."""
    names = [name for name, _ in request.headers]
    chunked, sized = b"transfer-encoding" in names, b"content-length" in names
    if chunked and sized:
        raise No(400, "cannot read the request: it has both Transfer-Encoding and Content-Length")
    if chunked and request.http_version == b"1.0":
        raise No(400, "cannot read the request: HTTP/1.0 has no Transfer-Encoding")
    if (chunked or sized) and request.method == b"CONNECT":
        raise No(400, "cannot read the request: CONNECT has no body")
    headers = [(name, value) for name, value in end_to_end(request) if name.lower() != b"host"]
    return (*headers, *([(b"Transfer-Encoding", b"chunked")] if chunked else []))


def end_to_end(event: h11.Request | h11.Response) -> list[tuple[bytes, bytes]]:
    """The headers that are passed on: none of the hop, and none that Connection names; the body's length stays."""
    words = [word for name, value in event.headers if name == b"connection" for word in value.split(b",")]
    left_out = _OF_THE_HOP | {word.strip().lower() for word in words} - {b"content-length"}
    return [(name, value) for name, value in event.headers.raw_items() if name.lower() not in left_out]
