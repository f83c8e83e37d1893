"""The script that a rehearsal follows: rules found in its own system prompt, and the few words they may fill in.

A fenced block ```rehearsal holds a JSON list of rules, of which the first that fits runs:
    {"from": NAME or absent, "match": REGEX searched in the body or absent, "do": [STEP, …]}
A step is one of
    {"say": TEXT}
    {"tool": NAME, "args": {…}, "save": WORD or absent}      the result's fields become {WORD.field}
    {"run": COMMAND, "save": WORD or absent}                 its output becomes {WORD}
    {"sleep_s": N} · {"hang": true} · {"exit": CODE}
Standard library alone.
"""

from __future__ import annotations

import json
import re
import shlex

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from hive_agent.wake import Wake

_BLOCK = re.compile(r"^```rehearsal[ \t]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
_WORD = re.compile(r"\{([a-z_][a-z0-9_.]*)\}")
_STEPS = frozenset({"say", "tool", "run", "sleep_s", "hang", "exit"})


class BadScript(Exception):
    """The script cannot be followed; the message says why."""


def find_rules(system_prompt: str) -> list[dict[str, Any]]:
    """The rules in a system prompt, [] without a script. Raises BadScript."""
    block = _BLOCK.search(system_prompt)
    if block is None:
        return []
    try:
        rules = json.loads(block[1])
    except ValueError as exc:
        raise BadScript(f"cannot follow the script: it is not JSON ({exc})") from None
    except RecursionError:
        raise BadScript("cannot follow the script: it is not JSON (it is nested too deeply)") from None
    if not isinstance(rules, list):
        raise BadScript("cannot follow the script: it must be a list of rules")
    for number, rule in enumerate(rules, 1):
        _check(number, rule)
    return rules


def _check(number: int, rule: object) -> None:
    if not isinstance(rule, dict) or not isinstance(rule.get("do"), list):
        raise BadScript(f"cannot follow rule {number} of the script: it must be an object with a list `do`")
    for step in rule["do"]:
        if not isinstance(step, dict) or len(_STEPS & step.keys()) != 1:
            raise BadScript(f"cannot follow rule {number} of the script: a step is one of {', '.join(sorted(_STEPS))}")
    try:
        re.compile(rule.get("match", ""))
    except (re.error, TypeError) as exc:
        raise BadScript(f"cannot follow rule {number} of the script: `match` is no pattern ({exc})") from None


def steps_for(rules: list[dict[str, Any]], wake: Wake) -> list[dict[str, Any]] | None:
    """The steps of the first rule that fits the message, None when none does."""
    for rule in rules:
        if rule.get("from") in (None, wake.sender) and re.search(rule.get("match", ""), wake.body):
            steps: list[dict[str, Any]] = rule["do"]
            return steps
    return None


def purpose(system_prompt: str) -> str:
    """The first line of a prompt that says something: no heading, and no part of a script."""
    for line in _BLOCK.sub("", system_prompt).splitlines():
        if line.strip() and not line.startswith("#"):
            return line.strip()
    return ""


def fill(template: Any, words: Mapping[str, Any], quote: Callable[[str], str] = str) -> Any:
    """A value with each {word} that is known replaced, in strings however deep; other braces stay.

    A string that is one word alone becomes that word's value with its type. What stands in a ```rehearsal block
    stays as it is: it is the script of another agent, whose words are its own.
    """
    if isinstance(template, dict):
        return {key: fill(value, words, quote) for key, value in template.items()}
    if isinstance(template, list):
        return [fill(value, words, quote) for value in template]
    if not isinstance(template, str):
        return template
    whole = _WORD.fullmatch(template)
    if whole and whole[1] in words and quote is str:
        return words[whole[1]]
    text, begin = "", 0
    for block in _BLOCK.finditer(template):
        text += _fill_text(template[begin : block.start()], words, quote) + block[0]
        begin = block.end()
    return text + _fill_text(template[begin:], words, quote)


def fill_command(command: str, words: Mapping[str, Any]) -> str:
    """A shell command with each word as one quoted argument: a message's body cannot become a command."""
    return str(fill(command, words, shlex.quote))


def _fill_text(text: str, words: Mapping[str, Any], quote: Callable[[str], str]) -> str:
    return _WORD.sub(lambda found: quote(str(words[found[1]])) if found[1] in words else found[0], text)
