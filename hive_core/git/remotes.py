"""Where a project's repository is, and how git reaches it with the project's own credential and nothing else."""

from __future__ import annotations

import ipaddress
import os
import re
import shlex
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import SplitResult, urlsplit

from hive_core.git.sterile_git import REASON_LIMIT, GitFailed, Setting
from hive_core.protocol.paths import explain
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.visible import named
from hive_core.protocol.words import shown

Kind = Literal["path", "http", "ssh"]
SOURCE_LIMIT = 1_000
CONNECT_S = 10
STALL_S = 120  # in which not one byte comes from a server, or goes there
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_LABELS = re.compile(r"[a-z0-9_]([a-z0-9_-]*[a-z0-9])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9])?)*", re.IGNORECASE)
_PATH = re.compile(r"/[A-Za-z0-9._~%+@/-]*")
_SCP = re.compile(r"(?:([^@/:]+)@)?([^@/:]+|\[[0-9a-fA-F:.]+\]):(?!/)(.+)")
FORM = "a path of this host, https://HOST/PATH, http://HOST/PATH, ssh://USER@HOST/PATH or USER@HOST:PATH"
# What an old repository may have, and no program takes harm of.
_OLD_SINS = ("badTimezone", "missingSpaceBeforeDate", "missingNameBeforeEmail", "badEmail", "missingEmail", "badDate")
_OLDER_SINS = ("zeroPaddedFilemode", "zeroPaddedDate", "badFilemode", "missingTaggerEntry")


@dataclass(frozen=True, slots=True)
class Source:
    """A repository: `text` as git takes it, never one of git's options."""

    kind: Kind
    text: str
    host: str = ""
    user: str = ""
    port: int | None = None


@dataclass(frozen=True, slots=True)
class Access:
    """How the repository is reached.

    key, known_hosts  files of the host's, for ssh
    token             for http
    """

    source: Source
    key: Path | None = None
    known_hosts: Path | None = None
    token: str = field(default="", repr=False)

    def setting(self) -> Setting:
        """What git needs besides to talk to the source."""
        config = {f"fetch.fsck.{sin}": "ignore" for sin in (*_OLD_SINS, *_OLDER_SINS)} | {
            "fetch.unpackLimit": "1",  # all that comes is a pack, which can be linked
            "http.followRedirects": "false",  # what the host says of another host is not followed with a credential
            "protocol.version": "2",
        }
        match self.source.kind:
            case "path":
                return Setting(config)
            case "http":
                scheme = urlsplit(self.source.text).scheme
                config |= {f"protocol.{scheme}.allow": "always", "protocol.file.allow": "never"}
                config |= {"http.lowSpeedLimit": "1", "http.lowSpeedTime": str(STALL_S)}
                # Proxies and authorities of this environment are the operator's own, as for the relay.
                variables = {key: value for key, value in os.environ.items() if key.lower() in _OPERATORS}
                if self.token:
                    config["credential.helper"] = _HELPER
                    variables |= {"HIVE_TOKEN": self.token, "HIVE_USER": self.source.user or "hive"}
                return Setting(config, variables)
            case "ssh":
                config |= {"protocol.ssh.allow": "always", "protocol.file.allow": "never"}
                return Setting(config, {"GIT_SSH_COMMAND": self.ssh(), "GIT_SSH_VARIANT": "ssh"})

    def ssh(self, *, accept_new: bool = False) -> str:
        """The command that git runs for ssh: by the project's key alone, and to the host that it knows."""
        options = {
            "BatchMode": "yes",
            "ClearAllForwardings": "yes",
            "ConnectTimeout": str(CONNECT_S),
            "GlobalKnownHostsFile": os.devnull,
            "IdentitiesOnly": "yes",
            "IdentityAgent": "none",
            "PasswordAuthentication": "no",
            "PermitLocalCommand": "no",
            "ServerAliveInterval": "15",
            "StrictHostKeyChecking": "accept-new" if accept_new else "yes",
            "UpdateHostKeys": "no",
            "UserKnownHostsFile": str(self.known_hosts or os.devnull),
        }
        words = ["ssh", "-F", os.devnull, *(["-i", str(self.key)] if self.key else [])]
        return shlex.join([*words, *(word for key, value in options.items() for word in ("-o", f"{key}={value}"))])


_OPERATORS = {"http_proxy", "https_proxy", "no_proxy", "all_proxy", "ssl_cert_file", "ssl_cert_dir", "git_ssl_cainfo"}
# Asked by git for the host of the url, and for no other: no redirect is followed.
_HELPER = '!f() { test "$1" = get && printf "username=%s\\npassword=%s\\n" "$HIVE_USER" "$HIVE_TOKEN"; }; f'


def parse_source(raw: object) -> Source:
    """A path of the host, or a url. Raises Refusal("usage")."""
    if not isinstance(raw, str) or not raw or len(raw) > SOURCE_LIMIT or not raw.isprintable() or raw.startswith("-"):
        raise _unusable(raw, f"give {FORM}")
    if raw.startswith("/"):
        return Source("path", os.path.normpath(raw))
    if "::" in raw.partition("/")[0] and not raw.startswith("["):
        raise _unusable(raw, f"git would run a program for it; give {FORM}")
    if "://" in raw:
        return _parse_url(raw)
    if (scp := _SCP.fullmatch(raw)) is not None:
        user, host, path = scp[1] or "", scp[2].strip("[]"), scp[3]
        _check_parts(raw, user, host, f"/{path}")
        return Source("ssh", raw, host, user)
    raise _unusable(raw, f"give {FORM}")


def _parse_url(raw: str) -> Source:
    try:
        url = urlsplit(raw)
        port = url.port
    except ValueError as exc:
        raise _unusable(raw, f"it is no url ({exc})") from None
    if url.scheme not in ("http", "https", "ssh"):
        raise _unusable(raw, f"{shown(url.scheme)} is not taken; give {FORM}")
    if url.password is not None or ("@" in url.netloc and ":" in url.netloc.rpartition("@")[0]):
        # Not shown: there is a secret in it.
        raise Refusal("usage", "cannot use this url: there is a password in it; leave it out, and give --token")
    if url.query or url.fragment or port == 0:
        raise _unusable(raw, "leave out what stands behind ? or #, and name a port from 1")
    _check_parts(raw, url.username or "", url.hostname or "", url.path)
    kind: Kind = "ssh" if url.scheme == "ssh" else "http"
    return Source(kind, _plain(url), (url.hostname or "").lower(), url.username or "", port)


def _plain(url: SplitResult) -> str:
    return f"{url.scheme}://{url.netloc}{url.path}"


def _check_parts(raw: str, user: str, host: str, path: str) -> None:
    if user and not _USER.fullmatch(user):
        raise _unusable(raw, "its user is 1 to 64 letters, digits and ._-")
    if len(host) > 253 or not (_LABELS.fullmatch(host) or _is_address(host)):
        raise _unusable(raw, "its host is a name of ASCII letters (xn--… for others) or an address")
    if not _PATH.fullmatch(path) or path == "/" or "/-" in path:
        raise _unusable(raw, "its path is letters, digits and ._~%+@/- and no part begins with -")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _unusable(raw: object, why: str) -> Refusal:
    return Refusal("usage", f"cannot use {shown(raw, 80)} as a project's repository: {why}")


_HOMES = ("/home/", "/root/", "/run/user/")  # which ProtectHome=yes of the unit hides


def their_git(source: Source, service: str) -> str:
    """The command for git's own `service` on a repository of this host, whose configuration runs nothing there.

    Run by root, it runs as whoever owns the repository: so what is written there is theirs.
    """
    config = {
        "safe.directory": "*",
        "core.hooksPath": os.devnull,
        "core.alternateRefsCommand": "true",
        "core.sshCommand": "false",
        "protocol.allow": "never",
        "uploadpack.allowFilter": "false",
        "receive.autogc": "false",
        "receive.updateServerInfo": "false",
        "gc.auto": "0",
    }
    words = ["git", *(word for key, value in config.items() for word in ("-c", f"{key}={value}")), service]
    try:
        owner = os.stat(source.text)
    except OSError as exc:
        why = explain(exc)
        if source.text.startswith(_HOMES):
            why = f"{why.partition(';')[0]}; a hardened unit sees no home directories: keep it elsewhere, as in /srv"
        raise GitFailed(why) from None
    if os.geteuid() == 0 and owner.st_uid != 0:
        if (setpriv := shutil.which("setpriv")) is None:
            raise GitFailed("it belongs to another user, and there is no setpriv (util-linux) to become that one")
        who = (f"--reuid={owner.st_uid}", f"--regid={owner.st_gid}", "--clear-groups", "--no-new-privs")
        words = [setpriv, *who, "--", *words]
    return shlex.join(words)


def better_told(failed: GitFailed) -> GitFailed:
    """The same, with what ssh said where git says no more than that it could not read, or with the way out."""
    said = str(failed)
    before, found, _ = failed.printed.partition("fatal: Could not read from remote repository")
    lines = [line.strip() for line in before.splitlines() if line.strip()]
    if found and said.startswith("fatal: Could not read") and lines:
        said = named(lines[-1])[:REASON_LIMIT]
    ways = [way for pattern, way in _WAYS_OUT.items() if re.search(pattern, said)]
    return GitFailed("; ".join([said, *ways[:1]]), failed.over, failed.code, failed.printed)


_WAYS_OUT = {
    r"returned error: 30[1278]\b": "give the url that it redirects to",
    "Authentication failed": "`hive project add NAME URL --token FILE` gives it a token, or another one",
    "Permission denied": "`hive project add NAME URL --key FILE` gives it another key",
    "Host key verification failed": "--host-key of `hive project add` says which key its server has",
}
