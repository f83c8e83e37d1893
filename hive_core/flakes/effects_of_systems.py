"""What a change does to the system that an agent's container is: told from what nix makes of both commits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from hive_core.effects import Line, changed, listed, some
from hive_core.protocol.visible import counted, mib, named

T = TypeVar("T")
Text = Annotated[str, StringConstraints(max_length=1_000)]


class _Fact(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Package(_Fact):
    """mark: of what it is built from. paths: what of it is installed."""

    name: Text
    mark: Text
    paths: list[Text] = []


EVERYBODY = "u+rx,g+x,o+x"  # may start a wrapper, where NixOS is told nothing else


class Wrapper(_Fact):
    """permissions: its mode, as chmod takes it. program: a mark of what it starts."""

    setuid: bool
    setgid: bool
    capabilities: Text
    owner: Text = "root"
    group: Text = "root"
    permissions: Text = EVERYBODY
    program: Text = ""

    def __str__(self) -> str:
        rights = [f"setuid {self.owner}"] if self.setuid else []
        rights += [f"setgid {self.group}"] if self.setgid else []
        rights += [self.capabilities] if self.capabilities else []
        whose = [] if self.permissions == EVERYBODY else [f"mode {self.permissions} of group {self.group}"]
        return ", ".join([*(rights or ["no rights"]), *whose])


class Network(_Fact):
    """tcp, udp: what is open, as "80", "80-90" or "80 on eth0". trusted: interfaces from where all is."""

    firewall: bool
    dhcp: bool
    tcp: list[Text]
    udp: list[Text]
    trusted: list[Text] = []
    nameservers: list[Text]


class Facts(_Fact):
    """What nix says of a system. None: it could not say that."""

    packages: list[Package] | None = None
    services: dict[Text, Text] | None = None  # unit → a mark of what it says
    etc: dict[Text, Text] | None = None  # file → a mark of what it holds
    scripts: Text | None = None  # a mark of what starts the system, and puts it together
    users: dict[Text, list[Text]] | None = None  # name → its groups
    setuid: dict[Text, Wrapper] | None = None  # program → what it gets
    capabilities: dict[Text, Text] | None = None  # service → what it begins with
    network: Network | None = None
    programs: list[Text] | None = None
    absent: dict[Text, Text] | None = None  # a fact that could not be told → the option that its NixOS does not have


class Closure(NamedTuple):
    """The store paths that a system, or packages, need, and the bytes that each has."""

    sizes: Mapping[str, int]

    @property
    def size(self) -> int:
        return sum(self.sizes.values())

    def __str__(self) -> str:
        return f"{mib(self.size)} in {counted(len(self.sizes), 'path')}"

    def without(self, other: Closure) -> Closure:
        return Closure({path: size for path, size in self.sizes.items() if path not in other.sizes})


NO_CLOSURE = Closure({})


def parse_closure(said: bytes) -> Closure | None:
    """From `nix path-info --recursive --size`: a path and its bytes a line. None for anything else."""
    words = [line.split() for line in said.decode("utf-8", "replace").splitlines()]
    if not words or not all(len(line) == 2 and line[1].isdecimal() for line in words):
        return None
    return Closure({path: int(size) for path, size in words})


def brought_lines(
    before: Closure | None, packages: Sequence[Package], brought: Closure | None
) -> tuple[list[Line], list[str]]:
    """Of a change of packages alone: what they bring, which are in the store before the system is built.

    packages: those that come. brought: their closure. Gives the lines, and what is unknown.
    """
    if before is None or brought is None:
        names = some(sorted({named(package.name) for package in packages}))
        return [], [f"closure: {names} is not in the store yet, so its size is known once it is built"]
    new = brought.without(before)
    told = f"{new}: {some([_package(path) for path in sorted(new.sizes)])}" if new.sizes else "no more than there is"
    return [Line("closure", None, told, amounts={"closure_bytes": new.size})], []


def closure_lines(before: Closure | None, after: Closure | None) -> tuple[list[Line], list[str]]:
    """The lines, and what is unknown. before: NO_CLOSURE where there was no system."""
    if before is None or after is None:
        return [], ["closure: what it adds and takes, and its size, is known once it is built"]
    added, removed = sorted(after.without(before).sizes), sorted(before.without(after).sizes)
    # By how much it grows is what a rule of the policy may bound.
    grows = {"closure_bytes": max(0, after.size - before.size)}
    if before == NO_CLOSURE:
        return [Line("closure", None, str(after), amounts=grows)], []
    lines = [Line("closure", str(before), str(after), amounts=grows)] if before != after else []
    lines += [Line("closure", None, some([_package(path) for path in added]))] if added else []
    return lines + ([Line("closure", some([_package(path) for path in removed]), None)] if removed else []), []


def _package(path: str) -> str:
    """/nix/store/HASH-NAME → NAME."""
    return path.rpartition("/")[2].partition("-")[2]


def parse_facts(raw: object) -> Facts:
    """Facts from what an evaluation printed, which an agent may have made up; none of what makes no sense."""
    given: Mapping[str, Any] = raw if isinstance(raw, dict) else {}
    kept = {}
    for key in Facts.model_fields:
        try:
            kept[key] = getattr(Facts.model_validate({key: given.get(key)}), key)
        except ValidationError:
            kept[key] = None
    return Facts(**kept)


def system_lines(before: Facts, after: Facts) -> tuple[list[Line], list[str]]:
    """The lines, and what is unknown."""
    lines: list[Line] = []
    unknown: list[str] = []
    for key, rule in _RULES.items():
        was, is_now = getattr(before, key), getattr(after, key)
        if was is None or is_now is None:
            where, facts = ("this commit", after) if is_now is None else ("what runs now", before)
            option = (facts.absent or {}).get(key)
            why = f", whose NixOS has no {named(option)}" if option else ""
            unknown.append(f"{key}: nix cannot tell them of {where}{why}")
        else:
            lines += rule(key, was, is_now)
    return lines, unknown


def packages_that_come(before: Facts, after: Facts) -> list[Package]:
    had = {package.mark for package in before.packages or []}
    return [package for package in after.packages or [] if package.mark not in had]


def _packages(key: str, before: list[Package], after: list[Package]) -> list[Line]:
    names, others = _names(before), _names(after)
    lines = listed(key, names, others)
    rebuilt = [name for name in others if name in names and others[name] != names[name]]
    return lines + ([Line(key, some(rebuilt), "built otherwise")] if rebuilt else [])


def _names(packages: list[Package]) -> dict[str, set[str]]:
    """Each name, with the marks of all that have it: one may be there twice."""
    found: dict[str, set[str]] = {}
    for package in sorted(packages, key=lambda one: one.name):
        found.setdefault(package.name, set()).add(package.mark)
    return found


def _marked(key: str, before: dict[str, str], after: dict[str, str]) -> list[Line]:
    others = [name for name in after if name in before and after[name] != before[name]]
    return listed(key, before, after) + ([Line(key, some(others), "changed")] if others else [])


def _each(widens: bool) -> Callable[[str, Mapping[str, T], Mapping[str, T]], list[Line]]:
    """A line for each that comes, goes or is another."""

    def rule(key: str, before: Mapping[str, T], after: Mapping[str, T]) -> list[Line]:
        lines: list[Line] = []
        for name in sorted({*before, *after}):
            if name in before and name in after and _whole(before[name]) == _whole(after[name]):
                continue
            was, is_now = (_told(name, one[name]) if name in one else None for one in (before, after))
            if was == is_now:
                is_now = "the same but for what a line has no room for"
            lines.append(Line(key, was, is_now, wide=widens and name in after))
        return lines

    return rule


def _whole(value: object) -> object:
    return value if isinstance(value, list) else str(value)


def _told(name: str, value: object) -> str:
    text = some(value) if isinstance(value, list) else str(value)
    return f"{name} ({text})" if text else name


def _wrappers(key: str, before: Mapping[str, Wrapper], after: Mapping[str, Wrapper]) -> list[Line]:
    others = [name for name in after if name in before and after[name].program != before[name].program]
    told = [Line(key, some(others), "another program", wide=True)] if others else []
    return _each(widens=True)(key, before, after) + told


def _network(key: str, before: Network, after: Network) -> list[Line]:
    on = {True: "on", False: "off"}
    return [
        *changed("firewall", on[before.firewall], on[after.firewall], wide=not after.firewall),
        *changed("DHCP", on[before.dhcp], on[after.dhcp], wide=after.dhcp),
        *listed("open TCP ports", before.tcp, after.tcp, widens=True),
        *listed("open UDP ports", before.udp, after.udp, widens=True),
        *listed("trusted interfaces", before.trusted, after.trusted, widens=True),
        *listed("nameservers", before.nameservers, after.nameservers, widens=True),
    ]


def _programs(key: str, before: list[str], after: list[str]) -> list[Line]:
    return listed(key, before, after)


_RULES: Mapping[str, Callable[[str, Any, Any], list[Line]]] = {
    "setuid": _wrappers,
    "capabilities": _each(widens=True),
    "network": _network,
    "users": _each(widens=False),
    "packages": _packages,
    "services": _marked,
    "etc": _marked,
    "scripts": lambda key, before, after: [] if before == after else [Line(key, "as they are", "changed")],
    "programs": _programs,
}
