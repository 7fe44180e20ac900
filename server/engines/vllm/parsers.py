"""vLLM's own parsers as `server.parsing.Parsers`: every family that vLLM knows, under its names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.parser import ParserManager
from vllm.reasoning import ReasoningParserManager

from probes.errors import ModelError
from server.parsing import Delta, Parser

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from vllm.entrypoints.generate.base.protocol import DeltaMessage


class VllmParsers:
    """One reasoning parser of vLLM, checked against the model's tokenizer.

    Raises ModelError when vLLM knows no such parser or the tokenizer lacks its markers.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, reasoning: str) -> None:
        known = ReasoningParserManager.list_registered()
        if reasoning not in known:
            raise ModelError(
                f"reasoning_parser: vLLM has no {reasoning!r}; it has {', '.join(sorted(known))}"
            )
        try:
            self._class: Any = ParserManager.get_parser(
                reasoning_parser_name=reasoning, tokenizer=tokenizer
            )
        except TypeError as error:
            raise ModelError(f"reasoning_parser: {error}") from error
        self._tokenizer = tokenizer
        self.shows_special_tokens = not _request(self._class(tokenizer)).skip_special_tokens

    def open(self, prompt: Sequence[int]) -> Parser:
        """See `Parsers.open`."""
        return _VllmParser(self._class(self._tokenizer), prompt)


class _VllmParser:
    """One choice; vLLM keeps the state."""

    def __init__(self, parser: Any, prompt: Sequence[int]) -> None:
        self._parser = parser
        self._request = _request(parser)
        self._prompt = list(prompt)

    def push(self, text: str, token_id: int) -> list[Delta]:
        """See `Parser.push`."""
        return self._parse(text, [token_id], finished=False)

    def finish(self) -> list[Delta]:
        """See `Parser.finish`."""
        return self._parse("", [], finished=True)

    def _parse(self, text: str, token_ids: list[int], *, finished: bool) -> list[Delta]:
        message: DeltaMessage | None = self._parser.parse_delta(
            text, token_ids, self._request, self._prompt, finished=finished
        )
        if message is None:
            return []
        deltas = (
            Delta("reasoning", message.reasoning or ""),
            Delta("content", message.content or ""),
        )
        return [delta for delta in deltas if delta.text]


def _request(parser: Any) -> Any:
    """What vLLM's server would have been asked; the parser says how it must be generated."""
    request = ChatCompletionRequest(model="", messages=[])
    return parser.adjust_request(request)
