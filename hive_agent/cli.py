"""`hive-agent`: the commands, each imported only when it is the one that runs."""

from __future__ import annotations

import sys

USAGE = """\
usage: hive-agent serve [--run DIR] [--state DIR] [--claude PATH] …   take turns for the agent whose sockets are in DIR
       hive-agent mcp --socket PATH                                   bridge stdio to the hive's tools
       hive-agent rehearse [flags of claude]                          be a stand-in for claude
"""


def main(argv: list[str] | None = None, role: str = "") -> int:
    """Run one command and return its exit code. `role` is the only one that `serve` agrees to play; "" is any."""
    arguments = sys.argv[1:] if argv is None else argv
    match arguments:
        case ["serve", *rest]:
            from hive_agent.serve_cli import main as serve

            return serve(rest, role)
        case ["mcp", *rest]:
            from hive_agent.bridge import main as bridge

            return bridge(rest)
        case ["rehearse", *rest]:
            from hive_agent.rehearse import main as rehearse

            return rehearse(rest)
        case ["-h" | "--help"]:
            print(USAGE, end="")
            return 0
        case _:
            print(USAGE, end="", file=sys.stderr)
            return 2


if __name__ == "__main__":
    sys.exit(main())
