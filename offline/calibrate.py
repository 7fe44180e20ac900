"""Risks from held-out logits; numbers only, applied by `probes/calibration.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

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


# The simplest first.
METHODS: dict[str, Callable[[Floats, NDArray[np.bool_]], Calibration]] = {
    "temperature": temperature,
    "platt": platt,
    "isotonic": isotonic,
}


class Chosen(NamedTuple):
    """A calibration, and the Brier score of every method on units that it was not fitted on."""

    calibration: Calibration
    scores: dict[str, float]
    score: float  # of the method that was chosen


def choose_calibration(
    logits: Floats, hallucinated: NDArray[np.bool_], units: Sequence[str], *, seed: int
) -> Chosen:
    """The simplest method within one standard error of the best, fitted on all rows; with the
    scores of each that these logits do not rule out.

    The error is that of the difference, fold by fold, as when the number of neurons is chosen: a
    curve with more freedom wins by a hair on the relations it was chosen by, and its risks of 0 and
    1 do not hold on others (docs/decisions/two-heads.md). `logits` must come from probes that were
    not fitted on the same rows. RecordError when every method is ruled out.
    """
    fold = np.array(folds(units, FOLDS, seed=seed))
    losses: dict[str, Floats] = {}  # [folds] Brier scores
    for name, method in METHODS.items():
        try:
            losses[name] = _held_out_losses(logits, hallucinated, fold, method)
        except RecordError as error:
            ruled_out = error
    if not losses:
        raise ruled_out
    best = min(losses.values(), key=lambda loss: float(loss.mean()))

    def near(loss: Floats) -> bool:
        lost = loss - best
        return bool(lost.mean() <= lost.std(ddof=1) / np.sqrt(len(lost)))

    chosen = next(name for name, loss in losses.items() if loss is best or near(loss))
    scores = {name: float(loss.mean()) for name, loss in losses.items()}
    return Chosen(METHODS[chosen](logits, hallucinated), scores, scores[chosen])


def _held_out_losses(
    logits: Floats,
    hallucinated: NDArray[np.bool_],
    fold: NDArray[np.int64],
    method: Callable[[Floats, NDArray[np.bool_]], Calibration],
) -> Floats:
    """`[folds]` Brier scores, each of what the other folds fit; RecordError from the method."""
    losses = []
    for held in np.unique(fold):
        out = fold == held
        risk = calibrate(method(logits[~out], hallucinated[~out]), logits[out])
        losses.append(((risk - hallucinated[out]) ** 2).mean())
    return np.array(losses)


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
