"""The forms of an agent's tools: what each takes, and what it answers with. Both are told to clients as JSON Schema."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from hive_core.archive import SEARCH_LIMIT
from hive_core.broker import RECV_LIMIT, RECV_WAIT_LIMIT_S


class _Untitled(GenerateJsonSchema):
    """A title that repeats the name of its field would be in every prompt that lists the tools."""

    def field_title_should_be_set(self, _: object) -> bool:
        return False


class _Brief(_Untitled):
    """What every request to the model carries: nothing in it that does not help to call the tool.

    That what may be left out may be null as well, that a number has 63 bits at most, that a text has some length and no
    other field is taken: a call that errs is told so, and each request is spared it.
    """

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        given = super().default_schema(schema)
        return {key: value for key, value in given.items() if (key, value) != ("default", None)}

    def int_schema(self, schema: core_schema.IntSchema) -> JsonSchemaValue:
        given = super().int_schema(schema)
        taken = {"exclusiveMinimum": 0, "exclusiveMaximum": 2**63}
        return {key: value for key, value in given.items() if taken.get(key) != value}

    def str_schema(self, schema: core_schema.StringSchema) -> JsonSchemaValue:
        return {"type": super().str_schema(schema)["type"]}

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        given = super().model_schema(schema)
        return {key: value for key, value in given.items() if key not in ("title", "additionalProperties")}


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


class SendArguments(Arguments):
    to: Annotated[str | list[str], Field(description="an agent's name, operator, a list of them, or * for everyone")]
    body: Annotated[str, Field(description="what to say, at most 512 KiB")]
    in_reply_to: Annotated[int | None, Field(gt=0, lt=2**63, description="the number of the message this answers")] = (
        None
    )
    key: ToolKey = None


class RecvArguments(Arguments):
    wait_seconds: Annotated[float, Field(ge=0, le=RECV_WAIT_LIMIT_S, description="how long to wait for mail")] = 0
    max: Annotated[int, Field(ge=1, le=RECV_LIMIT)] = RECV_LIMIT
    key: ToolKey = None


class ReadBodyArguments(Arguments):
    id: Annotated[int, Field(gt=0, lt=2**63, description="the message's number")]
    offset: Annotated[
        int, Field(ge=0, lt=2**63, description="the byte to begin with, next_offset of the answer before")
    ] = 0


class NoArguments(Arguments):
    pass


class SearchArguments(Arguments):
    text: Annotated[
        str, Field(description='words that must all be there, 16 at most; "two words" together; wor* begins a word')
    ] = ""
    sender: str | None = None
    thread: Annotated[int | None, Field(gt=0, lt=2**63, description="any message of the thread")] = None
    after: Annotated[str | None, Field(description="sent then or later, ISO 8601")] = None
    before: str | None = None
    limit: Annotated[int, Field(ge=1, le=SEARCH_LIMIT)] = 20
    cursor: Annotated[int | None, Field(gt=0, lt=2**63, description="next_cursor of the answer before")] = None


class AskArguments(Arguments):
    to: Annotated[str, Field(description="an agent's name, or operator")]
    question: str
    options: Annotated[list[str] | None, Field(description="2 to 12 answers to choose from")] = None
    multi: Annotated[bool, Field(description="several may be chosen")] = False
    free_text: Annotated[bool, Field(description="other text is an answer too")] = False
    ttl_s: Annotated[float | None, Field(description="seconds to wait for the answer")] = None
    key: ToolKey = None


class AnswerArguments(Arguments):
    question: Annotated[int, Field(gt=0, lt=2**63)]
    choices: Annotated[list[str] | None, Field(description="options of the question")] = None
    text: str | None = None
    key: ToolKey = None


class RemindArguments(Arguments):
    body: str
    at: Annotated[str | None, Field(description="an instant, ISO 8601")] = None
    after_s: Annotated[float | None, Field(description="or seconds from now")] = None
    key: ToolKey = None


class CancelArguments(Arguments):
    kind: Literal["reminder", "question", "thread"]
    id: Annotated[int, Field(gt=0, lt=2**63)]


class StatusArguments(Arguments):
    text: Annotated[str, Field(description="at most 200 characters")]


class SpawnArguments(Arguments):
    name: Annotated[str, Field(description="the new agent's name: a-z, 0-9 and dashes")]
    persona: Annotated[str, Field(description="who it is and how it works: the text of its CLAUDE.md")]
    reason: Annotated[str, Field(description="why the operator should approve it")]
    key: ToolKey = None


class ApplyArguments(Arguments):
    agent: str
    sha: Annotated[str, Field(description="the whole commit id, 40 hex digits, from /agents/AGENT/config")]
    reason: Annotated[str, Field(description="what the change is for")]
    key: ToolKey = None


class CancelRequestArguments(Arguments):
    approval: Annotated[int, Field(gt=0, lt=2**63)]
    reason: str


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


class StatusResult(BaseModel):
    status: str


class RequestResult(BaseModel):
    approval: int


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
