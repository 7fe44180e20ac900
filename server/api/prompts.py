"""From messages or text to the token ids of a prompt; and of a given text, with its characters."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import orjson
from jinja2 import TemplateError

from server.api.errors import APIError
from server.api.schemas import Message, ToolCall
from server.api.token_objects import JSON
from server.parsing import ToolUse
from server.service import Service
from server.strict_json import StrictJSONError, check_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_T = TypeVar("_T")
_INLINE_CHARACTERS = 16_384  # longer texts are tokenised on a thread, off the event loop


async def chat_prompt(
    service: Service, messages: Sequence[Message], tools: ToolUse | None = None
) -> tuple[int, ...]:
    """The conversation in the model's own template, up to where its answer begins."""
    tokenizer = service.engine.tokenizer
    if tokenizer.chat_template is None:
        raise APIError(400, "this model has no chat template; use /v1/completions")
    turns = [_turn(message, f"messages.{i}") for i, message in enumerate(messages)]
    length = sum(len(message.text) for message in messages)
    try:
        text = await _aside(length, lambda: _render(tokenizer, turns))
        if tools is not None:
            without = text
            text = await _aside(length, lambda: _render(tokenizer, turns, tools))
            if text == without:
                raise APIError(
                    400,
                    "the model's chat template does not show tools: it was not taught to call any",
                    param="tools",
                    code="chat_template_error",
                )
    except TemplateError as error:
        # The sentence is the template author's; it tells which order of roles the model takes.
        raise APIError(
            400,
            f"the model's chat template refuses these messages: {error.message or 'no reason'}",
            param="messages",
            code="chat_template_error",
        ) from error
    except (TypeError, ValueError, RecursionError, LookupError, AttributeError) as error:
        # What Python says inside a template that meets an unexpected shape, in a tool most often.
        raise APIError(
            400,
            "the model's chat template cannot render these messages or tools",
            param="messages",
            code="chat_template_error",
        ) from error
    return await _encode(service, text, special_tokens=False)


async def encode_prompts(service: Service, texts: Sequence[str]) -> list[tuple[int, ...]]:
    """Plain prompts, begun as the model begins a text; at least one token each."""
    tokenizer = service.engine.tokenizer
    encoded = await _aside(
        sum(map(len, texts)),
        lambda: [tuple(tokenizer(text, verbose=False).input_ids) for text in texts],
    )
    if not all(encoded):
        raise APIError(400, "the prompt is empty", param="prompt", code="invalid_value")
    return encoded


async def encode_with_spans(service: Service, text: str) -> list[tuple[int, int, int]]:
    """(token id, start, end) of a text without special tokens; offsets are code points of `text`.

    As in generation, the characters of a split one belong to the token that completes it.
    """
    tokenizer = service.engine.tokenizer
    encoding = await _aside(
        len(text),
        lambda: tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        ),
    )
    ends = [end for _, end in encoding["offset_mapping"]]
    spans: list[tuple[int, int, int]] = []
    start = 0
    for i, token_id in enumerate(encoding["input_ids"]):
        following = encoding["offset_mapping"][i + 1][0] if i + 1 < len(ends) else len(text)
        end = max(start, min(ends[i], following))
        spans.append((token_id, start, end))
        start = end
    return spans


def _turn(message: Message, path: str) -> JSON:
    """A message as templates know it: reasoning by its older name, arguments as an object."""
    role = "system" if message.role == "developer" else message.role
    turn: JSON = {"role": role, "content": message.text}
    if message.name is not None:
        turn["name"] = message.name
    if message.reasoning is not None:
        turn["reasoning_content"] = message.reasoning
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        turn["tool_calls"] = [
            {"id": call.id, "type": call.type, "function": _called(call, f"{path}.tool_calls.{i}")}
            for i, call in enumerate(message.tool_calls)
        ]
    return turn


def _called(call: ToolCall, path: str) -> JSON:
    text = call.function.arguments or "{}"
    try:
        check_json(text.encode())
        arguments = orjson.loads(text)
    except (StrictJSONError, orjson.JSONDecodeError, UnicodeEncodeError) as error:
        raise APIError(
            400,
            "the arguments of a call must be a JSON object of modest depth",
            param=f"{path}.function.arguments",
            code="invalid_value",
        ) from error
    return {"name": call.function.name, "arguments": arguments}


def _render(
    tokenizer: PreTrainedTokenizerBase, turns: list[JSON], tools: ToolUse | None = None
) -> str:
    text = tokenizer.apply_chat_template(
        turns,
        tools=None if tools is None else list(tools.tools),
        tokenize=False,
        add_generation_prompt=True,
    )
    assert isinstance(text, str)
    return text


async def _encode(service: Service, text: str, *, special_tokens: bool) -> tuple[int, ...]:
    tokenizer = service.engine.tokenizer
    return await _aside(
        len(text),
        lambda: tuple(tokenizer(text, add_special_tokens=special_tokens, verbose=False).input_ids),
    )


async def _aside(length: int, work: Callable[[], _T]) -> _T:
    """Long texts on a thread: megabytes would stop the event loop for seconds."""
    return await asyncio.to_thread(work) if length > _INLINE_CHARACTERS else work()
