"""Programs in a container do their work through the hive's proxy: git by http and by https, pip and npm; and what they
are refused, they tell."""

from __future__ import annotations

import functools
import http.server
import json
import os
import shutil
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hive_core.containers.inside import SYSTEM_PATHS, is_below
from tests.containers.drivers import dirs_in, need
from tests.containers.inside import look_around, open_exit
from tests.hives import clean_environment
from tests.registries import entries_for, fetched, python_registry, said, trusted

HERE = ["127.0.0.0/8"]
PACKAGE, MODULE = "sniffio", "isarray"  # small, and in need of nothing else
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


async def test_pip_installs_from_the_registry_of_the_machine_and_no_other(tmp_path: Path, sandbox: str) -> None:
    index, urls = python_registry(PACKAGE)
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
