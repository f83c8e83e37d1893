"""Changes that pass by a rule: real commits through the real gate, in the transaction that would put their card."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from hive_core.effects import Effect
from hive_core.git.proposals import Proposal
from hive_core.policy_rules import LINES, Rule
from hive_core.procedures.deployments import PlainDeployments
from hive_core.protocol.words import AgentName, CommitSha
from hive_core.services.approvals import Approval
from hive_core.services.events import newest_events
from hive_core.services.freeze import Freeze
from tests.checkouts import Checkout
from tests.dashboards import OURS, browse, hive_of
from tests.git.test_gate import HM1ND, IRIS, TOML, approve, ask_for, mail_of, serving
from tests.hives import Services, held_writer, open_services
from tests.tools import program_of

OPERATOR = AgentName("operator")


def rule(**given: Any) -> Rule:
    usual = {"name": "own prompt", "kind": "apply_commit", "agents": ["iris"], "requested_by": ["hm1nd"]}
    return Rule.model_validate({**usual, "only": ["prompt"], **given})


@asynccontextmanager
async def opened(folder: Path, *rules: Rule, **more: Any) -> AsyncIterator[Services]:
    async with open_services(folder, policy=rules, **more) as hive:
        await hive.gate.ensure_manager("You manage.")
        yield hive


async def add_iris(hive: Services) -> Checkout:
    number = (await hive.gate.spawn.request(OPERATOR, IRIS, "You read.", "a reader"))["approval"]
    async with serving(hive):
        assert (await approve(hive, number)).state == "done"
    return Checkout(hive.repos.proposed_dir / "iris" / "config")


async def state(hive: Services, number: int) -> tuple[str, str | None]:
    card = await hive.approvals.get(number)
    return card.state, card.rule


def prompt(iris: Checkout, text: str) -> CommitSha:
    return iris.commit(CLAUDE__md=f"{text}\n")


async def test_a_change_that_a_rule_allows_is_carried_out_without_a_click_and_marked_as_such(tmp_path: Path) -> None:
    async with opened(tmp_path, rule()) as hive:
        iris = await add_iris(hive)
        sha = prompt(iris, "You read aloud.")
        number = await ask_for(hive, sha)
        assert await hive.approvals.pending() == []
        async with serving(hive):
            done = await hive.approvals.wait_settled(number)
        assert (done.state, done.rule, done.resolved_by, done.resolved_from) == (
            "done",
            "own prompt",
            "policy",
            "policy",
        )
        assert (await hive.agents.get("iris")).deployed_sha == sha
        events = [event for event in await newest_events(hive.store, 50) if event["data"].get("approval") == number]
        kinds = [event["kind"] for event in events if event["kind"] != "approval_step"]
        assert kinds == ["approval_requested", "approval_approved", "approval_done"]
        assert (events[1]["actor"], events[1]["data"]["rule"]) == ("policy", "own prompt")
        (told,) = [body for body in await mail_of(hive, "hm1nd") if f"approval: {number}" in body]
        assert "approved by rule own prompt, without a click" in told.splitlines()[0]
        assert 'rule: "own prompt"' in told


async def test_whoever_asks_is_told_at_once_whether_it_waits_or_has_passed(tmp_path: Path) -> None:
    async with opened(tmp_path, rule(per_day=1)) as hive:
        iris = await add_iris(hive)
        async with program_of(hive, "hm1nd", tmp_path) as client, serving(hive):
            asked = {"agent": "iris", "sha": prompt(iris, "one"), "reason": "r"}
            result = await client.result("request_apply_commit", **asked)
            number = result["structuredContent"]["approval"]
            assert result["structuredContent"]["rule"] == "own prompt"
            assert "passed by rule own prompt" in result["content"][0]["text"]
            await hive.approvals.wait_settled(number)
            waits = await client.result("request_apply_commit", **{**asked, "sha": prompt(iris, "two")})
            assert waits["structuredContent"].get("rule", "") == ""
            assert "asks the operator for it" in waits["content"][0]["text"]


async def test_a_way_back_that_passes_by_a_rule_is_not_said_to_wait_for_a_click(tmp_path: Path) -> None:
    async with opened(tmp_path, rule(requested_by="*")) as hive:
        iris = await add_iris(hive)
        async with serving(hive), browse(hive_of(hive)) as client:
            await hive.approvals.wait_settled(await ask_for(hive, prompt(iris, "one")))
            client.headers.update({**OURS, "Accept": "application/json"})
            answer = await client.post("/agents/iris/rollback", data={"to": "deployed/0"})
            assert answer.json()["said"] == "approval 3 passed by rule own prompt, without a click"


async def test_without_a_rule_everything_waits(tmp_path: Path) -> None:
    async with opened(tmp_path) as hive:
        iris = await add_iris(hive)
        assert await state(hive, await ask_for(hive, prompt(iris, "x"))) == ("pending", None)


async def test_what_no_rule_allows_waits_and_is_approved_as_ever(tmp_path: Path) -> None:
    async with opened(tmp_path, rule()) as hive:
        iris = await add_iris(hive)
        number = await ask_for(hive, iris.commit(agent__toml=TOML, CLAUDE__md="Obey me.\n"))
        assert await state(hive, number) == ("pending", None)
        async with serving(hive):
            done = await approve(hive, number)
        assert (done.state, done.rule, done.resolved_by) == ("done", None, "operator")


async def test_a_new_agent_waits_whatever_the_rules_say(tmp_path: Path) -> None:
    async with opened(tmp_path, rule(agents="*", requested_by="*", only=["prompt", "model", "tools"])) as hive:
        number = (await hive.gate.spawn.request(HM1ND, IRIS, "You read.", "a reader"))["approval"]
        assert await state(hive, number) == ("pending", None)


async def test_a_commit_that_would_make_an_agent_waits(tmp_path: Path) -> None:
    every = rule(agents="*", only=sorted(LINES))
    async with opened(tmp_path, every) as hive, serving(hive):
        asked = await hive.gate.init_config.request(HM1ND, IRIS, "You read.", "a reader")
        assert (await approve(hive, asked["approval"])).state == "done"
        number = await ask_for(hive, prompt(Checkout(hive.repos.proposed_dir / "iris" / "config"), "x"))
        assert await state(hive, number) == ("pending", None)
        assert (await hive.gate.policy.rehearse([every]))["passes"] == 0


async def test_the_managers_own_change_waits(tmp_path: Path) -> None:
    async with opened(tmp_path, rule(agents="*")) as hive:
        own = Checkout(hive.repos.proposed_dir / "hm1nd" / "config")
        asked = await hive.gate.apply_commit.request(HM1ND, HM1ND, prompt(own, "I rule."), "r")
        assert await state(hive, asked["approval"]) == ("pending", None)


async def test_nothing_passes_by_itself_while_the_swarm_is_stopped(tmp_path: Path) -> None:
    async with opened(tmp_path, rule()) as hive:
        iris = await add_iris(hive)
        freeze = Freeze(hive.store, hive.agents.access)
        await freeze.estop("operator")
        stopped = await ask_for(hive, prompt(iris, "one"))
        await freeze.thaw("operator")
        thawed = await ask_for(hive, prompt(iris, "two"))
        assert await state(hive, stopped) == ("pending", None)
        assert await state(hive, thawed) == ("approved", "own prompt")


async def test_a_stop_that_the_disk_did_not_take_yet_holds(tmp_path: Path) -> None:
    async with opened(tmp_path, rule()) as hive:
        iris = await add_iris(hive)
        freeze = Freeze(hive.store, hive.agents.access)
        freeze.since_ms = 1
        assert await state(hive, await ask_for(hive, prompt(iris, "one"))) == ("pending", None)
    async with opened(tmp_path, rule()) as hive:
        await hive.sql("UPDATE swarm SET frozen_at_ms = 1")
        assert await state(hive, await ask_for(hive, prompt(iris, "two"))) == ("pending", None)


async def test_what_was_denied_waits_when_it_is_asked_for_again_also_by_another_commit(tmp_path: Path) -> None:
    async with opened(tmp_path, rule()) as hive:
        iris = await add_iris(hive)
        freeze = Freeze(hive.store, hive.agents.access)
        await freeze.estop("operator")
        sha = prompt(iris, "one")
        number = await ask_for(hive, sha)
        await hive.gate.deny(number, "no", OPERATOR)
        await freeze.thaw("operator")
        assert await state(hive, await ask_for(hive, sha)) == ("pending", None)
        iris.git("commit", "--quiet", "--amend", "--message", "the same by another name")
        again = CommitSha(iris.git("rev-parse", "HEAD").strip())
        assert again != sha
        assert await state(hive, await ask_for(hive, again)) == ("pending", None)
        assert await state(hive, await ask_for(hive, prompt(iris, "two"))) == ("approved", "own prompt")


async def pass_one(hive: Services, iris: Checkout, text: str) -> Approval:
    """The end of a change of the prompt."""
    number = await ask_for(hive, prompt(iris, text))
    card = await hive.approvals.get(number)
    return card if card.state == "pending" else await hive.approvals.wait_settled(number)


async def test_over_its_number_a_day_the_next_one_waits_until_a_day_has_passed(tmp_path: Path) -> None:
    async with opened(tmp_path, rule(per_day=2)) as hive:
        iris = await add_iris(hive)
        async with serving(hive):
            ends = [(await pass_one(hive, iris, text)).state for text in ("one", "two", "three")]
            assert ends == ["done", "done", "pending"]
            hive.clock.ahead_s += 24 * 3600.0
            assert (await pass_one(hive, iris, "four")).state == "done"
            # The card that waits is not looked at again: it is the operator's.
            assert [card.rule for card in await hive.approvals.pending()] == [None]


async def test_over_one_rules_number_another_rule_may_allow_it(tmp_path: Path) -> None:
    async with opened(tmp_path, rule(per_day=1), rule(name="again", per_day=1)) as hive:
        iris = await add_iris(hive)
        async with serving(hive):
            rules = [(await pass_one(hive, iris, text)).rule for text in ("one", "two", "three")]
        assert rules == ["own prompt", "again", None]


async def test_requests_at_the_same_moment_pass_no_more_than_a_day_allows(tmp_path: Path) -> None:
    """Each about an agent of its own, so that only the number is between them."""
    async with opened(tmp_path, rule(agents="*", per_day=3)) as hive:
        shas: dict[AgentName, CommitSha] = {}
        async with serving(hive):
            for name in map(AgentName, ("ares", "dike", "eris", "hera", "iris", "leto")):
                await approve(hive, (await hive.gate.spawn.request(OPERATOR, name, "You read.", "r"))["approval"])
                shas[name] = prompt(Checkout(hive.repos.proposed_dir / name / "config"), f"You are {name}.")
        async with trio.open_nursery() as nursery, held_writer(hive.store, nursery):
            for name, sha in shas.items():
                nursery.start_soon(hive.gate.apply_commit.request, HM1ND, name, sha, "r")
        states = [card.rule for name in shas for card in await hive.approvals.of(name) if card.kind == "apply_commit"]
        assert sorted(states, key=str) == [None] * 3 + ["own prompt"] * 3


async def test_a_second_change_of_an_agent_waits_while_its_first_is_carried_out(tmp_path: Path) -> None:
    """Its effect is told against what the agent runs on no longer when its turn comes."""
    async with opened(tmp_path, rule()) as hive:
        iris = await add_iris(hive)
        first = await ask_for(hive, prompt(iris, "one"))
        second = await ask_for(hive, prompt(iris, "two"))
        assert await state(hive, first) == ("approved", "own prompt")
        assert await state(hive, second) == ("pending", None)


class Slow(PlainDeployments):
    """Lets another change of the agent be deployed while the effect of one is being told."""

    async def check(self, name: AgentName, proposal: Proposal) -> Effect:
        effect = await super().check(name, proposal)
        self.told.set()
        await self.go_on.wait()
        return effect

    told, go_on = trio.Event(), trio.Event()


async def test_a_change_waits_when_its_agent_runs_on_something_else_than_its_effect_was_told_against(
    tmp_path: Path,
) -> None:
    Slow.told, Slow.go_on = trio.Event(), trio.Event()

    def deployments(*parts: Any) -> Slow:
        return Slow(*parts, sandbox="bwrap")

    async with opened(tmp_path, rule(), deployments=deployments) as hive:
        iris = await add_iris(hive)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask_for, hive, prompt(iris, "one"))
            await Slow.told.wait()
            await hive.sql("UPDATE agents SET deployed_sha = ? WHERE name = 'iris'", "1" * 40)
            Slow.go_on.set()
        assert [card.rule for card in await hive.approvals.pending()] == [None]


# -- a daemon with other rules ----------------------------------------------------------------------------------------


async def test_what_passed_is_carried_out_by_a_daemon_that_has_the_rule_no_more(tmp_path: Path) -> None:
    async with opened(tmp_path, rule()) as hive:
        iris = await add_iris(hive)
        sha = prompt(iris, "one")
        number = await ask_for(hive, sha)
    async with opened(tmp_path) as hive, serving(hive):
        done = await hive.approvals.wait_settled(number)
        assert (done.state, done.rule, done.resolved_by) == ("done", "own prompt", "policy")
        assert (await hive.agents.get("iris")).deployed_sha == sha
        assert await state(hive, await ask_for(hive, prompt(iris, "two"))) == ("pending", None)


async def test_a_card_that_waits_is_not_passed_by_a_rule_that_comes_later(tmp_path: Path) -> None:
    async with opened(tmp_path) as hive:
        iris = await add_iris(hive)
        number = await ask_for(hive, prompt(iris, "one"))
    async with opened(tmp_path, rule()) as hive, serving(hive):
        assert await state(hive, number) == ("pending", None)
        assert (await pass_one(hive, iris, "two")).rule == "own prompt"
        assert await state(hive, number) == ("pending", None)


# -- the rehearsal ----------------------------------------------------------------------------------------------------


async def test_a_rehearsal_tells_what_would_have_passed_and_first_what_of_that_was_denied_or_failed(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as hive:
        iris = await add_iris(hive)
        async with serving(hive):
            done = await ask_for(hive, prompt(iris, "good"))
            await approve(hive, done)
            denied = await ask_for(hive, prompt(iris, "bad"))
            await hive.gate.deny(denied, "no", "operator")
            other = await ask_for(hive, iris.commit(agent__toml=TOML))
            await hive.gate.deny(other, "no", "operator")
            failed, waits = await ask_for(hive, prompt(iris, "ugly")), await ask_for(hive, prompt(iris, "late"))
        await hive.sql("UPDATE approvals SET state = 'failed', note = 'it broke' WHERE id = ?", failed)
        await hive.sql("UPDATE approvals SET effect = NULL WHERE id = ?", other)

        told = await hive.gate.policy.rehearse([rule(name="proposed", only=["prompt", "model"])])
        assert {key: value for key, value in told.items() if key not in ("rules", "approvals")} == {
            "looked_at": 5,
            "not_known": 1,
            "over_per_day": 0,
            "passes": 4,
            "denied": 1,
            "failed": 1,
        }
        assert [one["id"] for one in told["approvals"]] == [failed, denied, waits, done]
        assert {one["rule"] for one in told["approvals"]} == {"proposed"}
        assert (told["approvals"][0]["note"], told["approvals"][1]["note"]) == ("it broke", "no")

        (one,) = told["rules"]
        assert (one["passes"], one["waits"], one["troubles"]) == (4, {"without a line": 1}, [])

        wrong = rule(name="w", agents=["iris", "irs"], only=["model", "promt"])
        (one,) = (await hive.gate.policy.rehearse([wrong]))["rules"]
        assert (one["passes"], one["waits"]) == (0, {"with prompt, which only does not name": 4, "without a line": 1})
        assert [trouble.split(",")[0] for trouble in one["troubles"]] == [
            "only names promt",
            "agents names irs",
        ]
        both = await hive.gate.policy.rehearse([rule(name="a", per_day=1), rule(name="b")])
        assert [(one["name"], one["passes"]) for one in both["rules"]] == [("a", 1), ("b", 1)]

        few = await hive.gate.policy.rehearse([rule(only=["prompt", "model"], per_day=1)])
        assert (few["passes"], few["over_per_day"]) == (1, 3)
        await hive.sql("UPDATE approvals SET requested_at_ms = requested_at_ms - 86400000 WHERE id <= ?", other)
        two = await hive.gate.policy.rehearse([rule(only=["prompt", "model"], per_day=1)])
        assert ([one["id"] for one in two["approvals"]], two["over_per_day"]) == ([failed, done], 2)
        hive.clock.ahead_s += 3 * 24 * 3600.0
        assert (await hive.gate.policy.rehearse([rule()], days=2))["looked_at"] == 0
        assert (await hive.gate.policy.rehearse([rule()], days=5))["looked_at"] == 5
        assert (await hive.gate.policy.rehearse([]))["passes"] == 0
        assert [kind for kind in await hive.kinds() if "approval" in kind][-1] != "approval_approved"


async def test_a_rehearsal_agrees_with_what_the_rules_did(tmp_path: Path) -> None:
    rules = [rule(per_day=2)]
    async with opened(tmp_path, *rules) as hive:
        iris = await add_iris(hive)
        async with serving(hive):
            for text in ("one", "two", "three"):
                await pass_one(hive, iris, text)
        told = await hive.gate.policy.rehearse(rules)
        assert (told["passes"], told["over_per_day"]) == (2, 1)
        assert all(one["passed_by"] == one["rule"] == "own prompt" for one in told["approvals"])
        (row,) = await hive.gate.policy.to_wire()
        assert (row["name"], row["passed"], row["troubles"]) == ("own prompt", 2, [])
