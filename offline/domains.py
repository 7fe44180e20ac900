"""Where answers come from: the sets that a probe is judged on, and probes of one source alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from offline.dataset import FITTED, Dataset
from offline.examples import Examples, Stored
from offline.features import IntArray
from offline.fit_result import ANSWER, FitResult
from offline.heads import train
from offline.metrics import Floats

MIN_CLASS = 15  # a place with fewer right or wrong answers gives no rows


# Names of data sets that no split of the units holds out (offline/crossvalidate.py).
NEVER_TRAINED_ON = "never trained on"
ORDINARY_TOKENS = "tokens of ordinary long answers"
ORDINARY_RESPONSES = "ordinary long responses"


class Place(NamedTuple):
    """Answers that are judged together."""

    name: str
    answers: IntArray
    as_asked: bool = False  # nothing was left out to balance it


def places(data: Dataset) -> list[Place]:
    """All unseen answers as they were asked; each source and style by itself; of it as many wrong
    answers as right ones in each relation; and of these the ones whose claim was found, which is
    the strictest set."""
    every = data.answered("test")
    found = [Place("unseen relations and questions, as asked", every, as_asked=True)]
    kinds = sorted({(answer.source, answer.style) for answer in data.answers if answer.gold})
    for source, style in kinds:
        for part in ("test", "transfer"):
            answers = data.answered(part, source=source, style=style)
            seen = "unseen" if part == "test" else NEVER_TRAINED_ON
            name = f"{source}, {style}, {seen}"
            found.append(Place(f"{name}, as asked", answers, as_asked=True))
            if part == "test":
                even = data.even(answers, wrong_per_right=1.0)
                found.append(Place(f"{name}, balanced inside groups", even))
                found.append(Place(f"{name}, balanced, with a claim", data.located(even)))
    return [place for place in found if _has_both(data, place.answers)]


def alone(
    data: Dataset, result: FitResult, examples: Examples, asked: Stored
) -> Iterator[tuple[str, Floats]]:
    """`(source, scores [answers])` of answer heads that saw one source only, with the same budget
    and penalty: is the mixture at least as good as the best of them?

    examples: what the answer head is fitted on. asked: `answer_means` of the answers.
    """
    if len(result.chosen.heads) == 1:
        return
    fitted = data.answered(*FITTED)
    sources = np.array([data.answers[i].source for i in fitted])
    for source in sorted(set(sources.tolist())):
        kept = np.ones(len(examples.unit), dtype=np.bool_)
        kept[: len(fitted)] = sources == source  # windows of prose follow
        if not _has_both(data, fitted[sources == source]):
            continue
        settings = result.settings.heads
        count = round(len(result.chosen.columns) / dict(settings.shares)[ANSWER])
        trial = train({ANSWER: examples}, {ANSWER: kept}, [count], settings)[0]
        weights = trial[settings.penalties.index(result.penalty[ANSWER])]
        yield source, weights.read(asked[:, np.array(weights.columns)].astype(np.float32))[:, 0]


def _has_both(data: Dataset, answers: IntArray) -> bool:
    wrong = data.hallucinated(answers)
    return bool(min(wrong.sum(), (~wrong).sum()) >= MIN_CLASS)
