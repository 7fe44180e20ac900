"""What the server answers, as documentation: OpenAPI is made from these models.

They are not on the hot path (`objects.py` writes plain dicts); tests validate every answer and
every chunk against them, so that neither can change without the other.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

Probability: TypeAlias = float
Segment: TypeAlias = Literal["reasoning", "content", "tool_call"]
Responses: TypeAlias = dict[int | str, dict[str, Any]]


class AnswerModel(BaseModel):
    """Exactly these fields, of exactly these types."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class ErrorDetail(AnswerModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(AnswerModel):
    """OpenAI's error object; also the last event of a stream that failed."""

    error: ErrorDetail


class Contributor(AnswerModel):
    """Share of one neuron in the token's logit: weight times CETT."""

    layer: int
    neuron: int
    value: float


class RiskToken(AnswerModel):
    """One written token; `risk` null is "not scored", which is never "safe"."""

    token: str = Field(description="The visible text it carries; empty for the end of the turn.")
    token_id: int | None = Field(description="null when the answer was withheld")
    start: int = Field(description="Code points of the visible text, half-open.")
    end: int
    risk: Probability | None = Field(ge=0, le=1, description="Calibrated, higher is worse.")
    segment: Segment = Field(description="Field of the message that start and end point into.")
    tool_call_index: int | None = Field(None, description="The call whose arguments those are.")
    contributors: list[Contributor] | None = None


class RiskSpan(AnswerModel):
    """A run of flagged tokens of one field. Its risk is calibrated for runs: on another scale than
    that of its tokens, and maybe below their threshold."""

    start: int
    end: int
    text: str
    risk: Probability = Field(ge=0, le=1)
    segment: Segment
    tool_call_index: int | None = None


class RiskAttempt(AnswerModel):
    """One generation under the policy `retry`."""

    alpha: float
    score: Probability | None
    flagged: bool | None
    returned: bool


class RiskTokens(AnswerModel):
    """`choices[].risk` of a chunk that carries text."""

    tokens: list[RiskToken]


class RiskReport(AnswerModel):
    """`choices[].risk` of a whole choice; in a stream it rides on the chunk with finish_reason."""

    status: Literal["scored", "partial", "unavailable"]
    reason: Literal["not_read", "nonfinite", "no_text"] | None
    probe: str = Field(description="name@sha")
    position: Literal["read", "write"]
    score: Probability | None = Field(ge=0, le=1)
    flagged: bool | None
    threshold: float
    token_threshold: float
    operating_point: str | None = Field(description="null: the request set its own threshold")
    alpha: float
    calibrated: bool = Field(description="false when alpha is not 1")
    policy: Literal["flag", "stop", "withhold", "retry"]
    spans: list[RiskSpan]
    unscored: dict[str, int]
    tokens: list[RiskToken] = Field(description="In a stream: those not sent before.")
    attempts: list[RiskAttempt] | None = None


class TopLogprob(AnswerModel):
    token: str
    bytes: list[int]
    logprob: float


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]
    risk: Probability | None = Field(None, description="Present when risk was asked for.")


class ChatLogprobs(AnswerModel):
    content: list[ChatLogprob]
    refusal: None


class TextLogprobs(AnswerModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class Usage(AnswerModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CalledFunction(AnswerModel):
    name: str
    arguments: str = Field(description="JSON as the model wrote it")


class ToolCall(AnswerModel):
    id: str
    type: Literal["function"]
    function: CalledFunction


class FunctionDelta(AnswerModel):
    name: str | None = None
    arguments: str


class ToolCallDelta(AnswerModel):
    """`id`, `type` and the name come once, with the first piece of a call."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class ChatMessage(AnswerModel):
    role: Literal["assistant"]
    content: str | None = Field(description="null: all that came is in other fields")
    refusal: None
    reasoning: str | None = Field(None, description="With a parser only; see --reasoning-parser.")
    tool_calls: list[ToolCall] | None = None


class ChatDelta(AnswerModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


FinishReason: TypeAlias = Literal["stop", "length", "content_filter", "tool_calls"]


class ChatChoice(AnswerModel):
    index: int
    message: ChatMessage
    finish_reason: FinishReason
    logprobs: ChatLogprobs | None
    token_ids: list[int] | None = None
    risk: RiskReport | None = None


class ChatCompletion(AnswerModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    prompt_token_ids: list[int] | None = None


class ChatChunkChoice(AnswerModel):
    index: int
    delta: ChatDelta
    finish_reason: FinishReason | None
    logprobs: ChatLogprobs | None
    token_ids: list[int] | None = None
    risk: RiskReport | RiskTokens | None = None


class ChatCompletionChunk(AnswerModel):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    system_fingerprint: str | None = None
    prompt_token_ids: list[int] | None = None


class TextChoice(AnswerModel):
    index: int
    text: str
    finish_reason: FinishReason | None
    logprobs: TextLogprobs | None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    risk: RiskReport | RiskTokens | None = None


class TextCompletion(AnswerModel):
    """A whole completion, and with `stream` each of its chunks."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None
    system_fingerprint: str | None = None


class ScoreUsage(AnswerModel):
    prompt_tokens: int
    scored_tokens: int


class ScoredText(AnswerModel):
    id: str
    object: Literal["risk"]
    created: int
    model: str
    usage: ScoreUsage
    risk: RiskReport


_ERRORS: Responses = {
    "4XX": {"model": ErrorBody, "description": "Refused; `param` names the field."},
    "5XX": {"model": ErrorBody, "description": "Failed or not ready; see `code`, Retry-After."},
}


def documented(whole: type[BaseModel], *, chunk: type[BaseModel] | None = None) -> Responses:
    """`responses=` of a route: its answer, its events, its errors."""
    responses: Responses = {"200": {"model": whole, "description": "The answer."}, **_ERRORS}
    if chunk is not None:
        data = {"type": "string", "description": f"A {chunk.__name__} as JSON, or [DONE]."}
        event = {"type": "object", "required": ["data"], "properties": {"data": data}}
        responses["200"]["description"] = "The answer; with `stream: true` as events."
        # Before OpenAPI 3.2 the schema of an event stream is that of one event.
        responses["200"]["content"] = {"text/event-stream": {"schema": event}}
    return responses
