"""What risks are calibrated on, and judged on: the same mixture of tokens, and of responses, in the
part that is fitted and in the part that tests; and how logits become one number per response."""

from __future__ import annotations

import numpy as np

from offline.dataset import Dataset
from offline.examples import sample
from offline.features import IntArray
from offline.metrics import Bools, Floats
from offline.shards import Kind
from offline.splits import Part
from probes.spans import Pooling

JUDGED = (Kind.WRONG, Kind.RIGHT, Kind.SCAFFOLD, Kind.PROSE)  # all tokens that somebody has judged
POOLINGS = (
    *(Pooling("max_window", width) for width in (2, 4, 8, 16, 24, 32)),
    Pooling("max"),
    Pooling("first"),
    Pooling("last"),
)


def mixture(data: Dataset, part: Part, *, seed: int = 0) -> IntArray:
    """Rows of a part on which token risks are calibrated and judged: every judged token of the
    short answers (right and wrong alike many) and as many tokens of ordinary prose."""
    short = data.even_rows(part, Kind.WRONG, Kind.RIGHT, Kind.SCAFFOLD)
    return np.sort(
        np.concatenate([short, sample(data.rows(part, Kind.PROSE), len(short), seed=seed)])
    )


def response_mixture(data: Dataset, part: Part) -> tuple[IntArray, Bools]:
    """`(answers, hallucinated)` on which response risks are calibrated and judged: short answers,
    right and wrong alike many, and ordinary long ones, which claim nothing false. Without these a
    response's risk would only measure its length."""
    short, long = data.even(data.answered(part)), data.ordinary(part)
    wrong = np.concatenate([data.hallucinated(short), np.zeros(len(long), dtype=np.bool_)])
    return np.concatenate([short, long]), wrong


def pooled(data: Dataset, logits: Floats, answers: IntArray, pooling: Pooling) -> Floats:
    """`[answers]` logits of whole responses, pooled over all their tokens as the server does."""
    return np.array([pooling.pool(logits[data.rows_of(i)].tolist()) for i in answers])


def claim_means(data: Dataset, logits: Floats, answers: IntArray) -> Floats:
    """`[answers]`: mean over the tokens of each answer's claim."""
    return np.array([logits[data.claim_rows(i)].mean() for i in answers])
