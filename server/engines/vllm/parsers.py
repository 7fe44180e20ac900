"""vLLM's own parsers as `server.parsing.Parsers`: every family that vLLM knows, under its names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.exceptions import VLLMClientError
from vllm.parser import ParserManager
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager

from probes.errors import ModelError
from server.engines.base import Grammar
from server.parsing import Delta, Parser, ToolCall, ToolUse

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class VllmParsers:
    """A reasoning and a tool-call parser of vLLM, checked against the model's tokenizer.

    Raises ModelError when vLLM knows no such parser or the tokenizer lacks its markers.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, reasoning: str | None, tool_call: str | None
    ) -> None:
        for setting, name, manager in (
            ("reasoning_parser", reasoning, ReasoningParserManager),
            ("tool_call_parser", tool_call, ToolParserManager),
        ):
            known = manager.list_registered()
            if name is not None and name not in known:
                raise ModelError(
                    f"{setting}: vLLM has no {name!r}; it has {', '.join(sorted(known))}"
                )
        try:
            self.parser_class: Any = ParserManager.get_parser(
                tool_parser_name=tool_call,
                reasoning_parser_name=reasoning,
                enable_auto_tools=tool_call is not None,
                tokenizer=tokenizer,
            )
        except TypeError as error:
            raise ModelError(f"the parsers do not fit the model: {error}") from error
        self.tokenizer = tokenizer
        self.calls_tools = tool_call is not None

    def rules(self, tools: ToolUse | None) -> VllmRules:
        """See `Parsers.rules`."""
        return VllmRules(self, tools)


class VllmRules:
    """See `Rules`. What vLLM's server would have been asked, as vLLM's parser has changed it."""

    def __init__(self, parsers: VllmParsers, tools: ToolUse | None) -> None:
        self._parsers = parsers
        try:
            request = ChatCompletionRequest(model="", messages=[], **_fields(tools))
            self._tools = request.tools
            self._request: Any = self._new_parser().adjust_request(request)
        except (ValueError, VLLMClientError) as error:  # its text may quote what the client sent
            raise ValueError("vLLM's parser cannot serve these tools") from error

    @property
    def shows_special_tokens(self) -> bool:
        return not self._request.skip_special_tokens

    @property
    def grammar(self) -> Grammar | None:
        wanted = self._request.structured_outputs
        if wanted is None:
            return None
        if wanted.structural_tag is not None:
            return Grammar("structural_tag", wanted.structural_tag)
        schema = wanted.json
        return Grammar("json", schema if isinstance(schema, str) else json.dumps(schema))

    def open(self, prompt: Sequence[int]) -> Parser:
        """See `Rules.open`."""
        return _VllmParser(self._new_parser(), self._request, prompt)

    def _new_parser(self) -> Any:
        return self._parsers.parser_class(self._parsers.tokenizer, self._tools)


class _VllmParser:
    """One choice; vLLM keeps the state."""

    def __init__(self, parser: Any, request: Any, prompt: Sequence[int]) -> None:
        self._parser, self._request, self._prompt = parser, request, list(prompt)

    def push(self, text: str, token_id: int) -> list[Delta]:
        """See `Parser.push`."""
        return self._parse(text, [token_id], finished=False)

    def finish(self) -> list[Delta]:
        """See `Parser.finish`."""
        return self._parse("", [], finished=True)

    def _parse(self, text: str, token_ids: list[int], *, finished: bool) -> list[Delta]:
        message = self._parser.parse_delta(
            text, token_ids, self._request, self._prompt, finished=finished
        )
        if message is None:
            return []
        deltas = [
            Delta("reasoning", message.reasoning or ""),
            Delta("content", message.content or ""),
        ]
        for call in message.tool_calls:
            if call.index > 0 and self._request.parallel_tool_calls is False:
                continue
            arguments = (call.function and call.function.arguments) or ""
            opens = ToolCall(call.id, call.function.name) if call.id is not None else None
            last = deltas[-1]
            if opens is None and last.call == call.index:  # name and first arguments in one step
                deltas[-1] = last._replace(text=last.text + arguments)
            else:
                deltas.append(Delta("tool_call", arguments, call.index, opens))
        return [delta for delta in deltas if delta.text or delta.opens]


def _fields(tools: ToolUse | None) -> dict[str, Any]:
    """OpenAI's fields of these tools."""
    if tools is None:
        return {}
    choice: Any = "required" if tools.must_call else "auto"
    if tools.function is not None:
        choice = {"type": "function", "function": {"name": tools.function}}
    return {
        "tools": list(tools.tools),
        "tool_choice": choice,
        "parallel_tool_calls": tools.parallel,
    }
