"""The defaults that keep a swarm quiet at night and stop a runaway one. Each is a key of the configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1, lt=2**31)]
Seconds = Annotated[float, Field(gt=0, lt=2**31, allow_inf_nan=False)]
# What is due later than any rest can be was put back before the clock was set back; so a rest has to have an end.
REST_LIMIT_S = 4 * 3600
Rest = Annotated[float, Field(gt=0, le=REST_LIMIT_S, allow_inf_nan=False)]


class Limits(BaseModel):
    """docs/defaults.md is made from this table; a test holds the two equal."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tries: Annotated[Count, Field(description="failed turns before a message is dead")] = 5
    backoff_s: Annotated[
        Rest, Field(description="rest after the first failed turn, doubled with each, ± half by chance")
    ] = 2.0
    provider_rest_s: Annotated[
        Rest, Field(description="rest of an agent and its message when the provider or the login was away, ± half")
    ] = 30.0
    after_limit: Annotated[
        Literal["resume", "stay"],
        Field(
            description="what agents do when a limit of their credential is over: resume by themselves, or stay "
            "stopped until `hive credentials resume NAME`"
        ),
    ] = "resume"
    limit_rest_s: Annotated[
        Rest,
        Field(
            description="rest of a credential that the provider turned away (429, 529) without saying until when, "
            "doubled with each up to 1 h, ± half"
        ),
    ] = 15.0
    refused_rest_s: Annotated[
        Rest,
        Field(
            description="rest of a credential that the provider refused (401, 403) before it is tried again, as above"
        ),
    ] = 60.0
    probe_s: Annotated[
        Seconds, Field(description="how long one agent tries a credential alone, after its rest, before another does")
    ] = 60.0
    resume_spread_s: Annotated[
        Seconds, Field(description="over how long the other agents follow the one that found the credential working")
    ] = 30.0
    lease_silence_s: Annotated[
        Seconds, Field(description="how long a harness may be silent before its turn is lost")
    ] = 60.0
    restart_s: Annotated[
        Rest, Field(description="rest of a container after a crash, doubled with each in a row up to 1 minute")
    ] = 1.0
    agent_memory_bytes: Annotated[
        int, Field(ge=64 * 2**20, lt=2**50, description="memory of each agent and all that it starts")
    ] = 4 * 2**30
    agent_cpu_percent: Annotated[int, Field(ge=1, lt=2**20, description="cpu of each agent; 100 is one processor")] = (
        200
    )
    agent_tasks: Annotated[int, Field(ge=16, lt=2**22, description="processes and threads of each agent")] = 2_048
    crash_loop: Annotated[
        Count,
        Field(description="crashes in a row before an agent is quarantined: not started again until `hive start NAME`"),
    ] = 8
    crash_loop_s: Annotated[
        Seconds, Field(description="how long after a crash the next one counts as in a row with it")
    ] = 600.0
    starts_at_once: Annotated[
        Count, Field(description="containers that start at once; the others wait, the manager first, then by name")
    ] = 4
    start_s: Annotated[
        Seconds, Field(description="how long a container that has not said hello yet holds up the starts of others")
    ] = 20.0
    hello_s: Annotated[
        Seconds, Field(description="how long an agent that was changed may take to say hello before it is taken back")
    ] = 120.0
    init_s: Annotated[
        Seconds, Field(description="and then its program to start and reach the hive's tools, before it is taken back")
    ] = 120.0
    canary_turn: Annotated[
        bool, Field(description="whether an agent that was changed also takes a turn with a fixed prompt, which costs")
    ] = False
    canary_s: Annotated[Seconds, Field(description="how long that turn is waited for")] = 300.0
    updates_at_once: Annotated[
        Count, Field(description="agents that are replaced at once after an upgrade, each at its turn's edge")
    ] = 2
    evaluation_s: Annotated[
        Seconds, Field(description="how long an agent's agent.nix may be evaluated before it is refused")
    ] = 60.0
    evaluation_memory_bytes: Annotated[
        int, Field(ge=2**28, lt=2**50, description="memory of the evaluation of an agent's agent.nix")
    ] = 4 * 2**30
    build_s: Annotated[
        Seconds, Field(description="how long the system of an agent's container may be built before the change fails")
    ] = 3600.0
    builds_at_once: Annotated[
        Count, Field(description="systems that are built at once; as many are evaluated, and one more to be asked for")
    ] = 2
    hops: Annotated[
        Count, Field(description="turns that one cause may set off in a chain before the next message is held")
    ] = 24
    pair_rate_per_hour: Annotated[
        Count, Field(description="messages of one agent to one recipient before they are held")
    ] = 60
    profile_changes_per_hour: Annotated[
        Count, Field(description="changes of an agent's status and profile by itself before more are refused")
    ] = 120
    inbox_depth: Annotated[Count, Field(description="messages that wait for one agent before more are refused")] = 1_000
    held_depth: Annotated[
        Count, Field(description="held messages of one agent, or taken back within an hour, before more are refused")
    ] = 100
    fan_out: Annotated[Count, Field(description="recipients of one message")] = 200
    body_quota_bytes: Annotated[Count, Field(description="kept files of large bodies, for each sender")] = (
        256 * 1024 * 1024
    )
    files_per_message: Annotated[int, Field(ge=1, le=100, description="files that come with one message")] = 10
    file_bytes: Annotated[Count, Field(description="each of them")] = 32 * 1024 * 1024
    message_files_bytes: Annotated[Count, Field(description="all files of one message together")] = 64 * 1024 * 1024
    files_quota_bytes: Annotated[
        int, Field(ge=1, lt=2**62, description="kept files of all messages, each counted once, before more are refused")
    ] = 2 * 1024**3
    line_quota_bytes: Annotated[Count, Field(description="kept lines that its program printed, for each agent")] = (
        64 * 1024 * 1024
    )
    disk_quota_bytes: Annotated[
        int,
        Field(
            ge=1, lt=2**62, description="what an agent's directories may take of the disk before the manager is told"
        ),
    ] = 10 * 1024**3
    snapshot_s: Annotated[
        Seconds, Field(description="how long after a snapshot of an agent's /state no other is taken by itself")
    ] = 600.0
    snapshots_kept: Annotated[
        Count, Field(description="snapshots of an agent's /state: the newest half of them, and one a day before that")
    ] = 12
    snapshots_bytes: Annotated[
        int, Field(ge=1, lt=2**62, description="what an agent's snapshots may take of the disk, and each of them alone")
    ] = 4 * 1024**3
    project_bytes: Annotated[
        int, Field(ge=2**20, lt=2**50, description="what the mirror of a project's repository may take of the disk")
    ] = 8 * 1024**3
    project_fetch_s: Annotated[
        Seconds, Field(description="how long a project may be fetched from where it is, and cloned by an agent")
    ] = 900.0
    push_bytes: Annotated[Count, Field(description="what one push of an agent to a project may bring")] = (
        256 * 1024 * 1024
    )
    push_s: Annotated[
        Seconds, Field(description="how long one push may take, until the project's repository has it")
    ] = 300.0
    approval_ttl_s: Annotated[Seconds, Field(description="how long a request waits for the operator's word")] = (
        7 * 24 * 3600.0
    )
    request_depth: Annotated[
        Count,
        Field(description="requests of hm1nd that wait, or were taken back within an hour, before more are refused"),
    ] = 100
    request_quota_bytes: Annotated[Count, Field(description="what those that wait may take, diffs and all")] = (
        16 * 1024 * 1024
    )
    forge_poll_s: Annotated[
        float,
        Field(ge=5, le=REST_LIMIT_S, allow_inf_nan=False, description="between two looks at what happens on a forge"),
    ] = 60.0
    lane_per_hour: Annotated[
        Count, Field(description="news of forges that one lane tells before the rest waits at the forge")
    ] = 60
    forge_writes_per_hour: Annotated[
        Count, Field(description="pull requests, issues and comments of one agent on forges before more are refused")
    ] = 30
    forge_reads_per_hour: Annotated[
        Count, Field(description="looks of one agent at forges before more are refused")
    ] = 600
    question_ttl_s: Annotated[Seconds, Field(description="how long a question waits for its answer")] = 6 * 3600.0
    kept_s: Annotated[Seconds, Field(description="how long an acked message is kept")] = 30 * 24 * 3600.0
    history_kept_s: Annotated[
        Seconds, Field(description="how long events, ended turns and settled reminders are kept")
    ] = 90 * 24 * 3600.0
    egress_connections: Annotated[
        Count, Field(description="connections to elsewhere that an agent may have open at once")
    ] = 64
    egress_connect_s: Annotated[Seconds, Field(description="how long a host may take to be connected to")] = 15.0
    egress_idle_s: Annotated[
        Seconds, Field(description="how long such a connection may be silent both ways before it is ended")
    ] = 300.0
    egress_connection_s: Annotated[Seconds, Field(description="and how long it may last at all")] = 4 * 3600.0
    egress_day_bytes: Annotated[
        int, Field(ge=1, lt=2**62, description="what an agent's may carry in a day of UTC, both ways together")
    ] = 50 * 1024**3
    connections_kept: Annotated[
        Count, Field(description="connections of each agent that are kept, the newest, for `hive reach`")
    ] = 20_000
    reserve_least_micro_usd: Annotated[
        Count, Field(description="set aside of the budgets for a turn that begins, at least, in millionths of a USD")
    ] = 10_000
    reserve_most_micro_usd: Annotated[
        Count, Field(description="and at most; between them as much as the dearest of the agent's last 5 turns took")
    ] = 5_000_000
    budget_warn_percent: Annotated[
        int, Field(ge=1, le=100, description="of a budget that is used before the manager is warned of it")
    ] = 80
