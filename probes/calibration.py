"""From a logit to a risk, and the thresholds that come with it; stored as numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray


class Platt(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="platt"):
    """risk = sigmoid(slope * logit + intercept)."""

    slope: float
    intercept: float

    def __post_init__(self) -> None:
        if not (0 < self.slope < math.inf and math.isfinite(self.intercept)):
            raise ValueError(
                f"Platt needs a finite slope > 0 and a finite intercept, not {self.slope} and "
                f"{self.intercept}: a higher logit must mean a higher risk"
            )

    def risk(self, logit: float) -> float:
        """Calibrated probability in [0, 1], higher is worse. `logit` must be finite."""
        x = self.slope * logit + self.intercept
        # Both branches exponentiate a negative number: no overflow at any finite logit.
        return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


class Isotonic(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="isotonic"):
    """Piecewise linear between knots, constant outside; `logits` strictly increasing."""

    logits: tuple[float, ...]
    risks: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.logits or len(self.logits) != len(self.risks):
            raise ValueError("isotonic needs as many risks as logits, at least one")
        if not all(math.isfinite(x) for x in (*self.logits, *self.risks)):
            raise ValueError("isotonic needs finite logits and risks")
        if any(a >= b for a, b in pairwise(self.logits)):
            raise ValueError("isotonic needs strictly increasing logits")
        if any(a > b for a, b in pairwise(self.risks)):
            raise ValueError("isotonic needs risks that never fall")
        if self.risks[0] < 0 or self.risks[-1] > 1:
            raise ValueError("isotonic needs risks in [0, 1]")

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

    def __post_init__(self) -> None:
        for field in ("threshold", "false_positive_rate", "recall"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field} must be in [0, 1], not {getattr(self, field)}")


def calibrate(calibration: Calibration, logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """`calibration` over an array of any shape."""
    risks: NDArray[np.float64] = np.vectorize(calibration.risk, otypes=[np.float64])(logits)
    return risks


def choose_operating_points(
    negatives: NDArray[np.float64],
    positives: NDArray[np.float64],
    *,
    rates: Sequence[float] = (0.01, 0.05, 0.10),
) -> tuple[OperatingPoint, ...]:
    """The lowest threshold whose false-positive rate does not exceed each of `rates`.

    `negatives` and `positives` are the risks of faithful and of hallucinated items that were
    neither fitted nor calibrated on. Named fpr_1, fpr_5, fpr_10. ValueError when negatives
    saturate at risk 1, so that no threshold keeps the rate.
    """
    if not len(negatives) or not len(positives):
        raise ValueError("operating points need negatives and positives, at least one of each")
    descending = np.sort(negatives)[::-1]
    seen = np.unique(np.concatenate([negatives, positives]))
    points = []
    for rate in rates:
        allowed = int(rate * len(negatives) + 1e-9)  # 0.1 * 30 is 3.0000000000000004
        threshold = 0.0
        if allowed < len(negatives):
            # Above this risk, halfway to the next one that was seen: ties must not all pass.
            limit = float(descending[allowed])
            above = seen[seen > limit]
            if limit >= 1:
                raise ValueError(
                    f"{(negatives >= 1).mean():.1%} of the negatives have risk 1: no threshold "
                    f"keeps a false-positive rate of {rate:.1%}"
                )
            ahead = float(above[0]) if len(above) else 1.0
            threshold = (limit + ahead) / 2
            if threshold <= limit:  # there is no number between the two
                threshold = ahead
        points.append(
            OperatingPoint(
                name=f"fpr_{100 * rate:g}",
                threshold=threshold,
                false_positive_rate=float((negatives >= threshold).mean()),
                recall=float((positives >= threshold).mean()),
            )
        )
    return tuple(points)
