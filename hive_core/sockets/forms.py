"""The forms of an agent's tools: what each takes, and what it answers with. Both are told to clients as JSON Schema."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, SkipJsonSchema
from pydantic_core import core_schema

from hive_core.services.archive import SEARCH_LIMIT
from hive_core.services.broker import RECV_LIMIT, RECV_WAIT_LIMIT_S
from hive_core.toolkits import toolkits


class _Untitled(GenerateJsonSchema):
    """A title that repeats the name of its field would be in every prompt that lists the tools."""

    def field_title_should_be_set(self, _: object) -> bool:
        return False


class _Brief(_Untitled):
    """What every request to the model carries: nothing in it that does not help to call the tool.

    That what may be left out may be null as well, and what it is then, that a number has bounds, that a text has some
    length, no other field is taken, and the only one is needed: a call that errs is told so, and each request is spared
    it.
    """

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        return {key: value for key, value in super().default_schema(schema).items() if key != "default"}

    def int_schema(self, schema: core_schema.IntSchema) -> JsonSchemaValue:
        return {"type": super().int_schema(schema)["type"]}

    def float_schema(self, schema: core_schema.FloatSchema) -> JsonSchemaValue:
        return {"type": super().float_schema(schema)["type"]}

    def str_schema(self, schema: core_schema.StringSchema) -> JsonSchemaValue:
        return {"type": super().str_schema(schema)["type"]}

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        given = super().model_schema(schema)
        needless = {"title", "additionalProperties", *(["required"] if len(given.get("properties", ())) == 1 else [])}
        return {key: value for key, value in given.items() if key not in needless}


@cache
def schema_of(form: type[BaseModel]) -> dict[str, Any]:
    """The JSON Schema of a form."""
    return form.model_json_schema(schema_generator=_Brief if issubclass(form, Arguments) else _Untitled)


# -- what tools take ---------------------------------------------------------------------------------------------------


class Arguments(BaseModel):
    model_config = ConfigDict(extra="forbid")


ToolKey = Annotated[
    str | None,
    Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$", description="the same key counts once"),
]
# Taken by every tool that writes, and told with none: the id of a call does the same within a turn.
UntoldKey = Annotated[ToolKey, SkipJsonSchema()]


class SendArguments(Arguments):
    to: Annotated[str | list[str], Field(description="agents, operator, or * for all")]
    body: str
    in_reply_to: Annotated[int | None, Field(gt=0, lt=2**63)] = None
    key: UntoldKey = None


class RecvArguments(Arguments):
    wait_seconds: Annotated[float, Field(ge=0, le=RECV_WAIT_LIMIT_S)] = 0
    max: Annotated[int, Field(ge=1, le=RECV_LIMIT)] = RECV_LIMIT
    key: UntoldKey = None


class ReadBodyArguments(Arguments):
    id: Annotated[int, Field(gt=0, lt=2**63)]
    offset: Annotated[int, Field(ge=0, lt=2**63)] = 0


class NoArguments(Arguments):
    pass


class SearchArguments(Arguments):
    text: Annotated[str, Field(description='words; "two words"; wor*')] = ""
    sender: str | None = None
    thread: Annotated[int | None, Field(gt=0, lt=2**63)] = None
    after: Annotated[str | None, Field(description="ISO 8601")] = None
    before: str | None = None
    limit: SkipJsonSchema[Annotated[int, Field(ge=1, le=SEARCH_LIMIT)]] = 20
    cursor: Annotated[int | None, Field(gt=0, lt=2**63)] = None


class AskArguments(Arguments):
    to: Annotated[str, Field(description="an agent, or operator")]
    question: str
    options: list[str] | None = None
    multi: bool = False
    free_text: bool = False
    ttl_s: SkipJsonSchema[float | None] = None
    key: UntoldKey = None


class AnswerArguments(Arguments):
    question: Annotated[int, Field(gt=0, lt=2**63)]
    choices: list[str] | None = None
    text: str | None = None
    key: UntoldKey = None


class RemindArguments(Arguments):
    body: str
    at: Annotated[str | None, Field(description="ISO 8601")] = None
    after_s: float | None = None
    key: UntoldKey = None


class CancelArguments(Arguments):
    kind: Literal["reminder", "question", "thread"]
    id: Annotated[int, Field(gt=0, lt=2**63)]


class StatusArguments(Arguments):
    text: str


class ProfileArguments(Arguments):
    pronouns: str
    icon: str | None = None
    about: str | None = None


class SpawnArguments(Arguments):
    name: str
    persona: str
    reason: str
    icon: str | None = None
    toolkit: Annotated[str | None, Field(description=", ".join(toolkits()))] = None
    key: UntoldKey = None


class InitArguments(Arguments):
    name: str
    persona: str
    reason: str
    key: UntoldKey = None


class ApplyArguments(Arguments):
    agent: str
    sha: str
    reason: str
    key: UntoldKey = None


class ScheduleArguments(Arguments):
    agent: str
    body: str
    cron: str | None = None
    zone: str | None = None
    every_s: float | None = None
    reason: str
    key: UntoldKey = None


class BudgetArguments(Arguments):
    scope: Annotated[str, Field(description="or hive")]
    day: Annotated[str | None, Field(description="USD")] = None
    total: SkipJsonSchema[str | None] = None
    reason: str
    key: UntoldKey = None


class DestroyArguments(Arguments):
    agent: str
    reason: str
    key: UntoldKey = None


class ReasonArguments(Arguments):
    reason: str
    key: UntoldKey = None


class CancelRequestArguments(Arguments):
    approval: Annotated[int, Field(gt=0, lt=2**63)]
    reason: SkipJsonSchema[str] = "it is not wanted any more"


class AgentArguments(Arguments):
    agent: str


class LogsArguments(Arguments):
    agent: str
    lines: Annotated[int, Field(ge=1, le=500)] = 50


# -- what they answer with ---------------------------------------------------------------------------------------------

Held = Annotated[dict[str, str], Field(description="from whom it is held for the operator, and why")]


class SendResult(BaseModel):
    message: int
    held: Held = {}


class AttachedFile(BaseModel):
    name: str
    type: str
    bytes: int
    path: Annotated[str, Field(description="where you find it")] = ""
    missing: Annotated[str, Field(description="why it is not there")] = ""


class ReceivedMessage(BaseModel):
    id: int
    sender: str
    body: str
    in_reply_to: int | None
    sent_at_ms: int
    cause: str
    cause_id: int | None
    attempt: Annotated[int, Field(description="1 on the first delivery")]
    body_bytes: Annotated[int, Field(description="of a body that goes on: read_body has the rest")] = 0
    files: list[AttachedFile] = []


class RecvResult(BaseModel):
    messages: list[ReceivedMessage]
    waiting: Annotated[int, Field(description="how many more wait")]


class ReadBodyResult(BaseModel):
    body: str
    next_offset: Annotated[int | None, Field(description="null: the body ends here")]
    bytes: Annotated[int, Field(description="of the whole body")]


class WhoamiResult(BaseModel):
    name: str
    role: Literal["agent", "manager"]


class ListedAgent(BaseModel):
    name: str
    state: str
    queued: Annotated[int, Field(description="messages that wait for it")]
    status: Annotated[str, Field(description="what it says that it is about")] = ""
    pronouns: str = ""
    icon: str = ""
    about: Annotated[str, Field(description="what it says of itself")] = ""


class ListResult(BaseModel):
    agents: list[ListedAgent]


class FoundMessage(BaseModel):
    id: int
    sender: str
    recipients: list[str]
    thread: int
    sent_at_ms: int
    body_bytes: int
    snippet: str


class SearchResult(BaseModel):
    messages: list[FoundMessage]
    next_cursor: Annotated[int | None, Field(description="null: there are no more")]
    unindexed: Annotated[int, Field(description="messages that were not searched yet")] = 0


class AskResult(BaseModel):
    question: int
    message: int
    held: Held = {}


class AnswerResult(BaseModel):
    question: int
    message: int
    held: Held = {}


class RemindResult(BaseModel):
    reminder: int
    at_ms: int


class CancelResult(BaseModel):
    """Of the three numbers the one of what was cancelled."""

    reminder: int = 0
    question: int = 0
    thread: int = 0
    reached: Annotated[bool, Field(description="the question had been delivered already")] = False
    dropped: Annotated[int, Field(description="deliveries of the thread that will not happen")] = 0
    too_late: Annotated[int, Field(description="deliveries of the thread that had happened")] = 0


class OpenQuestion(BaseModel):
    question: int
    asker: str
    answerer: str
    text: str
    options: list[str]
    expires_at_ms: int


class AsideMessage(BaseModel):
    message: int
    sender: str
    recipient: str
    why: str | None


class OpenApproval(BaseModel):
    approval: int
    kind: str
    agent: str
    requested_by: str
    state: str


class OpenReminder(BaseModel):
    reminder: int
    at_ms: int
    body: str
    due: Annotated[bool, Field(description="its instant has passed, and it waits for room in the inbox")] = False


class RunningWork(BaseModel):
    work: str
    command: str
    note: str
    output: str
    begun_at_ms: int
    turn: int | None


class WaitsOnYou(BaseModel):
    questions: list[OpenQuestion]
    unread: int
    dead: list[AsideMessage]


class YouWaitFor(BaseModel):
    questions: list[OpenQuestion]
    approvals: list[OpenApproval]
    reminders: list[OpenReminder]
    background: list[RunningWork]
    held: list[AsideMessage]


class LooseEndsResult(BaseModel):
    waits_on_you: WaitsOnYou
    you_wait_for: YouWaitFor


class ProfileResult(BaseModel):
    pronouns: str
    icon: str = ""
    about: str = ""


class StatusResult(BaseModel):
    status: str


class RequestResult(BaseModel):
    approval: int
    rule: Annotated[str, Field(description="of the policy: it passed without a click")] = ""


class AgentResult(BaseModel):
    agent: str


class UpdateResult(BaseModel):
    agent: str
    replaced: Annotated[bool, Field(description="false: it runs as it would be started now")]


class LogsResult(BaseModel):
    agent: str
    lines: Annotated[list[str], Field(description="the oldest first")]


class HiveLooseEndsResult(BaseModel):
    questions: list[OpenQuestion]
    approvals: list[OpenApproval]
    held: list[AsideMessage]
    dead: list[AsideMessage]
