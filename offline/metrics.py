"""Figures of merit with 95 % intervals, resampled by unit (relation or question), never by row.

Rows of one relation resemble each other; resampling rows would pretend to more evidence than there
is. Scores are oriented: higher = more likely hallucinated. `weight` counts a row several times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from probes.card import ReliabilityBin

Floats: TypeAlias = NDArray[np.float64]
Bools: TypeAlias = NDArray[np.bool_]
Ints: TypeAlias = NDArray[np.int64]
# (positive, score, weight) -> figure; rows come sorted by ascending score
Metric: TypeAlias = Callable[[Bools, Floats, Floats], float]

RESAMPLES = 500


class Figure(NamedTuple):
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int


def auroc(positive: Bools, score: Floats, weight: Floats) -> float:
    """Area under the ROC curve; ties count half. nan without both classes."""
    starts = _tie_starts(score)
    up = np.add.reduceat(weight * positive, starts)
    down = np.add.reduceat(weight * ~positive, starts)
    below = np.cumsum(down) - down
    pairs = up.sum() * down.sum()
    return float((up * (below + down / 2)).sum() / pairs) if pairs else float("nan")


def rank(positive: Bools, score: Floats) -> float:
    """AUROC of unsorted rows of weight 1."""
    order = np.argsort(score, kind="stable")
    return auroc(positive[order], score[order].astype(np.float64), np.ones(len(score)))


def auprc(positive: Bools, score: Floats, weight: Floats) -> float:
    """Area under the precision-recall curve (average precision). nan without positives."""
    starts = _tie_starts(score)
    up = np.add.reduceat(weight * positive, starts)[::-1]
    every = np.add.reduceat(weight, starts)[::-1]
    found, flagged = np.cumsum(up), np.cumsum(every)
    if not found[-1]:
        return float("nan")
    precision = np.divide(found, flagged, out=np.zeros_like(found), where=flagged > 0)
    return float((precision * up).sum() / found[-1])


def recall_at_fpr(rate: float) -> Metric:
    """Share of positives found while at most `rate` of the negatives is flagged."""

    def metric(positive: Bools, score: Floats, weight: Floats) -> float:
        starts = _tie_starts(score)
        up = np.cumsum(np.add.reduceat(weight * positive, starts)[::-1])
        down = np.cumsum(np.add.reduceat(weight * ~positive, starts)[::-1])
        if not up[-1] or not down[-1]:
            return float("nan")
        allowed = np.flatnonzero(down <= rate * down[-1])
        return float(up[allowed[-1]] / up[-1]) if len(allowed) else 0.0

    return metric


def mean_of_positives(positive: Bools, score: Floats, weight: Floats) -> float:
    """Weighted mean of the score over positive rows, e.g. a flagged share when scores are 0/1."""
    chosen = weight * positive
    return float((chosen * score).sum() / chosen.sum()) if chosen.sum() else float("nan")


def expected_calibration_error(bins: int = 10) -> Metric:
    """Mean |risk - frequency| over `bins` equally filled bins; the score is a risk."""

    def metric(positive: Bools, score: Floats, weight: Floats) -> float:
        mass = np.cumsum(weight)
        if not mass[-1]:
            return float("nan")
        of_bin = np.minimum((mass - weight / 2) * bins / mass[-1], bins - 1).astype(np.int64)
        total = np.bincount(of_bin, weight, bins)
        risk = np.bincount(of_bin, weight * score, bins)
        hits = np.bincount(of_bin, weight * positive, bins)
        return float(np.abs(risk - hits).sum() / total.sum())

    return metric


def brier(positive: Bools, score: Floats, weight: Floats) -> float:
    """Mean squared difference of risk and outcome."""
    return float((weight * (score - positive) ** 2).sum() / weight.sum())


def with_interval(
    metric: Metric,
    positive: Bools,
    score: Floats,
    units: Sequence[str],
    *,
    seed: int = 0,
) -> Figure:
    """`metric` with its bootstrap interval (2.5 and 97.5 %), whole units drawn with replacement."""
    order = np.argsort(score, kind="stable")
    positive, score = positive[order], score[order].astype(np.float64)
    _, unit = np.unique(np.asarray(units, dtype=object)[order].astype(str), return_inverse=True)
    value = metric(positive, score, np.ones(len(score)))
    random = np.random.default_rng(seed)
    n_units = int(unit.max()) + 1
    drawn = []
    for _ in range(RESAMPLES):
        counts = np.bincount(random.integers(n_units, size=n_units), minlength=n_units)
        drawn.append(metric(positive, score, counts[unit].astype(np.float64)))
    finite = np.array(drawn)[np.isfinite(drawn)]
    low, high = np.quantile(finite, (0.025, 0.975)) if len(finite) else (np.nan, np.nan)
    return Figure(value, float(low), float(high), len(score))


def auroc_within(positive: Bools, score: Floats, units: Sequence[str]) -> float:
    """AUROC inside each unit, averaged by size: telling units apart earns nothing."""
    names = np.asarray(units, dtype=str)
    total, size = 0.0, 0
    for name in np.unique(names):
        here = names == name
        inside = rank(positive[here], score[here])
        if np.isfinite(inside):
            total, size = total + inside * int(here.sum()), size + int(here.sum())
    return total / size if size else float("nan")


def reliability_bins(
    level: Literal["token", "response"], risk: Floats, positive: Bools, *, bins: int = 10
) -> tuple[ReliabilityBin, ...]:
    """Mean risk against observed frequency in equally filled bins."""
    return tuple(
        ReliabilityBin(
            level=level,
            mean_risk=float(risk[part].mean()),
            frequency=float(positive[part].mean()),
            n=len(part),
        )
        for part in np.array_split(np.argsort(risk, kind="stable"), bins)
        if len(part)
    )


def rank_correlation(first: Floats, second: Floats) -> float:
    """Spearman's: correlation of the ranks, ties by their mean rank. nan when one is constant."""
    if not (np.ptp(first) and np.ptp(second)):
        return float("nan")
    return float(np.corrcoef(_mean_ranks(first), _mean_ranks(second))[0, 1])


def accuracy_at_coverage(coverage: float) -> Metric:
    """Share of faithful rows among the `coverage` of rows with the lowest score."""

    def metric(positive: Bools, score: Floats, weight: Floats) -> float:
        mass = np.cumsum(weight)
        kept = weight * (mass <= coverage * mass[-1])
        return float((kept * ~positive).sum() / kept.sum()) if kept.sum() else float("nan")

    return metric


def _mean_ranks(values: Floats) -> Floats:
    _, of_value, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Floats = (np.cumsum(counts) - (counts - 1) / 2)[of_value]
    return ranks


def _tie_starts(score: Floats) -> Ints:
    """First row of each run of equal scores; `score` is ascending and not empty."""
    starts: Ints = np.flatnonzero(np.r_[True, np.diff(score) > 0])
    return starts
