"""The verbs of `hive` about what agents reach and work on, in the form of those in verbs."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

REACH_VERBS: dict[str, tuple[str, str, list[tuple[tuple[str, ...], dict[str, Any]]]]] = {
    "project": (
        "projects.project",
        "the repositories that agents work on: register one, fetch it now, forget it",
        [
            (("what",), {"nargs": "?", "choices": ["list", "add", "fetch", "rm"], "default": "list"}),
            (("words",), {"nargs": "*", "metavar": "NAME [PATH|URL]", "help": "add: its name, and where it is"}),
            (("--key",), {"metavar": "FILE", "help": "the private key for a repository that is reached by ssh"}),
            (("--token",), {"metavar": "FILE", "help": "the token for one that is reached by https; -: from stdin"}),
            (("--host-key",), {"metavar": "LINE", "help": "the ssh server's, as ssh-keyscan tells it; else its first"}),
        ],
    ),
    "forge": (
        "forges.forge",
        "where the pull requests and issues of projects are: agents open and read them, and hear of them by lanes",
        [
            (
                ("what",),
                {"nargs": "?", "choices": ["list", "add", "check", "rehearse", "rm"], "default": "list"},
            ),
            (
                ("words",),
                {"nargs": "*", "metavar": "PROJECT", "help": "add: PROJECT URL OWNER/REPO; rehearse: PROJECT NUMBER"},
            ),
            (("--kind",), {"choices": ["forgejo", "github"], "help": "forgejo (Gitea too) but for github.com"}),
            (("--token",), {"metavar": "FILE", "help": "that holds the token of its account; - is standard input"}),
        ],
    ),
    "reach": (
        "reach.reach",
        "what an agent talked to, and what it was refused",
        [
            (("agent",), {"metavar": "NAME"}),
            (
                ("--since",),
                {"metavar": "24h|7d|DATE", "default": "7d", "help": "hours back; days of UTC, with today (7d)"},
            ),
        ],
    ),
}
