"""Token ids to text, one token at a time, without ever showing half a character.

A character whose bytes are spread over several tokens belongs to the token that completes it; the
tokens before it carry no text. Special tokens are hidden, unless a parser reads them. What is
still unfinished when the answer ends is dropped. Knows nothing of stop strings or risk.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\ufffd"  # what decoders put for bytes that are not (yet) a character
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # SentencePiece's byte fallback
_SHORTEST_CONTEXT, _LONGEST_CONTEXT = 4, 24  # prompt tokens, as vLLM primes its detokeniser


class Detokenizer:
    """One answer's text; `push` every written token, in order.

    The pieces joined are what decoding prompt and answer together adds to the prompt's text, so a
    SentencePiece word keeps the space before it when it follows text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Sequence[int] = (),
        *,
        shown_but: frozenset[int] | None = None,
    ) -> None:
        """`shown_but`: special tokens are shown, but for these."""
        self._hidden = shown_but
        self._decode = _decoder(tokenizer, skip_special_tokens=shown_but is None)
        self._window = self._context(prompt)  # begins where a character begins
        self._boundary = len(self._window)  # tokens of the window before the newest piece
        self._shown = len(self._finished(self._window))  # characters of the window already given

    def push(self, token_id: int) -> str:
        """The characters that this token completes; often "", sometimes several."""
        if self._hidden is not None and token_id in self._hidden:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        finished = text.rstrip(_REPLACEMENT)
        # By length, not by prefix: while a run of byte-fallback tokens is incomplete, decoders
        # replace the whole run, characters that were given already included.
        piece = finished[self._shown :]
        self._shown += len(piece)
        if piece and finished == text:
            # Decode only the newest tokens from here on; the cost per token stays constant.
            self._window = self._window[self._boundary :]
            self._boundary = len(self._window)
            self._shown = len(self._decode(self._window))
        return piece

    def _context(self, prompt: Sequence[int]) -> list[int]:
        """The shortest useful end of the prompt that begins with a whole character."""
        for length in range(_SHORTEST_CONTEXT, min(len(prompt), _LONGEST_CONTEXT)):
            context = list(prompt[-length:])
            finished = self._finished(context)
            if finished and _REPLACEMENT not in finished:
                return context
        return list(prompt) if len(prompt) <= _LONGEST_CONTEXT else []

    def _finished(self, ids: list[int]) -> str:
        return self._decode(ids).rstrip(_REPLACEMENT)


def decode(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, skip_special_tokens: bool = True
) -> str:
    """All of `ids` at once, spaces untouched."""
    return _decoder(tokenizer, skip_special_tokens=skip_special_tokens)(list(ids))


def _decoder(
    tokenizer: PreTrainedTokenizerBase, *, skip_special_tokens: bool
) -> Callable[[list[int]], str]:
    """The tokenizer's `decode`, without what the library does around it where that is nothing.

    Around it is most of it: 2 us of 2.5 for a short window, twice per token (transformers 5.19).
    """
    from transformers import TokenizersBackend

    if isinstance(tokenizer, TokenizersBackend) and _is_plain(type(tokenizer)):
        backend = tokenizer.backend_tokenizer
        return lambda ids: str(backend.decode(ids, skip_special_tokens=skip_special_tokens))
    return lambda ids: str(
        tokenizer.decode(
            ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
    )


def _is_plain(kind: type[PreTrainedTokenizerBase]) -> bool:
    """It decodes as the library's own class does."""
    from transformers import PreTrainedTokenizerBase, TokenizersBackend

    return (
        kind.decode is PreTrainedTokenizerBase.decode and kind._decode is TokenizersBackend._decode
    )


class TokenNames:
    """How single tokens are called in `logprobs`: their text and their bytes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._alphabet = _byte_level_alphabet() if _is_byte_level(tokenizer) else {}
        self._special = frozenset(tokenizer.all_special_ids)

    def utf8(self, token_id: int) -> bytes:
        """The token's own bytes, which may be part of a character."""
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(piece, str):  # an id that the tokenizer does not have
            return b""
        if token_id in self._special:
            return piece.encode()
        if self._alphabet and all(char in self._alphabet for char in piece):
            return bytes(self._alphabet[char] for char in piece)
        if fallback := _BYTE_TOKEN.fullmatch(piece):
            return bytes([int(fallback[1], 16)])
        return piece.replace("\u2581", " ").encode()

    def text(self, token_id: int) -> str:
        """`utf8` as a string; U+FFFD where it is part of a character."""
        return self.utf8(token_id).decode(errors="replace")


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return "ByteLevel" in repr(backend.decoder) if backend is not None else False


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's table: the printable character that stands for each byte."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}
