"""What a group of tests may need of the machine, each tried for real: a program that is there may still not run."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import urllib.request
from pathlib import Path

from hive_agent.claude_command import tried_version

ROOT = Path(__file__).resolve().parent.parent
ACCOUNT_KEYS = ("ANTHROPIC_API_KEY", "CLAUDE_CODE_OAUTH_TOKEN")


def _output(*command: str | Path) -> tuple[bool, str]:
    """Whether the command ended well, and what it said."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as problem:
        return False, str(problem)
    return done.returncode == 0, (done.stdout or done.stderr).strip()


def _answers(program: Path) -> bool:
    return program.is_file() and _output(program, "--version")[0]


def pinned_claude_version() -> str:
    """The Claude Code that the tests were written against."""
    return tried_version()


def _global_node_modules() -> list[Path]:
    places = [
        Path("/usr/local/lib/node_modules"),
        Path("/usr/lib/node_modules"),
        Path("~/.npm-global/lib/node_modules"),
    ]
    if shutil.which("npm"):
        ok, said = _output("npm", "root", "-g")
        if ok and said:
            places.insert(0, Path(said.splitlines()[-1]))
    return [place.expanduser() for place in places]


@functools.cache
def find_claude() -> Path | None:
    """Claude Code as an executable that answers, or None. HIVE_CLAUDE is a choice: nothing else is tried then."""
    if chosen := os.environ.get("HIVE_CLAUDE"):
        return Path(chosen) if _answers(Path(chosen)) else None
    processor = "arm64" if os.uname().machine in ("aarch64", "arm64") else "x64"
    native = Path("@anthropic-ai") / f"claude-code-linux-{processor}" / "claude"
    near = [ROOT / ".npm" / "node_modules" / native, Path("~/.local/bin/claude").expanduser()]
    if on_path := shutil.which("claude"):
        near.insert(0, Path(on_path))
    for program in near:
        if _answers(program):
            return program
    for modules in _global_node_modules():
        # npm puts the optional package beside the main one or, for a global install, beneath it.
        for program in (modules / native, modules / "@anthropic-ai" / "claude-code" / "node_modules" / native):
            if _answers(program):
                return program
    return None


@functools.cache
def find_chromium() -> Path | None:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        program = shutil.which(name)
        if program and _answers(Path(program)):
            return Path(program)
    return None


@functools.cache
def bwrap_works() -> bool:
    return _output("bwrap", "--unshare-all", "--ro-bind", "/", "/", "true")[0]


def _setting(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _git() -> str | None:
    return None if _output("git", "--version")[0] else "git does not run (apt-get install git)"


def _bwrap() -> str | None:
    if bwrap_works():
        return None
    if not shutil.which("bwrap"):
        return "bwrap is not installed (apt-get install bubblewrap)"
    if _setting("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == "1":
        return (
            "AppArmor keeps bwrap from making user namespaces (put `profile bwrap /usr/bin/bwrap flags=(unconfined)"
            " { userns, }` into /etc/apparmor.d/bwrap and run `apparmor_parser -r /etc/apparmor.d/bwrap`; or, for the"
            " whole machine, `sysctl -w kernel.apparmor_restrict_unprivileged_userns=0`)"
        )
    if _setting("/proc/sys/kernel/unprivileged_userns_clone") == "0":
        return "the kernel refuses user namespaces (sysctl -w kernel.unprivileged_userns_clone=1)"
    if _setting("/proc/sys/user/max_user_namespaces") == "0":
        return "the kernel allows no user namespaces (sysctl -w user.max_user_namespaces=15000)"
    said = _output("bwrap", "--unshare-all", "--ro-bind", "/", "/", "true")[1]
    return f"bwrap is installed and makes no sandbox: {said} (a container needs leave to make user namespaces)"


def _nspawn() -> str | None:
    if not shutil.which("systemd-nspawn"):
        return "systemd-nspawn is not installed (apt-get install systemd-container)"
    if os.geteuid() != 0:
        return "systemd-nspawn needs root"
    options = ("--quiet", "--register=no", "--keep-unit", "--directory=/", "--volatile=yes", "--private-network")
    ok, said = _output("systemd-nspawn", *options, "--private-users=identity", "--", "true")
    return None if ok else f"systemd-nspawn is installed and makes no container: {said} (a container needs more rights)"


def _claude() -> str | None:
    if find_claude():
        return None
    if chosen := os.environ.get("HIVE_CLAUDE"):
        return f"HIVE_CLAUDE is {chosen}, and that does not answer --version"
    package = f"@anthropic-ai/claude-code@{pinned_claude_version()}"
    return f"Claude Code is not found (npm install --prefix .npm --no-save {package})"


def _chromium() -> str | None:
    return None if find_chromium() else "no Chromium answers (apt-get install chromium)"


def _account() -> str | None:
    if os.environ.get("HIVE_TEST_ACCOUNT") == "1" and any(os.environ.get(key) for key in ACCOUNT_KEYS):
        return None
    return f"it spends money, so it has to be asked for (HIVE_TEST_ACCOUNT=1 with {' or '.join(ACCOUNT_KEYS)})"


def _forgejo() -> str | None:
    given = os.environ.get("HIVE_TEST_FORGEJO")
    tokens = "HIVE_TEST_FORGEJO_TOKENS=ours,another's, of two accounts that may make repositories and write issues"
    if not given or os.environ.get("HIVE_TEST_FORGEJO_TOKENS", "").count(",") != 1:
        return f"no Forgejo is given (HIVE_TEST_FORGEJO=https://… with {tokens})"
    try:
        with urllib.request.urlopen(f"{given.rstrip('/')}/api/v1/version", timeout=10) as answer:
            return None if answer.status == 200 else f"HIVE_TEST_FORGEJO is {given}, and that answers {answer.status}"
    except (OSError, ValueError) as problem:
        return f"HIVE_TEST_FORGEJO is {given}, and that does not answer as one: {problem}"


def _nixos() -> str | None:
    if not Path("/etc/NIXOS").exists():
        return "this is not NixOS (there is no /etc/NIXOS)"
    ok, said = _output("nixos-version")
    return None if ok else f"this looks like NixOS, and nixos-version does not run: {said}"


def _systemd() -> str | None:
    return None if Path("/usr/lib/systemd/systemd").exists() else "systemd is not installed (apt-get install systemd)"


def _nix() -> str | None:
    ok, said = _output("nix-instantiate", "--version")
    return None if ok else f"nix does not run: {said} (apt-get install nix-bin)"


def _nixpkgs() -> str | None:
    given = os.environ.get("HIVE_TEST_NIXPKGS")
    if not given:
        return "no nixpkgs is given (HIVE_TEST_NIXPKGS=/path/to/nixpkgs, on a machine with nix)"
    if not (Path(given) / "pkgs" / "top-level").is_dir():
        return f"HIVE_TEST_NIXPKGS is {given}, and that is no nixpkgs (it has no pkgs/top-level)"
    if not shutil.which("nix-instantiate"):
        return "nix is not installed"
    ok, said = _output("nix-instantiate", "--eval", "--expr", f"(import {Path(given).resolve()}/lib).version")
    return (
        None
        if ok
        else f"nix cannot read the nixpkgs in {given}: {said.splitlines()[-1] if said else 'it says nothing'}"
    )


def _strace() -> str | None:
    ok, said = _output("strace", "-f", "-o", "/dev/null", "true")
    return None if ok else f"strace does not trace: {said} (apt-get install strace; a container needs leave to trace)"


CGROUPS = Path("/sys/fs/cgroup")


def _cgroup2() -> str | None:
    if _output("stat", "-f", "-c", "%T", CGROUPS) != (True, "cgroup2fs"):
        return f"{CGROUPS} is not cgroup v2 (start the machine with systemd.unified_cgroup_hierarchy=1)"
    ours = next((line[3:] for line in _setting("/proc/self/cgroup").splitlines() if line.startswith("0::")), "/")
    here = CGROUPS / ours.lstrip("/")
    lacking = {"memory", "cpu"} - set(_setting(str(here / "cgroup.controllers")).split())
    if lacking:
        return f"{here} is not given {' and '.join(sorted(lacking))} (systemd-run --user --scope -p Delegate=yes …)"
    trial = here / f"hive-test-{os.getpid()}"
    try:
        trial.mkdir()
        trial.rmdir()
    except OSError as exc:
        return f"no group can be made in {here}: {exc.strerror} (systemd-run --user --scope -p Delegate=yes …)"
    return None


PROBES = {
    "git": _git,
    "bwrap": _bwrap,
    "nspawn": _nspawn,
    "claude": _claude,
    "chromium": _chromium,
    "nixos": _nixos,
    "systemd": _systemd,
    "nix": _nix,
    "nixpkgs": _nixpkgs,
    "cgroup2": _cgroup2,
    "strace": _strace,
    "account": _account,
    "forgejo": _forgejo,
}


def missing(need: str) -> str | None:
    """Why the need is not met and how to meet it, or None."""
    return PROBES[need]()
