"""Figures of merit with 95 % intervals, resampled by unit (relation or question), never by row.

Rows of one relation resemble each other; resampling rows would pretend to more evidence than there
is. Scores are oriented: higher = more likely hallucinated. `weight` counts a row several times.

Figures of one table are taken from the same resamples, each weighed once for all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from probes.card import ReliabilityBin

Floats: TypeAlias = NDArray[np.float64]
Bools: TypeAlias = NDArray[np.bool_]
Ints: TypeAlias = NDArray[np.int64]

RESAMPLES = 500


@dataclass(frozen=True, eq=False)
class Weighed:
    """Rows sorted by ascending score, each counted `weight` times.

    starts: first row of each run of equal scores. up, down: weight of the positive and of the other
    rows of each run; sums of counts, so they are exact.
    """

    positive: Bools
    score: Floats
    weight: Floats
    starts: Ints

    @classmethod
    def of(cls, positive: Bools, score: Floats, weight: Floats) -> Weighed:
        """`score` is ascending and not empty."""
        starts: Ints = np.flatnonzero(np.r_[True, np.diff(score) > 0])
        return cls(positive, score, weight, starts)

    @cached_property
    def up(self) -> Floats:
        return self._by_run(self.weight * self.positive)

    @cached_property
    def down(self) -> Floats:
        return self._by_run(self.weight * ~self.positive)

    @cached_property
    def found(self) -> Floats:
        """Positive weight from each run upwards, highest run first."""
        sums: Floats = np.cumsum(self.up[::-1])
        return sums

    @cached_property
    def false_alarms(self) -> Floats:
        """Weight of the other rows from each run upwards, highest run first."""
        sums: Floats = np.cumsum(self.down[::-1])
        return sums

    def _by_run(self, values: Floats) -> Floats:
        if len(self.starts) == len(values):
            return values
        sums: Floats = np.add.reduceat(values, self.starts)
        return sums


Metric: TypeAlias = Callable[[Weighed], float]


class Figure(NamedTuple):
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int


def auroc(rows: Weighed) -> float:
    """Area under the ROC curve; ties count half. nan without both classes."""
    up, down = rows.up, rows.down
    below = np.cumsum(down) - down
    pairs = up.sum() * down.sum()
    return float((up * (below + down / 2)).sum() / pairs) if pairs else float("nan")


def has_both(positive: Bools) -> bool:
    """There is something to rank."""
    return bool(positive.any() and not positive.all())


def rank(positive: Bools, score: Floats) -> float:
    """AUROC of unsorted rows of weight 1."""
    order = np.argsort(score, kind="stable")
    ascending = score[order].astype(np.float64)
    return auroc(Weighed.of(positive[order], ascending, np.ones(len(score))))


def auprc(rows: Weighed) -> float:
    """Area under the precision-recall curve (average precision). nan without positives."""
    found, flagged = rows.found, rows.found + rows.false_alarms
    if not found[-1]:
        return float("nan")
    precision = np.divide(found, flagged, out=np.zeros_like(found), where=flagged > 0)
    return float((precision * rows.up[::-1]).sum() / found[-1])


def recall_at_fpr(rate: float) -> Metric:
    """Share of positives found while at most `rate` of the negatives is flagged."""

    def metric(rows: Weighed) -> float:
        up, down = rows.found, rows.false_alarms
        if not up[-1] or not down[-1]:
            return float("nan")
        allowed = np.searchsorted(down, rate * down[-1], side="right")
        return float(up[allowed - 1] / up[-1]) if allowed else 0.0

    return metric


def mean_of_positives(rows: Weighed) -> float:
    """Weighted mean of the score over positive rows, e.g. a flagged share when scores are 0/1."""
    chosen = rows.weight * rows.positive
    return float((chosen * rows.score).sum() / chosen.sum()) if chosen.sum() else float("nan")


def accuracy_at(threshold: float) -> Metric:
    """Share of rows that `score >= threshold` calls what they are."""

    def metric(rows: Weighed) -> float:
        is_right = (rows.score >= threshold) == rows.positive
        return float((rows.weight * is_right).sum() / rows.weight.sum())

    return metric


def expected_calibration_error(bins: int = 10) -> Metric:
    """Mean |risk - frequency| over `bins` equally filled bins; the score is a risk."""

    def metric(rows: Weighed) -> float:
        weight, mass = rows.weight, np.cumsum(rows.weight)
        if not mass[-1]:
            return float("nan")
        of_bin = np.minimum((mass - weight / 2) * bins / mass[-1], bins - 1).astype(np.int64)
        total = np.bincount(of_bin, weight, bins)
        risk = np.bincount(of_bin, weight * rows.score, bins)
        hits = np.bincount(of_bin, weight * rows.positive, bins)
        return float(np.abs(risk - hits).sum() / total.sum())

    return metric


def brier(rows: Weighed) -> float:
    """Mean squared difference of risk and outcome."""
    return float((rows.weight * (rows.score - rows.positive) ** 2).sum() / rows.weight.sum())


def with_interval(
    metric: Metric,
    positive: Bools,
    score: Floats,
    units: Sequence[str] | NDArray[np.generic],
    *,
    seed: int = 0,
) -> Figure:
    """`metric` with its bootstrap interval, see `with_intervals`."""
    return with_intervals({"": metric}, positive, score, units, seed=seed)[""]


def with_intervals(
    metrics: Mapping[str, Metric],
    positive: Bools,
    score: Floats,
    units: Sequence[str] | NDArray[np.generic],
    *,
    seed: int = 0,
) -> dict[str, Figure]:
    """Each of `metrics` with its bootstrap interval (2.5 and 97.5 %), whole units drawn with
    replacement; all are taken of the same draws."""
    order = np.argsort(score, kind="stable")
    _, unit = np.unique(np.asarray(units)[order], return_inverse=True)
    once = np.ones(len(score))
    rows = Weighed.of(positive[order], score[order].astype(np.float64), once)
    drawn = np.empty((len(metrics), RESAMPLES))
    for i, weight in enumerate(_weights(unit, seed)):
        again = replace(rows, weight=weight)
        drawn[:, i] = [metric(again) for metric in metrics.values()]
    return {
        name: Figure(metric(rows), *_middle(values), len(score))
        for (name, metric), values in zip(metrics.items(), drawn, strict=True)
    }


def auroc_gained(
    positive: Bools,
    score: Floats,
    rivals: Mapping[str, Floats],
    units: Sequence[str] | NDArray[np.generic],
    *,
    seed: int = 0,
) -> dict[str, Figure]:
    """AUROC of `score` less that of each rival, with the interval of the difference: all are taken
    of the same draws of whole units."""
    _, unit = np.unique(np.asarray(units), return_inverse=True)
    once = np.ones(len(score))
    sorted_once: list[tuple[Ints, Weighed]] = []
    for one in (score, *rivals.values()):
        order = np.argsort(one, kind="stable")
        rows = Weighed.of(positive[order], one[order].astype(np.float64), once)
        sorted_once.append((order, rows))
    areas = np.array(  # [1 + resamples, detectors], of all rows first
        [
            [auroc(replace(rows, weight=weight[order])) for order, rows in sorted_once]
            for weight in itertools.chain([once], _weights(unit, seed))
        ]
    )
    gains = areas[:, :1] - areas[:, 1:]
    return {
        name: Figure(float(gain[0]), *_middle(gain[1:]), len(score))
        for name, gain in zip(rivals, gains.T, strict=True)
    }


def _weights(unit: Ints, seed: int) -> Iterator[Floats]:
    """RESAMPLES times: how often each row counts when whole units are drawn with replacement."""
    random = np.random.default_rng(seed)
    n_units = int(unit.max()) + 1
    for _ in range(RESAMPLES):
        counts = np.bincount(random.integers(n_units, size=n_units), minlength=n_units)
        yield counts[unit].astype(np.float64)


def _middle(drawn: Floats) -> tuple[float, float]:
    """Where 95 % of the finite values lie; nan when there is none."""
    finite = drawn[np.isfinite(drawn)]
    low, high = np.quantile(finite, (0.025, 0.975)) if len(finite) else (np.nan, np.nan)
    return float(low), float(high)


def auroc_within(
    positive: Bools, score: Floats, units: Sequence[str] | NDArray[np.generic]
) -> float:
    """AUROC inside each unit, averaged by size: telling units apart earns nothing."""
    _, unit = np.unique(np.asarray(units), return_inverse=True)
    order = np.argsort(unit, kind="stable")
    total, size = 0.0, 0
    for here in np.split(order, np.flatnonzero(np.diff(unit[order])) + 1):
        inside = rank(positive[here], score[here])
        if np.isfinite(inside):
            total, size = total + inside * len(here), size + len(here)
    return total / size if size else float("nan")


def reliability_bins(
    level: Literal["token", "span", "response"], risk: Floats, positive: Bools, *, bins: int = 10
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

    def metric(rows: Weighed) -> float:
        mass = np.cumsum(rows.weight)
        kept = rows.weight * (mass <= coverage * mass[-1])
        return float((kept * ~rows.positive).sum() / kept.sum()) if kept.sum() else float("nan")

    return metric


def _mean_ranks(values: Floats) -> Floats:
    _, of_value, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Floats = (np.cumsum(counts) - (counts - 1) / 2)[of_value]
    return ranks
