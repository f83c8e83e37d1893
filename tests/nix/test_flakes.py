"""The flakes that the daemon renders, locks and evaluates, by real nix and real git."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from hive_core.flakes.flake_files import agent_files, git_url, input_of, meta_flake, nix_string
from hive_core.flakes.flakes import MetaFlake
from hive_core.flakes.nix import NixLimits
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName
from hive_core.settings import parse_agent_toml
from tests import nixes
from tests.nix.desk import AGENT, IRIS, SYSTEM, Desk, git
from tests.processes import look_until, pids_naming


@pytest.fixture
async def desk(tmp_path: Path, hyperhive: Path, store: Path) -> Desk:
    desk = Desk(tmp_path, hyperhive, store)
    await desk.meta.open()
    return desk


# -- rendering --------------------------------------------------------------------------------------------------------


NASTY = [
    '"; builtins.readFile "/etc/passwd',
    "${builtins.readFile /etc/passwd}",
    "$${x}",
    "\\${x}",
    '\\"${1+1}',
    "''${x}''",
    "a\\",
    "$",
    "\r\n\t\x0b\x7f\u202e",
    "*/ x /* # y",
    "",
]


def test_no_text_can_leave_its_literal(nix: nixes.Nix, tmp_path: Path) -> None:
    texts: list[str] = list(NASTY)
    alphabet = st.characters(exclude_characters="\0", exclude_categories=["Cs"]) | st.sampled_from(list("\"\\${}'\n\r"))

    @settings(max_examples=400, database=None, deadline=None)
    @given(st.text(alphabet, max_size=60))
    def collect(text: str) -> None:
        texts.append(text)

    collect()
    file = tmp_path / "texts.nix"
    file.write_text(f"[ {' '.join(map(nix_string, texts))} ]", "utf-8", newline="")
    done = nix.run("nix-instantiate", "--eval", "--strict", "--json", file)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == texts


@pytest.mark.parametrize("text", ["a\0b", "\ud800", 7, None])
def test_what_nix_cannot_hold_is_refused(text: object) -> None:
    with pytest.raises(Refusal, match="cannot write this into a flake"):
        nix_string(text)


def test_no_field_of_a_flake_can_become_another_or_code(nix: nixes.Nix, tmp_path: Path) -> None:
    """Names too, though nobody could have such ones: each flake has what it was given, and nothing beside it."""
    hostile = st.lists(st.sampled_from([*NASTY, "x", "\\", "''", "{{ 1 }}", "{% raw %}", "\ufeff"]), max_size=3).map(
        "".join
    )
    given_to: list[list[str]] = []

    @settings(max_examples=150, database=None, deadline=None)
    @given(hostile, hostile, hostile, hostile)
    def collect(name: str, title: str, url: str, system: str) -> None:
        given_to.append([name, title or name, url, system])

    collect()
    for number, (name, title, url, system) in enumerate(given_to):
        agent = agent_files(AgentName(name), title, hyperhive=url, system=system)["flake.nix"]
        meta = meta_flake({AgentName(name): url}, hyperhive=title, nixpkgs=title, system=system)
        (tmp_path / f"{number}.agent.nix").write_text(agent, "utf-8", newline="")
        (tmp_path / f"{number}.meta.nix").write_text(meta, "utf-8", newline="")
    (tmp_path / "given.json").write_text(json.dumps(given_to))
    found = nix.value(f"""
        let
          given = builtins.fromJSON (builtins.readFile {tmp_path}/given.json);
          hyperhive.lib.mkAgent = asked: removeAttrs asked [ "modules" ];
          look = n: let
            agent = import ({tmp_path} + "/${{toString n}}.agent.nix");
            meta = import ({tmp_path} + "/${{toString n}}.meta.nix");
            name = builtins.head (builtins.elemAt given n);
          in [
            (removeAttrs agent [ "outputs" ])
            (agent.outputs {{ self = {{ }}; inherit hyperhive; }})
            (removeAttrs meta [ "outputs" ])
            (meta.outputs {{ inherit hyperhive; "agent-${{name}}" = "/none"; }})
          ];
        in builtins.genList look (builtins.length given)""")
    for (name, title, url, system), (agent, made, meta, all_made) in zip(given_to, found, strict=True):
        assert agent == {"description": title, "inputs": {"hyperhive": {"url": url}}}
        assert made == {"nixosConfigurations": {"default": {"name": name, "system": system}}}
        assert meta["inputs"] == {
            "nixpkgs": {"url": title},
            "hyperhive": {"url": title, "inputs": {"nixpkgs": {"follows": "nixpkgs"}}},
            f"agent-{name}": {"url": url, "flake": False},
        }
        assert all_made == {"nixosConfigurations": {name: {"name": name, "system": system}}}


def test_a_meta_flake_is_the_same_in_whatever_order_its_agents_come(nix: nixes.Nix, tmp_path: Path) -> None:
    names = [AgentName(name) for name in ("hm1nd", "iris", "a-b-c", "z" * 30)]
    one = meta_flake(dict.fromkeys(names, "u"), hyperhive="h", nixpkgs="n", system=SYSTEM)
    assert one == meta_flake(dict.fromkeys(reversed(names), "u"), hyperhive="h", nixpkgs="n", system=SYSTEM)
    (tmp_path / "flake.nix").write_text(one)
    nix.parses([tmp_path / "flake.nix"])


def test_the_url_of_a_repository_keeps_what_its_path_holds() -> None:
    assert git_url(Path('/a b/#?%"${x}/r.git')) == "git+file:///a%20b/%23%3F%25%22%24%7Bx%7D/r.git?ref=refs/heads/main"


# -- locking ----------------------------------------------------------------------------------------------------------


async def test_what_is_staged_is_locked_and_committed_when_all_went_well(desk: Desk) -> None:
    first = desk.commit()
    async with desk.meta.staged(desk.flake(IRIS), "iris: deployed/0") as url:
        assert url == f"git+file://{desk.folder}/meta"
        assert await desk.meta.log() == ["An empty hive"]
    assert await desk.meta.log() == ["iris: deployed/0", "An empty hive"]
    assert set(desk.contents()) == {"flake.nix", "flake.lock"}
    assert json.loads(desk.contents()["flake.lock"])["nodes"]["agent-iris"]["locked"]["rev"] == first


async def test_only_what_is_named_is_locked_anew(desk: Desk) -> None:
    argus = AgentName("argus")
    old_iris, _ = desk.commit(), desk.commit(argus)
    await desk.deploy(IRIS, argus)
    desk.commit(agent_toml='model = "opus"\n')
    new_argus = desk.commit(argus, agent_toml='model = "opus"\n')
    async with desk.meta.staged(desk.flake(IRIS, argus), "argus", [input_of(argus)]):
        pass
    nodes = json.loads(desk.contents()["flake.lock"])["nodes"]
    assert nodes["agent-argus"]["locked"]["rev"] == new_argus
    assert nodes["agent-iris"]["locked"]["rev"] == old_iris


async def test_a_build_that_fails_or_is_cancelled_leaves_everything_as_it_was(desk: Desk) -> None:
    desk.commit()
    await desk.deploy(IRIS)
    before = desk.contents()
    desk.commit(agent_toml='model = "opus"\n')

    async def build_badly() -> None:
        async with desk.meta.staged(desk.flake(IRIS), "worse", [input_of(IRIS)]):
            assert desk.contents() != before
            raise RuntimeError("the build failed")

    with pytest.raises(RuntimeError, match="the build failed"):
        await build_badly()
    assert desk.contents() == before
    with trio.CancelScope() as scope:
        async with desk.meta.staged(desk.flake(), "gone"):
            scope.cancel()
            await trio.lowlevel.checkpoint()
    assert desk.contents() == before
    assert git(desk.folder / "meta", "status", "--porcelain") == ""
    assert await desk.meta.log() == ["deploy", "An empty hive"]


async def test_an_input_that_is_not_there_is_refused_and_leaves_everything_as_it_was(desk: Desk) -> None:
    desk.commit()
    await desk.deploy(IRIS)
    before = desk.contents()
    with pytest.raises(Refusal) as caught:
        await desk.deploy(IRIS, AgentName("nobody"))
    assert caught.value.message.startswith("cannot lock the meta flake: ")
    assert "nobody" in caught.value.message
    assert desk.contents() == before


async def test_what_a_daemon_that_died_had_staged_is_put_back_by_the_next(desk: Desk, hyperhive: Path) -> None:
    desk.commit()
    await desk.deploy(IRIS)
    before = desk.contents()
    meta = desk.folder / "meta"
    (meta / "flake.nix").write_text("half")
    git(meta, "add", "flake.nix")
    (meta / "flake.lock.tmp").touch()
    (meta / ".git" / "index.lock").touch()
    await MetaFlake(meta, desk.applied, desk.nix, desk.sources).open()
    assert desk.contents() == before


async def test_two_who_stage_at_once_wait_for_each_other(desk: Desk) -> None:
    argus = AgentName("argus")
    desk.commit()
    desk.commit(argus)
    async with desk.meta.staged(desk.flake(IRIS), "first"):
        with trio.move_on_after(0.5) as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(desk.deploy, argus)
        assert scope.cancelled_caught
    async with trio.open_nursery() as nursery:
        nursery.start_soon(desk.deploy, IRIS)
        nursery.start_soon(desk.deploy, argus)
    assert await desk.meta.log() == ["deploy", "deploy", "first", "An empty hive"]


# -- evaluating -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "toml",
    [
        "",
        'available_models = ["sonnet"]\n[env]\nTZ = "UTC"\n[mcp_servers.x]\ncommand = "x"\nargs = ["$H", "${y}"]\n',
        'model = "opus"\neffort = "high"\n',
        'program = "rehearsal"\ntools = []\nrecipients = ["operator", "hm1nd"]\n',
        'turns = "cold"\nwarm_idle_s = 9\nwarm_turns = 2\nwarm_memory_mib = 64\nturn_silence_s = 10\n',
        "context_window = 200000\ncompact_at_percent = 0\nbackground_s = 5\n",
        'credential = "second-one"\npair_rate_per_hour = 3\n',
        'description = "\\"; ${builtins.currentTime} \\\\ é"\n',
    ],
)
async def test_with_nix_the_settings_are_those_that_agent_toml_gives_without(desk: Desk, toml: str) -> None:
    desk.commit(agent_toml=toml, CLAUDE_md="You are ${iris}.\n")
    await desk.deploy(IRIS)
    found = await desk.evaluate()
    assert found.settings == parse_agent_toml(toml.encode())
    assert found.persona == "You are ${iris}.\n"


async def test_a_module_may_say_more_than_its_agent_toml(desk: Desk) -> None:
    desk.commit(agent_nix=AGENT.replace("environment.", 'hyperhive.allowedRecipients = [ "hm1nd" ];\n  environment.'))
    await desk.deploy(IRIS)
    assert (await desk.evaluate()).settings.recipients == ["hm1nd"]


async def test_a_proposal_is_evaluated_beside_what_is_deployed_and_changes_nothing(desk: Desk) -> None:
    desk.commit()
    await desk.deploy(IRIS)
    before = desk.contents()
    proposed = desk.commit(agent_toml='model = "opus"\n')
    assert (await desk.meta.evaluate(IRIS, proposed)).settings.model == "opus"
    assert (await desk.evaluate()).settings.model == "haiku"
    assert desk.contents() == before


HOST_FILE = "/etc/os-release"


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("{ pkgs, ... }: { hyperhive.model = ; }", "syntax error, unexpected ';' (agent.nix:1:36)"),
        ("{ hyperhive.frob = 1; }", "The option `hyperhive.frob' does not exist"),
        ('{ hyperhive.settings.warm_turns = "two"; }', "is not of type"),
        ('{ hyperhive.settings.description = "a\\u0000" + builtins.fromJSON "[]"; }', "cannot coerce"),
        (f"{{ hyperhive.persona = builtins.readFile {HOST_FILE}; }}", f"it reads {HOST_FILE} of the host"),
        ("{ imports = [ /etc/nixos/configuration.nix ]; }", "it reads /etc/nixos/configuration.nix of the host"),
        ("{ hyperhive.persona = builtins.readFile ./../../../../etc/os-release; }", "of the host"),
        (
            '{ imports = [ (derivation { name = "x"; system = "x86_64-linux"; builder = "/bin/sh"; }) ]; }',
            "it imports what would first have to be built",
        ),
        (
            '{ hyperhive.persona = builtins.readFile (builtins.fetchurl { url = "http://host.invalid/x";'
            ' sha256 = "0000000000000000000000000000000000000000000000000000"; }); }',
            "it fetches from the network",
        ),
        ("{ config, ... }: { hyperhive.persona = config.hyperhive.persona; }", "it refers to itself without end"),
        ("let f = x: 1 + f x; in { hyperhive.persona = toString (f 0); }", "it calls itself too deep"),
        (
            '{ fileSystems."/host" = { device = "/"; options = [ "bind" ]; }; }',
            'it mounts "/host", and what a cont',
        ),
        ("{ hyperhive.persona = builtins.readFile ./nothing.md; }", "nothing.md"),
        ('{ hyperhive.persona = throw "\u202e a \n b"; }', "a"),
    ],
)
async def test_a_module_that_is_no_good_is_one_sentence_and_touches_nothing(desk: Desk, module: str, said: str) -> None:
    desk.commit()
    await desk.deploy(IRIS)
    before = desk.contents()
    proposed = desk.commit(agent_nix=module)
    with pytest.raises(Refusal) as caught:
        await desk.meta.evaluate(IRIS, proposed)
    assert caught.value.code == "refused"
    assert caught.value.message.startswith("cannot use agent.nix of iris: ")
    assert said in caught.value.message
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 500
    assert desk.contents() == before
    assert (await desk.evaluate()).settings.model == "haiku"


@pytest.mark.parametrize(
    ("module", "limits", "said"),
    [
        (
            "let l = builtins.genList (x: x) 100000; in"
            " { hyperhive.persona = toString (builtins.foldl' (a: x: builtins.foldl' (b: y: b + y) a l) 0 l); }",
            NixLimits(time_s=3),
            "it took longer than 3 s; does it go round in circles?",
        ),
        (
            '{ hyperhive.persona = builtins.foldl\' (a: b: a + a) "x" (builtins.genList (x: x) 40); }',
            NixLimits(memory_mib=1024),
            "it took more than 1,024 MiB of memory",
        ),
        (
            '{ hyperhive.persona = builtins.foldl\' (a: b: a + a) "x" (builtins.genList (x: x) 21); }',
            NixLimits(),
            "it gave more than 1,048,576 bytes",
        ),
    ],
)
async def test_a_module_that_takes_too_much_is_ended(
    tmp_path: Path, hyperhive: Path, store: Path, module: str, limits: NixLimits, said: str
) -> None:
    desk = Desk(tmp_path, hyperhive, store, limits)
    await desk.meta.open()
    desk.commit(agent_nix=module)
    await desk.deploy(IRIS)
    with pytest.raises(Refusal) as caught:
        await desk.evaluate()
    assert said in caught.value.message


async def test_a_link_out_of_the_repository_is_not_followed(desk: Desk) -> None:
    desk.commit()
    await desk.deploy(IRIS)
    work = desk.applied / "iris.git.work"
    (work / "CLAUDE.md").unlink()
    (work / "CLAUDE.md").symlink_to(HOST_FILE)
    proposed = desk.commit()
    with pytest.raises(Refusal, match="of the host"):
        await desk.meta.evaluate(IRIS, proposed)


async def test_an_agents_own_flake_brings_in_nothing(desk: Desk) -> None:
    desk.commit(flake_nix='{ inputs.host.url = "path:/etc"; outputs = throw "never"; }')
    await desk.deploy(IRIS)
    assert "host" not in json.loads(desk.contents()["flake.lock"])["nodes"]
    assert (await desk.evaluate()).settings.model == "haiku"


async def test_an_evaluation_that_nobody_waits_for_ends(desk: Desk) -> None:
    endless = "let l = builtins.genList (x: x) 100000; in builtins.foldl' (a: x: builtins.foldl' (b: y: b + y) a l) 0 l"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(desk.nix.run, ["eval", "--expr", endless])
        await trio.to_thread.run_sync(look_until, lambda: pids_naming(endless))
        nursery.cancel_scope.cancel()
    # Some of them may have begun behind that look; the kernel ends them with the first in their namespace.
    await trio.to_thread.run_sync(look_until, lambda: not pids_naming(endless))


async def test_without_bubblewrap_nothing_is_evaluated(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "nix").symlink_to("/usr/bin/nix")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Refusal, match="bubblewrap is not installed; install it"):
        await desk.nix.run(["eval", "--expr", "1"])
