"""git's helper for `hive://PROJECT`: it connects git to the hive's repository of a project, through a socket.

git finds it as `git-remote-hive` on the PATH (hive_agent/path) and speaks gitremote-helpers(7) with it; of that it
knows `connect`. From then on bytes pass unread. Run by its path, standard library alone.

The daemon behind the socket may be away for a moment: nothing has begun then, and it is waited for. When it goes away
in the middle, that is one line on stderr and exit code 1.
"""

import os
import socket
import sys
import time
from _thread import start_new_thread
from contextlib import suppress

SOCKET = "/run/hive/git.sock"  # HIVE_GIT_SOCKET names another
SERVICES = ("git-upload-pack", "git-receive-pack")
WAIT_S = 30.0  # for a daemon that is away
PATIENCE_TOLD_S = 2.0  # after which the wait is told of
RETRY_S = 0.1
ANSWER_S = 120.0  # that a daemon has for whether it serves: it may fetch the project first
ANSWER_LIMIT_BYTES = 64 * 1024
READ_BYTES = 128 * 1024
_SCHEME = "hive://"
_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-")
_FLUSH = b"0000"  # ends what a side of git's protocol has to say


class Trouble(Exception):
    """What is told in one line."""


class Away(Exception):
    """The daemon did not answer; nothing has begun."""


def main(arguments: "list[str]") -> int:
    if len(arguments) != 2:
        print("usage: git-remote-hive REMOTE hive://PROJECT (git runs it)", file=sys.stderr)
        return 2
    project = arguments[1].removeprefix(_SCHEME).rstrip("/")
    try:
        if not project or not _LETTERS.issuperset(project):
            form = "hive://PROJECT, with a name of a-z, 0-9 and dashes"
            raise Trouble(f"cannot use {arguments[1][:200]!r}: an address of the hive's is {form}")
        while command := _read_line():
            if command == "capabilities":
                _write(1, b"connect\n\n")
            elif command.startswith("connect "):
                return _connect(project, command.removeprefix("connect "))
            else:
                raise Trouble(f"cannot {command[:80]!r}: git asks for more than this helper knows; use `git fetch`")
    except Trouble as trouble:
        print(f"hive: {trouble}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # git has gone
        return 1
    return 0


def _connect(project: str, service: str) -> int:
    if service not in SERVICES:
        raise Trouble(f"cannot run {service[:80]} of {project}: the hive serves {' and '.join(SERVICES)}")
    server, first = _dial(project, service)
    _write(1, b"\n")  # git goes on as if it were connected itself
    Conversation(server, service).carry(first)
    return 0


def _dial(project: str, service: str) -> "tuple[socket.socket, bytes]":
    """The connection on which git's own protocol follows, and what came of that already."""
    path, began, told = os.environ.get("HIVE_GIT_SOCKET", SOCKET), time.monotonic(), False
    while True:
        try:
            return _ask(path, project, service)
        except Away as exc:
            waited = time.monotonic() - began
            if waited > WAIT_S:
                why = f"its daemon is away ({exc}), and did not come back within {WAIT_S:g} s; try again later"
                raise Trouble(f"cannot reach the hive: {why}") from None
            if waited > PATIENCE_TOLD_S and not told:
                told = True
                print("hive: the hive's daemon is away; waiting for it", file=sys.stderr, flush=True)
            time.sleep(RETRY_S)


def _ask(path: str, project: str, service: str) -> "tuple[socket.socket, bytes]":
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        server.settimeout(ANSWER_S)
        server.connect(path)
        protocol = '"version=2"' if service == "git-upload-pack" else "null"
        # None of these words needs an escape, and the json module would take half of the start.
        request = f'{{"service": "{service}", "project": "{project}", "protocol": {protocol}}}\n'
        server.sendall(request.encode())
        answer = b""
        while b"\n" not in answer:
            if len(answer) > ANSWER_LIMIT_BYTES:
                raise Trouble("the hive said something that is no answer")
            if not (data := server.recv(READ_BYTES)):
                raise Away("it hung up")
            answer += data
        server.settimeout(None)
    except TimeoutError:
        server.close()
        raise Trouble(f"the hive did not say within {ANSWER_S:g} s whether it serves {project}; try again") from None
    except OSError as exc:
        server.close()
        raise Away(exc.strerror or str(exc)) from None
    except BaseException:
        server.close()
        raise
    line, _, first = answer.partition(b"\n")
    if line.replace(b" ", b"") != b'{"ok":true}':
        server.close()
        raise Trouble(_why_not(line))
    return server, first


def _why_not(line: bytes) -> str:
    import json

    try:
        return str(json.loads(line)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return "the hive said something that is no answer"


class Conversation:
    """git on stdin and stdout, its other half behind `server`.

    Whether that one had said all when it hung up is seen from what it said: an answer ends with a flush.
    """

    def __init__(self, server: socket.socket, service: str) -> None:
        self._server = server
        self._pushes = service == "git-receive-pack"
        self._packets = Packets()
        self._began = False  # git has said something, or that it has nothing to say
        self._unanswered = b""  # the first bytes of what was sent since something came

    def carry(self, first: bytes) -> None:
        """Until the other half hangs up. Raises Trouble when that is too early."""
        start_new_thread(self._send, ())  # the threading module costs a tenth of the start
        data = first
        while True:
            if data:
                self._unanswered = b""
                self._packets.follow(data)
                _write(1, data)
            try:
                data = self._server.recv(READ_BYTES)
            except ConnectionError:
                data = b""
            if not data:
                break
        # To a flush alone, by which git says that it wants nothing more, there is no answer.
        if not (self._began and self._packets.ended and self._unanswered in (b"", _FLUSH)):
            raise Trouble(
                "the hive went away during the push; nothing was pushed by halves: push again"
                if self._pushes
                else "the hive went away during the fetch; what is there is whole: fetch again"
            )

    def _send(self) -> None:
        while data := os.read(0, READ_BYTES):
            self._unanswered, self._began = (self._unanswered + data)[: len(_FLUSH) + 1], True
            try:
                self._server.sendall(data)
            except OSError:
                return  # the reader sees the end
        self._began = True
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_WR)


class Packets:
    """Where in git's packets (gitprotocol-common(5)) a stream is.

    ended  it ended just now with a flush, or is something else than packets
    """

    def __init__(self) -> None:
        self.ended = False
        self._head = b""  # of a packet: its length, in four digits
        self._left = 0  # bytes of its rest

    def follow(self, data: bytes) -> None:
        at = 0
        while at < len(data) and self._left >= 0:
            if self._left:
                step = min(self._left, len(data) - at)
                self._left, at = self._left - step, at + step
                continue
            step = min(4 - len(self._head), len(data) - at)
            self._head, at, self.ended = self._head + data[at : at + step], at + step, False
            if len(self._head) == 4:
                try:
                    size = int(self._head, 16)
                except ValueError:
                    size = -1
                self._head, self._left, self.ended = b"", max(size - 4, 0) if size >= 0 else -1, size <= 0


def _read_line() -> str:
    """Without reading on: what follows a command may be git's protocol."""
    line = b""
    while (byte := os.read(0, 1)) not in (b"", b"\n"):
        line += byte
    return line.decode("utf-8", "replace")


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
