"""Where agents may connect to: hosts, ports and addresses, and what lets a request pass. Pure, standard library alone.

A host is lower case, without a trailing dot, and ASCII; an address is written as ipaddress writes it, an IPv6 one
without brackets. One that stands for an IPv4 address (::ffff:10.0.0.7) is that address.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any, NamedTuple

from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import shown

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

TUNNEL = "tunnel"  # of HTTP's CONNECT; the other ways to reach a host are the methods of plain requests
METHODS = ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE")
HTTP_PORT = 80

# Below these no name has a public address (RFC 6761, RFC 6762 with its appendix G, RFC 8375; .internal of ICANN).
_NOT_PUBLIC = (
    *("localhost", "local", "internal", "intranet", "private", "corp", "home", "lan", "home.arpa"),
    *("test", "invalid", "onion", "alt"),
)

_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_PORT = re.compile(r"[1-9][0-9]{0,4}")
HOST_LIMIT = 253


class Range(NamedTuple):
    """Addresses that are not of the public network. never: nothing can be connected to there, named or not."""

    network: Network
    what: str
    never: bool = False


def _ranges(what: str, *networks: str, never: bool = False) -> list[Range]:
    return [Range(ip_network(network), what, never) for network in networks]


# Of the registries of special addresses of IANA (RFC 6890 and what came after it), the narrower before the wider.
RANGES = (
    *_ranges("an unspecified address", "0.0.0.0/8", "::/128", never=True),
    *_ranges("a broadcast address", "255.255.255.255/32", never=True),
    *_ranges("a multicast address", "224.0.0.0/4", "ff00::/8", never=True),
    *_ranges("a loopback address", "127.0.0.0/8", "::1/128"),
    *_ranges("an address of cloud metadata", "169.254.169.254/32", "168.63.129.16/32", "100.100.100.200/32"),
    *_ranges("an address of cloud metadata", "192.0.0.192/32", "fd00:ec2::254/128", "fd20:ce::254/128"),
    *_ranges("a link-local address", "169.254.0.0/16", "fe80::/10"),
    *_ranges("a private address", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7", "fec0::/10"),
    *_ranges("a private address", "64:ff9b:1::/48"),  # what a translator of one's own network stands for
    *_ranges("a shared address (CGNAT)", "100.64.0.0/10"),
    *_ranges("an IPv4 address in an IPv6 one", "::/96", "2001::/32", "2002::/16"),  # compatible, Teredo, 6to4
    *_ranges("a reserved address", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "198.18.0.0/15"),
    *_ranges("a reserved address", "198.51.100.0/24", "203.0.113.0/24", "240.0.0.0/4"),
    *_ranges("a reserved address", "2001::/23", "2001:db8::/32", "3fff::/20"),
    # Of IPv6 all but 2000::/3; each in a piece of its own.
    *_ranges("a reserved address", "::/3", "4000::/2", "8000::/1"),
)
_MAPPED = ip_network("::ffff:0:0/96")
_TRANSLATED = ip_network("64:ff9b::/96")  # NAT64: public where its IPv4 address is


def plain_address(address: Address) -> Address:
    """The address that is meant: of ::ffff:10.0.0.7 it is 10.0.0.7."""
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address


def find_range(address: Address) -> Range | None:
    """The range that an address is in, the narrowest; None of a public one."""
    meant = meant_address(address)
    return next((one for one in RANGES if meant in one.network), None)


def meant_address(address: Address) -> Address:
    """What is reached in the end: behind NAT64 an IPv4 address."""
    address = plain_address(address)
    return IPv4Address(int(address) & 0xFFFFFFFF) if address in _TRANSLATED else address


def parse_network(raw: str) -> Network:
    """An address or a network to name for a host: of one range, or public. Raises Refusal("usage")."""
    try:
        network = ip_network(raw)
    except ValueError:
        raise _no_network(raw, "write an address (10.0.0.7) or a network from its first address (10.0.0.0/8)") from None
    if any(network.overlaps(spelled) for spelled in (_MAPPED, _TRANSLATED) if spelled.version == network.version):
        raise _no_network(raw, "it holds IPv4 addresses in an IPv6 spelling; write them as IPv4")
    ranges = [one for one in RANGES if one.network.version == network.version and one.network.overlaps(network)]
    holding = [one for one in ranges if _is_within(network, one.network)]
    if ranges and not holding:
        raise _no_network(raw, f"it holds {ranges[0].what} and others besides; name each network by itself")
    if any(one.never for one in holding):
        raise _no_network(raw, f"nothing can be connected to at {holding[0].what}")
    return network


def _no_network(raw: str, why: str) -> Refusal:
    return Refusal("usage", f"cannot use {shown(raw)} as a network: {why}")


def _is_within(network: Network, other: Network) -> bool:
    return network.version == other.version and network.subnet_of(other)  # type: ignore[arg-type]


def parse_address(host: str) -> Address | None:
    """The address that a host is; None of a name."""
    try:
        return ip_address(host)
    except ValueError:
        return None


def is_private_name(host: str) -> bool:
    """Whether a name leads to no public address wherever it is asked for: one label, or below a suffix that is kept for
    private networks, for one machine, or for nothing."""
    return "." not in host or host.endswith(tuple(f".{suffix}" for suffix in _NOT_PUBLIC))


def parse_host(raw: str) -> str:
    """A name or an address, as it is written here; upper case and a trailing dot are taken. Raises Refusal("usage").

    What a resolver would take for an address in another spelling (127.1, 0x7f000001, 2130706433) is refused.
    """
    if not raw.isascii():
        raise _refused(raw, f"it is not ASCII; {_ascii_form(raw)}")
    if ":" in raw:
        return _parse_ipv6(raw)
    host = raw.lower().removesuffix(".")
    labels = host.split(".")
    if not host or len(host) > HOST_LIMIT or not all(_LABEL.fullmatch(label) for label in labels):
        raise _refused(
            raw, f"a host is labels of a-z, 0-9, - and _ with single dots between, at most {HOST_LIMIT} characters"
        )
    if _NUMBER.fullmatch(labels[-1]):
        return _parse_ipv4(host)
    return host


def _parse_ipv4(host: str) -> str:
    try:
        return str(IPv4Address(host))
    except ValueError:
        pass
    try:
        meant = IPv4Address(socket.inet_aton(host))
    except OSError:
        raise _refused(
            host, "its last label is a number, and it is no IPv4 address; write a name or 4 numbers"
        ) from None
    raise _refused(host, f"it is another spelling of an IPv4 address; write {meant}")


def _parse_ipv6(raw: str) -> str:
    if "%" in raw:
        raise _refused(raw, "an address has no zone here; leave out the % and what is behind it")
    try:
        return str(plain_address(IPv6Address(raw)))
    except ValueError:
        raise _refused(raw, "it is no IPv6 address; write it as [2001:db8::1]:443") from None


def _refused(raw: str, why: str) -> Refusal:
    return Refusal("usage", f"cannot use {shown(raw)} as a host: {why}")


def _ascii_form(raw: str) -> str:
    import idna  # of a mistake alone

    try:
        return f"write {idna.encode(raw.removesuffix('.'), uts46=True).decode()}"
    except idna.IDNAError:
        return "write its A-labels (xn--…)"


def parse_authority(raw: str, port: int | None = None) -> tuple[str, int]:
    """Host and port of "host:port" or "[address]:port". port: where none is given. Raises Refusal("usage")."""
    if "@" in raw:
        raise Refusal("usage", f"cannot use {shown(raw)} as host:port: leave out the @ and what is before it")
    bracketed = re.fullmatch(r"\[([^\[\]]*)\](?::(.*))?", raw, re.DOTALL)
    host, given = bracketed.groups() if bracketed else _split(raw)
    if bracketed and ":" not in host:
        raise _refused(host, "only an IPv6 address stands in brackets")
    if given is None:
        if port is None:
            raise Refusal("usage", f"cannot use {shown(raw)} as host:port: it has no port; write {shown(f'{raw}:443')}")
        return parse_host(host), port
    if not _PORT.fullmatch(given) or int(given) > 65_535:
        raise Refusal("usage", f"cannot use {shown(given)} as a port: a number from 1 to 65535 is needed")
    return parse_host(host), int(given)


def _split(raw: str) -> tuple[str, str | None]:
    if raw.count(":") > 1:
        raise Refusal("usage", f"cannot use {shown(raw)} as host:port: write an IPv6 address as [2001:db8::1]:443")
    host, colon, given = raw.partition(":")
    return host, given if colon else None


def authority(host: str, port: int) -> str:
    """ "host:port", as people and requests write it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def destination(how: str, host: str, port: int) -> str:
    """A destination as agent.toml has it: "github.com:443", "http://deb.debian.org"."""
    if how == TUNNEL:
        return authority(host, port)
    return f"http://{authority(host, port).removesuffix(f':{HTTP_PORT}')}"


@dataclass(frozen=True, slots=True)
class Allowed:
    """One destination.

    host      a host; with `below` every host below it, and not itself
    methods   of plain requests; none: it is for tunnels
    networks  where, besides public addresses, the host's may lie
    """

    host: str
    port: int
    below: bool = False
    methods: tuple[str, ...] = ()
    networks: tuple[Network, ...] = ()

    def covers(self, host: str, port: int) -> bool:
        named = host.endswith(f".{self.host}") if self.below else host == self.host
        return named and port == self.port

    def takes(self, how: str) -> bool:
        return how in self.methods if self.methods else how == TUNNEL

    def to_wire(self) -> dict[str, Any]:
        return {
            "host": self.host,
            "port": self.port,
            "below": self.below,
            "methods": list(self.methods),
            "networks": [str(network) for network in self.networks],
        }

    @classmethod
    def from_wire(cls, data: dict[str, Any]) -> Allowed:
        """Of what `to_wire` gave; nothing else comes to here."""
        networks = tuple(ip_network(network) for network in data["networks"])
        return cls(data["host"], data["port"], data["below"], tuple(data["methods"]), networks)


@dataclass(frozen=True, slots=True)
class WhyNot:
    """Why a destination is not an agent's: a clause, "github.com:443 is not in egress of agent.toml"."""

    reason: str


def find(allowed: Iterable[Allowed], how: str, host: str, port: int) -> Allowed | WhyNot:
    """What lets a request pass, with the networks of all that do; or why nothing does.

    how: TUNNEL or a method. host, port: of `parse_authority`.
    """
    covering = [one for one in allowed if one.covers(host, port)]
    passing = [one for one in covering if one.takes(how)]
    if passing:
        return replace(passing[0], networks=tuple(dict.fromkeys(n for one in passing for n in one.networks)))
    methods = dict.fromkeys(method for one in covering for method in one.methods)
    asked = destination(how, host, port)
    if not covering:
        return WhyNot(f"{asked} is not in egress of agent.toml")
    if how == TUNNEL:
        return WhyNot(f"{asked} is in egress of agent.toml for plain requests ({', '.join(methods)}), not for tunnels")
    if not methods:
        return WhyNot(f"{asked} is in egress of agent.toml for tunnels (https), not for plain requests")
    return WhyNot(f"{how} {asked} is not in egress of agent.toml, which has its {', '.join(methods)}")


def hindrance(address: Address, networks: Collection[Network], *, is_own: bool) -> str | None:
    """Why an address that a host has is not connected to: a clause; None where it may be.

    networks: those that are named for the host. is_own: whether the address is of this machine.
    """
    meant, place = meant_address(address), find_range(address)
    if place is None and not is_own:
        return None
    if place is not None and place.never:
        return f"{address} is {place.what}"
    for network in networks:
        # An address of metadata is not named by the network around it.
        if meant in network and (place is None or _is_within(network, place.network)):
            return None
    what = "an address of this machine" if place is None else place.what
    return f"{address} is {what}, which `addresses` of its entry does not name; hm1nd can propose it"
