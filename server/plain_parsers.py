"""Parsers for every engine: `<think>` and Hermes' `<tool_call>`, under vLLM's names of them."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from probes.errors import ModelError
from server.detokenizer import decode
from server.parsing import Delta, Parser, Segment, ToolCall, ToolUse

THINK_START, THINK_END = "<think>", "</think>"
CALL_START, CALL_END = "<tool_call>", "</tool_call>"
REASONING_PARSERS = ("deepseek_r1",)
TOOL_CALL_PARSERS = ("hermes",)
_CALL_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]+)"\s*,\s*"arguments"\s*:\s*(?=\{)')


@dataclass(frozen=True)
class PlainParsers:
    """See `Parsers`."""

    tokenizer: PreTrainedTokenizerBase
    reasons: bool
    calls_tools: bool

    def rules(self, tools: ToolUse | None) -> PlainRules:
        """See `Parsers.rules`; without a grammar no call can be demanded."""
        if tools is not None and (tools.must_call or tools.function or not tools.parallel):
            raise ValueError(
                "this engine cannot be held to a call, or to one call: only `auto` with parallel "
                "calls is served; a server with --engine vllm can"
            )
        return PlainRules(self, parses_calls=tools is not None)


@dataclass(frozen=True)
class PlainRules:
    """See `Rules`."""

    parsers: PlainParsers
    parses_calls: bool
    grammar: None = None

    @property
    def shows_special_tokens(self) -> bool:
        markup = {THINK_END} if self.parsers.reasons else set()
        markup |= {CALL_START} if self.parses_calls else set()
        added = self.parsers.tokenizer.added_tokens_decoder.values()
        return any(token.special and token.content in markup for token in added)

    def open(self, prompt: Sequence[int]) -> Parser:
        # Templates end so when reasoning is switched off; a user's own `</think>` stands before.
        end = decode(self.parsers.tokenizer, prompt[-16:], skip_special_tokens=False)
        is_open = self.parsers.reasons and not end.rstrip().endswith(THINK_END)
        return PlainParser(is_open=is_open, parses_calls=self.parses_calls)


def plain_parsers(
    tokenizer: PreTrainedTokenizerBase, *, reasoning: str | None, tool_call: str | None
) -> PlainParsers:
    """ModelError when there is no plain parser of such a name."""
    for setting, name, known in (
        ("reasoning_parser", reasoning, REASONING_PARSERS),
        ("tool_call_parser", tool_call, TOOL_CALL_PARSERS),
    ):
        if name is not None and name not in known:
            raise ModelError(
                f"{setting}: this engine knows {', '.join(known)}, not {name!r}; --engine vllm "
                f"knows all of vLLM's"
            )
    return PlainParsers(tokenizer, reasoning is not None, tool_call is not None)


class PlainParser:
    """Reasoning up to `</think>`, with or without a `<think>` at its start; then content and calls.

    A call is `<tool_call>{"name": .., "arguments": {..}}</tool_call>`; its arguments come out as
    they are written. What does not begin so is content, markup and all; what follows a call is
    dropped, as vLLM does.
    """

    def __init__(self, *, is_open: bool, parses_calls: bool) -> None:
        """`is_open`: the prompt has not ended the reasoning already."""
        self._parses_calls = parses_calls
        self._read: Callable[[], list[Delta]] = self._begin if is_open else self._content
        self._text = ""  # not decided yet
        self._call = -1  # number of the newest call
        self._depth = 0  # of braces in its arguments
        self._is_string = self._is_escaped = False

    def push(self, text: str, token_id: int) -> list[Delta]:
        """See `Parser.push`. Each reader takes what it can decide from the text and may hand over
        to another one; that goes on until nothing more is decided."""
        self._text += text
        deltas: list[Delta] = []
        while self._text:
            reader, before = self._read, len(self._text)
            deltas += reader()
            if self._read == reader and len(self._text) == before:
                break
        return deltas

    def finish(self) -> list[Delta]:
        """See `Parser.finish`."""
        text, self._text = self._text, ""
        if self._read in (self._begin, self._reasoning):
            return _deltas("reasoning", text)
        if self._read == self._head:
            return _deltas("content", CALL_START + text)
        is_content = self._read == self._content and self._call < 0
        return _deltas("content", text) if is_content else []

    def _begin(self) -> list[Delta]:
        if not THINK_START.startswith(self._text):
            self._text = self._text.removeprefix(THINK_START)
            self._read = self._reasoning
        return []

    def _reasoning(self) -> list[Delta]:
        return _deltas("reasoning", self._until(THINK_END, then=self._content))

    def _content(self) -> list[Delta]:
        if not self._parses_calls:
            text, self._text = self._text, ""
            return _deltas("content", text)
        text = self._until(CALL_START, then=self._head)
        return [] if self._call >= 0 else _deltas("content", text)

    def _head(self) -> list[Delta]:
        found = _CALL_HEAD.match(self._text)
        if found is not None:
            self._text = self._text[found.end() :]
            self._call += 1
            self._read = self._arguments
            return [Delta("tool_call", "", self._call, ToolCall(_new_id(), found[1]))]
        if CALL_END in self._text:
            text = self._until(CALL_END, then=self._content)
            return _deltas("content", CALL_START + text + CALL_END)
        return []

    def _arguments(self) -> list[Delta]:
        end = self._end_of_arguments()
        text, self._text = self._text[:end], self._text[end:]
        return [Delta("tool_call", text, self._call)]

    def _end_of_arguments(self) -> int:
        """How much of the text is arguments: up to the brace that closes them, if it has come."""
        for length, char in enumerate(self._text, start=1):
            if self._is_string:
                self._is_string = self._is_escaped or char != '"'
                self._is_escaped = char == "\\" and not self._is_escaped
            elif char == '"':
                self._is_string = True
            elif char in "{}":
                self._depth += 1 if char == "{" else -1
                if self._depth == 0:
                    self._read = self._tail
                    return length
        return len(self._text)

    def _tail(self) -> list[Delta]:
        self._until(CALL_END, then=self._content)
        return []

    def _until(self, marker: str, *, then: Callable[[], list[Delta]]) -> str:
        """The text before `marker`, which is taken away, too; all that cannot begin it if it is not
        there."""
        before, found, after = self._text.partition(marker)
        if found:
            self._text, self._read = after, then
            return before
        certain = len(before) - _overlap(before, marker)
        self._text = before[certain:]
        return before[:certain]


def _deltas(segment: Segment, text: str) -> list[Delta]:
    return [Delta(segment, text)] if text else []


def _new_id() -> str:
    return f"call_{uuid.uuid4().hex}"


def _overlap(text: str, marker: str) -> int:
    """How many of the last characters of `text` may begin `marker`."""
    for length in range(min(len(text), len(marker) - 1), 0, -1):
        if marker.startswith(text[-length:]):
            return length
    return 0
