"""The demo's story as data: who the rehearsed agents are and what each does when which message comes.

A rehearsal follows the ```rehearsal block of its own CLAUDE.md, so the script passes the gate like any other change.
"""

from __future__ import annotations

import json
from typing import Any

OPENING = "Please get the login module reviewed before we ship it tonight."
DENIAL = "Three agents are enough for one module."
ENDING = "Did anything happen?"
DENIED_ENDING = "I reviewed the login module"
KEPT_ENDING = "iris stays as it is"


def _commit(edit: str, subject: str) -> str:
    save = f"git commit --quiet --all --message {subject!r} && git rev-parse HEAD"
    return f'cd "$HIVE_CONFIGS/iris/config" && {edit} && {save}'


_CHEAPER = _commit("sed -i 's/^model = .*/model = \"haiku\"/' agent.toml", "Run iris on haiku: reviews are small")
# It loses the comma behind the pattern: iris's program cannot read its script any more, and does not come up.
_BROKEN = _commit(
    """sed -i 's/"match": "findings",/"match": "findings|bugs"/' CLAUDE.md""", "Let iris hear of bugs, too"
)


def _script(rules: list[dict[str, Any]]) -> str:
    return "```rehearsal\n" + json.dumps(rules, indent=1, ensure_ascii=False) + "\n```\n"


def _send(to: str, body: str) -> dict[str, Any]:
    return {"tool": "send", "args": {"to": to, "body": body}}


def _introduction(text: str) -> dict[str, Any]:
    return {"from": "system", "match": "Welcome to the hive", "do": [_send("operator", text)]}


def _propose(command: str, reason: str) -> list[dict[str, Any]]:
    """Commit a change of iris, and ask for it."""
    ask = {"agent": "iris", "sha": "{sha}", "reason": reason}
    return [{"run": command, "save": "sha"}, {"tool": "request_apply_commit", "args": ask}]


_REVIEW = {
    "match": "review",
    "do": [
        {"run": "sleep 0.2; date -u +%H:%M"},
        _send(
            "{sender}", "Two findings: the token never expires, and a wrong password answers faster than a right one."
        ),
    ],
}

ARGUS = "You are a reviewer with a hundred eyes: you read code for security holes.\n\n" + _script(
    [_introduction("argus here: a hundred eyes, at your service."), {"from": "hm1nd", **_REVIEW}]
)

IRIS = "You write and mend code.\n\n" + _script(
    [
        _introduction("iris here: I write and mend code."),
        {
            "from": "hm1nd",
            "match": "findings",
            "do": [{"run": "echo mended > login.txt"}, _send("hm1nd", "Both findings are mended.")],
        },
        {
            "from": "hm1nd",
            "match": "still there",
            "do": [_send("operator", f"iris here, on {{model}} as before. {ENDING}")],
        },
    ]
)

DAMOCLES = "You test what others wrote.\n\n" + _script(
    [
        _introduction("damocles here: I test what others wrote."),
        {
            "from": "hm1nd",
            "match": "review",
            "do": [_send("operator", f"{DENIED_ENDING} in argus's stead: the token never expires.")],
        },
    ]
)

HM1ND = "# hm1nd\n\nYou manage this hive. This is a rehearsal of it.\n\n" + _script(
    [
        {
            "from": "operator",
            "match": "review",
            "do": [
                _send("operator", "iris writes and damocles tests; a review wants other eyes. I ask for argus."),
                {
                    "tool": "request_spawn",
                    "args": {
                        "name": "argus",
                        "persona": ARGUS,
                        "reason": "The login module is to be reviewed by somebody who did not write it.",
                    },
                },
            ],
        },
        {
            "from": "system",
            "match": "agent argus: approved",
            "do": [_send("argus", "Please review the login module.")],
        },
        {
            "from": "system",
            "match": "agent argus: denied",
            "do": [
                _send("operator", "Understood, no argus."),
                _send("damocles", "Please review the login module, argus will not come."),
            ],
        },
        {"from": "argus", "match": "findings", "do": [_send("iris", "argus has two findings: {body}")]},
        {
            "from": "iris",
            "match": "mended",
            "do": _propose(_CHEAPER, "What is left for iris is small: a cheaper model will do."),
        },
        {
            "from": "system",
            "match": "for iris: approved",
            "do": [
                _send("operator", "Both findings are mended, and iris runs on haiku now. It shall hear of bugs, too."),
                *_propose(_BROKEN, "iris mends what is called a finding, and is to mend what is called a bug."),
            ],
        },
        {
            "from": "system",
            "match": "for iris: failed",
            "do": [
                _send("operator", "I lost a comma. iris did not come up with that, and was taken back by itself."),
                _send("iris", "Are you still there?"),
            ],
        },
        {"from": "system", "match": "for iris: denied", "do": [_send("operator", f"Understood, {KEPT_ENDING}.")]},
    ]
)

SEEDS = {"iris": IRIS, "damocles": DAMOCLES}
