"""Is an answer right, wrong, or neither: rules that need no model.

The alias rule compares whole words with the accepted answers. It decides only what it can tell and
says why where it cannot: wrong answers are plenty, and a wrong label costs more than a lost one.
A judge that asks a model is in judge_by_model.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

from offline.evasion import evades, first_sentence, refuses
from offline.records import RecordError, Verdict
from offline.words import APOSTROPHE, Word, akin, contains, new_words, occurrences, words

Alias = tuple[str, ...]

ABSTAINED = "declines to answer"
NO_ALIAS = "no accepted answer that the question does not contain"
NEAR = "shares words with an accepted answer"
HEDGED = "names an accepted answer as one of several"
DENIED = "names an accepted answer and denies it"
PART = "names an accepted answer as part of a longer name"
LATE = "names an accepted answer after it has answered otherwise"
NEITHER = "says neither yes nor no, or both"

_YES_OR_NO = frozenset((("yes",), ("no",)))
_AUXILIARIES = frozenset(
    """am is are was were do does did has have had can could will would shall should may might
    must""".split()  # noqa: SIM905
)
_DENIALS = frozenset(("not", "never", "nor", "without", "unlike", "than", "instead"))


class Case(NamedTuple):
    """What a judge sees of an answer."""

    id: str
    question: str
    gold: tuple[str, ...]
    text: str


class Judgement(NamedTuple):
    """`reason` says why a verdict is neither right nor wrong."""

    verdict: Verdict
    reason: str = ""


class Judge(Protocol):
    """Judges answers to questions that have accepted answers."""

    name: str  # stands in labels.jsonl and in the card

    def judge(self, cases: Sequence[Case]) -> list[Judgement]:
        """One judgement per case, in order."""
        ...


class RuleJudge:
    """`alias`, `exact` or `regex`: a rule applied to one answer after the other."""

    def __init__(self, rule: str) -> None:
        self._rule = RULES[rule]
        self.name = f"{rule} match"

    def judge(self, cases: Sequence[Case]) -> list[Judgement]:
        return [self._rule(case) for case in cases]


def by_alias(case: Case) -> Judgement:
    """Right when an accepted answer stands in the text as whole words and nothing there takes it
    back; wrong when the text evades, or claims something that is not even near one."""
    if refuses(case.text):
        return Judgement("abstained", ABSTAINED)
    aliases = usable_aliases(case.gold, case.question)
    if not aliases:
        return Judgement("unjudged", NO_ALIAS)
    if _asks_yes_or_no(case.question) and not _YES_OR_NO.isdisjoint(aliases):
        return _by_yes_or_no(case.text, aliases)
    found = words(case.text)
    spans = list(_alias_words(found, aliases))
    if not spans:
        claimed = new_words(found, case.question)
        evasive = evades(case.text, case.question)
        near = not evasive and any(_is_near(claimed, alias) for alias in aliases)
        return Judgement("unjudged", NEAR) if near else Judgement("wrong")
    standing = [(start, stop) for start, stop in spans if not _is_denied(found, start)]
    if not standing:
        return Judgement("unjudged", DENIED)
    alone = [span for span in standing if not _is_part_of_a_name(case, found, *span)]
    if not alone:
        return Judgement("unjudged", PART)
    start, stop = min(alone, key=lambda span: (span[0], -span[1]))
    if _is_one_of_several(case.text, found, start, stop):
        return Judgement("unjudged", HEDGED)
    end = len(first_sentence(case.text))
    if found[start].start >= end and new_words(words(case.text[:end]), case.question):
        return Judgement("unjudged", LATE)
    return Judgement("right")


def by_exact(case: Case) -> Judgement:
    """Right when the whole answer, without articles and the like around it, is an accepted one."""
    if refuses(case.text):
        return Judgement("abstained", ABSTAINED)
    said = _bare(words(case.text))
    return Judgement("right" if any(said == _bare(words(a)) for a in case.gold) else "wrong")


def by_regex(case: Case) -> Judgement:
    """Right when one of the accepted answers, read as a pattern, is found in the text."""
    if refuses(case.text):
        return Judgement("abstained", ABSTAINED)
    for pattern in case.gold:
        try:
            if re.search(pattern, case.text, re.IGNORECASE):
                return Judgement("right")
        except re.error as exc:
            raise RecordError(f"answer {case.id!r}: {pattern!r} is no pattern: {exc}") from exc
    return Judgement("wrong")


RULES = {"alias": by_alias, "exact": by_exact, "regex": by_regex}


def usable_aliases(gold: Iterable[str], question: str) -> list[Alias]:
    """Accepted answers as word keys, without those that the question itself contains: repeating
    the question would be right.

    One- and two-letter aliases stay only in capitals ("US", "A"), and are then found in capitals;
    but "no" answers a question that can be answered with it.
    """
    asked = [word.key for word in words(question)]
    usable: list[Alias] = []
    for text in gold:
        parts = words(text)
        if len(parts) > 1 and parts[0].key in ("the", "a", "an"):
            lower = parts[0].text.islower() or not any(part.is_named for part in parts[1:])
            parts = parts[1:] if lower else parts  # "the SAP Center", but The Who
        keys = tuple(part.key for part in parts)
        short = len(keys) == 1 and len(keys[0]) <= 2 and keys[0].isascii() and keys[0].isalpha()
        short = short and not (keys == ("no",) and _asks_yes_or_no(question))
        if not keys or contains(asked, keys) or (short and not parts[0].text.isupper()):
            continue
        usable.append((_capitals(parts[0]),) if short else keys)
    return usable


def find_alias(text: str, aliases: Sequence[Alias]) -> tuple[int, int] | None:
    """Characters `[start, stop)` of the first alias in `text`, of several there the longest; one
    that is denied only when no other stands there."""
    found = words(text)
    spans = list(_alias_words(found, aliases))
    if not spans:
        return None
    start, stop = min(spans, key=lambda s: (_is_denied(found, s[0]), s[0], -s[1]))
    return found[start].start, found[stop - 1].stop


def _by_yes_or_no(text: str, aliases: Sequence[Alias]) -> Judgement:
    """By the yes or no that opens or ends the first sentence: "there is no doubt" says neither, and
    what it does say no rule can tell."""
    opening = [(word.key,) for word in words(first_sentence(text))]
    said = _YES_OR_NO.intersection(opening[:1] + opening[-1:])
    if len(said) != 1:
        return Judgement("unjudged", NEITHER)
    return Judgement("wrong" if said.isdisjoint(aliases) else "right")


def _asks_yes_or_no(question: str) -> bool:
    return any(word.text.casefold() in _AUXILIARIES for word in words(question)[:1])


def _alias_words(found: Sequence[Word], aliases: Sequence[Alias]) -> Iterator[tuple[int, int]]:
    """Word indices `[start, stop)` of every alias in the text."""
    keys = [word.key for word in found]
    written = [_capitals(word) for word in found]
    for alias in aliases:
        for start in occurrences(written if alias[0].isupper() else keys, alias):
            yield start, start + len(alias)


def _capitals(word: Word) -> str:
    return word.text.replace(".", "")


def _is_denied(found: Sequence[Word], start: int) -> bool:
    """ "not Paris", "never in Paris": within three words before it; but not "never Lyon, always
    Paris"."""
    for word in reversed(found[max(0, start - 3) : start]):
        said = word.text.casefold()
        if said in _DENIALS or said.endswith(("n't", f"n{APOSTROPHE}t")):
            return True
        if word.is_named or said == "but":
            return False
    return False


def _is_part_of_a_name(case: Case, found: Sequence[Word], start: int, stop: int) -> bool:
    """ "New Mexico", "Washington Irving", "University of Barcelona": a capitalised word that is new
    stands right beside it."""
    new = {word.start for word in new_words(found, case.question)}
    beside = []
    if start and case.text[found[start - 1].stop : found[start].start] == " ":
        beside.append(found[start - 1])
    if stop < len(found) and case.text[found[stop - 1].stop : found[stop].start] == " ":
        beside.append(found[stop])
    if start > 1 and found[start - 1].key == "of":
        beside.append(found[start - 2])
    own = {word.key for alias in case.gold for word in words(alias)}
    return any(w.text[0].isupper() and w.start in new and w.key not in own for w in beside)


def _is_one_of_several(text: str, found: Sequence[Word], start: int, stop: int) -> bool:
    """ "Paris or Lyon", "Russian and English", "Nice, Lyon, Lille"."""
    before, after = found[max(0, start - 2) : start], found[stop : stop + 2]
    if any(word.key in ("or", "either") for word in (*before[-1:], *after[:1])):
        return True
    joined = [pair for pair in (before[::-1], after) if len(pair) == 2 and pair[0].key == "and"]
    listed = [
        word.is_named and "," in text[left:right]
        for word, left, right in (
            *((word, word.stop, found[start].start) for word in before[-1:]),
            *((word, found[stop - 1].stop, word.start) for word in after[:1]),
        )
    ]
    return any(not pair[1].is_stop for pair in joined) or (len(listed) == 2 and all(listed))


def _is_near(claimed: Sequence[Word], alias: Alias) -> bool:
    """At least half of the alias's own words, or forms of them, are claimed by the text."""
    own = [w for w in words(" ".join(alias)) if not w.is_stop and not w.text.isupper()]
    numbers = [w for w in own if w.key.isdigit()]
    if numbers and any(w.key.isdigit() for w in claimed):  # of a date the year decides
        own = [w for w in numbers if len(w.key) == 4] or numbers
    named = [w.key for w in claimed if w.is_named]
    said = [w.key for w in claimed] if len(own) == 1 else named
    shared = sum(any(akin(word.key, other) for other in said) for word in own)
    return 2 * shared >= len(own) > 0


def _bare(found: Sequence[Word]) -> list[str]:
    """Keys without the stop words at both ends."""
    kept = list(found)
    while kept and kept[0].is_stop:
        kept.pop(0)
    while kept and kept[-1].is_stop:
        kept.pop()
    return [word.key for word in kept or found]
