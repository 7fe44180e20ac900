"""From a logit to a risk, and the thresholds that come with it; stored as numbers."""

from __future__ import annotations

import math
from typing import TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray


class Platt(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="platt"):
    """risk = sigmoid(slope * logit + intercept)."""

    slope: float
    intercept: float

    def risk(self, logit: float) -> float:
        """Calibrated probability in [0, 1], higher is worse. `logit` must be finite."""
        x = self.slope * logit + self.intercept
        # Both branches exponentiate a negative number: no overflow at any finite logit.
        return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


class Isotonic(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="isotonic"):
    """Piecewise linear between knots, constant outside; `logits` strictly increasing."""

    logits: tuple[float, ...]
    risks: tuple[float, ...]

    def risk(self, logit: float) -> float:
        """Calibrated probability in [0, 1], higher is worse. `logit` must be finite."""
        return float(np.interp(logit, self.logits, self.risks))


Calibration: TypeAlias = Platt | Isotonic


class OperatingPoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A threshold with what it costs and finds on held-out data."""

    name: str  # e.g. "fpr_5"
    threshold: float  # flagged when risk >= threshold
    false_positive_rate: float
    recall: float


def calibrate(calibration: Calibration, logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """`calibration` over an array of any shape."""
    risks: NDArray[np.float64] = np.vectorize(calibration.risk, otypes=[np.float64])(logits)
    return risks
