"""What the heads are fitted on: mean CETT of some tokens, what they are an example of, whose unit.

Of the token head an example is one token; of the answer head a whole short answer, or a window of
ordinary prose; in the paper's designs the claim of an answer, and what stands around it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from offline.dataset import FITTED, Dataset, Names
from offline.features import Features, IntArray
from offline.metrics import Bools
from offline.records import RecordError
from offline.shards import Kind

if TYPE_CHECKING:
    from offline.fit_result import FitSettings

Stored: TypeAlias = NDArray[np.float16] | NDArray[np.float32]

BLOCK_ROWS = 2048  # tokens that are widened to float32 at a time


@dataclass(frozen=True, eq=False)
class Examples:
    """x [examples, neurons] raw CETT, as exact as it is stored; the rest [examples]."""

    x: Stored
    positive: Bools
    weight: IntArray  # how often an example counts
    unit: Names

    def __post_init__(self) -> None:
        if self.positive.all() or not self.positive.any():
            raise RecordError(
                f"{int(self.positive.sum())} of {len(self.positive)} examples to fit on are of "
                f"wrong answers: both classes are needed; ask more questions, or others (see the "
                f"counts of `label`)"
            )

    def taken(self, chosen: Bools) -> tuple[IntArray, Bools]:
        """Rows of `x` (each as often as it counts) and their class, of the chosen examples."""
        rows = np.repeat(np.flatnonzero(chosen), self.weight[chosen])
        return rows, self.positive[rows]

    def strongest(self, chosen: Bools, most: int) -> IntArray:
        """The columns, at most `most`, whose class means lie furthest apart in deviations.

        A fit at full width costs memory for columns that never get a weight.
        """
        if self.x.shape[1] <= most:
            return np.arange(self.x.shape[1])
        sums = np.zeros((2, self.x.shape[1]))
        squares = np.zeros(self.x.shape[1])
        total = np.zeros(2)
        rows = np.flatnonzero(chosen)
        for block in np.array_split(rows, -(-len(rows) // BLOCK_ROWS)):
            x, weight = self.x[block].astype(np.float32), self.weight[block].astype(np.float32)
            for side in (0, 1):
                of = self.positive[block] == bool(side)
                sums[side] += weight[of] @ x[of]
                total[side] += weight[of].sum()
            squares += weight @ x**2
        mean = sums.sum(0) / total.sum()
        deviation = np.sqrt(np.maximum(squares / total.sum() - mean**2, 1e-30))
        apart = np.abs(sums[1] / total[1] - sums[0] / total[0]) / deviation
        return np.sort(np.argsort(-apart, kind="stable")[:most])


def token_rows(data: Dataset, settings: FitSettings) -> tuple[IntArray, IntArray]:
    """`(rows, weight)` of single tokens to fit on: claims of wrong answers against claims of right
    ones, the scaffold of both and ordinary prose. Right claims are few and the hardest to tell, so
    each counts several times."""
    wrong, right = data.even_rows("fit", Kind.WRONG), data.even_rows("fit", Kind.RIGHT)
    if not len(wrong) or not len(right):
        raise RecordError(
            f"{len(wrong)} tokens of wrong claims and {len(right)} of right ones to fit on: both "
            f"are needed; ask more questions, or others (see the counts of `label`)"
        )
    sampled = [
        sample(rows, round(share * len(wrong)), seed=settings.seed)
        for rows, share in (
            (data.even_rows("fit", Kind.SCAFFOLD), settings.scaffold_per_wrong),
            (data.rows("fit", Kind.PROSE), settings.prose_per_wrong),
        )
    ]
    rows = np.sort(np.concatenate([wrong, right, *sampled]))
    repeats = max(1, round(settings.right_per_wrong * len(wrong) / len(right)))
    return rows, np.where(data.features.kind[rows] == Kind.RIGHT, repeats, 1)


def token_examples(data: Dataset, settings: FitSettings) -> Examples:
    """Single tokens, those of `token_rows`."""
    rows, weight = token_rows(data, settings)
    return Examples(
        x=_means(data.features, [rows[i : i + 1] for i in range(len(rows))]),
        positive=data.features.kind[rows] == Kind.WRONG,
        weight=weight,
        unit=data.unit[rows],
    )


def answer_examples(data: Dataset, settings: FitSettings) -> Examples:
    """Whole short answers, wrong against right, those of `augment` among them, and against windows
    of ordinary prose."""
    answers = data.answered(*FITTED)
    wrong = data.hallucinated(answers)
    windows = [
        rows[start : start + settings.window]
        for i in data.ordinary("fit")
        for rows in (data.rows_of(i),)
        for start in range(0, len(rows), settings.window)
    ]
    most = round(settings.windows_per_wrong * int(wrong.sum()))
    windows = [windows[i] for i in sample(np.arange(len(windows)), most, seed=settings.seed)]
    groups = [*(data.rows_of(i) for i in answers), *windows]
    return Examples(
        x=_means(data.features, groups),
        positive=np.concatenate([wrong, np.zeros(len(windows), dtype=np.bool_)]),
        weight=np.ones(len(groups), dtype=np.int64),
        unit=data.unit[[rows[0] for rows in groups]],
    )


def claim_examples(data: Dataset, *, around: bool) -> Examples:
    """The paper's designs: means over the claims, wrong against right (1-vs-1); `around` adds what
    stands around each claim to the negatives (3-vs-1)."""
    kinds = (Kind.RIGHT, Kind.WRONG)
    groups: list[IntArray] = []
    positive: list[bool] = []
    for i in data.even(data.answered("fit")):
        claim = data.claim_rows(i)
        rest = np.setdiff1d(data.rows_of(i), claim)
        if len(claim):
            groups.append(claim)
            positive.append(bool(data.features.kind[claim[0]] == kinds[1]))
            if around and len(rest):
                groups.append(rest)
                positive.append(False)
    return Examples(
        x=_means(data.features, groups),
        positive=np.array(positive, dtype=np.bool_),
        weight=np.ones(len(groups), dtype=np.int64),
        unit=data.unit[[rows[0] for rows in groups]],
    )


def answer_means(data: Dataset, answers: IntArray) -> Stored:
    """`[answers, neurons]`: mean CETT over all tokens of whole answers."""
    return _means(data.features, [data.rows_of(i) for i in answers])


def sample(rows: IntArray, most: int, *, seed: int) -> IntArray:
    """At most `most` of `rows`, drawn without replacement."""
    return np.random.default_rng(seed).permutation(rows)[:most]


def _means(features: Features, groups: Sequence[IntArray]) -> Stored:
    """`[groups, neurons]`: mean over the rows of each group."""
    if not groups:
        raise RecordError("nothing to fit on: no answer is usable (see the counts of `label`)")
    exact = np.float16 if features.header.dtype == "float16" else np.float32
    x = np.empty((len(groups), features.width), exact)
    order = sorted(range(len(groups)), key=lambda i: int(groups[i][0]))  # as the shards lie
    for block in _blocks(order, groups):
        rows = np.concatenate([groups[i] for i in block])
        starts = np.cumsum([0, *(len(groups[i]) for i in block)])[:-1]
        sums = np.add.reduceat(features.cett(rows), starts, axis=0)
        x[block] = sums / np.array([len(groups[i]) for i in block], np.float32)[:, None]
    return x


def _blocks(order: Sequence[int], groups: Sequence[IntArray]) -> Iterator[list[int]]:
    block: list[int] = []
    rows = 0
    for i in order:
        if block and rows + len(groups[i]) > BLOCK_ROWS:
            yield block
            block, rows = [], 0
        block.append(i)
        rows += len(groups[i])
    yield block
