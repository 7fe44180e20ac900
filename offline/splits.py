"""Which answers a probe is fitted on, which choose and calibrate it, which only test it.

No relation (or topic, category) and no question stands in two parts. A source with too few groups
to split by, such as the two trivia sites of TriviaQA, is split by question.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from offline.records import Answer, RecordError
from offline.words import words

Part = Literal["fit", "calibrate", "test", "transfer", "excluded"]

SHARES: dict[Part, float] = {"fit": 0.6, "calibrate": 0.15, "test": 0.25}
MIN_GROUPS = 10

# What a question file itself calls the parts of its ordinary prompts.
_OWN_SPLITS: dict[str, Part] = {"fit": "fit", "held_out": "calibrate", "test": "test"}


def unit(answer: Answer, groups_of_source: int) -> str:
    """What may not be torn apart: the group where the source has enough of them, else the
    question, without case and punctuation."""
    if groups_of_source >= MIN_GROUPS:
        return f"{answer.source}/{answer.group}"
    return _plain(answer)


def assign(
    answers: Sequence[Answer], *, transfer: frozenset[str], seed: int
) -> tuple[dict[str, str], dict[str, Part]]:
    """`(answer id -> unit, answer id -> part)`.

    `transfer` names sources that are only evaluated on; of these, a question that another source
    asks as well is excluded. Answers to ordinary prompts follow the
    split that their file gives. Deterministic in the answers, whatever their order.
    """
    groups: dict[str, set[str]] = defaultdict(set)
    for answer in answers:
        groups[answer.source].add(answer.group)
    units = {
        answer.id: unit(answer, len(groups[answer.source])) if answer.gold else answer.question_id
        for answer in answers
    }
    sizes: dict[str, Counter[str]] = defaultdict(Counter)
    for answer in answers:
        if answer.gold and answer.source not in transfer:
            sizes[answer.source][units[answer.id]] += 1
    homes: dict[str, Part] = {}
    for counts in sizes.values():
        _distribute(counts, homes, seed)
    asked = {_plain(answer) for answer in answers if answer.source not in transfer}
    parts: dict[str, Part] = {}
    for answer in answers:
        if answer.source in transfer:
            parts[answer.id] = "excluded" if _plain(answer) in asked else "transfer"
        elif answer.gold:
            parts[answer.id] = homes[units[answer.id]]
        else:
            if answer.split not in _OWN_SPLITS:
                raise RecordError(
                    f"ordinary prompt {answer.id!r} has split {answer.split!r}, expected one of "
                    f"{', '.join(_OWN_SPLITS)}"
                )
            parts[answer.id] = _OWN_SPLITS[answer.split]
    check_disjoint(answers, units, parts)
    return units, parts


def check_disjoint(
    answers: Sequence[Answer], units: Mapping[str, str], parts: Mapping[str, Part]
) -> None:
    """RecordError when an id, a unit or a normalised question stands in two parts."""
    seen: dict[str, Part] = {}
    for answer in answers:
        here = parts[answer.id]
        if here == "excluded":
            continue
        for key in (answer.question_id, f"unit {units[answer.id]}", f"text {_plain(answer)}"):
            before = seen.setdefault(key, here)
            if before != here:
                raise RecordError(f"{key!r} stands in {before!r} and in {here!r}: the split leaks")


def _distribute(counts: Counter[str], homes: dict[str, Part], seed: int) -> None:
    """Each unit, in a shuffled order, to the part that lacks most of its share."""
    total = counts.total()
    filled: Counter[str] = Counter()
    for name in sorted(counts, key=lambda n: hashlib.sha256(f"{seed}/{n}".encode()).digest()):
        if name not in homes:  # two sources may ask one question
            homes[name] = max(SHARES, key=lambda p: SHARES[p] - filled[p] / total)
        filled[homes[name]] += counts[name]


def _plain(answer: Answer) -> str:
    """The question without case and punctuation."""
    return " ".join(word.key for word in words(answer.question or answer.prompt))


assert set(SHARES) <= set(get_args(Part))
