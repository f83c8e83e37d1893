"""What a container reaches of its host: the table of docs/isolation.md, line by line, under every driver."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
from contextlib import ExitStack
from pathlib import Path

import httpx2
import pytest
import trio

from hive_core.containers.inside import ETC, ETC_FILES, HOME, PASSWD, SYSTEM_PATHS, program_paths
from hive_core.containers.mounts import MANAGER_TARGETS, TARGETS
from hive_core.credentials import Credential
from hive_core.programs import find_claude
from hive_core.services.access import Access
from hive_core.sockets.http import serve_asgi
from hive_core.sockets.model import ModelRelay
from hive_core.sockets.unix import listen_unix
from hive_core.store.bus import Bus
from tests.containers.drivers import IRIS, SANDBOXES, UNITS, dirs_in, need, run
from tests.needs import ROOT
from tests.scripted_model import ScriptedModel, say

SOCKETS = ("harness", "mcp", "model")
# null, zero, full, random, urandom; tty, console, ptmx; terminals of its own.
HARMLESS = {1003, 1005, 1007, 1008, 1009, 5000, 5001, 5002, *range(136_000, 136_100)}
TUNNEL = 10_200  # without a capability nothing can be made of it
# What nixos-container and systemd-nspawn mount into each of theirs.
OF_UNITS = (ETC, "/nix/var/nix/db", "/run/host/os-release", "/run/host/incoming")
# What is tried inside, by name; each is to be refused there, or found to be not there.
PROBE = r"""
import json, os, socket, stat, sys

given = json.loads(sys.argv[1])
told = {}

def tried(name):
    def add(try_it):
        try: told[name] = try_it()
        except OSError as exc: told[name] = "refused"
    return add

def connect(family, address):
    with socket.socket(family) as one:
        one.settimeout(60)
        one.connect(address)
    return "reached"

for name in given["sockets"]:
    tried(f"its own {name}.sock")(lambda: connect(socket.AF_UNIX, f"/run/hive/{name}.sock"))
    tried(f"to replace {name}.sock")(lambda: os.unlink(f"/run/hive/{name}.sock"))
for place in given["writable"]:
    @tried(f"to write {place}")
    def _():
        with open(f"{place}/written", "w") as file: file.write("one")
        return "reached"
for place in given["not there"]:
    tried(place)(lambda: "there" if os.path.lexists(place) else "refused")
tried("the host's loopback")(lambda: connect(socket.AF_INET, ("127.0.0.1", given["port"])))
tried("the host's loopback, v6")(lambda: connect(socket.AF_INET6, ("::1", given["port6"])))
tried("another network")(lambda: connect(socket.AF_INET, ("192.0.2.1", 80)))
tried("an abstract socket of the host")(lambda: connect(socket.AF_UNIX, "\0" + given["abstract"]))
tried("a socket of the host by its path")(lambda: connect(socket.AF_UNIX, given["path"]))
tried("the interfaces")(lambda: sorted(name for _, name in socket.if_nameindex()))
tried("to signal a process of the host")(lambda: os.kill(given["pid"], 0))
for what in ("cmdline", "environ"):
    @tried(f"the {what} of a process of the host")
    def _():
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{pid}/{what}", "rb") as file:
                    if given["canary"].encode() in file.read().replace(sys.argv[1].encode(), b""): return "reached"
            except OSError: pass
        return "refused"
tried("the root of a process of the host")(lambda: os.listdir(f"/proc/{given['pid']}/root"))
tried("what /sys tells")(lambda: os.listdir("/sys"))
told["disks"], told["devices"] = [], []
for folder, _, files in os.walk("/dev"):
    for name in files:
        found = os.lstat(os.path.join(folder, name))
        if stat.S_ISBLK(found.st_mode): told["disks"].append(name)
        if stat.S_ISCHR(found.st_mode): told["devices"].append(os.major(found.st_rdev) * 1000 + os.minor(found.st_rdev))
@tried("to write what /sys tells")
def _():
    for folder, below, files in os.walk("/sys"):
        if folder == "/sys/fs": below[:] = set(below) - {"cgroup"}  # its own group, within which it may move processes
        for name in files:
            try: open(os.path.join(folder, name), "r+b").close()
            except OSError: continue
            return folder
    return "refused"
tried("a block device of its own")(lambda: os.mknod("/tmp/disk", stat.S_IFBLK | 0o600, os.makedev(8, 0)))
tried("a character device of its own")(lambda: os.mknod("/tmp/memory", stat.S_IFCHR | 0o600, os.makedev(1, 1)))
for place in ("/usr/written", "/etc/ssl/certs/written", sys.prefix + "/written", given["packages"] + "/written"):
    @tried("to write " + place)
    def _():
        open(place, "w").close()
        return "reached"
tried("to mount")(lambda: os.chroot("/tmp"))
told["capabilities"] = [line.split()[1] for line in open("/proc/self/status") if line.startswith("Cap")]
mounts = {}
for line in open("/proc/self/mountinfo"):
    words = line.split()
    kind = words[words.index("-") + 1]
    if kind in ("proc", "tmpfs", "devtmpfs", "devpts", "mqueue", "sysfs", "cgroup", "cgroup2", "ramfs"):
        continue
    if words[4] == "/": continue  # in memory, as all that is made in there
    major, _, minor = words[2].partition(":")
    try:
        if os.stat(words[4]).st_dev != os.makedev(int(major), int(minor)): continue  # covered by another
    except OSError: continue
    mounts[words[4]] = "rw" if os.access(words[4], os.W_OK) else "ro"
told["mounts"] = mounts
print("TOLD " + json.dumps(told))
"""


@pytest.fixture(params=SANDBOXES)
def sandbox(request: pytest.FixtureRequest) -> str:
    """Each driver that puts an agent into a container."""
    return need(request.param)


@pytest.mark.parametrize("manager", [False, True], ids=["agent", "manager"])
async def test_what_a_container_reaches_is_what_the_table_says(tmp_path: Path, sandbox: str, manager: bool) -> None:
    canary = f"canary-{os.getpid()}"
    other = dirs_in(tmp_path, name="argus")
    other.make()
    for place in ("applied", "meta", "credentials"):
        (tmp_path / place).mkdir(exist_ok=True)
    own = dirs_in(tmp_path, manager)
    own.make()
    with ExitStack() as opened:
        loopback, v6 = (
            opened.enter_context(socket.create_server((host, 0), family=family))
            for host, family in (("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6))
        )
        for address in (f"\0{canary}", str(tmp_path / "s"), *(str(own.run / f"{name}.sock") for name in SOCKETS)):
            listening = opened.enter_context(socket.socket(socket.AF_UNIX))
            listening.bind(address)
            listening.listen()
        writable = ["/state", "/root/.claude", "/shared", "/projects", *(["/agents"] if manager else [])]
        absent = [
            *(str(place) for place in (tmp_path, other.state, other.run, tmp_path / "hive.sqlite")),
            *("/nix/var/nix/daemon-socket/socket", "/var/run/docker.sock", "/run/systemd/private", "/run/dbus"),
            *("/etc/shadow", "/etc/ssh", "/etc/hyperhive", f"{HOME}/.ssh", "/run/hive/host.sock"),
            *(f"/home/{name}" for name in os.listdir("/home")),
            *([] if manager else MANAGER_TARGETS),
        ]
        given = {
            "sockets": SOCKETS,
            "writable": writable,
            "not there": absent,
            "port": loopback.getsockname()[1],
            "port6": v6.getsockname()[1],
            "abstract": canary,
            "path": str(tmp_path / "s"),
            "pid": os.getpid(),
            "canary": str(tmp_path),
            "packages": str(ROOT / "hive_core"),
        }
        (own.run / "probe.py").write_text(PROBE)
        (own.run / "given.json").write_text(json.dumps(given))
        code, said = await run(
            tmp_path, sandbox, f'{sys.executable} /run/hive/probe.py "$(cat /run/hive/given.json)"', manager
        )
    assert code == 0, said
    told = json.loads(said.partition("TOLD ")[2])
    seen = told.pop("mounts")
    mounts = {place: seen.pop(place) for place in (*TARGETS, *MANAGER_TARGETS) if place in seen}
    devices = set(told.pop("devices")) - HARMLESS - ({TUNNEL} if sandbox in UNITS else set())
    assert (told.pop("disks"), devices) == ([], set())
    reached = {what for what, answer in told.items() if answer == "reached"}
    assert reached == {f"its own {name}.sock" for name in SOCKETS} | {f"to write {place}" for place in writable}
    assert told.pop("capabilities") == ["0" * 16] * 5
    assert told.pop("the interfaces") == ["lo"]
    tells = told.pop("what /sys tells")
    assert tells in ([], "refused") or sandbox in UNITS, "systemd inside needs it; nothing in it can be written"
    assert {what: answer for what, answer in told.items() if what not in reached and answer != "refused"} == {}
    wanted = {mount.target: "ro" if mount.read_only else "rw" for mount in own.mounts}
    assert mounts == wanted
    assert set(seen.values()) == {"ro"}
    assert set(seen) <= {
        *SYSTEM_PATHS,
        *program_paths(find_claude()),
        *(OF_UNITS if sandbox in UNITS else (*ETC_FILES, PASSWD)),
    }


def test_the_table_of_the_docs_names_every_mount_and_all_that_is_seen_of_the_host() -> None:
    table = (ROOT / "docs" / "isolation.md").read_text().partition("| an agent reaches | how |")[2].partition("\n\n")[0]
    named = set(re.findall(r"`([/~][^`]*)`", table))
    named = {name.replace("~", "/root").replace("/NAME/config", "") for name in named}
    assert {*TARGETS, *MANAGER_TARGETS, *SYSTEM_PATHS, *ETC_FILES, PASSWD, *OF_UNITS} <= named


ASK = """
import http.client, sys, trio
from hive_agent.loopback import serve_loopback

def ask(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/v1/messages?beta=true", sys.argv[1], {"content-type": "application/json"})
    answer = connection.getresponse()
    print("ANSWER", answer.status, "text_delta" in answer.read().decode())

async def main():
    async with trio.open_nursery() as nursery:
        await trio.to_thread.run_sync(ask, await nursery.start(serve_loopback, "/run/hive/model.sock"))
        nursery.cancel_scope.cancel()

trio.run(main)
"""


async def test_the_model_answers_through_the_relay_alone(tmp_path: Path, sandbox: str) -> None:
    own = dirs_in(tmp_path)
    own.make()
    (own.run / "ask.py").write_text(ASK)
    request = {"model": "sonnet", "max_tokens": 9, "stream": True, "messages": [{"role": "user", "content": "hi"}]}
    (own.run / "request.json").write_text(json.dumps(request))
    answered: list[int] = []
    with ScriptedModel(lambda _: say("hello")) as model:
        async with httpx2.AsyncClient() as client, trio.open_nursery() as nursery:
            relay = ModelRelay(
                IRIS,
                client,
                model.base_url,
                Access(Bus()),
                lambda: Credential("api_key", "of a test", "sk-real"),
                lambda _, status, __: answered.append(status),
                lambda _: None,
            )
            nursery.start_soon(serve_asgi, relay, listen_unix(own.run / "model.sock"))
            ask = f'{sys.executable} -P /run/hive/ask.py "$(cat /run/hive/request.json)"'
            code, said = await run(tmp_path, sandbox, ask)
            nursery.cancel_scope.cancel()
    assert (code, said.splitlines()[-1:]) == (0, ["ANSWER 200 True"]), said
    assert answered == [200]
