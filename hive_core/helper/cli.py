"""`hive-root`: the helper, in the foreground."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from hive_core.config import Config, load_config
from hive_core.helper.desk import HelperDesk
from hive_core.helper.drivers import make_root_driver, trouble_of
from hive_core.helper.owner import Owner
from hive_core.helper.trust import check_code, check_trusted
from hive_core.lock import take_lock
from hive_core.logs import set_up_logs
from hive_core.programs import find_claude
from hive_core.protocol.arguments import parser_class
from hive_core.protocol.paths import SYSTEM_CONFIG, explain
from hive_core.protocol.refusal import EXIT_CODES, Refusal
from hive_core.sockets.unix import listen_unix, serve_unix
from hive_core.systemd import notify, serve_watchdog

if TYPE_CHECKING:
    from hive_core.containers.nixos_host import NixosHost

log = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    parser = parser_class("hive-root serve")(
        prog="hive-root", description="Starts and ends agents for a hyperhive daemon that has no privileges."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="serve")
    serve = verbs.add_parser("serve", help="serve in the foreground until SIGTERM; agents outlive it")
    serve.add_argument("--config", default=SYSTEM_CONFIG, metavar="FILE", help=f"the daemon's own ({SYSTEM_CONFIG})")
    try:
        config = read_own_config(Path(os.path.abspath(parser.parse_args(argv).config)))
        set_up_logs(config.log_format, config.log_level)
        os.umask(0o077)
        trio.run(serve_helper, config)
    except Refusal as refusal:
        print(f"hive-root: {refusal}", file=sys.stderr)
        return EXIT_CODES.get(refusal.code, 1)
    except OSError as exc:
        print(f"hive-root: cannot go on: {explain(exc)}", file=sys.stderr)
        return 1
    return 0


def read_own_config(file: Path) -> Config:
    """The configuration, when root alone can have written it and what it names. Raises Refusal."""
    if os.geteuid() != 0:
        raise Refusal("refused", "cannot serve: the helper does what needs root; run it as root")
    check_trusted(file, "--config")
    config = load_config({}, {}, str(file))
    if config.helper is None:
        raise Refusal("usage", f"cannot serve: {file} sets no `helper`; set it to the path of the helper's socket")
    for path, setting, mode in (
        (config.helper.parent, "helper", 0o755),
        (config.helper_state_dir, "helper_state_dir", 0o700),
    ):
        path.mkdir(mode=mode, exist_ok=True)
        check_trusted(path, setting)
    # What agents printed is in there, and for a moment what they have is mounted below it.
    if (entry := config.helper_state_dir.stat().st_mode & 0o077) != 0:
        fix = f"`chmod 700 {config.helper_state_dir}`"
        why = f"others than root may enter it (its mode has {entry:03o} for them)"
        raise Refusal("refused", f"cannot use {config.helper_state_dir} as helper_state_dir: {why}; {fix}")
    check_code()
    check_trusted(config.nspawn_root, "a part of the sandbox")
    return config


async def serve_helper(config: Config, host: NixosHost | None = None) -> None:
    """Serve until SIGTERM or SIGINT, which ends no agent. Raises Refusal.

    host: the NixOS host whose containers agents have; this one when it is not said.
    """
    assert config.helper is not None
    owner, claude = Owner.named(config.helper_user), find_claude(config.claude)
    if claude is not None:
        check_trusted(claude, "claude")
    lock = take_lock(config.helper_state_dir)
    try:
        trouble = await trio.to_thread.run_sync(trouble_of, config, owner, claude, host)
        if trouble is not None:
            log.error("no agent can be started: %s", trouble)
        driver = make_root_driver(config, owner, claude, host)
        sock = listen_unix(config.helper)
        os.chown(config.helper, owner.uid, -1)
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async with trio.open_nursery() as nursery:
                desk = HelperDesk(driver, config, config.helper_state_dir, owner, trouble, nursery)
                nursery.start_soon(serve_unix, sock, desk.serve)
                nursery.start_soon(serve_watchdog)
                log.info("ready: %s, for uid %d", config.helper, owner.uid)
                notify("READY=1")
                async for number in signals:
                    log.info("stopping on %s", signal.Signals(number).name)
                    nursery.cancel_scope.cancel()
                    break
    finally:
        os.close(lock)


if __name__ == "__main__":
    sys.exit(main())
