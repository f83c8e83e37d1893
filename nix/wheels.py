"""nix/wheels.json, made from the lock files: `python nix/wheels.py` writes it anew, as `make lock` does.

The lock files name packages by version and hashes; Nix fetches files by name. pip, asked for each processor what it
would install from the lock, says which file has which of the locked hashes. Nothing is installed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parents[1]
WHEELS = ROOT / "nix" / "wheels.json"
PYTHON = "3.13"
PROCESSORS = ("x86_64", "aarch64")
GLIBC_MINORS = (34, 28, 27, 26, 24, 17, 12, 5)
AGENT_NEEDS = "trio"  # all that hive_agent imports besides the standard library and ourselves


def locked_names(lock: str) -> set[str]:
    """The packages of a lock file."""
    lines = (ROOT / lock).read_text("utf-8").splitlines()
    return {canonicalize_name(line.split("==")[0]) for line in lines if "==" in line and line[0].isalnum()}


def chosen(processor: str) -> list[dict[str, Any]]:
    """What pip would install on that processor from the larger lock: its report's entries."""
    compact = PYTHON.replace(".", "")
    platforms = [f"manylinux_2_{minor}_{processor}" for minor in GLIBC_MINORS]
    platforms += [f"manylinux2014_{processor}", f"manylinux2010_{processor}", f"manylinux1_{processor}"]
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "install", "--dry-run"]
        command += ["--ignore-installed", "--no-deps", "--only-binary=:all:", "--require-hashes"]
        command += ["--python-version", PYTHON, "--implementation", "cp", "--target", scratch, "--report", str(report)]
        command += [word for abi in (f"cp{compact}", "abi3", "none") for word in ("--abi", abi)]
        command += [word for platform in platforms for word in ("--platform", platform)]
        subprocess.run([*command, "-r", str(ROOT / "requirements-dev.lock")], check=True)
        entries: list[dict[str, Any]] = json.loads(report.read_text("utf-8"))["install"]
    return entries


def closure(entries: Iterable[dict[str, Any]], root: str) -> set[str]:
    """The names of `root` and of all that it needs on Linux."""
    environment = {"sys_platform": "linux", "os_name": "posix", "python_version": PYTHON, "extra": ""}
    environment |= {"implementation_name": "cpython", "platform_python_implementation": "CPython"}
    needs = {
        canonicalize_name(entry["metadata"]["name"]): [
            canonicalize_name(need.name)
            for need in map(Requirement, entry["metadata"].get("requires_dist", []))
            if need.marker is None or need.marker.evaluate(environment)
        ]
        for entry in entries
    }
    found: set[str] = set()
    waiting = [canonicalize_name(root)]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += needs[name]
    return found


def wheel(entry: dict[str, Any]) -> tuple[str, str, dict[str, str]]:
    """(name as in the file's name, version, the tags and the hash) of a report's entry."""
    file_name = entry["download_info"]["url"].rpartition("/")[2]
    parse_wheel_filename(file_name)  # a name that cannot be taken apart ends this here
    name, version, python, abi, platform = file_name.removesuffix(".whl").split("-")
    digest = entry["download_info"]["archive_info"]["hashes"]["sha256"]
    return name, version, {"python": python, "abi": abi, "platform": platform, "sha256": digest}


def main() -> None:
    reports = {f"{processor}-linux": chosen(processor) for processor in PROCESSORS}
    run, agent = locked_names("requirements.lock"), closure(next(iter(reports.values())), AGENT_NEEDS)
    wheels: dict[str, dict[str, Any]] = {}
    for system, entries in reports.items():
        for entry in entries:
            name, version, file = wheel(entry)
            known = canonicalize_name(name)
            sets = ["dev", *(["run"] if known in run else []), *(["agent"] if known in agent else [])]
            row = wheels.setdefault(known, {"pname": name, "version": version, "sets": sets, "files": {}})
            row["files"]["any" if file["platform"] == "any" else system] = file
    table = {"python": PYTHON, "wheels": [wheels[name] for name in sorted(wheels)]}
    WHEELS.write_text(json.dumps(table, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
