"""What a client may send, as strict pydantic models: unknown, coerced or non-finite is refused.

A field is either honoured, listed here as accepted without effect, or answered with a 400 that
names it. `null` means "not set" for OpenAI's optional fields and is refused inside `risk`.
Bounds that depend on the model (vocabulary, context) are checked in `server/api/orders.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeAlias, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)

MAX_CHOICES = 8
MAX_PROMPTS = 64
MAX_STOP_STRINGS = 4
MAX_LOGPROBS = 20
MAX_TOOLS = 128
MAX_FIELDS = 64  # of any object
MAX_BIASES = 1024
MAX_METADATA = 16
_MAX_TOKEN_ID = 2**31 - 1
_T = TypeVar("_T")

ShortText: TypeAlias = Annotated[str, StringConstraints(max_length=512)]
StopString: TypeAlias = Annotated[str, StringConstraints(min_length=1, max_length=256)]
TokenId: TypeAlias = Annotated[int, Field(ge=0, le=_MAX_TOKEN_ID)]
TokenIdKey: TypeAlias = Annotated[str, StringConstraints(pattern=r"^(0|[1-9][0-9]{0,8})$")]
Bias: TypeAlias = Annotated[float, Field(ge=-100, le=100)]
# fail_fast: or a list of a hundred thousand bad items holds every stream up for a second, one
# finding after another.
TokenIds: TypeAlias = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _has_few_fields(cls, data: object) -> object:
        return _no_more(data, MAX_FIELDS)


def _no_more(data: object, most: int) -> object:
    """`data`; ValueError for a dict of more keys, before each of them is found to be wrong."""
    if isinstance(data, dict) and len(data) > most:
        raise ValueError(f"at most {most} keys")
    return data


class RiskOptions(_Strict):
    """How to monitor; every field has the server's default when it is absent."""

    probe: ShortText | None = Field(None, description="Name or name@sha of a loaded probe.")
    alpha: float = Field(1.0, ge=0, le=3, description="Scales the H-Neurons; 1 is off.")
    threshold: float | None = Field(
        None, ge=0, le=1, description="Of tokens and answer; absent: the probe's operating points."
    )
    tokens: bool = Field(True, description="Return one entry per token.")
    contributors: int = Field(0, ge=0, le=10, description="Neurons to name per token.")
    policy: Literal["flag", "stop", "withhold", "retry"] = "flag"

    @field_validator("probe", "threshold", mode="before")
    @classmethod
    def _not_null(cls, value: object) -> object:
        if value is None:
            raise ValueError("must not be null; leave it out for the default")
        return value


Risk: TypeAlias = bool | RiskOptions


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool | None = Field(None, description="Without effect: none is added.")


class TextFormat(_Strict):
    type: Literal["text"]


class JSONObjectFormat(_Strict):
    type: Literal["json_object"]


class NamedSchema(_Strict):
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    schema_: dict[str, Any] = Field(alias="schema", description="JSON Schema of the answer.")
    description: str | None = None
    strict: bool | None = Field(None, description="The schema is kept in any case.")


class JSONSchemaFormat(_Strict):
    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat: TypeAlias = Annotated[
    TextFormat | JSONObjectFormat | JSONSchemaFormat, Field(discriminator="type")
]


FunctionName: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


class Function(_Strict):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON Schema of the arguments.")
    strict: bool | None = Field(None, description="Hold calls of it to the schema.")


class Tool(_Strict):
    type: Literal["function"]
    function: Function


class FunctionChoice(_Strict):
    name: FunctionName


class NamedToolChoice(_Strict):
    type: Literal["function"]
    function: FunctionChoice


class CalledFunction(_Strict):
    name: FunctionName
    arguments: str


class ToolCall(_Strict):
    id: ShortText
    type: Literal["function"]
    function: CalledFunction
    index: int | None = Field(None, description="Of a streamed call that is sent back; ignored.")


class _Generation(_Strict):
    """What chat and plain completions have in common."""

    model: ShortText
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=_MAX_TOKEN_ID, description="0 and -1 are off.")
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=0, le=2**62, description="Choice i uses seed + i.")
    stop: (
        StopString
        | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)]
        | None
    ) = None
    max_tokens: int | None = Field(None, ge=1, le=_MAX_TOKEN_ID)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.001, le=2)
    logit_bias: Annotated[dict[TokenIdKey, Bias], Field(max_length=MAX_BIASES)] | None = None
    ignore_eos: bool | None = Field(None, description="For load tests.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    risk: Risk | None = None
    # Accepted without effect: bookkeeping of the client's own.
    user: ShortText | None = None
    metadata: Annotated[dict[ShortText, ShortText], Field(max_length=MAX_METADATA)] | None = None
    store: bool | None = None
    service_tier: ShortText | None = None
    safety_identifier: ShortText | None = None
    prompt_cache_key: ShortText | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _has_few_biases(cls, value: object) -> object:
        return _no_more(value, MAX_BIASES)

    @field_validator("metadata", mode="before")
    @classmethod
    def _has_few_metadata(cls, value: object) -> object:
        return _no_more(value, MAX_METADATA)

    @field_validator("stream_options")
    @classmethod
    def _needs_stream(
        cls, value: StreamOptions | None, info: ValidationInfo
    ) -> StreamOptions | None:
        if value is not None and not info.data.get("stream"):
            raise ValueError("needs stream: true")
        return value


class TextPart(_Strict):
    type: Literal["text"]
    text: str


def _content_of_answers_may_be_missing(schema: dict[str, Any]) -> None:
    """JSON Schema of `Message`, which cannot say of whom the content is asked for otherwise."""
    schema["required"].remove("content")
    schema["if"] = {"properties": {"role": {"not": {"const": "assistant"}}}}
    schema["then"] = {"required": ["content"]}


class Message(_Strict):
    model_config = ConfigDict(json_schema_extra=_content_of_answers_may_be_missing)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: (
        str | Annotated[list[TextPart], Field(min_length=1, max_length=1024, fail_fast=True)] | None
    )
    name: Annotated[str, StringConstraints(max_length=64)] | None = None
    reasoning: str | None = Field(None, description="Of an answer that is sent back.")
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_call_id: ShortText | None = Field(None, description="Of `tool`: whose result this is.")
    # An assistant message that a client sends back as it came: these must be empty.
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[object], Field(max_length=0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _answers_may_lack_content(cls, data: object) -> object:
        """As OpenAI has it: clients leave out what is null, and a call of a tool has no text."""
        if isinstance(data, dict) and data.get("role") == "assistant":
            return {"content": None, **data}
        return data

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content or ())

    @field_validator("content")
    @classmethod
    def _null_in_answers_only(cls, value: _T, info: ValidationInfo) -> _T:
        if value is None and info.data.get("role") != "assistant":
            raise ValueError("must not be null")
        return value

    @field_validator("reasoning", "tool_calls")
    @classmethod
    def _in_answers_only(cls, value: _T, info: ValidationInfo) -> _T:
        if value is not None and info.data.get("role") != "assistant":
            raise ValueError("belongs to assistant messages")
        return value

    @model_validator(mode="after")
    def _names_its_call(self) -> Self:
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("tool_call_id belongs to tool messages, and to each of them")
        return self


Messages: TypeAlias = Annotated[list[Message], Field(min_length=1, max_length=1024, fail_fast=True)]


class ChatRequest(_Generation):
    """Body of `POST /v1/chat/completions`."""

    messages: Messages
    max_completion_tokens: int | None = Field(None, ge=1, le=_MAX_TOKEN_ID)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: (
        Annotated[list[Tool], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)] | None
    ) = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None

    @field_validator("top_logprobs")
    @classmethod
    def _needs_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and not info.data.get("logprobs"):
            raise ValueError("needs logprobs: true")
        return value

    @field_validator("max_completion_tokens")
    @classmethod
    def _is_only_limit(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("max_tokens") is not None:
            raise ValueError("means the same as max_tokens; send one of them")
        return value


class CompletionRequest(_Generation):
    """Body of `POST /v1/completions`."""

    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: Literal[False] | None = None


class ScoreTextRequest(_Strict):
    """Body of `POST /v1/risk`: one of the three pairs, scored without generating."""

    model: ShortText | None = None
    messages: Messages | None = None
    answer: Annotated[str, StringConstraints(min_length=1)] | None = None
    prompt: str | None = None
    text: Annotated[str, StringConstraints(min_length=1)] | None = None
    prompt_token_ids: TokenIds | None = None
    token_ids: TokenIds | None = None
    risk: Risk | None = None

    @model_validator(mode="after")
    def _one_pair(self) -> Self:
        pairs = (("messages", "answer"), ("prompt", "text"), ("prompt_token_ids", "token_ids"))
        given = [[name for name in pair if getattr(self, name) is not None] for pair in pairs]
        if sorted(map(len, given)) != [0, 0, 2]:
            raise ValueError(
                "send exactly one pair: messages and answer, prompt and text, "
                "or prompt_token_ids and token_ids"
            )
        return self
