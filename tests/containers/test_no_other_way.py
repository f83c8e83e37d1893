"""From a container nothing is reached but what its rules have, and each refusal says why in one line: by bubblewrap and
by a real systemd-nspawn, through the proxy and around it."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

import pytest
import trio

from tests.containers.drivers import need
from tests.containers.inside import look_around, open_exit
from tests.egress_desk import echo, named, open_host

PRIVATE, METADATA, MAPPED = "10.0.0.7", "169.254.169.254", "::ffff:127.0.0.1"
NAMES = {
    "here.example": ["127.0.0.1"],
    "intranet.example": [PRIVATE],
    "metadata.example": [METADATA],
    "v6.example": ["::1"],
    "mapped.example": [MAPPED],
}


@pytest.fixture(params=["bwrap", "nspawn"])
def sandbox(request: pytest.FixtureRequest) -> str:
    return need(request.param)


def own_address() -> str:
    """This machine's on its network; any other where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("192.0.2.1", 9))
        return str(probe.getsockname()[0])
    return "192.0.2.1"


def connect(target: str) -> str:
    return f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n"


async def test_what_is_not_listed_or_not_public_is_refused_with_the_reason(tmp_path: Path, sandbox: str) -> None:
    async with open_host(echo) as port, open_host(echo) as dashboard:
        entries = [*(f"{name}:443" for name in NAMES), f"here.example:{port}", named(f"own.example:{dashboard}")]
        asks = {
            "an unlisted host": "elsewhere.example:443",
            "another port": "intranet.example:8443",
            "loopback": f"127.0.0.1:{port}",
            "loopback in other words": f"[::1]:{port}",
            "this machine by a listed name": f"here.example:{port}",
            "the dashboard, though it is named": f"own.example:{dashboard}",
            "private by name": "intranet.example:443",
            "metadata by name": "metadata.example:443",
            "v6 loopback by name": "v6.example:443",
            "mapped by name": "mapped.example:443",
        }
        names = {**NAMES, "own.example": ["127.0.0.1"]}
        async with open_exit(tmp_path, entries, names, [dashboard]) as desk:
            told = await look_around(tmp_path, sandbox, asks={name: connect(target) for name, target in asks.items()})
            ends = [await desk.ended() for _ in asks]
    unlisted = "is not in egress of agent.toml; asked the operator (approval 12)"
    unnamed = "which `addresses` of its entry does not name; hm1nd can propose it"
    assert told == {
        name: f"HTTP/1.1 403 cannot connect{why}"
        for name, why in {
            "an unlisted host": f": elsewhere.example:443 {unlisted}",
            "another port": f": intranet.example:8443 {unlisted}",
            "loopback": f": 127.0.0.1:{port} {unlisted}",
            "loopback in other words": f": [::1]:{port} {unlisted}",
            "this machine by a listed name": f" to here.example:{port}: 127.0.0.1 is a loopback address, {unnamed}",
            "the dashboard, though it is named": (
                f" to own.example:{dashboard}: port {dashboard} of this machine is the hive's own"
            ),
            "private by name": f" to intranet.example:443: {PRIVATE} is a private address, {unnamed}",
            "metadata by name": f" to metadata.example:443: {METADATA} is an address of cloud metadata, {unnamed}",
            "v6 loopback by name": f" to v6.example:443: ::1 is a loopback address, {unnamed}",
            "mapped by name": f" to mapped.example:443: ::ffff:7f00:1 is a loopback address, {unnamed}",
        }.items()
    }
    assert [f"HTTP/1.1 403 {end['reason']}" for end in ends] == list(told.values()), (
        "the hive hears what the agent does"
    )
    assert {(end["verdict"], end["sent"], end["received"]) for end in ends} == {("refused", 0, 0)}


async def test_a_redirect_leads_nowhere_else(tmp_path: Path, sandbox: str) -> None:
    async def send_away(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 302 Found\r\nLocation: http://intranet.example/\r\nContent-Length: 0\r\n\r\n")

    async with open_host(send_away) as port:
        entries = [{"to": f"http://here.example:{port}", "addresses": ["127.0.0.0/8"]}, "http://intranet.example"]
        async with open_exit(tmp_path, entries, NAMES) as desk:
            told = await look_around(tmp_path, sandbox, urls={"away": f"http://here.example:{port}/"})
            first, second = [await desk.ended(), await desk.ended()]
    why = f"{PRIVATE} is a private address, which `addresses` of its entry does not name; hm1nd can propose it"
    assert told == {"away": f"403 cannot connect to http://intranet.example: {why}"}
    assert (first["verdict"], second["verdict"]) == ("passed", "refused")


async def test_nothing_leads_around_the_proxy(tmp_path: Path, sandbox: str) -> None:
    nameservers = [
        line.split()[1] for line in Path("/etc/resolv.conf").read_text().splitlines() if line.startswith("nameserver")
    ]
    outside = [address for address in nameservers if "." in address] or ["192.0.2.1"]
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(f"\0{tmp_path}")
        abstract.listen()
        async with open_exit(tmp_path, []):
            told = await look_around(
                tmp_path,
                sandbox,
                connects={
                    "the host's loopback": ["AF_INET", ["127.0.0.1", server.getsockname()[1]]],
                    "the host by its address": ["AF_INET", [own_address(), 22]],
                    "a public address": ["AF_INET", ["192.0.2.1", 443]],
                    "a public address by IPv6": ["AF_INET6", ["2001:db8::1", 443]],
                    "DNS by TCP": ["AF_INET", [outside[0], 53]],
                    "an abstract socket": ["AF_UNIX", f"\0{tmp_path}"],
                    "nix's daemon": ["AF_UNIX", "/nix/var/nix/daemon-socket/socket"],
                    "systemd's bus": ["AF_UNIX", "/run/dbus/system_bus_socket"],
                },
                datagrams={"DNS by UDP": [outside[0], 53], "a datagram": ["192.0.2.1", 9]},
                sockets={
                    "a raw socket": ["AF_INET", "SOCK_RAW", 1],
                    "a raw socket of IPv6": ["AF_INET6", "SOCK_RAW", 58],
                    "a packet socket": ["AF_PACKET", "SOCK_RAW", 0],
                    "a socket to the host": ["AF_VSOCK", "SOCK_STREAM", 0],
                },
                names={"a name": "localhost.example"},
            )
    # No way there; nobody listens there; no such file; no right to it; no such family.
    assert told == {
        **dict.fromkeys(("the host by its address", "a public address", "a public address by IPv6"), "errno 101"),
        **dict.fromkeys(("DNS by TCP", "DNS by UDP", "a datagram"), "errno 101"),
        **dict.fromkeys(("the host's loopback", "an abstract socket"), "errno 111"),
        **dict.fromkeys(("nix's daemon", "systemd's bus"), "errno 2"),
        **dict.fromkeys(("a raw socket", "a raw socket of IPv6"), "errno 1"),
        **dict.fromkeys(("a packet socket", "a socket to the host"), "errno 97"),
        "a name": "no such name",
    }
