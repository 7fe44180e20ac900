"""OpenAI's response objects with our `risk`: a whole answer as a dict, its parts as events.

What is sent is exactly this; whoever calls has made sure that every float is finite.

Chat and plain completions differ in where the text stands, how log-probabilities look and where
the prompt's ids are; all of that is here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import orjson

from server.api.sse import event
from server.api.token_objects import JSON, chat_logprobs, risk_entries, risk_summary, text_logprobs
from server.detokenizer import TokenNames
from server.monitor import Token
from server.parsing import Segment, ToolCall
from server.policy import Ending, Order
from server.segments import Piece

_END = b"}\n\n"  # of a chunk and its event


@dataclass(frozen=True, kw_only=True)
class Writer:
    """Makes every object of one answer."""

    id: str
    model: str
    created: int
    system_fingerprint: str
    is_chat: bool
    with_token_ids: bool
    names: TokenNames
    orders: Sequence[Order]  # one per choice

    def body(self, choices: list[JSON], *, usage: JSON) -> JSON:
        """The whole answer."""
        body = self._object("chat.completion" if self.is_chat else "text_completion", choices)
        if self.is_chat and self.with_token_ids:
            body["prompt_token_ids"] = self.orders[0].request.prompt_token_ids
        return body | {"system_fingerprint": self.system_fingerprint, "usage": usage}

    def choice(self, index: int, pieces: Sequence[Piece], ending: Ending) -> JSON:
        """One choice of the whole answer; `pieces` is all that went before the ending."""
        tokens = (*(token for piece in pieces for token in piece.tokens), *ending.tokens)
        choice: JSON = {
            "index": index,
            **(
                {"message": self._message(index, pieces)}
                if self.is_chat
                else {"text": _text(pieces, "content")}
            ),
            "finish_reason": ending.finish_reason,
            **self._of_tokens(index, tokens),
        }
        if self.with_token_ids and not self.is_chat:
            choice["prompt_token_ids"] = self.orders[index].request.prompt_token_ids
        if ending.risk is not None:
            choice["risk"] = risk_summary(ending.risk, tokens)
        return choice

    def openings(self) -> bytes:
        """The chunks before any text, one per choice: who speaks in a chat, and prompts' ids."""
        if not self.is_chat:
            return b"".join(
                self._chunk(
                    self._written(i, Piece("", ()))
                    | {"prompt_token_ids": order.request.prompt_token_ids}
                )
                for i, order in enumerate(self.orders)
                if self.with_token_ids
            )
        delta = {"role": "assistant", "content": ""}
        first: JSON = {}
        if self.with_token_ids:
            first = {"prompt_token_ids": self.orders[0].request.prompt_token_ids}
        return b"".join(
            self._chunk(
                {"index": i, "delta": delta, "logprobs": None, "finish_reason": None},
                first if i == 0 else {},
            )
            for i in range(len(self.orders))
        )

    def delta(self, index: int, piece: Piece) -> bytes:
        """The chunk of one piece of text, with the entries of the tokens that carry it."""
        return self._chunk(self._written(index, piece))

    def _written(self, index: int, piece: Piece) -> JSON:
        choice: JSON = {
            "index": index,
            **({"delta": _delta(piece)} if self.is_chat else {"text": piece.text}),
            "finish_reason": None,
            **self._of_tokens(index, piece.tokens),
        }
        plan = self.orders[index].plan
        if plan is not None and plan.with_tokens:
            choice["risk"] = {"tokens": risk_entries(piece.tokens, plan)}
        return choice

    def closing(self, index: int, ending: Ending) -> bytes:
        """The last chunk of a choice: why it ended, and its risk as a whole."""
        choice: JSON = {
            "index": index,
            **({"delta": {}} if self.is_chat else {"text": ""}),
            "finish_reason": ending.finish_reason,
            **self._of_tokens(index, ending.tokens),
        }
        if ending.risk is not None:
            choice["risk"] = risk_summary(ending.risk, ending.tokens)
        return self._chunk(choice, {"system_fingerprint": self.system_fingerprint})

    def usage(self, usage: JSON) -> bytes:
        """The chunk without choices that `stream_options.include_usage` asks for."""
        return event(self._object(self._chunk_name, []) | {"usage": usage})

    def _message(self, index: int, pieces: Sequence[Piece]) -> JSON:
        content = _text(pieces, "content")
        if self.orders[index].rules is None:
            return {"role": "assistant", "content": content, "refusal": None}
        message: JSON = {
            "role": "assistant",
            "content": content or None,
            "refusal": None,
            "reasoning": _text(pieces, "reasoning") or None,
        }
        calls = [
            _opening(piece.opens, _text(pieces, "tool_call", piece.call))
            for piece in pieces
            if piece.opens is not None
        ]
        if calls:
            message["tool_calls"] = calls
        return message

    @property
    def _chunk_name(self) -> str:
        return "chat.completion.chunk" if self.is_chat else "text_completion"

    def _chunk(self, choice: JSON, more: JSON | None = None) -> bytes:
        """The event of a chunk with one choice; `more` are fields of the chunk itself."""
        tail = b"]," + orjson.dumps(more)[1:-1] + _END if more else b"]" + _END
        return self._head + orjson.dumps(choice) + tail

    @cached_property
    def _head(self) -> bytes:
        """What all chunks begin with."""
        return event(self._object(self._chunk_name, [])).removesuffix(b"]" + _END)

    def _object(self, name: str, choices: list[JSON]) -> JSON:
        return {
            "id": self.id,
            "object": name,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _of_tokens(self, index: int, tokens: Sequence[Token]) -> JSON:
        with_risk = self.orders[index].plan is not None
        logprobs = (
            chat_logprobs(tokens, self.names, with_risk=with_risk)
            if self.is_chat
            else text_logprobs(tokens, self.names)
        )
        if not self.with_token_ids:
            return {"logprobs": logprobs}
        ids = [token.token_id for token in tokens if token.token_id is not None]
        return {"logprobs": logprobs, "token_ids": ids}


def _text(pieces: Sequence[Piece], segment: Segment, call: int | None = None) -> str:
    return "".join(piece.text for piece in pieces if piece.field == (segment, call))


def _delta(piece: Piece) -> JSON:
    """What a piece adds to the message."""
    if piece.segment != "tool_call":
        return {piece.segment: piece.text}
    if piece.opens is not None:
        return {"tool_calls": [{"index": piece.call, **_opening(piece.opens, piece.text)}]}
    return {"tool_calls": [{"index": piece.call, "function": {"arguments": piece.text}}]}


def _opening(call: ToolCall, arguments: str) -> JSON:
    function = {"name": call.function, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def usage(*, prompt_tokens: int, completion_tokens: int) -> JSON:
    """Tokens that were read and written; `len(risk.tokens)` of all choices is the latter."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
