"""ROC curves kept as points; precision, recall and selective answering follow from the same points.

A curve is thinned to what a plot can show. Scores are oriented: higher = more likely hallucinated.
"""

from __future__ import annotations

import numpy as np

from offline.metrics import Bools, Floats, Ints
from offline.records import Record, RecordError

POINTS = 48  # along each axis


class Curve(Record, frozen=True, kw_only=True):
    """What one detector flags of one data set while its threshold falls from none to all.

    flagged_wrong[i] of `wrong` hallucinated and flagged_right[i] of `right` faithful rows are
    flagged together; both ascend from 0 to all.
    """

    dataset: str
    detector: str
    wrong: int
    right: int
    flagged_wrong: tuple[int, ...]
    flagged_right: tuple[int, ...]

    @property
    def recall(self) -> Floats:
        """Share of the hallucinated rows that are flagged (true-positive rate)."""
        return self._wrong / self.wrong

    @property
    def false_positive_rate(self) -> Floats:
        """Share of the faithful rows that are flagged."""
        return self._right / self.right

    @property
    def precision(self) -> Floats:
        """Share of the flagged rows that are hallucinated; 1 while nothing is flagged."""
        return _share(self._wrong, self._wrong + self._right)

    @property
    def coverage(self) -> Floats:
        """Share of all rows that are not flagged: what is still answered."""
        return 1 - (self._wrong + self._right) / (self.wrong + self.right)

    @property
    def accuracy(self) -> Floats:
        """Share of the rows that are not flagged which are faithful; 1 when all are flagged."""
        kept_wrong, kept_right = self.wrong - self._wrong, self.right - self._right
        return _share(kept_right, kept_wrong + kept_right)

    @property
    def _wrong(self) -> Floats:
        return np.array(self.flagged_wrong, np.float64)

    @property
    def _right(self) -> Floats:
        return np.array(self.flagged_right, np.float64)


def curve(dataset: str, detector: str, wrong: Bools, score: Floats) -> Curve:
    """The points of one detector; rows of equal score are flagged together.

    RecordError without both classes: then there is nothing to tell apart.
    """
    if wrong.all() or not wrong.any():
        raise RecordError(
            f"{dataset}: {int(wrong.sum())} of {len(wrong)} are hallucinated, both classes are "
            f"needed; collect more answers"
        )
    order = np.argsort(-score, kind="stable")
    last = np.flatnonzero(np.r_[np.diff(score[order]) != 0, True])  # of each run of equal scores
    up = np.r_[0, np.cumsum(wrong[order])[last]]
    down = np.r_[0, np.cumsum(~wrong[order])[last]]
    kept = np.unique(np.concatenate([_spaced(up), _spaced(down)]))
    return Curve(
        dataset=dataset,
        detector=detector,
        wrong=int(up[-1]),
        right=int(down[-1]),
        flagged_wrong=tuple(up[kept].tolist()),
        flagged_right=tuple(down[kept].tolist()),
    )


def _spaced(counts: Ints) -> Ints:
    """Indices at which ascending `counts` first reach evenly spaced values; both ends are in."""
    wanted = np.linspace(0, counts[-1], POINTS + 1)
    return np.append(np.searchsorted(counts, wanted, side="left"), len(counts) - 1)


def _share(part: Floats, whole: Floats) -> Floats:
    """1 where the whole is empty."""
    share: Floats = np.divide(part, whole, out=np.ones(len(whole)), where=whole > 0)
    return share
