"""git.sock as the daemon serves it, without what it checks: a project is a bare repository, and git answers."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.hives import clean_environment

Serve = Callable[[socket.socket, dict[str, Any]], None]


def serve_git(projects: Path) -> Serve:
    """Answer as git does for PROJECT.git in a folder."""

    def serve(client: socket.socket, asked: dict[str, Any]) -> None:
        repository = projects / f"{asked['project']}.git"
        if not repository.is_dir():
            client.sendall(b'{"ok": false, "error": {"code": "not_found", "message": "there is no such project"}}\n')
            return
        client.sendall(b'{"ok": true}\n')
        environment = clean_environment()
        if asked["protocol"]:
            environment["GIT_PROTOCOL"] = asked["protocol"]
        command = ["git", asked["service"].removeprefix("git-"), str(repository)]
        subprocess.run(command, stdin=client, stdout=client, stderr=subprocess.DEVNULL, env=environment)

    return serve


@contextlib.contextmanager
def git_socket(path: Path, serve: Serve) -> Iterator[list[dict[str, Any]]]:
    """Serve connections, one after the other, for as long as the block runs; gives what was asked."""
    asked: list[dict[str, Any]] = []
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(str(path))
        listening.listen()

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = listening.accept()
                    with client, client.makefile("rb", buffering=0) as reading, contextlib.suppress(OSError):
                        asked.append(json.loads(reading.readline()))
                        serve(client, asked[-1])

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield asked
        finally:
            with contextlib.suppress(OSError):
                listening.shutdown(socket.SHUT_RDWR)
            thread.join()
            path.unlink(missing_ok=True)
