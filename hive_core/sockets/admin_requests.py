"""The operator's verbs that put a card: he asks, as hm1nd does, and approves it by a word of its own. On host.sock."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from hive_core.hive import Hive
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import OPERATOR, parse_agent_name, parse_commit_sha, shown
from hive_core.services.refused_requests import noting_a_refusal

Args = dict[str, Any]
Answer = Callable[[Args], Awaitable[Any]]
Verbs = dict[str, tuple[Answer, set[str]]]
_OF_A_NEW_AGENT = {"agent", "persona", "reason", "icon", "toolkit"}


def request_verbs(hive: Hive) -> Verbs:
    """verb → (what answers it, the arguments it takes). Each answers `{"approval": id}`."""

    async def request_spawn(args: Args) -> Any:
        name, persona, reason, more = _of_a_new_agent(args)
        return await hive.gate.spawn.request(OPERATOR, name, persona, reason, **more)

    async def request_init_config(args: Args) -> Any:
        """And `config`: where its repository will lie, to be shaped."""
        name, persona, reason, more = _of_a_new_agent(args)
        asked = await hive.gate.init_config.request(OPERATOR, name, persona, reason, **more)
        return {**asked, "config": str(hive.config.state_dir / "proposed" / name / "config")}

    async def request_apply_commit(args: Args) -> Any:
        name, sha = parse_agent_name(args.get("agent")), parse_commit_sha(args.get("sha"))
        return await hive.gate.apply_commit.request(OPERATOR, name, sha, args.get("reason"))

    async def request_update_meta_inputs(args: Args) -> Any:
        return await hive.gate.update_meta_inputs.request(OPERATOR, args.get("reason"))

    async def request_claude(args: Args) -> Any:
        former = args.get("former", False)
        if not isinstance(former, bool):
            raise Refusal("usage", f"cannot use {shown(former)} as `former`: give true or false")
        return await hive.update_claude.request(args.get("path"), args.get("reason"), former)

    def noted(kind: str, ask: Answer, takes: set[str]) -> Verbs:
        async def answer(args: Args) -> Any:
            async with noting_a_refusal(hive.store, OPERATOR, kind, args):
                return await ask(args)

        return {f"request_{kind}": (answer, takes)}

    return {
        **noted("spawn", request_spawn, _OF_A_NEW_AGENT),
        **noted("init_config", request_init_config, _OF_A_NEW_AGENT),
        **noted("apply_commit", request_apply_commit, {"agent", "sha", "reason"}),
        **noted("claude", request_claude, {"path", "reason", "former"}),
        **noted("update_meta_inputs", request_update_meta_inputs, {"reason"}),
    }


def _of_a_new_agent(args: Args) -> tuple[Any, Any, Any, Args]:
    more = {key: args.get(key) for key in ("icon", "toolkit")}
    return parse_agent_name(args.get("agent")), args.get("persona"), args.get("reason"), more
