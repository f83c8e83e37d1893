"""From a name to a connection: resolved once, each address judged, and connected to what was judged."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Awaitable, Callable, Collection, Iterable
from ipaddress import ip_address
from typing import Any, NamedTuple

import trio

from hive_core.destinations import Address, Allowed, hindrance, parse_address, plain_address
from hive_core.egress.heads import Asked, No

# How long one address is tried alone before the next is tried beside it (RFC 8305), and how many are tried at all.
STAGGER_S = 0.25
ADDRESSES_LIMIT = 16
NAMES_AT_ONCE = 8

Found = tuple[socket.AddressFamily, tuple[Any, ...]]  # and the address as that family's sockets take it
# A name and a port to all that it has, in the order of preference. Raises OSError.
Resolver = Callable[[str, int], Awaitable[list[Found]]]


def system_resolver() -> Resolver:
    """The machine's own, in threads: so many names at once, by each resolver that is made."""
    limiter = trio.CapacityLimiter(NAMES_AT_ONCE)

    async def resolve(host: str, port: int) -> list[Found]:
        def look_up() -> list[Found]:
            # As bytes: a text would be encoded once more, by other rules than ours.
            listed = socket.getaddrinfo(host.encode("ascii"), port, type=socket.SOCK_STREAM)
            return [(family, address) for family, _, _, _, address in listed]

        return await trio.to_thread.run_sync(look_up, abandon_on_cancel=True, limiter=limiter)

    return resolve


class Reached(NamedTuple):
    """A connection to a host, and to which of its addresses."""

    sock: trio.socket.SocketType
    address: str


async def reach(
    asked: Asked, allowed: Allowed, resolve: Resolver, own_ports: Collection[int], within_s: float
) -> Reached:
    """A connection to what was asked for. Raises No: refused, unreachable, or not there in time."""
    with trio.move_on_after(within_s):
        found = await _find(asked, resolve)
        return await _connect(asked, _judged(asked, allowed, found, own_ports))
    raise No(504, f"cannot connect to {asked}: it did not answer within {within_s:g} s", "failed")


async def _find(asked: Asked, resolve: Resolver) -> list[Found]:
    address = parse_address(asked.host)
    if address is not None:
        await trio.lowlevel.checkpoint()
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        return [(family, (str(address), asked.port))]
    try:
        found = await resolve(asked.host, asked.port)
    except (OSError, UnicodeError) as exc:
        why = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
        raise No(502, f"cannot connect to {asked}: its name cannot be resolved ({why})", "failed") from None
    if not found:
        raise No(502, f"cannot connect to {asked}: its name has no address", "failed")
    return found


def _judged(asked: Asked, allowed: Allowed, found: Iterable[Found], own_ports: Collection[int]) -> list[Found]:
    """Those that may be connected to. Raises No if none may be."""
    hindrances, passing = [], []
    for family, sockaddr in dict.fromkeys(found):
        address = ip_address(sockaddr[0].partition("%")[0])
        is_own = _is_own(family, sockaddr, address)
        why = hindrance(address, allowed.networks, is_own=is_own)
        if why is None and is_own and asked.port in own_ports:
            why = f"port {asked.port} of this machine is the hive's own"
        if why is None:
            passing.append((family, sockaddr))
        else:
            hindrances.append(why)
    if not passing:
        raise No(403, f"cannot connect to {asked}: {hindrances[0]}")
    return passing[:ADDRESSES_LIMIT]


def _is_own(family: socket.AddressFamily, sockaddr: tuple[Any, ...], address: Address) -> bool:
    """Whether an address is of this machine: packets to it would come from itself."""
    if plain_address(address).is_loopback:
        return True
    try:
        probe = socket.socket(family, socket.SOCK_DGRAM)
    except OSError as exc:
        if exc.errno == errno.EAFNOSUPPORT:
            return False  # nor has it an address of that family
        raise
    with probe:
        try:
            probe.connect((sockaddr[0], 9, *sockaddr[2:]))
        except OSError:
            return False  # there is no way there
        return bool(probe.getsockname()[0] == probe.getpeername()[0])


async def _connect(asked: Asked, found: list[Found]) -> Reached:
    reached: list[Reached] = []
    failures: list[OSError] = []
    async with trio.open_nursery() as nursery:

        async def attempt(family: socket.AddressFamily, sockaddr: tuple[Any, ...], failed: trio.Event) -> None:
            try:
                sock = trio.socket.socket(family, socket.SOCK_STREAM)
            except OSError as exc:
                failures.append(exc)
                failed.set()
                return
            try:
                await sock.connect(sockaddr)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except OSError as exc:
                failures.append(exc)
                sock.close()
                failed.set()
            except BaseException:
                sock.close()
                raise
            else:
                # Of two that came at once one is left.
                if reached:
                    sock.close()
                else:
                    reached.append(Reached(sock, str(plain_address(ip_address(sockaddr[0].partition("%")[0])))))
                nursery.cancel_scope.cancel()

        for one in found:
            failed = trio.Event()
            nursery.start_soon(attempt, *one, failed)
            with trio.move_on_after(STAGGER_S):
                await failed.wait()
    if reached:
        return reached[0]
    # A family that this machine has no way for says nothing of the host.
    told = [exc for exc in failures if exc.errno not in (errno.ENETUNREACH, errno.EAFNOSUPPORT)] or failures
    raise _unreachable(asked, told[0])


def _unreachable(asked: Asked, exc: OSError) -> No:
    status = 504 if exc.errno == errno.ETIMEDOUT else 502
    why = os.strerror(exc.errno) if exc.errno else str(exc)  # trio's own words name the address once more
    return No(status, f"cannot connect to {asked}: {why}", "failed")
