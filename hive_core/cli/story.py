"""The demo's story as data: who the rehearsed agents are and what each does when which message comes.

A rehearsal follows the ```rehearsal block of its own CLAUDE.md, so the script passes the gate like any other change.
"""

from __future__ import annotations

import json
from typing import Any

OPENING = "Please get the login module reviewed before we ship it tonight."
DENIAL = "Three agents are enough for one module."
ENDING = "iris runs on haiku now"
DENIED_ENDING = "I reviewed the login module"

_MODEL_CHANGE = (
    'cd "$HIVE_CONFIGS/iris/config" && sed -i \'s/^model = .*/model = "haiku"/\' agent.toml'
    " && git commit --quiet --all --message 'Run iris on haiku: reviews are small' && git rev-parse HEAD"
)


def _script(rules: list[dict[str, Any]]) -> str:
    return "```rehearsal\n" + json.dumps(rules, indent=1, ensure_ascii=False) + "\n```\n"


def _send(to: str, body: str) -> dict[str, Any]:
    return {"tool": "send", "args": {"to": to, "body": body}}


def _introduction(text: str) -> dict[str, Any]:
    return {"from": "system", "match": "Welcome to the hive", "do": [_send("operator", text)]}


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
            "do": [
                {"run": _MODEL_CHANGE, "save": "sha"},
                {
                    "tool": "request_apply_commit",
                    "args": {
                        "agent": "iris",
                        "sha": "{sha}",
                        "reason": "What is left for iris is small: a cheaper model will do.",
                    },
                },
            ],
        },
        {
            "from": "system",
            "match": "for iris: approved",
            "do": [_send("operator", f"The review is done, both findings are mended, and {ENDING}.")],
        },
        {"from": "system", "match": "for iris: denied", "do": [_send("operator", "Understood, iris stays as it is.")]},
    ]
)

SEEDS = {"iris": IRIS, "damocles": DAMOCLES}
