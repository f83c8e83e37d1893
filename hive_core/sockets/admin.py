"""host.sock: the operator's verbs as JSON lines. Whoever can open the socket is the operator.

A request is `{"v": 1, "verb": …, "args": {…}}`. An answer is `{"v": 1, "ok": true, "result": …}` or
`{"v": 1, "ok": false, "error": {"code", "message"}}`. A verb that goes on (`events`, `down`) sends answers marked
`"more": true`, then one without. Requests on one connection are answered in order.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from contextlib import aclosing, suppress
from functools import partial
from typing import Any

import trio

from hive_core.containers.helped import Helper, helper_trouble
from hive_core.hive import Hive
from hive_core.protocol.admin import PROTOCOL_VERSION
from hive_core.protocol.call_key import CallKey
from hive_core.protocol.container_id import container_id
from hive_core.protocol.file_names import FILES_MOST
from hive_core.protocol.lines import LINE_LIMIT_BYTES
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import (
    OPERATOR,
    AgentName,
    parse_agent_name,
    parse_id,
    parse_recipients,
    parse_text,
    shown,
)
from hive_core.services.agents import LIVE
from hive_core.services.archive import parse_query
from hive_core.services.attachments import body_with
from hive_core.services.configured import all_configured
from hive_core.services.events import follow_events, newest_events
from hive_core.services.flow import count_aside
from hive_core.services.life import life_of
from hive_core.services.question_words import parse_answer
from hive_core.services.schedules import parse_plan
from hive_core.services.stopped import stopped
from hive_core.sockets.admin_approvals import approval_streams, approval_verbs, caller_uid
from hive_core.sockets.admin_credentials import credential_streams, credential_verbs
from hive_core.sockets.admin_deploys import deploy_verbs
from hive_core.sockets.admin_forges import forge_verbs
from hive_core.sockets.admin_lifecycle import lifecycle_verbs
from hive_core.sockets.admin_policy import policy_verbs
from hive_core.sockets.admin_projects import project_streams, project_verbs
from hive_core.sockets.admin_reach import reach_verbs
from hive_core.sockets.admin_requests import request_verbs
from hive_core.sockets.admin_snapshots import snapshot_verbs
from hive_core.sockets.admin_spend import spend_verbs
from hive_core.sockets.admin_steering import steering_verbs
from hive_core.sockets.admin_tombstones import tombstone_verbs
from hive_core.sockets.admin_turns import turn_verbs
from hive_core.sockets.admin_updates import update_status, update_verbs
from hive_core.sockets.given_files import descriptors, given_files
from hive_core.sockets.unix import Connection, Lines
from hive_core.store.bus import EVENTS, WANTED
from hive_core.version import __version__

Args = dict[str, Any]
Tell = Callable[[Any], Awaitable[None]]  # sends one answer of a verb that goes on
LIMIT_MOST = 1000
TELL_WITHIN_S = 2.0  # whoever asked for the end and does not read must not hold it up
KEY_LIMIT_BYTES = 200
PATIENCE_MOST_S = 24 * 3600.0


class AdminDesk:
    def __init__(self, hive: Hive) -> None:
        self._hive = hive
        # verb → (what answers it, the arguments it takes)
        self._verbs: dict[str, tuple[Callable[[Args], Awaitable[Any]], set[str]]] = {
            "status": (self._status, set()),
            "list": (self._list, set()),
            "send": (self._send, {"to", "body", "in_reply_to", "key", "files"}),
            "messages": (self._messages, {"agent", "limit"}),
            "message": (self._message, {"message"}),
            "read": (self._read, {"message", "offset"}),
            "inbox": (self._inbox, {"limit"}),
            "dead": (partial(self._aside, "dead"), {"limit"}),
            "held": (partial(self._aside, "held"), {"limit"}),
            "requeue": (partial(self._move, "requeue"), {"message"}),
            "release": (partial(self._move, "release"), {"message"}),
            "drop": (partial(self._move, "drop"), {"message"}),
            "cancel": (self._cancel, {"agent"}),
            "search": (self._search, {"text", "sender", "thread", "after", "before", "limit", "cursor"}),
            "thread": (self._thread, {"message", "after"}),
            "explain": (self._explain, {"message"}),
            "questions": (self._questions, {"limit"}),
            "answer": (self._answer_question, {"question", "choices", "text", "key", "files"}),
            "schedule": (self._schedule, {"agent", "body", "cron", "zone", "every_s", "key"}),
            "schedules": (self._schedules, set()),
            "schedule_pause": (partial(self._schedule_move, "pause"), {"schedule"}),
            "schedule_resume": (partial(self._schedule_move, "resume"), {"schedule"}),
            "schedule_remove": (partial(self._schedule_move, "remove"), {"schedule"}),
            "schedule_run": (self._schedule_run, {"schedule", "key"}),
            "loose_ends": (self._loose_ends, {"agent"}),
            "start": (partial(self._want, "up"), {"agent"}),
            "pause": (partial(self._want, "paused"), {"agent"}),
            "estop": (self._estop, set()),
            "thaw": (self._thaw, set()),
            "kill": (self._kill, {"agent"}),
            "dashboard": (self._dashboard, set()),
            **approval_verbs(hive),
            **deploy_verbs(hive),
            **credential_verbs(hive),
            **forge_verbs(hive),
            **lifecycle_verbs(hive),
            **policy_verbs(hive),
            **project_verbs(hive),
            **reach_verbs(hive),
            **request_verbs(hive),
            **snapshot_verbs(hive),
            **spend_verbs(hive),
            **steering_verbs(hive),
            **tombstone_verbs(hive),
            **turn_verbs(hive),
            **update_verbs(hive),
        }
        self._streams: dict[str, tuple[Callable[[Args, Tell], Awaitable[None]], set[str]]] = {
            "watch": (self._watch, set()),
            "events": (self._events, {"follow", "after", "limit"}),
            "down": (self._down, {"patience_s"}),
            **approval_streams(hive),
            **credential_streams(hive),
            **project_streams(hive),
        }

    async def serve(self, stream: Connection) -> None:
        """Answer one client until it hangs up."""
        caller_uid.set(stream.peer_uid())
        descriptors.set(came := stream.take_descriptors(FILES_MOST))
        lines = Lines(stream, LINE_LIMIT_BYTES)
        while (request := await lines.next()) is not None:
            try:
                await self._answer(request, lines)
            except Refusal as refusal:
                await lines.send({"v": PROTOCOL_VERSION, "ok": False, "error": refusal.to_wire()})
            finally:
                while came:  # which no request took: they belong to none that comes later
                    os.close(came.pop())

    async def _answer(self, request: Args | Refusal, lines: Lines) -> None:
        if isinstance(request, Refusal):
            raise request
        version = request.get("v")
        if type(version) is not int or version != PROTOCOL_VERSION:  # true and 1.0 equal 1
            speaks = f"this daemon speaks {PROTOCOL_VERSION}; give just that number"
            raise Refusal("usage", f"cannot answer: the request says v={shown(version)}, {speaks}")
        verb = request.get("verb")
        if isinstance(verb, str) and verb in self._verbs:
            answer, keys = self._verbs[verb]
            result = await answer(_checked(verb, request.get("args", {}), keys))
            await lines.send({"v": PROTOCOL_VERSION, "ok": True, "result": result})
        elif isinstance(verb, str) and verb in self._streams:
            stream, keys = self._streams[verb]

            async def tell(result: Any) -> None:
                await lines.send({"v": PROTOCOL_VERSION, "ok": True, "more": True, "result": result})

            await stream(_checked(verb, request.get("args", {}), keys), tell)
            await lines.send({"v": PROTOCOL_VERSION, "ok": True, "result": None})
        else:
            known = ", ".join([*self._verbs, *self._streams])
            raise Refusal("usage", f"cannot do {shown(verb)}: the verbs are {known}")

    async def _status(self, _: Args) -> Any:
        hive = self._hive
        approvals, agents = await hive.approvals.pending(), await hive.agents.all()
        return {
            "version": __version__,
            "state_dir": str(hive.config.state_dir),
            "dashboard": hive.dashboard_url(),
            "credential": hive.credential.source if hive.credential else None,
            "credential_missing": hive.credential_missing or None,
            "credentials": hive.breaker.rows(),
            "claude": str(hive.claude) if hive.claude else None,
            "claude_pin": hive.pinned.pin.to_wire() if hive.pinned.pin else None,
            "claude_chosen": str(hive.config.claude) if hive.config.claude else None,
            "sandbox": hive.sandbox,
            "sandbox_trouble": hive.sandbox_trouble or await self._helper_trouble(),
            "sandbox_weakness": hive.sandbox_weakness,
            "unsafe": hive.unsafe,
            "frozen_since_ms": hive.freeze.since_ms,
            "stopped": stopped(hive.agents, agents, hive.reconciler.trouble),
            "pending": [{"id": a.id, "kind": a.kind, "agent": a.agent, "reason": a.reason} for a in approvals],
            "unread": await hive.broker.messages.unread(),
            "questions": [one.to_wire() for one in await hive.questions.open_to(OPERATOR)],
            **await count_aside(hive.store),
            **update_status(hive),
            "forges": await hive.forges.rows(),
            "refused": {agent.name: agent.refused for agent in agents if agent.refused},
        }

    async def _helper_trouble(self) -> str | None:
        config = self._hive.config
        if config.helper is None:
            return None
        return await helper_trouble(Helper(config.helper, config.state_dir, config.runtime_dir, config.sandbox))

    async def _list(self, _: Args) -> Any:
        hive = self._hive
        agents, outdated = [], set(hive.reconciler.updates.outdated)
        for agent in await hive.agents.all():
            live, settings, disk = hive.agents.live(agent.name), agent.settings or {}, hive.disk.of(agent.name)
            agents.append(
                {
                    "name": agent.name,
                    "container": container_id(agent.name),
                    "role": agent.role,
                    "wanted": agent.wanted,
                    "state": live.state,
                    "detail": live.detail,
                    "since_ms": live.since_ms,
                    "until_ms": live.until_ms,
                    "sandbox": live.sandbox,
                    "network": agent.network,
                    "outdated": agent.name in outdated,
                    "queued": agent.queued,
                    "held": agent.held,
                    "dead": agent.dead,
                    "refused": agent.refused,
                    "inbox_full": agent.queued >= hive.broker.limits.inbox_depth,
                    "program": settings.get("program"),
                    "model": agent.chosen_model or settings.get("model"),
                    "effort": agent.chosen_effort or settings.get("effort"),
                    "chosen_model": agent.chosen_model,
                    "chosen_effort": agent.chosen_effort,
                    "session": agent.session,
                    "context_tokens": agent.context_tokens,
                    "context_window": agent.context_window,
                    "errand": agent.errand,
                    "deployed_sha": agent.deployed_sha,
                    "page": hive.page_url(agent.name),
                    "status": agent.status,
                    "disk_bytes": disk.bytes if disk else None,
                    "disk_quota_bytes": hive.disk.quota_bytes,
                    "rests_until_ms": agent.rests_until_ms,
                }
            )
        swarm = {"unsafe": hive.unsafe, "frozen_since_ms": hive.freeze.since_ms, "shared_bytes": hive.disk.shared_bytes}
        return {"agents": agents, "configured": await all_configured(hive.store), **swarm}

    async def _watch(self, args: Args, tell: Tell) -> None:
        """What `list` answers, now and after each change."""
        with self._hive.store.bus.listen(LIVE, WANTED, EVENTS) as listener:
            while True:
                await tell(await self._list(args))
                await listener.wait()

    async def _send(self, args: Args) -> Any:
        in_reply_to, key = args.get("in_reply_to"), args.get("key")
        if key is not None:
            key = parse_text(key, "key", KEY_LIMIT_BYTES)
        reply = None if in_reply_to is None else parse_id(in_reply_to, "a message")
        with given_files(args.get("files", [])) as files:
            body = body_with(args.get("body"), len(files))
            return await self._hive.broker.send(OPERATOR, _recipients(args.get("to")), body, reply, key, files)

    async def _messages(self, args: Args) -> Any:
        agent = None if args.get("agent") is None else parse_agent_name(args["agent"])
        return {"messages": await self._hive.broker.messages.newest(agent, _limit(args))}

    async def _message(self, args: Args) -> Any:
        message_id = parse_id(args.get("message"), "a message")
        if (found := await self._hive.broker.messages.one(message_id)) is None:
            raise Refusal("not_found", f"cannot find message {message_id}")
        return found

    async def _read(self, args: Args) -> Any:
        message_id, offset = parse_id(args.get("message"), "a message"), args.get("offset", 0)
        if isinstance(offset, bool) or not isinstance(offset, int) or not 0 <= offset < 2**62:
            raise Refusal("usage", f"cannot use {shown(offset)} as the offset: give a number of bytes from 0")
        messages = self._hive.broker.messages
        return {**await messages.read_body(message_id, offset), "files": await messages.files(message_id)}

    async def _aside(self, state: str, args: Args) -> Any:
        return {"messages": await self._hive.broker.messages.aside(state, _limit(args))}

    async def _move(self, verb: str, args: Args) -> Any:
        messages, message_id = self._hive.broker.messages, parse_id(args.get("message"), "a message")
        move = {"requeue": messages.requeue, "release": messages.release, "drop": messages.drop}[verb]
        return {"message": message_id, "recipients": await move(message_id, OPERATOR)}

    async def _cancel(self, args: Args) -> Any:
        name = parse_agent_name(args.get("agent"))
        await self._hive.agents.get(name)
        return {"agent": name, "turn": await self._hive.broker.cancel_turn(name, OPERATOR)}

    async def _search(self, args: Args) -> Any:
        return await self._hive.archive.search(parse_query(args))

    async def _thread(self, args: Args) -> Any:
        after = 0 if args.get("after") is None else parse_id(args["after"], "a message")
        return await self._hive.archive.thread(parse_id(args.get("message"), "a message"), after)

    async def _explain(self, args: Args) -> Any:
        return await life_of(self._hive.store, parse_id(args.get("message"), "a message"))

    async def _questions(self, args: Args) -> Any:
        questions, limit = self._hive.questions, _limit(args)
        rows = [question.to_wire() for question in await questions.open_to(OPERATOR, limit)]
        rows += [{**question.to_wire(), "held": True} for question in await questions.held_from(OPERATOR, limit)]
        return {"questions": rows[:limit]}

    async def _answer_question(self, args: Args) -> Any:
        question_id = parse_id(args.get("question"), "a question")
        answer = parse_answer(args.get("choices"), args.get("text"))
        with given_files(args.get("files", [])) as files:
            return await self._hive.questions.answer(OPERATOR, question_id, answer, _key(args), files)

    async def _schedule(self, args: Args) -> Any:
        plan = parse_plan(*(args.get(key) for key in ("agent", "body", "cron", "zone", "every_s")))
        return await self._hive.schedules.add(plan, _key(args))

    async def _schedules(self, _: Args) -> Any:
        return {"schedules": await self._hive.schedules.all()}

    async def _schedule_move(self, verb: str, args: Args) -> Any:
        schedules, schedule_id = self._hive.schedules, parse_id(args.get("schedule"), "a schedule")
        move = {"pause": schedules.pause, "resume": schedules.resume, "remove": schedules.remove}[verb]
        return await move(schedule_id)

    async def _schedule_run(self, args: Args) -> Any:
        return await self._hive.schedules.run(parse_id(args.get("schedule"), "a schedule"), _key(args))

    async def _loose_ends(self, args: Args) -> Any:
        if args.get("agent") is None:
            return await self._hive.loose_ends.of(OPERATOR)
        return await self._hive.loose_ends.of((await self._hive.agents.get(parse_agent_name(args["agent"]))).name)

    async def _inbox(self, args: Args) -> Any:
        return {"messages": await self._hive.broker.messages.inbox(_limit(args))}

    async def _want(self, wanted: str, args: Args) -> Any:
        name = parse_agent_name(args.get("agent"))
        await self._hive.agents.want(name, wanted, OPERATOR)
        return {"agent": name, "wanted": wanted}

    async def _estop(self, _: Args) -> Any:
        return {"frozen": True, "changed": await self._hive.freeze.estop(OPERATOR)}

    async def _thaw(self, _: Args) -> Any:
        return {"frozen": False, "changed": await self._hive.freeze.thaw(OPERATOR)}

    async def _kill(self, args: Args) -> Any:
        name = parse_agent_name(args.get("agent"))
        await self._hive.reconciler.kill(name, OPERATOR)
        return {"agent": name, "wanted": "down"}

    async def _dashboard(self, _: Args) -> Any:
        return {"url": self._hive.sign_in_url()}

    async def _events(self, args: Args, tell: Tell) -> None:
        store, after = self._hive.store, args.get("after")
        if after is None:
            newest = await newest_events(store, _limit(args))
            for event in newest:
                await tell(event)
            after = newest[-1]["seq"] if newest else 0
        elif isinstance(after, bool) or not isinstance(after, int) or not 0 <= after < 2**62:
            raise Refusal("usage", "cannot use `after`: give the number of an event")
        end = None if args.get("follow") else await store.last_seq()
        if end is not None and after >= end:
            return
        async with aclosing(follow_events(store, after)) as following:
            async for event in following:
                await tell(event)
                if event["seq"] == end:
                    return

    async def _down(self, args: Args, tell: Tell) -> None:
        """Drain every agent, telling whom it waits for; then the daemon ends, also when whoever asked has left."""
        hive, patience_s = self._hive, args.get("patience_s", self._hive.config.drain_s)
        if isinstance(patience_s, bool) or not isinstance(patience_s, int | float):
            raise Refusal("usage", "cannot use `patience_s`: give a number of seconds")
        if not 0 <= patience_s <= PATIENCE_MOST_S:
            raise Refusal("usage", f"cannot wait {patience_s} s: give 0 to {PATIENCE_MOST_S:.0f}")
        ends: list[dict[str, str]] = []
        async with trio.open_nursery() as nursery:
            done = trio.Event()

            async def drain() -> None:
                ends.append(await hive.reconciler.drain(patience_s))
                done.set()
                hive.store.bus.publish([EVENTS])

            nursery.start_soon(drain)
            with suppress(trio.BrokenResourceError), hive.store.bus.listen(EVENTS) as listener:
                while not done.is_set():
                    with trio.move_on_after(TELL_WITHIN_S):
                        await tell({"waiting": hive.reconciler.running()})
                    await listener.wait()
        with suppress(trio.BrokenResourceError), trio.move_on_after(TELL_WITHIN_S):
            await tell({"ends": ends[0]})
        hive.stopping.set()


def _checked(verb: str, args: object, keys: set[str]) -> Args:
    if not isinstance(args, dict):
        raise Refusal("usage", "cannot read `args`: an object is needed")
    if unknown := sorted(set(args) - keys):
        takes = ", ".join(sorted(keys)) or "none"
        raise Refusal("usage", f"cannot do {verb}: it has no argument {shown(unknown[0])}; it takes {takes}")
    return args


def _recipients(raw: object) -> tuple[AgentName, ...]:
    recipients = parse_recipients(raw)
    if OPERATOR in recipients:
        raise Refusal("usage", "cannot send to operator: the name is reserved for you; name agents, or * for everyone")
    return recipients


def _key(args: Args) -> CallKey | None:
    """What a client that asks again gives both times."""
    if args.get("key") is None:
        return None
    key = parse_text(args["key"], "key", KEY_LIMIT_BYTES)
    if not key.isprintable():
        raise Refusal("usage", "cannot use the key: it has characters that cannot be seen; give letters and digits")
    return CallKey(key, {**args, "key": None})


def _limit(args: Args) -> int:
    limit = args.get("limit", 50)
    if isinstance(limit, bool) or not isinstance(limit, int) or not 0 < limit <= LIMIT_MOST:
        raise Refusal("usage", f"cannot use {shown(limit)} as the limit: give 1 to {LIMIT_MOST}")
    return limit
