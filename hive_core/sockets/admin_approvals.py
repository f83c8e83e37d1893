"""The operator's verbs about what waits for his word, and its decision, on host.sock."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

import trio

from hive_core.hive import Hive
from hive_core.procedures.kinds.apply_commit import BASES
from hive_core.procedures.together import Click
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import OPERATOR, parse_agent_name, parse_id, shown
from hive_core.services.approvals import COMMITS

Args = dict[str, Any]
Tell = Callable[[Any], Awaitable[None]]
Streams = dict[str, tuple[Callable[[Args, Tell], Awaitable[None]], set[str]]]
Verbs = dict[str, tuple[Callable[[Args], Awaitable[Any]], set[str]]]
caller_uid: ContextVar[int] = ContextVar("caller_uid")  # of whoever is answered now


def approval_verbs(hive: Hive) -> Verbs:
    """verb → (what answers it, the arguments it takes)."""

    async def expand_commit(args: Args) -> Any:
        """What a person calls a commit → its whole id; who asks for it then says that."""
        name = parse_agent_name(args.get("agent"))
        return {"sha": await hive.gate.apply_commit.expand(name, args.get("revision"))}

    async def diff(args: Args) -> Any:
        approval = await hive.approvals.get(parse_id(args.get("approval"), "an approval"))
        against = args.get("against", "running")
        if against not in BASES:
            raise Refusal("usage", f"cannot compare with {shown(against)}: against is one of {', '.join(BASES)}")
        if approval.kind not in COMMITS:
            raise Refusal("usage", f"cannot compare approval {approval.id}: it is of no commit (`hive show` shows it)")
        return await hive.gate.apply_commit.diff(approval, against)

    async def pending(_: Args) -> Any:
        return {"approvals": [approval.to_wire() for approval in await hive.approvals.pending()]}

    async def show(args: Args) -> Any:
        return (await hive.approvals.get(parse_id(args.get("approval"), "an approval"))).to_wire()

    async def approve(args: Args) -> Any:
        approval_id, digest = parse_id(args.get("approval"), "an approval"), args.get("digest")
        if not isinstance(digest, str):
            raise Refusal("usage", "cannot approve without the digest of what was shown; `show` gives it")
        return (await hive.gate.approve(approval_id, digest, OPERATOR, _door())).to_wire()

    async def deny(args: Args) -> Any:
        approval_id, reason = parse_id(args.get("approval"), "an approval"), args.get("reason")
        return (await hive.gate.deny(approval_id, reason, OPERATOR, _door())).to_wire()

    return {
        "expand_commit": (expand_commit, {"agent", "revision"}),
        "diff": (diff, {"approval", "against"}),
        "pending": (pending, set()),
        "show": (show, {"approval"}),
        "approve": (approve, {"approval", "digest"}),
        "deny": (deny, {"approval", "reason"}),
    }


def approval_streams(hive: Hive) -> Streams:
    """verb → (what goes on, the arguments it takes)."""

    async def approve_all(args: Args, tell: Tell) -> None:
        """Each step of each, and its end; one that is refused tells its `error`."""
        clicks = _clicks(args.get("approvals"))

        async def tell_step(row: dict[str, Any]) -> None:
            with suppress(trio.BrokenResourceError):  # it goes on, whether anybody looks or not
                await tell(row)

        for outcome in await hive.together.approve(clicks, OPERATOR, _door(), tell=tell_step):
            await tell({**outcome.to_wire(), "end": True})

    return {"approve_all": (approve_all, {"approvals"})}


def _clicks(given: object) -> list[Click]:
    """From `[[ID, DIGEST], …]`. Raises Refusal("usage")."""
    if not isinstance(given, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in given):
        raise Refusal("usage", "cannot approve without the digests of what was shown: give [ID, DIGEST] for each")
    clicks = [Click(parse_id(number, "an approval"), digest) for number, digest in given]
    if not all(isinstance(click.digest, str) for click in clicks):
        raise Refusal("usage", "cannot approve without the digest of what was shown; `show` gives it")
    return clicks


def _door() -> str:
    return f"host.sock, uid {caller_uid.get()}"
