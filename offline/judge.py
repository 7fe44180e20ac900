"""Is an answer right, wrong, or no answer: normalised whole-word comparison with the gold aliases.

Words are compared without case, accents and punctuation, always whole: the alias "us" is not in
"Russia". Aliases that occur in the question are taken out first, or repeating the question would
be right (188 of 3,495 TriviaQA questions have such an alias). Model-free and deterministic.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from offline.records import Verdict

APOSTROPHE = "\N{RIGHT SINGLE QUOTATION MARK}"

_WORD = re.compile(rf"[^\W_]+(?:['{APOSTROPHE}][^\W_]+)*")

# First-person refusals and non-answers. A bare "cannot" is no abstention: "Penguins cannot fly".
_ABSTENTIONS = re.compile(
    r"""\b(?: i \s (?:do \s not|don't) \s (?:know|have|understand)
          | i (?:'m|\s am) \s (?:not \s (?:sure|certain|aware|able|familiar)|un(?:sure|able)|afraid)
          | (?:i|we) \s (?:cannot|can't|could \s not|couldn't|can \s not)
          | (?:i'm|i \s am)? \s? sorry \b
          | as \s an \s (?:ai|artificial)
          | (?:is|are|was) \s (?:unknown|unclear)
          | no \s (?:information|answer|data) \s (?:is|was|available|about|on)
          | not \s enough \s information
        )""",
    re.VERBOSE,
)
# "The country of Caen is not a place" names no answer; frequent in small models.
_EVASION = re.compile(r"\b(?:is|are|was|were)(?: not|n't)\b")


class Word(NamedTuple):
    """A word of a text: as compared, as written, and where `[start, stop)` in characters."""

    key: str
    text: str
    start: int
    stop: int


def words(text: str) -> list[Word]:
    """The words of `text` in order; offsets are Unicode code points."""
    return [Word(_key(m[0]), m[0], m.start(), m.end()) for m in _WORD.finditer(text)]


def usable_aliases(gold: Iterable[str], question: str) -> list[tuple[str, ...]]:
    """Gold answers as word keys, without those that the question itself contains.

    One- and two-letter aliases stay only in capitals ("US", "A"); `find_alias` then compares case.
    """
    asked = [word.key for word in words(question)]
    usable: list[tuple[str, ...]] = []
    for alias in gold:
        parts = words(alias)
        keys = tuple(word.key for word in parts)
        short = len(alias.strip()) <= 2 and alias.strip().isascii() and alias.strip().isalpha()
        if not keys or _find(asked, keys) is not None or (short and not alias.strip().isupper()):
            continue
        usable.append((parts[0].text,) if short else keys)
    return usable


def find_alias(text: str, aliases: Sequence[tuple[str, ...]]) -> tuple[int, int] | None:
    """Characters `[start, stop)` of the first alias in `text`, of several there the longest."""
    found = words(text)
    keys = [word.key for word in found]
    written = [word.text for word in found]
    best: tuple[int, int] | None = None
    for alias in aliases:
        capitals = len(alias) == 1 and len(alias[0]) <= 2 and alias[0].isupper()
        at = _find(written if capitals else keys, alias)
        if at is not None:
            start, stop = found[at].start, found[at + len(alias) - 1].stop
            if best is None or (start, -stop) < (best[0], -best[1]):
                best = (start, stop)
    return best


def abstains(text: str) -> bool:
    """The text refuses or evades: it gives no answer that could be right or wrong."""
    plain = " ".join(text.replace(APOSTROPHE, "'").casefold().split())
    return not words(text) or bool(_ABSTENTIONS.search(plain) or _EVASION.search(plain))


def judge(text: str, aliases: Sequence[tuple[str, ...]]) -> Verdict:
    """`right` when an alias stands in `text`, `abstained`, else `wrong`. `aliases` is not empty."""
    if abstains(text):
        return "abstained"
    return "right" if find_alias(text, aliases) is not None else "wrong"


def _key(word: str) -> str:
    decomposed = unicodedata.normalize("NFKD", word.casefold())
    kept = "".join(c for c in decomposed if not unicodedata.combining(c))
    return kept.replace(APOSTROPHE, "'").removesuffix("'s")


def _find(haystack: Sequence[str], needle: Sequence[str]) -> int | None:
    width = len(needle)
    for i in range(len(haystack) - width + 1):
        if tuple(haystack[i : i + width]) == tuple(needle):
            return i
    return None
