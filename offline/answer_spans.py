"""Which characters of an answer make its claim, and which of its tokens those are.

Right answers: the gold alias. Wrong answers: the words of the first sentence that the question did
not give and that are no stop words; when the gold answers are names or numbers, only names or
numbers ("is located in the city of Perth" -> "Perth"), which keeps wrong spans as narrow as right
ones. Offsets are characters, so apostrophes, quotes and accents cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from offline.evasion import evades, first_sentence
from offline.judge import Alias, find_alias
from offline.words import Word, new_words, words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CharSpan = tuple[int, int]  # half-open, Unicode code points

MAX_CLAIM_WORDS = 6  # more words than this are prose, not an answer
MAX_BARE_WORDS = 3  # of an answer that names nothing where a name is asked for
_JOINTS = frozenset("of the de la le du da di von van der den".split())  # noqa: SIM905
_PARTS = ("type", "kind", "sort", "form", "shade")  # "a deep shade of blue" claims blue
_ASKING = frozenset(
    "who whom whose what which where when why how in at on name".split()  # noqa: SIM905
)
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
    """The claim of a wrong answer: one run of words that the question did not give. None when it
    evades, or when nothing in it can be told from prose.

    A statement is completed after its own words; a question may be answered before or after them,
    and the first run is taken. Where the accepted answers are names or numbers, so is the claim.
    """
    if evades(text, question):
        return None
    sentence = words(first_sentence(text))
    new = new_words(sentence, question)
    runs = _runs(text, sentence, new)
    if any(word.is_named for alias in gold for word in words(alias)[-1:]):
        named = [run for run in map(_from_first_name, runs) if run]
        if not named and len(new) > MAX_BARE_WORDS:
            return None
        runs = named or runs
    elif len(new) > MAX_CLAIM_WORDS:
        return None
    run = runs[0] if _is_question(question) else _after_the_statement(runs, sentence, question)
    run = _after_a_part_of(run)
    if len(run) > MAX_CLAIM_WORDS:
        return None
    start, stop = run[0].start, run[-1].stop
    return Located(((start, stop),), stop)


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


def _runs(text: str, sentence: Sequence[Word], new: Sequence[Word]) -> list[list[Word]]:
    """The new words in runs; a run goes on over joints ("Republic of the Congo"), and ends at other
    words and at punctuation, except inside a word or an abbreviation."""
    fresh = {word.start for word in new}
    runs: list[list[Word]] = []
    open_run: list[Word] = []  # the words since the last end, joints included
    for i, word in enumerate(sentence):
        gap = text[sentence[i - 1].stop : word.start] if i else ""
        if open_run and gap.strip() not in ("", "-", ".", "'"):
            runs.append(open_run)
            open_run = []
        pair = word.key in ("and", "or") and _joins_alike(sentence, i)
        if word.start in fresh or (open_run and (word.text in _JOINTS or pair)):
            open_run.append(word)
        elif open_run:
            runs.append(open_run)
            open_run = []
    runs.append(open_run)
    return [kept for run in runs if (kept := _without_last_joints(run, fresh))]


def _joins_alike(sentence: Sequence[Word], i: int) -> bool:
    """ "Sanskrit and Telugu", but not "Nolan and stars"."""
    beside = sentence[i - 1 : i + 2 : 2] if i else []
    return len(beside) == 2 and beside[0].is_named == beside[1].is_named


def _without_last_joints(run: list[Word], fresh: set[int]) -> list[Word]:
    while run and run[-1].start not in fresh:
        run = run[:-1]
    return run


def _from_first_name(run: list[Word]) -> list[Word]:
    """ "island of Baja California" claims Baja California."""
    return next((run[i:] for i, word in enumerate(run) if word.is_named), [])


def _after_a_part_of(run: list[Word]) -> list[Word]:
    keys = [word.key for word in run]
    at = [i + 2 for i in range(len(run) - 2) if keys[i] in _PARTS and keys[i + 1] == "of"]
    return run[at[-1] :] if at else run


def _is_question(text: str) -> bool:
    return text.rstrip().endswith("?") or text.split(maxsplit=1)[0].casefold() in _ASKING


def _after_the_statement(
    runs: Sequence[list[Word]], sentence: Sequence[Word], question: str
) -> list[Word]:
    """The first run that as much of the statement as possible stands before."""
    given = {word.key for word in words(question) if not word.is_stop}

    def said_before(run: list[Word]) -> int:
        return len(given & {word.key for word in sentence if word.stop <= run[0].start})

    return max(runs, key=said_before)
