"""git servers on loopback for a test: git's own http-backend behind a small http server, and a real sshd."""

from __future__ import annotations

import base64
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.processes import PATIENCE_S


@dataclass
class HttpGit:
    """
    authorizations  the header of each request that came, None where it had none
    elsewhere       where it redirects every request to, when that is set
    error           what it says to every fetch in its place, when that is set
    """

    folder: Path
    url: str
    token: str | None = None
    elsewhere: str | None = None
    error: str | None = None
    authorizations: list[str | None] = field(default_factory=list)


@contextmanager
def serve_http(folder: Path, token: str | None = None) -> Iterator[HttpGit]:
    """Serve the bare repositories in a folder, and take pushes; with a token only to who gives it as the password."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            given = self.headers["Authorization"]
            served.authorizations.append(given)
            if served.elsewhere is not None:
                self.send_response(302)
                self.send_header("Location", f"{served.elsewhere}{self.path}")
                self.end_headers()
                return
            if served.token is not None and not self._knows(given):
                self.send_response(401)
                self.send_header("WWW-Authenticate", 'Basic realm="git"')
                self.end_headers()
                return
            if served.error is not None:
                line = f"ERR {served.error}"
                self.send_response(200)
                self.send_header("Content-Type", "application/x-git-upload-pack-advertisement")
                self.end_headers()
                self.wfile.write(f"001e# service=git-upload-pack\n0000{len(line) + 4:04x}{line}".encode())
                return
            self._run()

        do_POST = do_GET

        def _knows(self, given: str | None) -> bool:
            scheme, _, word = (given or "").partition(" ")
            return scheme == "Basic" and base64.b64decode(word).decode().partition(":")[2] == served.token

        def _run(self) -> None:
            path, _, query = self.path.partition("?")
            length = self.headers["Content-Length"]
            environment = {
                "PATH": os.environ["PATH"],
                "GIT_PROJECT_ROOT": str(folder),
                "GIT_HTTP_EXPORT_ALL": "1",
                "GIT_CONFIG_GLOBAL": os.devnull,
                "REMOTE_USER": "hive",
                "PATH_INFO": path,
                "QUERY_STRING": query,
                "REQUEST_METHOD": self.command,
                "CONTENT_TYPE": self.headers.get("Content-Type", ""),
                "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
                "HTTP_GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
                **({"CONTENT_LENGTH": length} if length else {}),
            }
            body = self.rfile.read(int(length)) if length else self._chunks()
            done = subprocess.run(["git", "http-backend"], env=environment, input=body, capture_output=True)
            head, _, rest = done.stdout.partition(b"\r\n\r\n")
            fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n"))
            self.send_response(int(fields.pop("Status", "200 OK").split()[0]))
            for name, value in fields.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(rest)

        def _chunks(self) -> bytes:
            whole = b""
            if self.headers.get("Transfer-Encoding") == "chunked":
                while size := int(self.rfile.readline(), 16):
                    whole += self.rfile.read(size)
                    self.rfile.readline()
            return whole

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        served = HttpGit(folder, f"http://127.0.0.1:{server.server_port}", token)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield served
        finally:
            server.shutdown()
            thread.join()


@dataclass
class SshGit:
    """
    key       a private key that it takes
    host_key  a line with its own key
    """

    url: str
    key: Path
    host_key: str
    log: Path


@cache
def find_sshd() -> str | None:
    return shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")


@contextmanager
def serve_ssh(folder: Path) -> Iterator[SshGit]:
    """A real sshd on loopback, which takes one key of its user's. folder: for its files."""
    if (sshd := find_sshd()) is None:
        pytest.skip("sshd is not installed (apt-get install openssh-server)")
    folder.mkdir()
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", folder / name], check=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config, log = folder / "config", folder / "log"
    config.write_text(
        f"ListenAddress 127.0.0.1\nPort {port}\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\n"
        "StrictModes no\nUsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\nPidFile none\n"
        "PermitRootLogin yes\nLogLevel DEBUG1\n"
    )
    if os.geteuid() == 0:
        # It wants its directory to be there, and so do those of other tests: it stays, as behind its own service.
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    process = subprocess.Popen([sshd, "-D", "-E", str(log), "-f", str(config)], stdin=subprocess.DEVNULL)
    try:
        _wait_for(port)
        user = subprocess.run(["id", "-un"], check=True, capture_output=True, text=True).stdout.strip()
        host_key = " ".join((folder / "host.pub").read_text().split()[:2])
        yield SshGit(f"ssh://{user}@127.0.0.1:{port}", folder / "user", host_key, log)
    finally:
        process.kill()
        process.wait()


def _wait_for(port: int) -> None:
    """Until somebody listens there: a first word comes with the connection."""
    for _ in range(int(PATIENCE_S * 100)):
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as probe:
            if probe.recv(1):
                return
        threading.Event().wait(0.01)
    raise AssertionError("sshd does not listen")
