"""Credentials that are missing, refused or limited, with the real Claude Code, the real daemon and a scripted model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from hive_core.cli.client import Client
from hive_core.protocol.refusal import Refusal
from tests.daemons import Daemon, open_daemon
from tests.needs import find_claude
from tests.scripted_model import Answer, Request, ScriptedModel, fail, say, tool

KEY, OTHER = "sk-ant-api03-canary-one-of-the-host", "sk-ant-api03-canary-two-of-the-host"
TOKEN = "sk-ant-oat01-" + "canary" * 10


def obeys(request: Request) -> Answer:
    """One message to the operator, then the end of the turn."""
    if request.tool_results:
        return "Done."
    return say(tool("mcp__hive__send", to="operator", body="I am at work"))


class Provider:
    """What the model provider says, first of all to whom; a test may change it."""

    def __init__(self) -> None:
        self.no: Callable[[Request], Answer | None] = lambda _: None

    def __call__(self, request: Request) -> Answer:
        return self.no(request) or obeys(request)


@contextmanager
def a_hive(**environment: str) -> Iterator[tuple[Daemon, ScriptedModel, Provider]]:
    provider = Provider()
    with ScriptedModel(provider) as model:
        flags = [f"--provider-base-url={model.base_url}", f"--claude={find_claude()}", "--end-agents-with-daemon"]
        flags += ["--provider-rest-s=0.1", "--limit-rest-s=3", "--refused-rest-s=600"]
        with open_daemon(*flags, **environment) as daemon:
            yield daemon, model, provider


def state(daemon: Daemon, name: str, state: str) -> dict[str, Any]:
    return daemon.wait_live(lambda agent: agent["name"] == name and agent["state"] == state)


@pytest.mark.parametrize(
    ("kind", "secret", "header", "value"),
    [("api_key", KEY, "x-api-key", KEY), ("oauth_token", TOKEN, "authorization", f"Bearer {TOKEN}")],
)
def test_an_agent_without_a_credential_waits_and_answers_when_one_is_given(
    kind: str, secret: str, header: str, value: str
) -> None:
    with a_hive() as (daemon, model, _):
        client = daemon.start()
        assert "hive login" in state(daemon, "hm1nd", "needs_login")["detail"]
        client.call("send", to="hm1nd", body="are you there?")
        state(daemon, "hm1nd", "needs_login")
        assert not [event for event in client.stream("events", after=0) if event["kind"] == "turn_started"]
        client.call("credentials_give", credential="default", kind=kind, secret=secret)
        daemon.wait_message(client, "I am at work")
        (request, *_) = model.turns
        assert request.headers[header] == value
        if kind == "oauth_token":
            assert "oauth-2025-04-20" in request.headers["anthropic-beta"]
        assert client.call("credentials")["credentials"][0]["state"] == "works"
        assert "canary" not in daemon.log.read_text()


def test_a_refused_key_is_tried_once_and_the_message_is_answered_with_another() -> None:
    with a_hive() as (daemon, model, provider):
        provider.no = lambda request: fail(401, "bad key") if request.headers["x-api-key"] == KEY else None
        client = daemon.start()
        client.call("credentials_give", credential="default", kind="api_key", secret=KEY)
        client.call("send", to="hm1nd", body="are you there?")
        assert "`hive login default`" in state(daemon, "hm1nd", "needs_login")["detail"]
        assert len(model.turns) == 1
        client.call("credentials_give", credential="default", kind="api_key", secret=OTHER)
        daemon.wait_message(client, "I am at work")
        assert [kind for kind in told(client) if kind != "changed"] == ["logged_in", "refused", "logged_in"]


@pytest.mark.parametrize(("status", "headers"), [(429, {"retry_after": "2"}), (529, {})])
def test_a_limit_ends_the_turn_and_its_message_is_answered_when_it_is_over(
    status: int, headers: dict[str, str]
) -> None:
    refusals = threading.Semaphore(1)
    with a_hive(ANTHROPIC_API_KEY=KEY) as (daemon, model, provider):
        provider.no = lambda _: fail(status, **headers) if refusals.acquire(blocking=False) else None
        client = daemon.start()
        client.call("send", to="hm1nd", body="are you there?")
        assert f"({status})" in state(daemon, "hm1nd", "rate_limited")["detail"]
        daemon.wait_message(client, "I am at work")
        assert ends(client)[0] == "waiting", "a limit was taken for a failure, or for a result"
        assert told(client) == ["limited", "reopened"]
        assert len([request for request in model.turns if not request.tool_results]) == 2, "it was found out twice"


def test_a_program_that_waits_for_the_end_of_its_limit_by_itself_goes_on_in_its_turn() -> None:
    refusals = threading.Semaphore(1)
    with a_hive(ANTHROPIC_API_KEY=KEY) as (daemon, _, provider):
        provider.no = lambda _: fail(429, retry=True, retry_after="1") if refusals.acquire(blocking=False) else None
        client = daemon.start()
        client.call("send", to="hm1nd", body="are you there?")
        daemon.wait_message(client, "I am at work")
        assert told(client) == ["limited", "reopened"]
        assert "waiting" not in ends(client)


def told(client: Client) -> list[str]:
    """What was told of credentials, oldest first."""
    kinds = [event["kind"] for event in client.stream("events", after=0)]
    return [kind.removeprefix("credential_") for kind in kinds if kind.startswith("credential_")]


def ends(client: Client) -> list[str]:
    """How turns ended, oldest first."""
    return [event["data"]["state"] for event in client.stream("events", after=0) if event["kind"] == "turn_ended"]


def test_a_default_from_the_environment_cannot_be_logged_in_over() -> None:
    with a_hive(ANTHROPIC_API_KEY=KEY) as (daemon, _, _provider), pytest.raises(Refusal, match="ANTHROPIC_API_KEY"):
        daemon.start().call("login", credential="default")
