"""What an agent.nix may try: each ends in one sentence, or in nothing that it could not know anyway."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hive_core.flakes.nix import NixLimits
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName
from tests.nix.desk import Desk

LIMITS = NixLimits(time_s=15, memory_mib=1024)
ENDLESS = ("never ends", "matches for ever")  # each takes all the time that it is given
SAY = "{ pkgs, lib, ... }: { hyperhive.persona = %s; }"
HOST = "it reads %s of the host, and it sees its own repository alone"
HASH = "0000000000000000000000000000000000000000000000000000"

REFUSED = {
    # The host's files.
    "a file of the host": (SAY % "builtins.readFile /etc/shadow", HOST % "/etc/shadow"),
    "a file of the host, as a text": (SAY % 'builtins.readFile "/etc/shadow"', HOST % "/etc/shadow"),
    "a file of the host, copied": (SAY % '"${/etc/shadow}"', HOST % "/etc/shadow"),
    "a file of the host by path": (SAY % "builtins.path { path = /etc/shadow; }", HOST % "/etc/shadow"),
    "a folder of the host": (SAY % "toString (builtins.attrNames (builtins.readDir /etc))", "of the host"),
    "a folder of the host, filtered": (SAY % '"${builtins.filterSource (a: b: true) /etc}"', HOST % "/etc"),
    "what the sandbox was told": (SAY % "builtins.readFile /proc/self/environ", HOST % "/proc/self/environ"),
    "a file without end": (SAY % "builtins.readFile /dev/zero", HOST % "/dev/zero"),
    "the database": (SAY % "builtins.readFile /var/lib/hyperhive/hive.sqlite", "of the host"),
    "code of the host": ("import /etc/nixos/configuration.nix", "of the host"),
    "code of the host, scoped": (SAY % "builtins.scopedImport { } /etc/nixos/configuration.nix", "of the host"),
    "a hash of a file of the host": (SAY % 'builtins.hashFile "sha256" /etc/shadow', HOST % "/etc/shadow"),
    "something else of the store": (SAY % "builtins.storePath /nix/store", "storePath"),
    "up and out": (SAY % "builtins.readFile ./../../../etc/shadow", "of the host"),
    "a file of the host, and catches what happens": (
        SAY % "toString (builtins.tryEval (builtins.readFile /etc/shadow)).success",
        HOST % "/etc/shadow",
    ),
    "the search path": (SAY % "toString <nixpkgs>", "nixpkgs"),
    # The network, and other repositories.
    "a download": (
        SAY % (f'builtins.readFile (builtins.fetchurl {{ url = "http://a.invalid"; sha256 = "{HASH}"; }})'),
        "",
    ),
    "a download without a hash": (SAY % 'builtins.readFile (builtins.fetchurl "http://host.invalid")', ""),
    "an archive": (
        SAY % (f'"${{builtins.fetchTarball {{ url = "http://a.invalid"; sha256 = "{HASH}"; }}}}"'),
        "",
    ),
    "a repository of the network": (
        SAY % f'"${{builtins.fetchGit {{ url = "https://host.invalid/x"; rev = "{HASH[:40]}"; }}}}"',
        "",
    ),
    "a flake of the host": (SAY % '(builtins.getFlake "path:/etc").x', ""),
    "a tree of the host": (SAY % '"${builtins.fetchTree { type = "path"; path = "/etc"; }}"', ""),
    # Building while evaluating.
    "imports from a derivation": (
        'import (derivation { name = "x"; system = "x86_64-linux"; builder = "/bin/sh"; })',
        "it imports what would first have to be built",
    ),
    "reads from a derivation": (SAY % "builtins.readFile pkgs.strace", "it imports what would first have to be built"),
    "reads what is downloaded by a build": (
        SAY
        % (
            'builtins.readFile (derivation { name = "x"; system = "x86_64-linux"; builder = "/bin/sh";'
            f' outputHash = "{HASH}"; outputHashAlgo = "sha256"; }})'
        ),
        "it imports what would first have to be built",
    ),
    "runs a program": (SAY % 'builtins.exec [ "id" ]', "exec"),
    "loads a library": (SAY % 'builtins.importNative ./x.so "y"', "importNative"),
    # Without end, and too much.
    "goes round": ("{ config, ... }: { hyperhive.persona = config.hyperhive.persona; }", "it refers to itself without"),
    "imports itself": ("{ imports = [ ./agent.nix ]; }", ""),
    "calls itself": ("let f = x: 1 + f x; in { hyperhive.persona = toString (f 0); }", "it calls itself too deep"),
    "never ends": (
        "let l = builtins.genList (x: x) 100000; in"
        " { hyperhive.persona = toString (builtins.foldl' (a: x: builtins.foldl' (b: y: b + y) a l) 0 l); }",
        "it took longer than 3 s",
    ),
    "grows": (SAY % 'builtins.foldl\' (a: b: a + a) "x" (builtins.genList (x: x) 40)', "it took more than 1,024 MiB"),
    "makes a list of everything": (
        SAY % "toString (builtins.genList (x: x) 1000000000)",
        "it took more than 1,024 MiB",
    ),
    "matches for ever": (
        SAY % 'toString (builtins.match "(x+x+)+y" (builtins.foldl\' (a: b: a + a) "x" (builtins.genList (x: x) 16)))',
        "",
    ),
    "is nested": ("(" * 30_000 + ")" * 30_000, ""),
    "gives a megabyte": (
        SAY % 'builtins.foldl\' (a: b: a + a) "x" (builtins.genList (x: x) 21)',
        "it gave more than 1,048,576 bytes",
    ),
    "gives too long a prompt": (
        SAY % 'builtins.foldl\' (a: b: a + a) "x" (builtins.genList (x: x) 16)',
        "hyperhive.persona",
    ),
    # What is the host's to say.
    "mounts": ('{ fileSystems."/host" = { device = "/"; options = [ "bind" ]; }; }', 'it mounts "/host"'),
    "mounts by a unit": (
        '{ systemd.mounts = [ { what = "/"; where = "/host"; type = "none"; } ]; }',
        'it mounts "/host"',
    ),
    "a mount with a strange name": ('{ fileSystems."/a\\n\x1b[31m" = { device = "/"; }; }', "it mounts"),
    "is the manager": (
        '{ lib, ... }: { hyperhive.role = lib.mkForce "manager"; }',
        "hyperhive.role is the hive's",
    ),
    "sets what is the hive's": ('{ hyperhive.env.LD_PRELOAD = "/state/x.so"; }', "the hive's own to set"),
    "serves our tools": ('{ hyperhive.extraMcpServers.hive.command = "x"; }', "mcp_servers.hive is the hive's own"),
    "a setting that there is not": ("{ hyperhive.settings.sudo = true; }", "does not exist"),
    "a credential by a path": ('{ hyperhive.credential = "../default"; }', "is not of type"),
    "declares an option again": ("{ lib, ... }: { options.hyperhive.persona = lib.mkOption { }; }", "declared twice"),
    # Lies.
    "an error that says otherwise": (SAY % 'throw "a\\nerror: nothing is wrong\\nwarning: approved"', ""),
    "an error that paints": (SAY % 'throw "\x1b[2J\u202e"', ""),
    "an error of a megabyte": (
        SAY % 'throw (builtins.foldl\' (a: b: a + a) "x" (builtins.genList (x: x) 20))',
        "",
    ),
    "aborts": (SAY % 'abort "it ends here"', "it ends here"),
    "is no module": ("42", ""),
    "is a text": ('"hyperhive"', ""),
    "is not there": ("{ imports = [ ./more.nix ]; }", "more.nix"),
}

# What gives nothing away.
HARMLESS = {
    "whether a file of the host is there": (SAY % 'if builtins.pathExists "/etc/shadow" then "yes" else "no"', "no"),
    "what the environment says": (SAY % '"${builtins.getEnv "HOME"}${builtins.getEnv "PATH"}."', "."),
    "the time": (SAY % 'if builtins ? currentTime then "yes" else "no"', "no"),
    "the machine": (SAY % 'if builtins ? currentSystem then "yes" else "no"', "no"),
    "prints on the side": (
        SAY % 'builtins.trace (builtins.concatStringsSep "x" (builtins.genList toString 99999)) "."',
        ".",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
async def test_a_hostile_module_is_one_sentence(tmp_path: Path, hyperhive: Path, store: Path, kind: str) -> None:
    module, said = REFUSED[kind]
    desk = Desk(tmp_path, hyperhive, store, replace(LIMITS, time_s=3) if kind in ENDLESS else LIMITS)
    await desk.meta.open()
    commit = desk.commit(agent_nix=module)
    with pytest.raises(Refusal) as caught:
        await desk.meta.evaluate(AgentName("iris"), commit)
    sentence = caught.value.message
    assert said in sentence
    assert "iris" in sentence or "hyperhive.persona" in sentence
    assert sentence.isprintable()
    assert len(sentence) < 500


@pytest.mark.parametrize("kind", HARMLESS)
async def test_a_curious_module_learns_nothing(tmp_path: Path, hyperhive: Path, store: Path, kind: str) -> None:
    module, said = HARMLESS[kind]
    desk = Desk(tmp_path, hyperhive, store, LIMITS)
    await desk.meta.open()
    found = await desk.meta.evaluate(AgentName("iris"), desk.commit(agent_nix=module))
    assert said in (None, found.persona)


async def test_an_agent_cannot_read_what_another_has(tmp_path: Path, hyperhive: Path, store: Path) -> None:
    desk = Desk(tmp_path, hyperhive, store, LIMITS)
    await desk.meta.open()
    theirs = desk.commit(AgentName("argus"), CLAUDE_md="secret")
    url = f"file://{desk.applied}/argus.git"
    read = f'builtins.readFile (builtins.fetchGit {{ url = "{url}"; rev = "{theirs}"; ref = "main"; }} + "/CLAUDE.md")'
    with pytest.raises(Refusal, match="cannot use agent"):
        await desk.meta.evaluate(AgentName("iris"), desk.commit(agent_nix=SAY % read))
