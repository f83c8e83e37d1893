"""The skills and plugins of an agent's own repository, as agent.toml names them: skills/NAME and plugins/NAME.

They are read from a commit before a program loads them, so that a card can say what they bring. Of what a program could
find in several places one is taken, and the others are refused: what the card names is all that there is.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from hive_core.protocol.harness import OWN_PLUGIN

SKILLS, PLUGINS = "skills", "plugins"
SKILL_FILE, PLUGIN_FILE = "SKILL.md", ".claude-plugin/plugin.json"
HOOKS_FILE, SERVERS_FILE = "hooks/hooks.json", ".mcp.json"
DESCRIPTION_LIMIT = 1024  # characters
OFFERED_LIMIT = 200  # skills and commands, of all plugins together
OFFERED_LIMIT_BYTES = 32 * 1024  # their names and descriptions: they stand behind the prompt, in one argument with it
# What a prompt that begins with / already is to the program; the hive uses some of them.
RESERVED = frozenset({"clear", "compact", "config", "context", "cost", "init", "usage"})

# What front matter may say without giving anybody more than words.
_WORDS = frozenset(
    {"name", "description", "when_to_use", "argument-hint", "license", "metadata", "version", "author", "compatibility"}
    | {"disable-model-invocation", "user-invocable"}
)
_TEXTS = frozenset({"", ".md", ".txt", ".json", ".yaml", ".yml", ".toml", ".csv", ".html", ".css", ".xml", ".svg"})
# Of plugin.json. All others say where parts of the plugin are, or are parts themselves.
_ABOUT = frozenset({"name", "version", "description", "author", "homepage", "repository", "license", "keywords"})
_KEY = re.compile(r"([A-Za-z_][\w-]*)[ \t]*:(?:[ \t]+(.*)|[ \t]*)")
_BLOCK = re.compile(r"[|>][+-]?\d?[+-]?")
_ENDS = re.compile("\r\n|[\r\n\x85\u2028\u2029]")  # whatever some YAML takes for the end of a line
_INLINE = re.compile("!`|```!")  # as the program looks for them: anywhere in a line
# What it puts arguments in the place of before it looks, and so, without any, nothing.
_ARGUMENT = re.compile(r"\$(?:\{[^}]*\}|\w+(?:\[\d*\])?)")
# What the hooks of each type run or ask, and what of a hook is no more than how it is shown.
_RUN_BY = {"command": "command", "prompt": "prompt", "agent": "prompt", "http": "url"}
_SHOWN_BY = frozenset({"type", "timeout", "statusMessage"})


class BadExtra(ValueError):
    """`path: why; way out`, of what cannot be used."""


class ExtraFile(NamedTuple):
    text: str
    executable: bool = False


class Offered(NamedTuple):
    """A skill or a command, as the program calls it, and what the model is told of it."""

    name: str
    description: str


@dataclass(frozen=True, slots=True)
class Extra:
    """A skill or a plugin.

    files    by their paths in it
    offered  what of it the model can choose
    powers   what of it runs, or lets something run, in words; empty where it is only text
    """

    files: Mapping[str, ExtraFile]
    offered: tuple[Offered, ...]
    powers: tuple[str, ...]

    @property
    def size_bytes(self) -> int:
        return sum(len(file.text.encode()) for file in self.files.values())


@dataclass(frozen=True, slots=True)
class Extras:
    """All that a commit gives its agent's program, by name."""

    skills: Mapping[str, Extra]
    plugins: Mapping[str, Extra]

    def __bool__(self) -> bool:
        return bool(self.skills or self.plugins)

    @property
    def offered(self) -> list[Offered]:
        return [one for extra in (*self.skills.values(), *self.plugins.values()) for one in extra.offered]

    @property
    def files(self) -> dict[str, ExtraFile]:
        """By their paths in the repository."""
        return {
            f"{kind}/{name}/{path}": file
            for kind, extras in ((SKILLS, self.skills), (PLUGINS, self.plugins))
            for name, extra in extras.items()
            for path, file in extra.files.items()
        }

    @property
    def files_of_plugins(self) -> dict[str, ExtraFile]:
        """By their paths below the agent's /extras/DIGEST, where the skills are a plugin too.

        Given in any other way, they are loaded together with whatever the working directory has of the kind.
        """
        own = {path: file for path, file in self.files.items() if path.startswith(f"{SKILLS}/")}
        if own:
            own[PLUGIN_FILE] = ExtraFile(json.dumps({"name": OWN_PLUGIN}))
        plugins = {OWN_PLUGIN: own, **{name: extra.files for name, extra in self.plugins.items()}}
        return {f"{name}/{path}": file for name, files in plugins.items() for path, file in files.items()}

    @property
    def digest(self) -> str:
        """Names what lies there: the paths, whether they can be executed, and what is in them."""
        digest = hashlib.sha256()
        for path, file in sorted(self.files_of_plugins.items()):
            for part in (path, "x" if file.executable else "-", file.text):
                raw = part.encode()
                digest.update(b"%d:" % len(raw) + raw)
        return digest.hexdigest()[:32]

    def to_wire(self) -> dict[str, Any]:
        """As it travels to the harness: protocol.harness.Extras."""
        return {
            "digest": self.digest,
            "skills": list(self.skills),
            "plugins": list(self.plugins),
            "offered": [one._asdict() for one in self.offered],
        }


NONE = Extras({}, {})


def parse_extras(skills: Collection[str], plugins: Collection[str], files: Mapping[str, ExtraFile]) -> Extras:
    """What is named, of the files of a commit by their paths. Raises BadExtra."""
    extras = Extras(
        {name: _skill(f"{SKILLS}/{name}", name, _below(f"{SKILLS}/{name}/", files)) for name in skills},
        {name: _plugin(f"{PLUGINS}/{name}", name, _below(f"{PLUGINS}/{name}/", files)) for name in plugins},
    )
    if (count := sum(len(extra.offered) for extra in extras.plugins.values())) > OFFERED_LIMIT:
        raise BadExtra(f"{PLUGINS}: they bring {count} skills and commands, and the limit is {OFFERED_LIMIT}")
    if (size := sum(len("".join(one).encode()) for one in extras.offered)) > OFFERED_LIMIT_BYTES:
        why = f"have {size:,} bytes together, and the limit is {OFFERED_LIMIT_BYTES:,}; shorten the descriptions"
        raise BadExtra(f"{SKILLS} and {PLUGINS}: the names and descriptions of what they bring {why}")
    return extras


def _below(folder: str, files: Mapping[str, ExtraFile]) -> dict[str, ExtraFile]:
    return {path.removeprefix(folder): file for path, file in files.items() if path.startswith(folder)}


def _skill(where: str, name: str, files: Mapping[str, ExtraFile]) -> Extra:
    if SKILL_FILE not in files:
        raise BadExtra(f"{where}/{SKILL_FILE} is missing; write it, or take {name} out of skills in agent.toml")
    for path in files:
        parts = path.split("/")
        if hidden := next((part for part in parts if part.startswith(".")), None):
            raise BadExtra(f"{where}/{path}: a skill holds no {hidden}, by which it would be more; make it a plugin")
        if len(parts) > 1 and parts[-1] == SKILL_FILE:
            raise BadExtra(f"{where}/{path}: a skill holds no other; give it a folder of its own in {SKILLS}")
    front = parse_front_matter(files[SKILL_FILE].text)
    if (called := front.get("name", name)) != name:
        raise BadExtra(f"{where}/{SKILL_FILE} calls itself {called[:60]}; call it {name}, as its folder")
    hidden_from_model = _is_set(front, "disable-model-invocation")
    offered = () if hidden_from_model else (_offered(where, SKILL_FILE, f"{OWN_PLUGIN}:{name}", front),)
    return Extra(files, offered, (*_front_powers(files[SKILL_FILE].text, front), *_programs(files)))


def _front_powers(text: str, front: Mapping[str, str]) -> list[str]:
    told = [f"sets {', '.join(sorted(front.keys() - _WORDS))}"] if front.keys() - _WORDS else []
    return told + (["runs commands when it is loaded"] if _has_inline(text) else [])


def _has_inline(text: str) -> bool:
    """Whether it has commands that run, with or without arguments. One made of ever more of these is taken for it."""
    for _ in range(8):
        if _INLINE.search(text):
            return True
        former, text = text, _ARGUMENT.sub("", text)
        if text == former:
            return False
    return True


def _programs(files: Mapping[str, ExtraFile]) -> list[str]:
    programs = [
        path
        for path, file in files.items()
        if file.executable or file.text.startswith("#!") or PurePosixPath(path).suffix.lower() not in _TEXTS
    ]
    return [f"programs {', '.join(programs)}"] if programs else []


def _plugin(where: str, name: str, files: Mapping[str, ExtraFile]) -> Extra:
    if PLUGIN_FILE not in files:
        raise BadExtra(f"{where}/{PLUGIN_FILE} is missing; write it, or take {name} out of plugins in agent.toml")
    about = _object(f"{where}/{PLUGIN_FILE}", files[PLUGIN_FILE].text)
    if (called := about.get("name")) != name:
        raise BadExtra(f"{where}/{PLUGIN_FILE} calls itself {str(called)[:60]}; call it {name}, as its folder")
    if more := sorted(about.keys() - _ABOUT):
        why = f"sets {', '.join(more)[:80]}; put the parts of a plugin where they are looked for, such as {HOOKS_FILE}"
        raise BadExtra(f"{where}/{PLUGIN_FILE} {why}")
    powers = [*_hooks(where, files), *_servers(where, files)]
    offered: list[Offered] = []
    for path, file in files.items():
        if not path.lower().endswith(".md"):
            continue
        # Also of an agent, and of a command in a folder: wherever the program takes a text, its head is read.
        front = parse_front_matter(file.text)
        powers += [f"{path} {power}" for power in _front_powers(file.text, front)]
        if (called := _called(path)) and not _is_set(front, "disable-model-invocation"):
            offered.append(_offered(where, path, f"{name}:{called}", front))
    told = {HOOKS_FILE, SERVERS_FILE, PLUGIN_FILE}
    parts_of = dict.fromkeys(path.split("/")[0] for path in files if path not in told)
    powers += [f"brings {', '.join(parts_of)}"] if parts_of else []
    return Extra(files, tuple(offered), (*powers, *_programs(files)))


def _called(path: str) -> str:
    """What a plugin calls the skill or command that stands there; empty where there is none."""
    match path.split("/"):
        case ["skills", name, file] if file == SKILL_FILE:
            return name
        case ["commands", file]:
            return file.removesuffix(".md")
    return ""


def _hooks(where: str, files: Mapping[str, ExtraFile]) -> list[str]:
    """Each event with what runs at it."""
    if HOOKS_FILE not in files:
        return []
    path = f"{where}/{HOOKS_FILE}"
    events = _object(path, files[HOOKS_FILE].text).get("hooks", {})
    told: list[str] = []
    try:
        for event, groups in events.items():
            for group in groups:
                at = f"{event} ({group['matcher']})" if group.get("matcher") else event
                for hook in group["hooks"]:
                    told.append(f"hook {at}: {_hook(hook)}")
    except (AttributeError, KeyError, TypeError):
        raise BadExtra(f"{path} is not as hooks are written; `claude plugin validate` says more") from None
    return told


def _hook(hook: Mapping[str, Any]) -> str:
    """Its type and what it runs, and behind that all else that it says: the arguments of a command above all."""
    run_by = _RUN_BY.get(hook["type"], "")
    others = {key: value for key, value in hook.items() if key not in _SHOWN_BY and key != run_by}
    more = [f"{key} {json.dumps(value, ensure_ascii=False)}" for key, value in others.items()]
    return "; ".join([f"{hook['type']} {hook.get(run_by, '')}".strip(), *more])


def _servers(where: str, files: Mapping[str, ExtraFile]) -> list[str]:
    """The servers of tools that it declares. They are not started: agent.toml's are all that there are."""
    if SERVERS_FILE not in files:
        return []
    said = _object(f"{where}/{SERVERS_FILE}", files[SERVERS_FILE].text)
    servers = said.get("mcpServers", said)
    if not isinstance(servers, dict):
        raise BadExtra(f"{where}/{SERVERS_FILE}: mcpServers needs to be an object")
    return [f"MCP servers {', '.join(servers)}, which are not started: name them in mcp_servers"] if servers else []


def _object(path: str, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise BadExtra(f"{path} is not JSON; mend it") from None
    if not isinstance(found, dict):
        raise BadExtra(f"{path} needs to be a JSON object")
    return found


def _offered(where: str, path: str, name: str, front: Mapping[str, str]) -> Offered:
    description = front.get("description", "")
    if not description:
        why = "it has no description; begin it with a line ---, a line `description: …` and a line ---"
        raise BadExtra(f"{where}/{path}: {why}")
    if len(description) > DESCRIPTION_LIMIT:
        why = f"its description has {len(description):,} characters, and the limit is {DESCRIPTION_LIMIT:,}; shorten it"
        raise BadExtra(f"{where}/{path}: {why}")
    return Offered(name, description)


def _is_set(front: Mapping[str, str], key: str) -> bool:
    return front.get(key, "").lower() in ("true", "yes", "on")


def parse_front_matter(text: str) -> dict[str, str]:
    """What stands between two lines --- at the head of a text: each key with its value in one line; {} without them.

    Of YAML only as much as names the keys, and reads the plain, quoted and folded texts that descriptions are.
    """
    first, *lines = _ENDS.split(text.removeprefix("\ufeff"))
    if first.rstrip() != "---":
        return {}
    found: dict[str, list[str]] = {}
    key = ""
    for line in lines:
        # No other line ends it: the program reads on behind "...", which in YAML ends a text.
        if line.rstrip() == "---":
            return {key: _value(parts) for key, parts in found.items()}
        if match := _KEY.fullmatch(line.rstrip()):
            key = match[1]
            found[key] = [match[2] or ""]
        elif line.strip() and not line.startswith("#"):
            # Whatever else stands there, such as a key in quotes, is told under the words that it is written in.
            if line[0].isspace() or line.startswith("-"):
                found.setdefault(key or line.strip()[:40], []).append(line.strip())
            else:
                found[key := line.strip()[:40]] = [""]
    return {}


def _value(parts: list[str]) -> str:
    first, *rest = parts
    if _BLOCK.fullmatch(first.strip()):
        return " ".join(rest)
    whole = " ".join((first, *rest)).strip()
    if len(whole) > 1 and whole[0] == whole[-1] and whole[0] in "'\"":
        return whole[1:-1].replace("''", "'") if whole[0] == "'" else whole[1:-1].replace('\\"', '"')
    return whole
