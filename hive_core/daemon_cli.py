"""`hive-core`: runs the daemon in the foreground."""

from __future__ import annotations

import argparse
import os
import shutil
import sys

from hive_core.protocol.arguments import life_fd, parser_class
from hive_core.protocol.paths import explain
from hive_core.protocol.refusal import EXIT_CODES, Refusal


def _parser() -> argparse.ArgumentParser:
    from hive_core.limits import Limits

    parser = parser_class("hive-core serve")(
        prog="hive-core",
        description="The hyperhive daemon.",
        epilog="Every flag is also HIVE_<NAME> and a key of config.toml.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="serve|check")
    check = verbs.add_parser("check", help="say whether a configuration file could be used; start nothing")
    check.add_argument("file", help="a config.toml")
    serve = verbs.add_parser(
        "serve", help="serve the hive in the foreground until SIGTERM", argument_default=argparse.SUPPRESS
    )
    for flag, help_text in (
        ("state-dir", "where the hive is kept"),
        ("runtime-dir", "where its sockets are"),
        ("dashboard-host", "the address of the dashboard"),
        ("dashboard-port", "its port (7000); 0 takes any"),
        ("manager-port", "the port of the manager's page (8000)"),
        ("agent-ports", "FIRST-LAST, the ports of agents' pages (8100-8999)"),
        ("provider-base-url", "where the model relay sends requests"),
        ("claude", "the claude executable"),
        ("manager-prompt", "a file: the first CLAUDE.md of hm1nd, in the place of ours"),
        ("sandbox", "what agents run in: bwrap or nspawn"),
        ("nspawn-root", "the root directory whose /usr agents see under nspawn (/)"),
        ("default-program", "what new agents run: claude or rehearsal"),
        ("default-model", "what new agents think with"),
        ("operator-pronouns", "how agents speak of the operator, such as they/them"),
        ("log-format", "text or json"),
        ("log-level", "debug, info, warning or error"),
        ("orphan-grace-s", "how long agents wait for a daemon that is gone (600)"),
        ("drain-s", "how long `hive down` waits for turns to end (30)"),
    ):
        serve.add_argument(f"--{flag}", metavar="…", help=help_text)
    for name, field in Limits.model_fields.items():
        default = field.default if isinstance(field.default, str) else f"{field.default:,}"
        told = f"{field.description} ({default})"
        serve.add_argument(f"--{name.replace('_', '-')}", metavar="…", help=told)
    serve.add_argument("--life-fd", type=life_fd, metavar="FD", help="stop when this inherited pipe is closed")
    serve.add_argument("--end-agents-with-daemon", action="store_true", help="agents end when the daemon does")
    serve.add_argument("--unsafe-no-sandbox", action="store_true", help="run real programs without a sandbox")
    return parser


def main(argv: list[str] | None = None) -> int:
    try:
        flags = vars(_parser().parse_args(argv))
    except Refusal as refusal:
        return _explain(refusal)
    if flags.pop("verb") == "check":
        return _check(flags["file"])
    life = flags.pop("life_fd", None)
    os.umask(0o077)
    # A caller's git environment would point our own repositories elsewhere.
    for variable in [name for name in os.environ if name.startswith("GIT_")]:
        del os.environ[variable]
    if shutil.which("git") is None:
        return _explain(
            Refusal(
                "failed",
                "cannot start: git is not installed, and every agent's configuration is a git repository; install git",
            )
        )
    from hive_core.config import load_config
    from hive_core.logs import set_up_logs
    from hive_core.store.errors import StoreError

    try:
        _check_current_directory()
        config = load_config(flags)
        set_up_logs(config.log_format, config.log_level)
        from hive_core.daemon import run

        run(config, life)
    except BaseExceptionGroup as group:
        return _explain(group)
    except (Refusal, StoreError, OSError) as exc:
        return _explain(exc)
    return 0


def _check(file: str) -> int:
    from hive_core.config import load_config

    try:
        load_config({}, {}, file)
    except Refusal as refusal:
        return _explain(refusal)
    return 0


def _explain(exc: BaseException) -> int:
    """One line for what a person can mend; a trace for what is our bug."""
    from hive_core.store.errors import StoreError

    while isinstance(exc, BaseExceptionGroup) and len(exc.exceptions) == 1:
        exc = exc.exceptions[0]
    if isinstance(exc, OSError):
        exc = Refusal("failed", f"cannot go on: {explain(exc)}")
    if isinstance(exc, Refusal | StoreError):
        print(f"hive-core: {exc}", file=sys.stderr)
        return EXIT_CODES.get(exc.code, 1) if isinstance(exc, Refusal) else 1
    raise exc


def _check_current_directory() -> None:
    """Many a library asks for it, and says no more than that there is no such file."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise Refusal("failed", "cannot start: the current directory was deleted; `cd` to another") from None


if __name__ == "__main__":
    sys.exit(main())
