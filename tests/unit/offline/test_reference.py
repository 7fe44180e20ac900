"""The reference distribution that a card carries, made from risks."""

from __future__ import annotations

import numpy as np
import pytest

from offline.calibrate import REFERENCE_BINS, reference_risks
from probes.calibration import Platt

PLATT = Platt(slope=1.0, intercept=0.0)


def counted(reference, risks):
    bins = [reference.bin(risk) for risk in risks]
    return np.bincount(bins, minlength=len(reference.shares)) / len(risks)


@pytest.mark.parametrize("kind", ["smooth", "tied", "constant", "saturated"])
def test_shares_are_those_that_the_server_would_count(kind: str) -> None:
    """The server bins by `bin`, training by searchsorted: a difference would be drift."""
    rng = np.random.default_rng(0)
    logits = {
        "smooth": rng.normal(size=5000),
        "tied": rng.integers(0, 3, size=5000).astype(float),
        "constant": np.zeros(50),
        "saturated": np.where(rng.random(500) < 0.5, -800.0, 800.0),
    }[kind]
    reference = reference_risks(PLATT, logits)
    assert counted(reference, [PLATT.risk(x) for x in logits]) == pytest.approx(reference.shares)
    assert len(reference.shares) == {"smooth": REFERENCE_BINS, "tied": 3}.get(kind, 1)


def test_bins_of_smooth_risks_hold_about_as_many_each() -> None:
    """Equal bins make the index equally sensitive everywhere."""
    reference = reference_risks(PLATT, np.random.default_rng(0).normal(size=5000))
    assert reference.shares == pytest.approx([0.1] * REFERENCE_BINS, abs=1e-3)
