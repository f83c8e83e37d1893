"""`hive-agent`: the commands, each imported only when it is the one that runs."""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

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

            return _run(bridge, rest)
        case ["rehearse", *rest]:
            from hive_agent.rehearse import main as rehearse

            return _run(rehearse, rest)
        case ["-h" | "--help"]:
            print(USAGE, end="")
            return 0
        case _:
            print(USAGE, end="", file=sys.stderr)
            return 2


def _run(command: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Run a command that lives on its standard input, and say in one line what the system refuses it."""
    if sys.stdin is None:
        print("hive-agent: cannot run: standard input is closed; leave it open", file=sys.stderr)
        return 1
    try:
        return command(arguments)
    except OSError as exc:
        from hive_core.protocol.paths import explain

        print(f"hive-agent: cannot go on: {explain(exc)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
