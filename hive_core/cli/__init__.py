"""`hive`: the operator's command line, a client of host.sock.

It imports neither trio nor pydantic, and what a verb needs more than the standard library's small change is imported
by that verb, so that it starts in under 100 ms.
"""

from __future__ import annotations

import sys

from hive_core.cli.output import drop_output, prepare_streams, refuse
from hive_core.cli.verbs import parse
from hive_core.protocol.paths import explain
from hive_core.protocol.refusal import Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable


def main(argv: list[str] | None = None) -> int:
    """Run one verb. Exit codes: 0 ok, 1 failed, 2 usage, 3 not found or not running, 4 refused."""
    words = sys.argv[1:] if argv is None else argv
    # --json may stand anywhere before a --.
    end = words.index("--") if "--" in words else len(words)
    as_json = "--json" in words[:end]
    words = [word for word in words[:end] if word != "--json"] + words[end:]
    prepare_streams()
    try:
        try:
            return _run(words, as_json)
        except Refusal as refusal:
            return refuse(refusal, as_json)
        finally:
            sys.stdout.flush()  # here, and not when the interpreter ends: its complaint would be a trace
    except BrokenPipeError:
        # The reader went away (`hive events | head`): that is its right.
        drop_output()
        return 0
    except OSError as exc:
        drop_output()
        return refuse(Refusal("failed", f"cannot go on: {explain(exc)}"), False)
    except KeyboardInterrupt:
        return 130


def _run(words: list[str], as_json: bool) -> int:
    for position, word in enumerate(words, 1):
        try:
            word.encode()
        except UnicodeEncodeError:
            raise Refusal(
                "usage", f"cannot read the words: argument {position} is not UTF-8; give it as UTF-8"
            ) from None
    arguments = parse(words)
    arguments.json = as_json
    # Not by importlib, which is one more import.
    module, name = arguments.run.split(".")
    run: Callable[[Namespace], int | None] = getattr(__import__(f"{__name__}.{module}", fromlist=[name]), name)
    try:
        return run(arguments) or 0
    except BrokenPipeError:
        raise
    except OSError as exc:
        raise Refusal("failed", f"cannot go on: {explain(exc)}") from None
