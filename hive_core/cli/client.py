"""A blocking client of host.sock, with the standard library alone."""

from __future__ import annotations

# What `socket` is made of: `socket` itself imports selectors, two of the 38 ms that a client takes.
import _socket as socket
import os
import sys

from hive_core.protocol.admin import PROTOCOL_VERSION
from hive_core.protocol.lines import LineSplitter, decode, encode
from hive_core.protocol.paths import (
    SYSTEM_CONFIG,
    absolute,
    check_socket_room,
    explain,
    host_socket,
    read_config,
    runtime_dir,
)
from hive_core.protocol.refusal import Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any


def _check_owner(folder: str) -> None:
    """Whoever owns the directory can put a socket of their own there: only root and ourselves are believed, and whom
    root's configuration names."""
    try:
        owner = os.stat(folder).st_uid
    except OSError:
        return
    if os.geteuid() not in (0, owner) and owner != 0 and not _named_by_root(folder):
        raise Refusal(
            "refused",
            f"cannot trust {folder}: it belongs to uid {owner}, neither to you nor to root; if that is the hive's "
            f"user, have root set runtime_dir in {SYSTEM_CONFIG}",
        )


def _named_by_root(folder: str) -> bool:
    try:
        found = os.stat(SYSTEM_CONFIG)
        named = absolute(read_config(SYSTEM_CONFIG).get("runtime_dir"))
    except (OSError, ValueError, Refusal):
        return False
    return found.st_uid == 0 and not found.st_mode & 0o022 and named == folder


def _connect(sock: socket.socket, path: str) -> None:
    try:
        sock.connect(path)
    except OSError:
        sock.close()
        raise


def _hung_up() -> Refusal:
    return Refusal("not_running", "cannot go on: the daemon hung up; look at its log, then `hive up`")


# An answer may hold a thousand messages of 64 KiB.
ANSWER_LIMIT_BYTES = 256 * 1024 * 1024


class Client:
    """One connection to the daemon. Raises Refusal("not_running") when none answers."""

    def __init__(self, runtime: str | None = None) -> None:
        runtime = runtime or runtime_dir()
        path = host_socket(runtime)
        _check_owner(os.path.dirname(path))
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            _connect(self._socket, path)
        except (FileNotFoundError, ConnectionRefusedError):
            raise Refusal(
                "not_running", f"cannot reach the hive: no daemon answers on {path}; `hive up` starts one"
            ) from None
        except PermissionError:
            raise Refusal("refused", f"cannot reach the hive: {path} is not yours to open; ask who runs it") from None
        except OSError as exc:
            if not exc.errno:  # Python's own, and it says no more than that a path is too long
                check_socket_room(runtime)
            why = explain(exc, "runtime_dir (HIVE_RUNTIME_DIR)")
            raise Refusal("not_running", f"cannot reach the hive on {path}: {why}") from None
        self._splitter = LineSplitter(ANSWER_LIMIT_BYTES)
        self._ready: list[bytes] = []

    def call(self, verb: str, descriptors: Sequence[int] = (), **args: Any) -> Any:
        """The result of one verb, with which open files go. Raises Refusal with the daemon's reason."""
        result = None
        for result in self.stream(verb, descriptors, **args):  # noqa: B007 - the last one counts
            pass
        return result

    def stream(self, verb: str, descriptors: Sequence[int] = (), **args: Any) -> Iterator[Any]:
        """The results of a verb that goes on, as they come."""
        given = {key: value for key, value in args.items() if value is not None}
        line = encode({"v": PROTOCOL_VERSION, "verb": verb, "args": given})
        try:
            if descriptors:
                packed = b"".join(one.to_bytes(4, sys.byteorder) for one in descriptors)
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, packed)]
                line = line[self._socket.sendmsg([line], rights) :]
            self._socket.sendall(line)
        except (BrokenPipeError, ConnectionResetError):
            raise _hung_up() from None
        while True:
            answer = decode(self._line())
            if not answer.get("ok"):
                raise Refusal.from_wire(answer.get("error"))
            if answer.get("more") or answer.get("result") is not None:
                yield answer["result"]
            if not answer.get("more"):
                return

    def close(self) -> None:
        self._socket.close()

    def give_up_after(self, seconds: float) -> None:
        """Let a wait for the daemon's next answer end with TimeoutError."""
        self._socket.settimeout(seconds)

    def shut(self) -> None:
        """End a `stream` that another thread reads: it raises Refusal("not_running")."""
        self._socket.shutdown(socket.SHUT_RDWR)

    def _line(self) -> bytes:
        while not self._ready:
            try:
                data = self._socket.recv(1 << 16)
            except ConnectionResetError:
                raise _hung_up() from None
            if not data:
                raise _hung_up()
            for line in self._splitter.feed(data):
                if isinstance(line, Refusal):
                    raise line
                self._ready.append(line)
        return self._ready.pop(0)
