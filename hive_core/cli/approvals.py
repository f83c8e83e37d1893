"""Approvals: shown whole, approved or denied."""

from __future__ import annotations

from hive_core.cli.client import Client
from hive_core.cli.output import emit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace


def pending(arguments: Namespace) -> None:
    from hive_core.cli.show import approval_line

    result = Client().call("pending")
    emit(arguments, result, "\n".join(map(approval_line, result["approvals"])) or "nothing waits for you")


def show(arguments: Namespace) -> None:
    from hive_core.cli.show import approval

    result = Client().call("show", approval=arguments.approval)
    emit(arguments, result, approval(result))


def apply(arguments: Namespace) -> None:
    client = Client()
    sha = client.call("expand_commit", agent=arguments.agent, revision=arguments.revision)["sha"]
    result = client.call("request_apply_commit", agent=arguments.agent, sha=sha, reason=arguments.reason)
    lines = [f"{arguments.revision} is {sha}; approval {result['approval']} waits for you"]
    lines += [f"`hive show {result['approval']}` shows it, `hive approve {result['approval']}` approves it"]
    emit(arguments, {**result, "sha": sha}, "\n".join(lines))


def diff(arguments: Namespace) -> None:
    from hive_core.protocol.visible import named

    result = Client().call("diff", approval=arguments.approval, against=arguments.against)
    emit(arguments, result, named(result["diff"]).rstrip("\n") or f"the same as {result['base'][:12]}")


def approve(arguments: Namespace) -> int:
    client = Client()
    digest = arguments.digest or client.call("show", approval=arguments.approval)["digest"]
    result = client.call("approve", approval=arguments.approval, digest=digest)
    note = f": {result['note']}" if result["note"] else ""
    emit(arguments, result, f"approval {result['id']} of {result['agent']}: {result['state']}{note}")
    return 0 if result["state"] == "done" else 1


def deny(arguments: Namespace) -> None:
    result = Client().call("deny", approval=arguments.approval, reason=arguments.reason)
    emit(arguments, result, f"approval {result['id']} of {result['agent']}: {result['state']}")
