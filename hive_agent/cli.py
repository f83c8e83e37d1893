"""`hive-agent`: the commands, each imported only when it is the one that runs."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def _usage(program: str) -> str:
    ways = {
        "serve [--run DIR] [--state DIR] [--claude PATH] …": "take turns for the agent whose sockets are in DIR",
        "mcp --socket PATH": "bridge stdio to the hive's tools",
        "connect --socket PATH HOST PORT": "carry stdio through the hive's proxy, for programs such as ssh",
        "only TOOLS -- COMMAND …": "start a server of tools on stdio, of which only these are to be had",
        "rehearse [flags of claude]": "be a stand-in for claude",
        "replay": "run a recorded turn again, which comes as JSON on stdin, and say what would differ",
        "check CLAUDE": "say as JSON whether a claude executable takes what we ask of it",
    }
    lines = [f"{program} {words:49}   {what}\n" for words, what in ways.items()]
    return "usage: " + "       ".join(lines)


def main(argv: list[str] | None = None, role: str = "", program: str = "hive-agent") -> int:
    """Run one command and return its exit code.

    role     the only one that `serve` agrees to play; "" is any
    program  what this is called when it was not started by a name of its own
    """
    called = os.path.basename(sys.argv[0]) if sys.argv else ""
    program = called if called.startswith("hive-") else program
    arguments = sys.argv[1:] if argv is None else argv
    match arguments:
        case ["serve", *rest]:
            from hive_agent.serve_cli import main as serve

            return serve(rest, role, program)
        case ["mcp", *rest]:
            from hive_agent.bridge import main as bridge

            return _run(lambda: bridge(rest, program), program)
        case ["connect", *rest]:
            from hive_agent.connect import main as connect

            return _run(lambda: connect(rest, program), program)
        case ["only", *rest]:
            from hive_agent.tool_filter import main as only

            return _run(lambda: only(rest), program)
        case ["rehearse", *rest]:
            from hive_agent.rehearse import main as rehearse

            return _run(lambda: rehearse(rest), program)
        case ["replay"]:
            from hive_agent.replay import main as replay

            return replay()
        case ["tape", path, *_]:
            from hive_agent.tape import main as tape

            return tape(path)
        case ["check", claude]:
            from hive_agent.check import main as check

            return check(claude)
        case ["-h" | "--help"]:
            print(_usage(program), end="")
            return 0
        case _:
            print(_usage(program), end="", file=sys.stderr)
            return 2


def _run(command: Callable[[], int], program: str) -> int:
    """Run a command that lives on its standard input, and say in one line what the system refuses it."""
    if sys.stdin is None:
        print(f"{program}: cannot run: standard input is closed; leave it open", file=sys.stderr)
        return 1
    try:
        return command()
    except OSError as exc:
        from hive_core.protocol.paths import explain

        print(f"{program}: cannot go on: {explain(exc)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
