"""What of a model's text is reasoning, what content, what a tool call: the seam to parsers.

A parser sees the text of one choice token by token and tells what each token adds to the fields
that a client sees. The plain one here knows the commonest markup and serves every engine; vLLM's
own parsers come through `server.engines.vllm.parsers`, under the same names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeAlias

from probes.errors import ModelError
from server.detokenizer import decode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Segment: TypeAlias = Literal["reasoning", "content"]


class Delta(NamedTuple):
    """What one token adds to one field."""

    segment: Segment
    text: str


class Parser(Protocol):
    """One choice."""

    def push(self, text: str, token_id: int) -> list[Delta]:
        """Of the next token; empty when it is markup, or is held back because it may be."""
        ...

    def finish(self) -> list[Delta]:
        """What was held back, once the text has ended."""
        ...


class Parsers(Protocol):
    """The parsers of one server; made once, and refused then if the model's tokenizer lacks what
    they need."""

    @property
    def shows_special_tokens(self) -> bool:
        """The markup is made of special tokens: they must be in the text."""
        ...

    def open(self, prompt: Sequence[int]) -> Parser:
        """A new parser for an answer to `prompt`."""
        ...


@dataclass(frozen=True)
class PlainParsers:
    """`<think>`, for engines without parsers of their own."""

    tokenizer: PreTrainedTokenizerBase

    @property
    def shows_special_tokens(self) -> bool:
        return THINK_END in self.tokenizer.all_special_tokens

    def open(self, prompt: Sequence[int]) -> Parser:
        # Templates end so when reasoning is switched off; a user's own `</think>` stands before.
        end = decode(self.tokenizer, prompt[-len(THINK_END) - 8 :], skip_special_tokens=False)
        return ThinkParser(is_open=not end.rstrip().endswith(THINK_END))


THINK_START, THINK_END = "<think>", "</think>"
REASONING_PARSERS = ("deepseek_r1",)  # vLLM's name of the same rule


def plain_parsers(tokenizer: PreTrainedTokenizerBase, *, reasoning: str) -> PlainParsers:
    """ModelError when there is no plain parser of that name."""
    if reasoning not in REASONING_PARSERS:
        raise ModelError(
            f"reasoning_parser: this engine knows {', '.join(REASONING_PARSERS)}, not "
            f"{reasoning!r}; --engine vllm knows all of vLLM's"
        )
    return PlainParsers(tokenizer)


class ThinkParser:
    """What stands before `</think>` is reasoning, with or without a `<think>` at its start."""

    def __init__(self, *, is_open: bool) -> None:
        """`is_open`: the prompt has not ended the reasoning already."""
        self._is_open = is_open
        self._begins = True  # a `<think>` may still come
        self._held = ""

    def push(self, text: str, token_id: int) -> list[Delta]:
        """See `Parser.push`."""
        if not self._is_open:
            return _deltas(("content", text))
        text, self._held = self._held + text, ""
        if self._begins:
            if THINK_START.startswith(text):  # also while there is no text yet
                self._held = text
                return []
            self._begins = False
            text = text.removeprefix(THINK_START)
        reasoning, end, content = text.partition(THINK_END)
        if end:
            self._is_open = False
            return _deltas(("reasoning", reasoning), ("content", content))
        certain = len(text) - _overlap(text, THINK_END)
        self._held = text[certain:]
        return _deltas(("reasoning", text[:certain]))

    def finish(self) -> list[Delta]:
        """See `Parser.finish`."""
        held, self._held = self._held, ""
        return _deltas(("reasoning", held))


def _deltas(*parts: tuple[Segment, str]) -> list[Delta]:
    return [Delta(segment, text) for segment, text in parts if text]


def _overlap(text: str, marker: str) -> int:
    """How many of the last characters of `text` may begin `marker`."""
    for length in range(min(len(text), len(marker) - 1), 0, -1):
        if marker.startswith(text[-length:]):
            return length
    return 0
