"""`hive-agent serve`: its arguments, and the process around the turn loop."""

from __future__ import annotations

import argparse
import os
import sys

import trio

from hive_agent.runner import Seat
from hive_agent.serve import SeatMaker, serve
from hive_core.protocol.arguments import life_fd, parser_class, seconds
from hive_core.protocol.paths import SOCKET_PATH_LIMIT_BYTES, explain
from hive_core.protocol.refusal import EXIT_CODES, Refusal

DEFAULT_PATH = "/usr/local/bin:/usr/bin:/bin"


def _run_dir(text: str) -> str:
    excess = len(os.fsencode(os.path.join(text, "harness.sock"))) - SOCKET_PATH_LIMIT_BYTES
    if excess > 0:
        raise argparse.ArgumentTypeError(
            f"its sockets' paths would have {excess} bytes more than the {SOCKET_PATH_LIMIT_BYTES} that they may have; "
            "give a shorter one"
        )
    return text


def make_parser(program: str = "hive-agent") -> argparse.ArgumentParser:
    parser = parser_class()(
        prog=f"{program} serve",
        description="Take turns for one agent: lease a message from the host, run its program, report, again.",
        epilog="Exit codes: 0 told to stop, or no host answered for the grace; 3 another harness serves the agent; "
        "4 host and harness do not fit together.",
    )
    parser.add_argument(
        "--run",
        type=_run_dir,
        default="/run/hive",
        metavar="DIR",
        help="holds the sockets of the hive",
    )
    parser.add_argument("--state", default="/state", metavar="DIR", help="the program's working directory")
    parser.add_argument(
        "--configs", default="/agents", metavar="DIR", help="every agent's configuration, the manager's"
    )
    parser.add_argument("--projects", default="/projects", metavar="DIR", help="its clones of projects")
    parser.add_argument("--mirrors", default="/mirrors", metavar="DIR", help="what they borrow objects from")
    parser.add_argument("--extras", default="/extras", metavar="DIR", help="its skills and plugins, as deployed")
    parser.add_argument("--claude", metavar="PATH", help="the claude executable, where there is one")
    parser.add_argument(
        "--claude-dir",
        metavar="DIR",
        help="its sessions and settings (default: DIR/config of --extras in a sandbox, else ~/.claude)",
    )
    parser.add_argument(
        "--sandbox",
        choices=["bwrap", "nspawn", "nspawn-host-uids", "nixos-container", "none"],
        default="none",
        help="what is around this process: only inside a sandbox the program acts without asking",
    )
    parser.add_argument(
        "--network",
        choices=["private", "host"],
        default="private",
        help="which it has: in that of the host nothing goes through the hive's proxy",
    )
    parser.add_argument(
        "--life-fd", type=life_fd, metavar="N", help="a pipe's read end: when it is closed everything ends at once"
    )
    parser.add_argument(
        "--orphan-grace",
        type=seconds(600),
        default=600.0,
        metavar="S",
        help="end when no host answered for so many seconds",
    )
    return parser


def seat_maker(arguments: argparse.Namespace) -> SeatMaker:
    home = os.environ.get("HOME") or arguments.state
    in_sandbox = arguments.sandbox != "none"
    # In a sandbox it can be read and not written, but for what the program itself writes. A host of another version
    # than ours may have none.
    own = f"{arguments.extras}/config"
    own = own if in_sandbox and os.path.isdir(own) else os.path.join(home, ".claude")

    def make_seat(agent: str, model_port: int, egress_port: int) -> Seat:
        return Seat(
            agent=agent,
            run_dir=arguments.run,
            state_dir=arguments.state,
            configs_dir=arguments.configs,
            projects_dir=arguments.projects,
            mirrors_dir=arguments.mirrors,
            extras_dir=arguments.extras,
            home=home,
            config_dir=arguments.claude_dir or own,
            path=os.environ.get("PATH") or DEFAULT_PATH,
            claude=arguments.claude,
            sandboxed=in_sandbox,
            model_port=model_port,
            egress_port=egress_port,
        )

    return make_seat


def main(argv: list[str], role: str = "", program: str = "hive-agent") -> int:
    try:
        arguments = make_parser(program).parse_args(argv)
    except Refusal as refusal:
        print(f"{program} serve: {refusal}", file=sys.stderr)
        return EXIT_CODES[refusal.code]
    try:
        return trio.run(_serve, arguments, role)
    except KeyboardInterrupt:
        return 130
    except OSError as exc:
        print(f"{program}: cannot go on: {explain(exc)}", file=sys.stderr)
        return 1


async def _serve(arguments: argparse.Namespace, role: str) -> int:
    return await serve(
        arguments.run,
        seat_maker(arguments),
        role=role,
        own_network=arguments.network == "private",
        shared_loopback=arguments.network == "host" or arguments.sandbox == "none",
        life_fd=arguments.life_fd,
        orphan_grace_s=arguments.orphan_grace,
    )
