"""What a commit of an agent's repository may hold: files of text in directories, each checked before anything is made
of it. What is checked here is what a card can show whole, and what means the same to git, to nix and to a file system.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hive_core.extras import NONE, PLUGINS, SKILLS, BadExtra, ExtraFile, Extras, parse_extras
from hive_core.git.sterile_git import GitFailed, GitLimits, run_git
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.visible import hides
from hive_core.protocol.words import PERSONA_LIMIT_BYTES, CommitSha, parse_text
from hive_core.settings import AgentSettings, parse_agent_toml

# In every commit. With them alone an agent can be run in any sandbox.
FILES = ("CLAUDE.md", "agent.toml")
# agent.nix counts where containers are built from it, with whatever it reads of the files beside it; the flake is for
# whoever wants to build the same by hand, and is never read here.
NIX_FILES = ("agent.nix", "flake.lock", "flake.nix")
READ_LIMIT_BYTES = 64 * 1024  # of one of FILES, which the daemon reads itself
FILE_LIMIT_BYTES = 1024 * 1024
TREE_LIMIT_BYTES = 16 * 1024**2  # of all files together
FILES_LIMIT = 2_000
DEPTH_LIMIT = 12  # of a path: its parts
PATH_LIMIT_BYTES = 240
COMMIT_LIMIT_BYTES = 64 * 1024  # of the commit itself: its header and message

_MODES = {b"100644", b"100755"}
_WHAT = {b"120000": "a symbolic link", b"160000": "a submodule"}
# What git or another file system takes for .git, .gitattributes or .gitmodules, which change what a commit means.
_GITS_OWN = re.compile(r"\.git|\.gitattributes|\.gitmodules|gi[^.]*~\d+", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a commit. object_id: of its content in git."""

    object_id: str
    executable: bool = False


@dataclass(frozen=True, slots=True)
class Contents:
    """
    settings, prompt  what agent.toml and CLAUDE.md say
    files             the path of each file, and what stands there
    module            what stands in agent.nix, where there is one
    extras            the skills and plugins that agent.toml names
    extra_files       all that lies where skills and plugins are, by its path
    """

    settings: AgentSettings
    prompt: str
    files: Mapping[str, Entry]
    module: str | None = None
    extras: Extras = NONE
    extra_files: Mapping[str, ExtraFile] = field(default_factory=dict)


def named_extras(sha: CommitSha, settings: AgentSettings, files: Mapping[str, ExtraFile]) -> Extras:
    """The skills and plugins that settings name, of a commit's files. Raises Refusal that names the file."""
    try:
        return parse_extras(settings.skills, settings.plugins, files)
    except BadExtra as bad:
        raise _refused(sha, str(bad)) from None


def read_contents(repository: Path, sha: CommitSha) -> Contents:
    """The checked contents of a commit. Blocks. Raises Refusal that names the file and the limit, or GitFailed."""
    files = read_files(repository, sha)
    content = _read_all(repository, sha, files)
    texts = {path: _text(sha, path, content[entry.object_id]) for path, entry in files.items()}
    if missing := [name for name in FILES if name not in texts]:
        raise _refused(sha, f"{missing[0]} is missing")
    for name in FILES:
        if (size := len(content[files[name].object_id])) > READ_LIMIT_BYTES:
            raise _refused(sha, f"{name} is over the limit of {READ_LIMIT_BYTES:,} bytes (it has {size:,})")
    settings = parse_agent_toml(texts["agent.toml"].encode())
    prompt = parse_text(texts["CLAUDE.md"], "CLAUDE.md", PERSONA_LIMIT_BYTES)
    given = {path: ExtraFile(texts[path], entry.executable) for path, entry in files.items() if _is_extra(path)}
    extras = named_extras(sha, settings, given)
    return Contents(settings, prompt, files, texts.get("agent.nix"), extras, given)


def _is_extra(path: str) -> bool:
    return path.startswith((f"{SKILLS}/", f"{PLUGINS}/"))


def read_files(repository: Path, sha: CommitSha) -> dict[str, Entry]:
    """Every file of a commit by its path, in git's order within each directory. Raises Refusal, or GitFailed.

    However often a tree holds the same one below it, no more is looked at than a commit may hold.
    """
    found: dict[str, Entry] = {}
    folders = 0
    root, content = _tree_of(repository, sha)
    level, trees = [("", root)], {root: content}
    for _ in range(DEPTH_LIMIT):
        if not level:
            return found
        ids = sorted({tree for _, tree in level} - trees.keys())
        trees |= zip(ids, _objects(repository, ids, TREE_LIMIT_BYTES), strict=True)
        below: list[tuple[str, str]] = []
        for folder, tree in level:
            for path, mode, object_id in _entries(sha, folder, trees[tree]):
                if mode == b"40000":
                    below.append((f"{path}/", object_id))
                    folders += 1
                elif mode in _MODES:
                    found[path] = Entry(object_id, mode == b"100755")
                else:
                    what = _WHAT.get(mode, f"of mode {mode.decode('ascii', 'replace')[:12]}")
                    raise _refused(sha, f"{path} is {what}; only regular files in directories are deployed")
            if max(len(found), folders) > FILES_LIMIT:
                raise _too_many(sha)
        level = below
    if level:
        raise _refused(sha, f"{level[0][0][:60]} is more than {DEPTH_LIMIT} directories deep; move it up")
    return found


def kinds(repository: Path, ids: Sequence[str]) -> list[tuple[str, int]]:
    """Kind and size of each object; ("", 0) for one that is not there."""
    said = run_git(repository, "cat-file", "--batch-check=%(objecttype) %(objectsize)", stdin=_lines(ids)).decode()
    lines = [line.split(" ") for line in said.splitlines()]
    return [(kind, int(size)) if size.isdigit() else ("", 0) for kind, size in lines]


def _tree_of(repository: Path, sha: CommitSha) -> tuple[str, bytes]:
    """The id of a commit's tree, and what that holds. Raises Refusal for what is no commit."""
    both, limit_bytes = [sha, f"{sha}^{{tree}}"], COMMIT_LIMIT_BYTES + TREE_LIMIT_BYTES
    (kind, commit), (below, tree) = _read(repository, both, limit_bytes)
    if kind != "commit":
        raise _refused(sha, "it is not a commit (`git rev-parse HEAD` gives one)")
    if (size := len(commit)) > COMMIT_LIMIT_BYTES:
        raise _refused(
            sha, f"the commit itself has {size:,} bytes, and the limit is {COMMIT_LIMIT_BYTES:,}; shorten it"
        )
    header = commit[:46].decode("ascii", "replace")
    if not re.fullmatch(r"tree [0-9a-f]{40}\n", header):
        raise _refused(sha, "it names no tree")
    if below != "tree":
        raise GitFailed(f"the object {header[5:45]} is missing")
    return header[5:45], tree


def _entries(sha: CommitSha, folder: str, tree: bytes) -> list[tuple[str, bytes, str]]:
    """Path, mode and id of each entry of a tree, as its bytes have them."""
    entries: list[tuple[str, bytes, str]] = []
    seen: dict[str, str] = {}
    at = 0
    while at < len(tree):
        space, nul = tree.find(b" ", at), tree.find(b"\0", at)
        if not at < space < nul or len(tree) < nul + 21:
            raise _refused(sha, f"its tree {folder[:60]} is not as git writes one")
        path = folder + _name(sha, tree[space + 1 : nul])
        # Here, so that a tree of many paths ends with the first that is too long.
        if len(path.encode()) > PATH_LIMIT_BYTES:
            raise _refused(sha, f"the path {path[:60]}… is over the limit of {PATH_LIMIT_BYTES} bytes; shorten it")
        folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())
        if folded in seen:
            raise _refused(sha, f"{seen[folded][:60]} and {path[:60]} differ by case at most; rename one")
        seen[folded] = path
        entries.append((path, tree[at:space], tree[nul + 1 : nul + 21].hex()))
        if len(entries) > 2 * FILES_LIMIT:
            raise _too_many(sha)
        at = nul + 21
    return entries


def _name(sha: CommitSha, raw: bytes) -> str:
    """A plain name: text without what hides or what a path or another file system reads differently."""
    shown = ascii(raw.decode("utf-8", "backslashreplace"))[:60]
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        raise _refused(sha, f"it holds {shown}, a name that is not UTF-8; rename it") from None
    plain = name.isprintable() and not hides(name) and not set(name) & {"/", "\\", ":", '"'}
    if not plain or name in ("", ".", "..") or name != name.strip() or name.endswith("."):
        why = "a name that is not plain (a control or hidden character, a quote, a colon, a backslash, a blank or dot "
        raise _refused(sha, f"it holds {shown}, {why}at its end); rename it")
    if _GITS_OWN.fullmatch(name):
        raise _refused(sha, f"it holds {shown}, which git would read for itself; take it out")
    return name


def _read_all(repository: Path, sha: CommitSha, files: Mapping[str, Entry]) -> dict[str, bytes]:
    """The content of all files by their ids. Raises Refusal that names what is too large, or no file."""
    ids = sorted({entry.object_id for entry in files.values()})
    try:
        found = dict(zip(ids, _read(repository, ids, TREE_LIMIT_BYTES), strict=True))
    except GitFailed as failed:
        if failed.over == "output":
            _check_sizes(sha, files, dict(zip(ids, kinds(repository, ids), strict=True)))
        raise
    _check_sizes(sha, files, {object_id: (kind, len(data)) for object_id, (kind, data) in found.items()})
    return {object_id: data for object_id, (_, data) in found.items()}


def _check_sizes(sha: CommitSha, files: Mapping[str, Entry], sizes: Mapping[str, tuple[str, int]]) -> None:
    whole = 0
    for path, entry in files.items():
        kind, size = sizes[entry.object_id]
        if not kind:
            raise GitFailed(f"what {path} holds is missing from its repository")
        if kind != "blob":
            raise _refused(sha, f"{path} is a {kind} by another name; write it anew")
        if size > FILE_LIMIT_BYTES:
            raise _refused(sha, f"{path} is over the limit of {FILE_LIMIT_BYTES:,} bytes (it has {size:,})")
        whole += size
    if whole > TREE_LIMIT_BYTES:
        raise _refused(sha, f"its files have {whole:,} bytes together, and the limit is {TREE_LIMIT_BYTES:,}")


def _text(sha: CommitSha, path: str, data: bytes) -> str:
    """Text, which a card shows: of anything else a diff says only that it differs."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        why = "it is not UTF-8, and a card could not show it; save it as UTF-8, or let agent.nix fetch it by its hash"
        raise _refused(sha, f"{path}: {why}") from None
    if "\0" in text:
        raise _refused(sha, f"{path} holds a NUL; take it out")
    return text


def _objects(repository: Path, ids: Sequence[str], limit_bytes: int) -> list[bytes]:
    """The content of each object. Raises GitFailed when one is not there, or all have more than `limit_bytes`."""
    found = _read(repository, ids, limit_bytes)
    if missing := [object_id for object_id, (kind, _) in zip(ids, found, strict=True) if not kind]:
        raise GitFailed(f"the object {missing[0]} is missing")
    return [data for _, data in found]


def _read(repository: Path, names: Sequence[str], limit_bytes: int) -> list[tuple[str, bytes]]:
    """Kind and content of each object; ("", b"") for one that is not there. Raises GitFailed over `limit_bytes`."""
    if not names:
        return []
    limits = GitLimits(output_bytes=limit_bytes + 64 * len(names) + 64)
    words = ("cat-file", "--batch=%(objecttype) %(objectsize)")
    said = memoryview(run_git(repository, *words, stdin=_lines(names), limits=limits))
    found: list[tuple[str, bytes]] = []
    at = 0
    for _ in names:
        end = bytes(said[at : at + 128]).find(b"\n")
        kind, _, size = bytes(said[at : at + max(end, 0)]).decode("ascii", "replace").partition(" ")
        at += end + 1
        if size.isdigit():
            found.append((kind, bytes(said[at : at + int(size)])))
            at += int(size) + 1
        else:
            found.append(("", b""))
    return found


def _lines(ids: Sequence[str]) -> bytes:
    return "".join(f"{object_id}\n" for object_id in ids).encode()


def _too_many(sha: CommitSha) -> Refusal:
    return _refused(sha, f"it holds more than {FILES_LIMIT:,} files or directories; take some out")


def _refused(sha: CommitSha, why: str) -> Refusal:
    return Refusal("refused", f"cannot apply {sha[:12]}: {why}")
