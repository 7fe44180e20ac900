"""What of a model's text is reasoning, what content, what a tool call: the seam to parsers.

A parser sees the text of one choice token by token and tells what each token adds to the fields
that a client sees. Plain ones serve every engine (`server.plain_parsers`); vLLM's own come through
`server.engines.vllm.parsers`, under the same names. Knows nothing of the wire.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias

if TYPE_CHECKING:
    from server.engines.base import Grammar

Segment: TypeAlias = Literal["reasoning", "content", "tool_call"]


class ToolCall(NamedTuple):
    """How a call is named."""

    id: str
    function: str


class Delta(NamedTuple):
    """What one token adds to one field.

    text    of the field; of a tool call: of its arguments
    call    number of the tool call, from 0
    opens   the call begins here
    """

    segment: Segment
    text: str
    call: int | None = None
    opens: ToolCall | None = None


class Parser(Protocol):
    """One choice."""

    def push(self, text: str, token_id: int) -> list[Delta]:
        """Of the next token; empty when it is markup, or is held back because it may be."""
        ...

    def finish(self) -> list[Delta]:
        """What was held back, once the text has ended."""
        ...


@dataclass(frozen=True, kw_only=True)
class ToolUse:
    """The tools that the model may call in answering one request."""

    tools: tuple[dict[str, Any], ...]  # OpenAI's objects, as they stand in the prompt
    must_call: bool = False  # at least one of them
    function: str | None = None  # this one
    parallel: bool = True  # more than one call in an answer


class Rules(Protocol):
    """How the answers to one request are written and read."""

    @property
    def shows_special_tokens(self) -> bool:
        """The markup is made of special tokens: they must be in the text."""
        ...

    @property
    def grammar(self) -> Grammar | None:
        """What the engine must hold the text to, for calls that are demanded."""
        ...

    def open(self, prompt: Sequence[int]) -> Parser:
        """A new parser for an answer to `prompt`."""
        ...


class Parsers(Protocol):
    """The parsers of one server, made at its start.

    Those whose markup the tokenizer lacks are refused then.
    """

    @property
    def calls_tools(self) -> bool: ...

    def rules(self, tools: ToolUse | None) -> Rules:
        """ValueError with a sentence for the client when these tools cannot be served."""
        ...
