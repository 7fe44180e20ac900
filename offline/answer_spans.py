"""Which characters of an answer make its claim, and which of its tokens those are.

Right answers: the gold alias. Wrong answers: the words of the first sentence that the question did
not give and that are no stop words; when the gold answers are names or numbers, only names or
numbers ("is located in the city of Perth" -> "Perth"), which keeps wrong spans as narrow as right
ones. Offsets are characters, so apostrophes, quotes and accents cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from offline.judge import Alias, evades, find_alias, first_sentence
from offline.words import new_words, words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CharSpan = tuple[int, int]  # half-open, Unicode code points

MAX_WRONG_WORDS = 6  # more words than this are prose, not an answer
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Located(NamedTuple):
    """Spans of the claim, and where the free text begins that nobody has judged."""

    spans: tuple[CharSpan, ...]
    judged_until: int  # characters before this are the claim or its scaffold


def locate_right(text: str, aliases: Sequence[Alias]) -> Located | None:
    """The gold alias in a right answer."""
    span = find_alias(text, aliases)
    return None if span is None else Located((span,), span[1])


def locate_wrong(text: str, question: str, gold: Sequence[str]) -> Located | None:
    """The claim of a wrong answer; None when it evades, or when nothing in it can be told from its
    scaffold."""
    if evades(text, question):
        return None
    sentence = first_sentence(text)
    claimed = new_words(words(sentence), question)
    if any(word.is_named for alias in gold for word in words(alias)[-1:]):
        claimed = [word for word in claimed if word.is_named] or claimed
    if not claimed or len(claimed) > MAX_WRONG_WORDS:
        return None
    return Located(tuple((word.start, word.stop) for word in claimed), claimed[-1].stop)


def scaffold(text: str, question: str, located: Located) -> tuple[CharSpan, ...]:
    """Words that repeat the question or join its parts: they claim nothing. Before the end of the
    claim only; what a model adds after it may be false and was not judged."""
    new = {word.start for word in new_words(words(text), question)}
    return tuple(
        (word.start, word.stop)
        for word in words(text)
        if word.stop <= located.judged_until
        and word.start not in new
        and not any(start < word.stop and word.start < stop for start, stop in located.spans)
    )


def closing(offsets: Sequence[CharSpan], text: str, located: Located) -> tuple[int, ...]:
    """Tokens between the claim and the next word: the full stop, a closing quotation mark."""
    following = (word.start for word in words(text) if word.start >= located.judged_until)
    end = next(following, len(text))
    return tuple(
        i for i, (start, stop) in enumerate(offsets) if located.judged_until <= start < stop <= end
    )


def token_offsets(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[CharSpan]:
    """Characters that each token wrote, from the kept ids alone; special tokens write nothing.

    Prefixes are decoded, since a token's text depends on what stands before it. While a character
    is incomplete (its bytes lie in several tokens) the decoder shows U+FFFD, which is not counted:
    the last of those tokens gets the character.
    """
    ends: list[int] = []
    for stop in range(1, len(ids) + 1):
        prefix = decode(tokenizer, ids[:stop])
        ends.append(len(prefix if stop == len(ids) else prefix.rstrip(REPLACEMENT)))
    return [(min(start, stop), stop) for start, stop in zip([0, *ends], ends, strict=False)]


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The visible text of token ids, exactly: no clean-up of spaces."""
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def overlapping(offsets: Sequence[CharSpan], spans: Sequence[CharSpan]) -> tuple[int, ...]:
    """Indices of the tokens that share a character with a span."""
    return tuple(
        i
        for i, (start, stop) in enumerate(offsets)
        if any(start < span_stop and span_start < stop for span_start, span_stop in spans)
    )
