"""Risks from held-out logits; numbers only, applied by `probes/calibration.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from offline.metrics import Floats
from offline.records import RecordError
from offline.splits import folds
from probes.calibration import Calibration, Isotonic, Platt, calibrate
from probes.card import ReferenceRisks

FOLDS = 5
REFERENCE_BINS = 10


def platt(logits: Floats, hallucinated: NDArray[np.bool_]) -> Platt:
    """risk = sigmoid(slope * logit + intercept), fitted by maximum likelihood.

    RecordError when a higher logit does not mean a higher risk: such a probe reads nothing.
    """
    from sklearn.linear_model import LogisticRegression

    _require_both(hallucinated)
    spread = float(logits.std()) or 1.0
    model = LogisticRegression(C=1e6).fit((logits / spread)[:, None], hallucinated)
    return _rising(float(model.coef_[0, 0]) / spread, float(model.intercept_[0]))


def temperature(logits: Floats, hallucinated: NDArray[np.bool_]) -> Platt:
    """risk = sigmoid(slope * logit): the logit's own zero stays at a risk of one half."""
    from sklearn.linear_model import LogisticRegression

    _require_both(hallucinated)
    spread = float(logits.std()) or 1.0
    model = LogisticRegression(C=1e6, fit_intercept=False).fit(
        (logits / spread)[:, None], hallucinated
    )
    return _rising(float(model.coef_[0, 0]) / spread, 0.0)


def isotonic(logits: Floats, hallucinated: NDArray[np.bool_]) -> Isotonic:
    """The monotone curve through the data; needs many rows, keeps no shape of its own."""
    from sklearn.isotonic import IsotonicRegression

    _require_both(hallucinated)
    model = IsotonicRegression(y_min=0.0, y_max=1.0).fit(logits, hallucinated)
    knots, first = np.unique(model.X_thresholds_, return_index=True)
    return Isotonic(logits=tuple(knots.tolist()), risks=tuple(model.y_thresholds_[first].tolist()))


METHODS: dict[str, Callable[[Floats, NDArray[np.bool_]], Calibration]] = {
    "platt": platt,
    "temperature": temperature,
    "isotonic": isotonic,
}


def choose_calibration(
    logits: Floats, hallucinated: NDArray[np.bool_], units: Sequence[str], *, seed: int
) -> tuple[Calibration, dict[str, float]]:
    """The method with the lowest Brier score on units that it was not fitted on, fitted on all
    rows; and the score of each that these logits do not rule out.

    `logits` must come from probes that were not fitted on the same rows.
    """
    fold = np.array(folds(units, FOLDS, seed=seed))
    scores = {name: _held_out_brier(logits, hallucinated, fold, name) for name in METHODS}
    best = min(scores, key=lambda name: scores[name])
    allowed = {name: score for name, score in scores.items() if math.isfinite(score)}
    return METHODS[best](logits, hallucinated), allowed


def _held_out_brier(
    logits: Floats, hallucinated: NDArray[np.bool_], fold: NDArray[np.int64], name: str
) -> float:
    """Infinite for a method that these logits rule out."""
    risk = np.empty(len(logits))
    try:
        for held in np.unique(fold):
            out = fold == held
            risk[out] = calibrate(METHODS[name](logits[~out], hallucinated[~out]), logits[out])
    except RecordError:
        return math.inf
    return float(((risk - hallucinated) ** 2).mean())


def _rising(slope: float, intercept: float) -> Platt:
    if slope <= 0:
        raise RecordError(
            f"on held-out data a higher logit means less risk (slope {slope:.3g}): the probe has "
            f"learned nothing that holds there; collect more answers"
        )
    return Platt(slope=slope, intercept=intercept)


def reference_risks(calibration: Calibration, logits: Floats) -> ReferenceRisks:
    """The distribution of these risks in bins that hold about as many each."""
    risks = calibrate(calibration, logits)
    quantiles = np.arange(1, REFERENCE_BINS) / REFERENCE_BINS
    edges = np.unique(np.quantile(risks, quantiles, method="higher"))
    edges = edges[(edges > max(risks.min(), 0.0)) & (edges < 1)]  # no empty lowest bin
    counts = np.bincount(np.searchsorted(edges, risks, side="right"), minlength=len(edges) + 1)
    return ReferenceRisks(edges=tuple(edges.tolist()), shares=tuple((counts / len(risks)).tolist()))


def _require_both(hallucinated: NDArray[np.bool_]) -> None:
    if hallucinated.all() or not hallucinated.any():
        raise RecordError(
            f"calibration needs both classes, found {int(hallucinated.sum())} hallucinated of "
            f"{len(hallucinated)}; collect more answers"
        )
