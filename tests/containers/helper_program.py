"""The helper as it is, in a process of its own, but that an agent is the script that stands in a file of root's.

Nothing that looks for agents of a folder must find it: the folder is not in its command line.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import trio

from hive_core.config import Config
from hive_core.containers.host_process import HostProcessDriver
from hive_core.helper.cli import serve_helper
from hive_core.logs import set_up_logs
from tests.containers.standin.host import host_of


def main(settings: dict[str, Any]) -> None:
    script = Path(settings["helper_state_dir"]) / "script"
    shell: Any = lambda *_: ["/bin/sh", "-c", script.read_text()]  # noqa: E731
    HostProcessDriver._command = shell  # type: ignore[method-assign]
    os.umask(0o077)
    set_up_logs("text", "info")
    # Not by load_config: folders of tests have long names, and no socket of an agent is made in them.
    config = Config.model_validate(settings)
    host = host_of(config.helper_state_dir / "host") if config.sandbox == "nixos-container" else None
    trio.run(serve_helper, config, host)
