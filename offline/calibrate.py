"""Risks and thresholds from held-out logits; numbers only, applied by `probes/calibration.py`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from offline.metrics import Floats
from offline.records import RecordError
from probes.calibration import Calibration, Isotonic, OperatingPoint, Platt, calibrate
from probes.card import ReferenceRisks

REFERENCE_BINS = 10
RATES = (0.01, 0.05, 0.1)  # false-positive rates of the operating points fpr_1, fpr_5, fpr_10


def platt(logits: Floats, hallucinated: NDArray[np.bool_]) -> Platt:
    """risk = sigmoid(slope * logit + intercept), fitted by maximum likelihood.

    RecordError when a higher logit does not mean a higher risk: such a probe reads nothing.
    """
    from sklearn.linear_model import LogisticRegression

    _require_both(hallucinated)
    spread = float(logits.std()) or 1.0
    model = LogisticRegression(C=1e6).fit((logits / spread)[:, None], hallucinated)
    slope = float(model.coef_[0, 0]) / spread
    if slope <= 0:
        raise RecordError(
            f"on held-out data a higher logit means less risk (slope {slope:.3g}): the probe has "
            f"learned nothing that holds there; collect more answers"
        )
    return Platt(slope=slope, intercept=float(model.intercept_[0]))


def isotonic(logits: Floats, hallucinated: NDArray[np.bool_]) -> Isotonic:
    """The monotone curve through the data; needs many rows, keeps no shape of its own."""
    from sklearn.isotonic import IsotonicRegression

    _require_both(hallucinated)
    model = IsotonicRegression(y_min=0.0, y_max=1.0).fit(logits, hallucinated)
    knots, first = np.unique(model.X_thresholds_, return_index=True)
    return Isotonic(logits=tuple(knots.tolist()), risks=tuple(model.y_thresholds_[first].tolist()))


def operating_points(
    calibration: Calibration, logits: Floats, hallucinated: NDArray[np.bool_]
) -> tuple[OperatingPoint, ...]:
    """Thresholds that flag 1, 5 and 10 % of the rows that are not hallucinated."""
    _require_both(hallucinated)
    risks = calibrate(calibration, logits)
    negative = np.sort(risks[~hallucinated])[::-1]
    points = []
    for rate in RATES:
        # Just above the first negative that would be one too many; flagged is risk >= threshold.
        threshold = min(1.0, float(np.nextafter(negative[int(rate * len(negative))], 2.0)))
        points.append(
            OperatingPoint(
                name=f"fpr_{round(100 * rate)}",
                threshold=threshold,
                false_positive_rate=float((negative >= threshold).mean()),
                recall=float((risks[hallucinated] >= threshold).mean()),
            )
        )
    return tuple(points)


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
