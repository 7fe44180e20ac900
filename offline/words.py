"""Words of a text as they are compared: without case, accents, punctuation, plural or spelling of
numbers. Offsets are Unicode code points into the text as it is. Model-free and deterministic."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

APOSTROPHE = "\N{RIGHT SINGLE QUOTATION MARK}"

# In order: 1,234,567 and 9.81; U.S. and J. S.; a sign of a script without spaces; a word.
_WORD = re.compile(
    rf"""\d{{1,3}}(?:,\d{{3}})+(?:\.\d+)?(?!\d) | \d+\.\d+
       | [A-Z]\.(?:\ ?[A-Z]\.)+
       | [぀-ヿ㐀-䶿一-鿿豈-﫿]
       | (?:(?![぀-ヿ㐀-䶿一-鿿豈-﫿])[^\W_])+(?:['{APOSTROPHE}][^\W_]+)* | &""",
    re.VERBOSE,
)
_NUMBERS = """zero two three four five six seven eight nine ten eleven twelve thirteen fourteen
    fifteen sixteen seventeen eighteen nineteen twenty""".split()  # noqa: SIM905
# Without "one", which is a pronoun more often than a number.
_SPELT = dict(zip(_NUMBERS, map(str, (0, *range(2, 21))), strict=True)) | {"&": "and"}
_LETTERS = str.maketrans("łđøħı", "ldohi")  # they have no accent to take off
_PLURAL = re.compile(r"(?<=[^\W\d_]{3})(?<!s)(?<!u)(?<!i)s$")

STOP_WORDS = frozenset(
    """a an the this that these those it its he she they him his her them their i you we my your our
    and or but nor so yet if then than as of in on at by for from to into with about over under
    between during after before is was were are be been being am has have had do does did will
    would can could may might must shall should not no yes also only both which who whom whose what
    when where why how there here all any each some such more most other another same very just
    answer question sentence word words missing following correct called known named located one
    first respectively based considered used found mr mrs dr either neither""".split()  # noqa: SIM905
)


class Word(NamedTuple):
    """A word of a text: as compared, as written, and where `[start, stop)` in characters."""

    key: str
    text: str
    start: int
    stop: int

    @property
    def is_named(self) -> bool:
        """Written like a name or a number."""
        return self.text[0].isupper() or self.text[0].isdigit()

    @property
    def is_stop(self) -> bool:
        return self.text.casefold() in STOP_WORDS or self.text == "&"


def words(text: str) -> list[Word]:
    """The words of `text` in order."""
    return [Word(_key(m[0]), m[0], m.start(), m.end()) for m in _WORD.finditer(text)]


def new_words(found: Sequence[Word], question: str) -> list[Word]:
    """Words that are no stop words and that the question has not given.

    Each word of the question covers one occurrence: in "The country of Luxor is Luxor" the second
    "Luxor" is new.
    """
    given = Counter(word.key for word in words(question))
    new: list[Word] = []
    for word in found:
        if given[word.key] > 0:
            given[word.key] -= 1
        elif not word.is_stop:
            new.append(word)
    return new


def occurrences(haystack: Sequence[str], needle: Sequence[str]) -> Iterator[int]:
    """Where `needle` stands in `haystack` as a contiguous run."""
    width, wanted = len(needle), tuple(needle)
    for i in range(len(haystack) - width + 1):
        if tuple(haystack[i : i + width]) == wanted:
            yield i


def contains(haystack: Sequence[str], needle: Sequence[str]) -> bool:
    """`needle` stands in `haystack` as a contiguous run."""
    return next(occurrences(haystack, needle), None) is not None


def akin(a: str, b: str) -> bool:
    """Two keys are forms of one word, as far as spelling tells: Greek and Greece, Catholic and
    Catholicism. Numbers are akin only when equal."""
    if a == b:
        return True
    if any(c.isdigit() for c in a + b):
        return False
    common = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), -1)
    shared = min(len(a), len(b)) if common < 0 else common
    return shared >= 4 and 2 * shared >= max(len(a), len(b))


@lru_cache(maxsize=100_000)  # accepted answers by the hundred, most of them of the same words
def _key(word: str) -> str:
    decomposed = unicodedata.normalize("NFKD", word.casefold())
    kept = "".join(c for c in decomposed if not unicodedata.combining(c)).translate(_LETTERS)
    kept = kept.replace(APOSTROPHE, "'").removesuffix("'s")
    if kept[0].isdigit():
        return kept.replace(",", "")
    kept = kept.replace(".", "").replace(" ", "")
    return _SPELT.get(kept) or _PLURAL.sub("", kept)
