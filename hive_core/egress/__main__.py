"""`python -P -m hive_core.egress`: the proxy, on the daemon's socket that is its stdin. It ends with that."""

from __future__ import annotations

import logging
import socket
import sys

import trio

from hive_core.egress.confinement import Unconfined, confine, outlive_signals, raise_file_limit
from hive_core.egress.serving import serve_proxy


def main() -> int:
    logging.basicConfig(format="egress: %(message)s", level=logging.WARNING)
    outlive_signals()
    raise_file_limit()
    try:
        confine()
    except Unconfined as exc:
        print(f"egress: {exc}", file=sys.stderr)
        return 1
    trio.run(serve_proxy, socket.socket(fileno=0))
    return 0


sys.exit(main())
