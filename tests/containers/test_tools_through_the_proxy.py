"""Programs in a container do their work through the hive's proxy: git by http and by https, pip and npm; and what they
are refused, they tell."""

from __future__ import annotations

import contextlib
import functools
import http.server
import importlib.util
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from hive_core.containers.inside import SYSTEM_PATHS, is_below
from hive_core.destinations import find_range
from tests.containers.drivers import dirs_in, need
from tests.containers.inside import look_around, open_exit
from tests.hives import clean_environment

HERE = ["127.0.0.0/8"]
PACKAGE, MODULE = "sniffio", "isarray"  # small, and in need of nothing else
BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/ssl/certs/ca-bundle.crt")
NAMES = {"git.example": ["127.0.0.1"]}


@pytest.fixture(params=["bwrap", "nspawn"])
def sandbox(request: pytest.FixtureRequest) -> str:
    return need(request.param)


@contextmanager
def serving(folder: Path, certificate: Path | None = None) -> Iterator[int]:
    """A server of files on loopback, by https with a certificate; its port."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def git(folder: Path, *words: str) -> None:
    own = ("-c", "user.name=x", "-c", "user.email=x@x", "-c", "init.defaultBranch=main")
    subprocess.run(["git", *own, *words], cwd=folder, env=clean_environment(), check=True, capture_output=True)


@pytest.fixture
def repositories(tmp_path: Path) -> Path:
    """A folder with a bare repository, x.git, as a server of files has it."""
    folder = tmp_path / "served"
    (folder / "work").mkdir(parents=True)
    (folder / "work" / "README").write_text("it was cloned\n")
    git(folder / "work", "init", "-q")
    git(folder / "work", "add", "-A")
    git(folder / "work", "commit", "-q", "-m", "first")
    git(folder, "clone", "-q", "--bare", "work", "x.git")
    git(folder / "x.git", "update-server-info")
    return folder


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """Of git.example, with its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    path = tmp_path / "certificate.pem"
    words = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    words += ["-subj", "/CN=git.example", "-addext", "subjectAltName=DNS:git.example"]
    subprocess.run(["openssl", *words, "-keyout", path, "-out", path], check=True, capture_output=True)
    return path


async def test_git_clones_by_http_and_by_https_and_tells_what_it_is_refused(
    tmp_path: Path, sandbox: str, repositories: Path, certificate: Path
) -> None:
    with serving(repositories) as plain, serving(repositories, certificate) as secret:
        entries = [
            {"to": f"http://git.example:{plain}", "addresses": HERE},
            {"to": f"git.example:{secret}", "addresses": HERE},
        ]
        dirs_in(tmp_path).make()
        shutil.copy(certificate, dirs_in(tmp_path).state / "certificate.pem")
        async with open_exit(tmp_path, entries, NAMES):
            told = await look_around(
                tmp_path,
                sandbox,
                commands={
                    "plain": ["git", "clone", "-q", f"http://git.example:{plain}/x.git", "/state/plain"],
                    "secret": ["git", "clone", "-q", f"https://git.example:{secret}/x.git", "/state/secret"],
                    "read": ["cat", "/state/plain/README", "/state/secret/README"],
                    "refused": ["git", "clone", "-q", "https://elsewhere.example/x.git"],
                    "refused by http": ["git", "clone", "-q", "http://elsewhere.example/x.git"],
                },
                environment={"GIT_SSL_CAINFO": "/state/certificate.pem"},
            )
    unlisted = "is not in egress of agent.toml; asked the operator (approval 12)"
    assert told["plain"] == told["secret"] == [0, "", ""]
    assert told["read"] == [0, "it was cloned\n" * 2, ""]
    # Of a tunnel git's own library keeps the reason to itself, but for `curl --verbose`.
    assert told["refused"][0] == told["refused by http"][0] == 128
    assert "CONNECT tunnel failed, response 403" in told["refused"][2]
    assert f"remote: cannot connect: http://elsewhere.example {unlisted}\n" in told["refused by http"][2]


# -- the machine's own registries -------------------------------------------------------------------------------------


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
    file = next((str(one) for one in (paths.cafile, paths.openssl_cafile, *BUNDLES) if one and Path(one).exists()), "")
    if not file.startswith("/etc/ssl/certs/"):
        return {}
    names = ("PIP_CERT", "SSL_CERT_FILE", "NODE_EXTRA_CA_CERTS", "npm_config_cafile")
    return dict.fromkeys(names, file)


async def test_pip_installs_from_the_registry_of_the_machine_and_no_other(tmp_path: Path, sandbox: str) -> None:
    if importlib.util.find_spec("pip") is None:
        pytest.skip("this interpreter has no pip")
    own = said(sys.executable, "-m", "pip", "config", "get", "global.index-url")
    usual = said(sys.executable, "-c", "from pip._internal.models import index; print(index.PyPI.simple_url)")
    index = (os.environ.get("PIP_INDEX_URL") or own or usual).rstrip("/")
    files = json.loads(fetched(f"{index}/{PACKAGE}/"))["files"]
    urls = [index, *(urllib.parse.urljoin(f"{index}/{PACKAGE}/", one["url"]) for one in files)]
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-cache-dir", "--target", "/state/site"]
    async with open_exit(tmp_path, entries_for(urls)):
        told = await look_around(
            tmp_path,
            sandbox,
            commands={
                "installs": [*pip, "--index-url", index, PACKAGE],
                "uses": [
                    sys.executable,
                    "-c",
                    f"import sys; sys.path.insert(0, '/state/site'); import {PACKAGE} as p; print(p.__file__)",
                ],
                "refused": [*pip, "--retries", "1", "--index-url", "https://elsewhere.example/simple", PACKAGE],
            },
            environment=trusted(),
        )
    assert told["installs"][:2] == [0, ""], told
    assert told["uses"] == [0, f"/state/site/{PACKAGE}/__init__.py\n", ""]
    assert told["refused"][0] != 0
    assert "403 cannot connect: elsewhere.example:443 is not in egress of agent.toml; asked" in told["refused"][2]


async def test_npm_installs_from_the_registry_of_the_machine_and_no_other(tmp_path: Path, sandbox: str) -> None:
    registry = said("npm", "config", "get", "registry")
    if not registry.startswith("http") or not is_below(os.path.realpath(shutil.which("npm") or ""), SYSTEM_PATHS):
        pytest.skip("npm is not installed where a container sees it")
    versions = json.loads(fetched(f"{registry.rstrip('/')}/{MODULE}"))["versions"].values()
    tarballs = [one["dist"]["tarball"] for one in versions]
    npm = ["npm", "install", "--no-audit", "--no-fund", "--no-update-notifier", "--prefix", "/state/modules"]
    async with open_exit(tmp_path, entries_for([registry, *tarballs])):
        told = await look_around(
            tmp_path,
            sandbox,
            commands={
                "installs": [*npm, "--registry", registry, MODULE],
                "refused": [*npm, "--fetch-retries", "0", "--registry", "https://elsewhere.example/", "inherits"],
            },
            environment=trusted(),
        )
    assert told["installs"][0] == 0, told
    assert (dirs_in(tmp_path).state / "modules" / "node_modules" / MODULE / "package.json").exists()
    assert told["refused"][0] != 0
    assert "403 cannot connect: elsewhere.example:443 is not in egress of agent.toml; asked" in told["refused"][2]
