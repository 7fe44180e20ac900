"""Which answers a probe is fitted on and which only test it, and how the former are folded.

No relation (or topic, category) and no question stands in two parts, nor in two folds. A source
with too few groups to split by, such as the two trivia sites of TriviaQA, is split by question.
A unit's part depends on its name and the seed alone: more answers of a source do not move one of
its relations from the test to the fit, so what was never looked at stays that way.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from offline.records import Answer, RecordError
from offline.words import words

# augmented: fitted on besides, of units of the part fit; nothing is chosen or calibrated by it
Part = Literal["fit", "test", "transfer", "excluded", "augmented"]

TEST_SHARE = 0.25
SPLIT_SEED = 1128  # of the shipped probe; chosen by date, before anything was fitted with it
MIN_GROUPS = 10

# What a question file itself calls the parts of its ordinary prompts.
OWN_SPLITS: dict[str, Part] = {"fit": "fit", "test": "test"}


class Split(NamedTuple):
    """What decides the parts. `label` is told it and writes it down; later verbs read it there, so
    that no two of them can go by another one."""

    transfer: frozenset[str] = frozenset()  # sources that are only evaluated on
    seed: int = SPLIT_SEED

    @classmethod
    def of(cls, settings: Mapping[str, str]) -> Split:
        """That of the header of a file of labels."""
        names = settings["transfer"]
        return cls(frozenset(names.split(",") if names else ()), int(settings["split_seed"]))


def assign(answers: Sequence[Answer], split: Split) -> tuple[dict[str, str], dict[str, Part]]:
    """`(answer id -> unit, answer id -> part)`.

    Of the sources of `split.transfer`, a question that another source asks as well is excluded. So
    is, from the fit, a question that the test asks in another unit. Answers to ordinary prompts
    follow the split that their file gives; without one a hash decides. Deterministic in the
    answers, whatever their order. RecordError for a source that nothing is of.
    """
    transfer, seed = split
    sources = {answer.source for answer in answers}
    if unknown := sorted(transfer - sources):
        raise RecordError(
            f"--transfer {unknown[0]!r} is the stem of no question file that was asked; these are: "
            f"{', '.join(sorted(sources))}"
        )
    units = _units([answer for answer in answers if answer.source not in transfer])
    units |= _units([answer for answer in answers if answer.source in transfer])
    asked = {plain(answer) for answer in answers if answer.source not in transfer}
    parts: dict[str, Part] = {}
    for answer in answers:
        if answer.source in transfer:
            parts[answer.id] = "excluded" if plain(answer) in asked else "transfer"
        elif answer.gold:
            parts[answer.id] = home(units[answer.id], seed)
        elif not answer.split:
            parts[answer.id] = home(plain(answer), seed)  # one text is in one part
        else:
            if answer.split not in OWN_SPLITS:
                raise RecordError(
                    f"ordinary prompt {answer.id!r} has split {answer.split!r}, expected one of "
                    f"{', '.join(OWN_SPLITS)}"
                )
            parts[answer.id] = OWN_SPLITS[answer.split]
    tested = {plain(answer) for answer in answers if parts[answer.id] == "test"}
    for answer in answers:
        if parts[answer.id] == "fit" and plain(answer) in tested:
            parts[answer.id] = "excluded"
    check_disjoint(answers, units, parts)
    return units, parts


def _units(answers: Sequence[Answer]) -> dict[str, str]:
    """Answer id -> what may not be torn apart: the group where a source has enough of them, else
    the question, without case and punctuation; of ordinary prose the prompt.

    A group that several sources share, as two files of one relation do, is one unit of the first
    that has enough.
    """
    groups: dict[str, set[str]] = defaultdict(set)
    for answer in answers:
        if answer.gold:
            groups[answer.source].add(answer.group)
    grouped = [source for source in sorted(groups) if len(groups[source]) >= MIN_GROUPS]
    owner: dict[str, str] = {}
    for source in grouped:
        for group in groups[source] - {""}:
            owner.setdefault(group, source)
    units: dict[str, str] = {}
    for answer in answers:
        if not answer.gold:
            units[answer.id] = answer.question_id
        elif answer.group in owner:
            units[answer.id] = f"{owner[answer.group]}/{answer.group}"
        elif answer.source in grouped:
            units[answer.id] = f"{answer.source}/{answer.group}"
        else:
            units[answer.id] = plain(answer)
    return units


def check_disjoint(
    answers: Sequence[Answer], units: Mapping[str, str], parts: Mapping[str, Part]
) -> None:
    """RecordError when an id, a unit or a normalised question stands in two parts."""
    seen: dict[str, Part] = {}
    for answer in answers:
        here = parts[answer.id]
        if here == "excluded":
            continue
        for key in (answer.question_id, f"unit {units[answer.id]}", f"text {plain(answer)}"):
            before = seen.setdefault(key, here)
            if before != here:
                raise RecordError(f"{key!r} stands in {before!r} and in {here!r}: the split leaks")


def folds(units: Sequence[str], count: int, *, seed: int) -> list[int]:
    """A fold in [0, count) for every row: no unit in two of them, alike in rows.

    The largest unit first, each to the emptiest fold.
    """
    sizes = Counter(units)
    filled = [0] * count
    fold_of: dict[str, int] = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], _draw(name, seed))):
        fold_of[name] = min(range(count), key=lambda fold: filled[fold])
        filled[fold_of[name]] += sizes[name]
    return [fold_of[name] for name in units]


def home(unit: str, seed: int) -> Part:
    """The part of a unit whose file does not say it."""
    return "test" if _draw(unit, seed) < TEST_SHARE else "fit"


def _draw(name: str, seed: int) -> float:
    """A number in [0, 1) that only name and seed decide."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return float(int.from_bytes(digest[:8]) / 2**64)


def plain(answer: Answer) -> str:
    """The question without case and punctuation."""
    return " ".join(word.key for word in words(answer.question or answer.prompt))
