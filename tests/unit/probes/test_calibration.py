"""A worse answer never gets a lower risk, and a threshold costs what it says."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probes.calibration import (
    Isotonic,
    OperatingPoint,
    Platt,
    calibrate,
    choose_operating_points,
)

finite = st.floats(allow_nan=False, allow_infinity=False)
CALIBRATIONS = [
    Platt(slope=2.0, intercept=-1.0),
    Platt(slope=1e-3, intercept=700.0),
    Isotonic(logits=(-1.0, 0.5, 2.0), risks=(0.0, 0.25, 1.0)),
    Isotonic(logits=(0.0,), risks=(0.5,)),
]


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@given(a=finite, b=finite)
def test_risk_is_in_the_unit_interval_and_never_falls(calibration, a, b):
    """Polarity (trap 20): higher is worse, at any finite logit, without overflow."""
    low, high = calibration.risk(min(a, b)), calibration.risk(max(a, b))
    assert 0 <= low <= high <= 1


def test_platt_is_the_logistic_function():
    platt = Platt(slope=2.0, intercept=-1.0)
    for logit in (-3.0, 0.0, 0.5, 4.0):
        assert platt.risk(logit) == pytest.approx(1 / (1 + math.exp(1 - 2 * logit)))


def test_calibrate_keeps_the_shape():
    logits = np.array([[-1.0, 0.5], [2.0, 1.25]])
    np.testing.assert_allclose(calibrate(CALIBRATIONS[2], logits), [[0.0, 0.25], [1.0, 0.625]])
    assert calibrate(CALIBRATIONS[2], np.zeros((0,))).shape == (0,)


@pytest.mark.parametrize(
    ("slope", "intercept"), [(0, 0), (-1, 0), (math.inf, 0), (math.nan, 0), (1, math.nan)]
)
def test_platt_refuses_what_is_not_increasing_and_finite(slope, intercept):
    with pytest.raises(ValueError, match="slope > 0"):
        Platt(slope=slope, intercept=intercept)


@pytest.mark.parametrize(
    ("logits", "risks", "message"),
    [
        ((), (), "at least one"),
        ((1.0,), (0.1, 0.2), "as many"),
        ((1.0, 1.0), (0.1, 0.2), "strictly increasing"),
        ((1.0, 2.0), (0.2, 0.1), "never fall"),
        ((1.0, 2.0), (-0.1, 0.1), r"\[0, 1\]"),
        ((1.0, 2.0), (0.1, 1.1), r"\[0, 1\]"),
        ((1.0, math.nan), (0.1, 0.2), "finite"),
        ((1.0, 2.0), (0.1, math.nan), "finite"),
    ],
)
def test_isotonic_refuses_what_is_not_monotone(logits, risks, message):
    with pytest.raises(ValueError, match=message):
        Isotonic(logits=logits, risks=risks)


def test_operating_point_refuses_what_is_no_rate():
    with pytest.raises(ValueError, match="recall must be in"):
        OperatingPoint(name="x", threshold=0.5, false_positive_rate=0.1, recall=math.nan)


@given(
    negatives=st.lists(st.floats(0, 0.99), min_size=1, max_size=60),
    positives=st.lists(st.floats(0, 1), min_size=1, max_size=60),
)
def test_operating_points_never_exceed_their_rate(negatives, positives):
    """Ties at the threshold all pass: a quantile alone may promise 5 % and flag 40 %."""
    low, high = np.array(negatives), np.array(positives)
    points = choose_operating_points(low, high)
    assert [point.name for point in points] == ["fpr_1", "fpr_5", "fpr_10"]
    for point, rate in zip(points, (0.01, 0.05, 0.10), strict=True):
        assert (low >= point.threshold).mean() == point.false_positive_rate <= rate
        assert (high >= point.threshold).mean() == point.recall


def test_no_number_lies_between_two_neighbours():
    """Their mean rounds to the lower one, and every tie at it would be flagged."""
    low, high = 1 - 2**-52, 1 - 2**-53
    points = choose_operating_points(np.array([low] * 50), np.array([high]))
    assert [(p.threshold, p.false_positive_rate, p.recall) for p in points] == [(high, 0, 1)] * 3


def test_operating_points_use_the_rate_that_is_allowed():
    """A threshold that flags nothing also keeps every rate."""
    negatives = np.linspace(0, 0.9, 30)
    points = choose_operating_points(negatives, np.array([0.85, 0.1]))
    assert [point.false_positive_rate for point in points] == [0, 1 / 30, 3 / 30]
    assert [point.recall for point in points] == [0, 0, 0.5]
    everything = choose_operating_points(negatives, negatives, rates=(1.0,))[0]
    assert (everything.name, everything.threshold, everything.recall) == ("fpr_100", 0.0, 1.0)


def test_saturated_negatives_are_refused():
    with pytest.raises(ValueError, match=r"50\.0% of the negatives have risk 1"):
        choose_operating_points(np.array([1.0, 0.0]), np.array([1.0]))


@pytest.mark.parametrize(("negatives", "positives"), [([], [1.0]), ([1.0], [])])
def test_operating_points_need_both_classes(negatives, positives):
    with pytest.raises(ValueError, match="at least one of each"):
        choose_operating_points(np.array(negatives), np.array(positives))
