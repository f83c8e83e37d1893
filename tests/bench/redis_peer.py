"""Redis as the peer of the figures: a server of its own in a folder, every append synced before it is answered."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def redis_server() -> str | None:
    """The program, where it is installed."""
    return shutil.which("redis-server")


@contextmanager
def open_redis(folder: Path) -> Iterator[str]:
    """Run a server whose files are in `folder`; the path of its unix socket."""
    program = redis_server()
    assert program is not None
    path = folder / "redis.sock"
    words = ["--port", "0", "--unixsocket", str(path), "--appendonly", "yes", "--appendfsync", "always", "--save", ""]
    process = subprocess.Popen([program, *words, "--dir", str(folder)], stdout=subprocess.DEVNULL)
    try:
        while not path.exists():
            if process.poll() is not None:
                raise RuntimeError(f"redis-server ended with {process.returncode}")
            time.sleep(0.02)
        yield str(path)
    finally:
        process.terminate()
        process.wait()
