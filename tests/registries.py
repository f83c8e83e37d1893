"""The registries of packages that this machine is set up with, and what opens them to an agent."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import socket
import ssl
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterable
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from hive_core.destinations import find_range

_BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/ssl/certs/ca-bundle.crt")


def said(*command: str) -> str:
    """What a command prints; nothing when there is no such command, or it fails."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else ""
    return ""


def fetched(url: str) -> str:
    """A page of a registry's, with the proxy and the certificates that this machine has. Skips where there is none."""
    try:
        request = urllib.request.Request(
            url, headers={"Accept": "application/vnd.pypi.simple.v1+json, application/json"}
        )
        return str(urllib.request.urlopen(request, timeout=20).read().decode())
    except (OSError, ValueError) as exc:
        pytest.skip(f"no registry answers here ({exc})")


def entries_for(urls: Iterable[str]) -> list[dict[str, Any]]:
    """What opens the hosts of these URLs, with their addresses where those are not public ones."""
    hosts = {(one.scheme, one.hostname or "", one.port) for one in map(urllib.parse.urlsplit, urls)}
    return [_entry(*host) for host in sorted(hosts, key=str)]


def _entry(scheme: str, host: str, given: int | None) -> dict[str, Any]:
    port = given or {"https": 443, "http": 80}[scheme]
    addresses = sorted({str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)})
    own = [address for address in addresses if find_range(ip_address(address)) is not None]
    return {"to": f"{host}:{port}" if scheme == "https" else f"http://{host}:{port}", "addresses": own}


def trusted() -> dict[str, str]:
    """The certificates that this machine trusts, where a container has them too."""
    paths = ssl.get_default_verify_paths()
    file = next((str(one) for one in (paths.cafile, paths.openssl_cafile, *_BUNDLES) if one and Path(one).exists()), "")
    if not file.startswith("/etc/ssl/certs/"):
        return {}
    names = ("PIP_CERT", "SSL_CERT_FILE", "NODE_EXTRA_CA_CERTS", "npm_config_cafile")
    return dict.fromkeys(names, file)


def python_registry(package: str) -> tuple[str, list[str]]:
    """pip's index, and the URLs from which it takes a package. Skips where there is no pip, or no registry answers."""
    if importlib.util.find_spec("pip") is None:
        pytest.skip("this interpreter has no pip")
    own = said(sys.executable, "-m", "pip", "config", "get", "global.index-url")
    usual = said(sys.executable, "-c", "from pip._internal.models import index; print(index.PyPI.simple_url)")
    index = (os.environ.get("PIP_INDEX_URL") or own or usual).rstrip("/")
    files = json.loads(fetched(f"{index}/{package}/"))["files"]
    return index, [index, *(urllib.parse.urljoin(f"{index}/{package}/", one["url"]) for one in files)]
