"""Which destinations `egress` names, and which addresses of theirs may be connected to."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hive_core.destinations import (
    TUNNEL,
    Allowed,
    WhyNot,
    find,
    find_range,
    hindrance,
    parse_authority,
    parse_host,
    parse_network,
)
from hive_core.egress_rules import Rule, expand, presets, wanted
from hive_core.protocol.refusal import Refusal
from hive_core.settings import describe


def passes(entries: list[object], how: str, target: str) -> bool:
    return isinstance(find(expand(entries), how, *parse_authority(target)), Allowed)  # type: ignore[arg-type]


def why_not(entries: list[object], how: str, target: str) -> str:
    found = find(expand(entries), how, *parse_authority(target))  # type: ignore[arg-type]
    assert isinstance(found, WhyNot)
    return found.reason


def refused(entry: object) -> str:
    with pytest.raises(ValidationError) as caught:
        expand([entry])  # type: ignore[list-item]
    return describe(caught.value)


# -- entries ----------------------------------------------------------------------------------------------------------


def test_a_host_is_matched_whole_and_with_its_port() -> None:
    assert passes(["github.com:443"], TUNNEL, "github.com:443")
    assert passes(["github.com:443"], TUNNEL, "GitHub.COM.:443")
    for other in ("github.com:22", "api.github.com:443", "xgithub.com:443", "github.com.evil.example:443"):
        assert why_not(["github.com:443"], TUNNEL, other).endswith("is not in egress of agent.toml")


def test_a_suffix_takes_what_is_below_it_and_not_itself() -> None:
    for below in ("a.github.com:443", "a.b.github.com:443"):
        assert passes(["*.github.com:443"], TUNNEL, below)
    for other in ("github.com:443", "xgithub.com:443", "a.github.com:80"):
        assert not passes(["*.github.com:443"], TUNNEL, other)


def test_plain_requests_and_tunnels_are_apart() -> None:
    assert passes(["http://repo.lan"], "GET", "repo.lan:80")
    assert passes(["http://*.repo.lan:8080"], "HEAD", "a.repo.lan:8080")
    assert "for plain requests (GET, HEAD), not for tunnels" in why_not(["http://repo.lan"], TUNNEL, "repo.lan:80")
    assert "for tunnels (https), not for plain requests" in why_not(["repo.lan:80"], "GET", "repo.lan:80")


def test_other_methods_pass_where_the_entry_has_them() -> None:
    assert why_not(["http://repo.lan"], "POST", "repo.lan:80") == (
        "POST http://repo.lan is not in egress of agent.toml, which has its GET, HEAD"
    )
    more = {"to": "http://repo.lan", "methods": ["POST"]}
    assert passes(["http://repo.lan", more], "POST", "repo.lan:80")
    assert passes(["http://repo.lan", more], "GET", "repo.lan:80")
    assert not passes([more], "GET", "repo.lan:80")


def test_networks_of_every_entry_that_lets_a_request_pass_hold() -> None:
    entries = [
        "*.lan:80",
        {"to": "git.lan:80", "addresses": ["10.0.0.7"]},
        {"to": "*.lan:80", "addresses": ["fd00::/8"]},
    ]
    found = find(expand(entries), TUNNEL, "git.lan", 80)  # type: ignore[arg-type]
    assert isinstance(found, Allowed)
    assert [str(network) for network in found.networks] == ["10.0.0.7/32", "fd00::/8"]


def test_an_address_names_itself() -> None:
    for to, address in (
        ("10.0.0.7:80", "10.0.0.7"),
        ("http://[fd00::1]:8080", "fd00::1"),
        ("127.0.0.1:80", "127.0.0.1"),
    ):
        (one,) = expand([to])
        assert hindrance(ip_address(address), one.networks, is_own=True) is None


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ("pyton", "cannot find a preset 'pyton': there are model, git-forges, python"),
        ("GitHub.com:443", "write github.com:443"),
        ("github.com.:443", "write github.com:443"),
        ("http://Repo.lan", "write http://repo.lan:80"),
        ("bücher.example:443", "write xn--bcher-kva.example"),
        ("https://github.com/ada", "write github.com:443"),
        ("http://repo.lan/debian", "leave out what is behind the host"),
        ("github.com", "it has no port"),
        ("github.com:0443", "a number from 1 to 65535"),
        ("github.com:65536", "a number from 1 to 65535"),
        ("ada@github.com:443", "leave out the @"),
        ("*:443", "a host is labels"),
        ("*.*.com:443", "a host is labels"),
        ("a.*.com:443", "a host is labels"),
        ("*.10.0.0.1:80", "nothing is below an address"),
        ("2130706433:80", "write 127.0.0.1"),
        ("0x7f.1:80", "write 127.0.0.1"),
        ("[::ffff:10.0.0.7]:80", "write 10.0.0.7:80"),
        ("[FD00::1]:80", "write [fd00::1]:80"),
        ("[fe80::1%eth0]:80", "no zone"),
        ("fd00::1:80", "write an IPv6 address as [2001:db8::1]:443"),
        ("0.0.0.0:80", "nothing can be connected to at an unspecified address"),
        ("git.lan:80\n", "a number from 1 to 65535"),
        ("git\x00.lan:80", "a host is labels"),
        (7, "0: "),
        ({"to": "python", "addresses": ["10.0.0.7"]}, "it is a preset"),
        ({"to": "git.lan:80", "methods": ["POST"]}, "they are of plain requests, http://git.lan:80"),
        ({"to": "http://git.lan", "methods": ["CONNECT"]}, "is needed"),
        ({"to": "git.lan:80", "addresses": ["10.0.0.7/8"]}, "a network from its first address"),
        ({"to": "git.lan:80", "addresses": ["0.0.0.0/0"]}, "name each network by itself"),
        ({"to": "git.lan:80", "addresses": ["10.0.0.0/7"]}, "name each network by itself"),
        ({"to": "git.lan:80", "addresses": ["224.0.0.1"]}, "nothing can be connected to at a multicast address"),
        ({"to": "git.lan:80", "addresses": ["::ffff:10.0.0.0/104"]}, "write them as IPv4"),
        ({"to": "git.lan:80", "port": 80}, "unknown key"),
    ],
)
def test_a_bad_entry_is_refused_with_the_way_to_write_it(entry: object, told: str) -> None:
    assert told in refused(entry)


def test_every_preset_has_destinations() -> None:
    assert list(presets()) == ["model", "git-forges", "python", "npm", "debian", "nix-cache"]
    assert all(presets().values())
    assert expand(["python", "python"]) == presets()["python"]


def test_an_entry_is_written_the_shortest_way() -> None:
    table = {"to": "git.lan:80", "addresses": ["10.0.0.7"]}
    entries: list[str | dict[str, object]] = ["python", "git.lan:80", table]
    assert [Rule.model_validate({"to": e} if isinstance(e, str) else e).written() for e in entries] == entries


@pytest.mark.parametrize(
    ("how", "host", "port", "written"),
    [
        (TUNNEL, "github.com", 443, "github.com:443"),
        (TUNNEL, "fd00::1", 443, "[fd00::1]:443"),
        ("GET", "repo.lan", 80, "http://repo.lan"),
        ("POST", "repo.lan", 8080, {"to": "http://repo.lan:8080", "methods": ["GET", "HEAD", "POST"]}),
    ],
)
def test_what_was_asked_for_passes_by_the_entry_that_is_wanted_for_it(
    how: str, host: str, port: int, written: object
) -> None:
    rule = wanted(how, host, port)
    assert rule.written() == written
    assert isinstance(find(rule.allowed(), how, host, port), Allowed)


def test_what_is_allowed_survives_the_wire() -> None:
    for one in expand(["npm", "*.lan:80", {"to": "http://a.lan", "addresses": ["fd00::/8"], "methods": ["POST"]}]):
        assert Allowed.from_wire(one.to_wire()) == one


# -- hosts and addresses ----------------------------------------------------------------------------------------------

ADDRESSES = {
    "a loopback address": ["127.0.0.1", "127.255.255.254", "::1", "::ffff:127.0.0.1", "64:ff9b::127.0.0.1"],
    "a private address": [
        "10.0.0.1",
        "172.31.255.255",
        "192.168.0.1",
        "fd00::1",
        "::ffff:10.0.0.1",
        "64:ff9b::10.0.0.1",
    ],
    "a link-local address": ["169.254.0.1", "fe80::1"],
    "an address of cloud metadata": [
        *("169.254.169.254", "168.63.129.16", "100.100.100.200", "fd00:ec2::254", "::ffff:169.254.169.254"),
        "64:ff9b::a9fe:a9fe",
    ],
    "a shared address (CGNAT)": ["100.64.0.1", "100.127.255.255"],
    "a multicast address": ["224.0.0.1", "239.255.255.255", "ff02::1"],
    "an unspecified address": ["0.0.0.0", "0.1.2.3", "::", "::ffff:0.0.0.0"],
    "a broadcast address": ["255.255.255.255"],
    "an IPv4 address in an IPv6 one": ["2002:7f00:1::", "2001::1", "::7f00:1"],
    "a reserved address": [
        "240.0.0.1",
        "192.0.2.1",
        "198.18.0.1",
        "2001:db8::1",
        "4000::1",
        "e000::1",
        "100::1",
        "5f00::",
    ],
}


@pytest.mark.parametrize(("what", "address"), [(what, one) for what, many in ADDRESSES.items() for one in many])
def test_an_address_that_is_not_public_is_refused_without_a_name(what: str, address: str) -> None:
    assert f"is {what}" in (hindrance(ip_address(address), (), is_own=False) or "")


@pytest.mark.parametrize("address", ["8.8.8.8", "172.32.0.1", "2606:4700::1111", "64:ff9b::8.8.8.8", "100.128.0.1"])
def test_a_public_address_may_be_connected_to_unless_it_is_this_machines(address: str) -> None:
    assert hindrance(ip_address(address), (), is_own=False) is None
    told = hindrance(ip_address(address), (), is_own=True)
    assert told is not None
    assert "is an address of this machine" in told


@pytest.mark.parametrize(
    ("network", "address"),
    [
        ("10.0.0.0/8", "10.1.2.3"),
        ("10.0.0.0/8", "::ffff:10.1.2.3"),
        ("10.0.0.0/8", "64:ff9b::10.1.2.3"),
        ("fd00::/8", "fd00::1"),
        ("169.254.169.254", "169.254.169.254"),
        ("8.8.8.0/24", "8.8.8.8"),
    ],
)
def test_a_named_network_lets_its_addresses_pass(network: str, address: str) -> None:
    assert hindrance(ip_address(address), [parse_network(network)], is_own=True) is None


@pytest.mark.parametrize(
    ("network", "address"),
    [("169.254.0.0/16", "169.254.169.254"), ("100.64.0.0/10", "100.100.100.200"), ("fc00::/7", "fd00:ec2::254")],
)
def test_metadata_is_not_named_by_the_network_around_it(network: str, address: str) -> None:
    assert hindrance(ip_address(address), [parse_network(network)], is_own=False) is not None


@given(st.ip_addresses(v=4).filter(lambda address: not address.is_global))
def test_what_python_knows_not_to_be_global_is_in_a_range(address: IPv4Address) -> None:
    assert find_range(address) is not None


@given(st.ip_addresses(v=6))
def test_of_ipv6_only_global_unicast_and_spelled_ipv4_are_public(address: IPv6Address) -> None:
    if find_range(address) is None:
        text = address.exploded
        assert text[0] in "23" or text.startswith(("0064:ff9b:0000", "0000:0000:0000:0000:0000:ffff"))


@pytest.mark.parametrize(
    "raw",
    [
        *("127.1", "0x7f000001", "0x7f.0.0.1", "2130706433", "017700000001", "0177.0.0.1", "127.0.0.1.0", "1.2.3.04"),
        *("256.1.1.1", "1.2.3", "0x", "a.0x1", "", ".", "a..b", ".a", "a.", "a..", "-a", "a-", "a b", "a\x00", "a\r\n"),
        *("a/b", "a%2eb", "a#b", "a?b", "a\\b", "[a]", "ⓖithub.com", "a\u3002b", "a" * 64, "a." * 127 + "a"),
        *("::1%lo", "fe80::1%25eth0", "::g", "1:2", ":::"),
    ],
)
def test_what_is_no_host_is_refused(raw: str) -> None:
    if raw == "a.":
        assert parse_host(raw) == "a"
        return
    with pytest.raises(Refusal):
        parse_host(raw)


@given(st.text(st.characters(codec="utf-8"), max_size=40) | st.from_regex(r"[0-9a-fx.:%\[\]@]{1,30}", fullmatch=True))
def test_whatever_is_taken_as_host_and_port_is_taken_again_as_it_was_read(raw: str) -> None:
    try:
        host, port = parse_authority(raw, 80)
    except Refusal:
        return
    assert parse_host(host) == host
    assert host.isascii()
    assert 0 < port < 65_536
