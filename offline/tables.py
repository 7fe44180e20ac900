"""Rows of the card: figures with intervals, of one detector on one data set."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from offline import metrics
from offline.curves import Curve, curve
from offline.metrics import Bools, Floats, Metric
from probes.calibration import OperatingPoint
from probes.card import EvaluationRow

log = logging.getLogger(__name__)

Names = NDArray[np.str_]

RANKING: dict[str, Metric] = {
    "auroc": metrics.auroc,
    "auprc": metrics.auprc,
    "recall_at_1_fpr": metrics.recall_at_fpr(0.01),
    "recall_at_5_fpr": metrics.recall_at_fpr(0.05),
    "recall_at_10_fpr": metrics.recall_at_fpr(0.10),
}
CALIBRATION: dict[str, Metric] = {
    "ece": metrics.expected_calibration_error(),
    "brier": metrics.brier,
}


# What has no row of its own there: the probe itself, what it is a part of, its own method on fewer
# data, and random neurons, which are many draws.
NO_RIVALS = ("probe", "random", "fitted on")


def has_both(dataset: str, wrong: Bools) -> bool:
    """False, and the log says why, for a data set that lacks a class: it has no figures."""
    if metrics.has_both(wrong):
        return True
    log.warning("no figures of %r: %d of %d are hallucinated", dataset, wrong.sum(), len(wrong))
    return False


def ranked(
    dataset: str, detector: str, wrong: Bools, score: Floats, units: Names
) -> Iterator[EvaluationRow | Curve]:
    """How well a detector ranks wrong above right; inside units too, where they have both. The
    data set has both, see `has_both`."""
    yield from table(RANKING, dataset, detector, wrong, score, units)
    yield curve(dataset, detector, wrong, score)
    within = metrics.auroc_within(wrong, score, units)
    if np.isfinite(within):  # undefined where each question is a unit of its own
        yield figure(dataset, detector, "auroc_within_units", within, len(wrong))


def gained(
    dataset: str, scores: Mapping[str, Floats], wrong: Bools, units: Names
) -> Iterator[EvaluationRow]:
    """AUROC of the probe less that of each rival, from the same resamples: their own intervals
    overlap where the difference is certain, and the other way round."""
    rivals = {name: score for name, score in scores.items() if not name.startswith(NO_RIVALS)}
    for name, gain in metrics.auroc_gained(wrong, scores["probe"], rivals, units).items():
        yield measured(f"probe less rival, {dataset}", name, "auroc_gained", gain)


def drawn(
    dataset: str, detector: str, wrong: Bools, draws: Sequence[Floats]
) -> Iterator[EvaluationRow]:
    """A detector that was drawn at random: mean over the draws and where 95 % of them lie."""
    found = [metrics.rank(wrong, score) for score in draws]
    yield EvaluationRow(
        dataset=dataset,
        detector=detector,
        metric="auroc",
        value=float(np.mean(found)),
        low=float(np.quantile(found, 0.025)),
        high=float(np.quantile(found, 0.975)),
        n=len(wrong),
    )


def flagged(
    dataset: str, points: Sequence[OperatingPoint], risk: Floats, units: Names
) -> Iterator[EvaluationRow]:
    """Share of the items that each operating point flags."""
    every = np.ones(len(risk), dtype=np.bool_)
    for point in points:
        share: dict[str, Metric] = {f"flagged_at_{point.name}": metrics.mean_of_positives}
        over = (risk >= point.threshold).astype(np.float64)
        yield from table(share, dataset, "probe", every, over, units)


def table(
    wanted: Mapping[str, Metric],
    dataset: str,
    detector: str,
    positive: Bools,
    score: Floats,
    units: Names,
) -> Iterator[EvaluationRow]:
    """One row per metric, each with its interval; none where there is nothing to measure."""
    if not len(score):
        return
    for name, found in metrics.with_intervals(wanted, positive, score, units).items():
        yield measured(dataset, detector, name, found)


def measured(dataset: str, detector: str, metric: str, found: metrics.Figure) -> EvaluationRow:
    """A figure with its interval."""
    return EvaluationRow(
        dataset=dataset,
        detector=detector,
        metric=metric,
        value=found.value,
        low=found.low,
        high=found.high,
        n=found.n,
    )


def figure(dataset: str, detector: str, metric: str, value: float, n: int) -> EvaluationRow:
    """A figure without an interval."""
    return EvaluationRow(dataset=dataset, detector=detector, metric=metric, value=value, n=n)
