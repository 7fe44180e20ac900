"""Curves of the report: one detector has the same figures in the picture and in the table."""

from __future__ import annotations

import numpy as np
import pytest

from offline import metrics
from offline.curves import POINTS, curve
from offline.records import RecordError


def test_the_area_under_the_points_is_the_figure_of_the_table() -> None:
    """Thinned points that bend the curve would show another detector than the table names."""
    random = np.random.default_rng(0)
    wrong = random.random(3000) < 0.2
    score = np.round(random.normal(size=3000) + wrong, 2)  # with ties
    points = curve("tokens", "probe", wrong, score)
    area = np.trapezoid(points.recall, points.false_positive_rate)
    assert area == pytest.approx(metrics.rank(wrong, score), abs=2e-3)
    assert len(points.flagged_wrong) <= 2 * POINTS + 4


def test_every_share_of_a_small_curve_by_hand() -> None:
    """Two wrong answers score 3 and 1, two right ones 2 and 0; thresholds fall from the top."""
    points = curve("claims", "probe", np.array([1, 0, 1, 0], bool), np.array([3.0, 2.0, 1.0, 0.0]))
    assert points.recall.tolist() == [0, 0.5, 0.5, 1, 1]
    assert points.false_positive_rate.tolist() == [0, 0, 0.5, 0.5, 1]
    assert points.precision.tolist() == [1, 1, 1 / 2, 2 / 3, 1 / 2]
    assert points.coverage.tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert points.accuracy.tolist() == [0.5, 2 / 3, 0.5, 1, 1]


def test_rows_of_equal_score_are_flagged_together() -> None:
    """A constant detector has one threshold: none or all. Row order must not look like skill."""
    points = curve("claims", "nothing", np.array([True, True, False, False]), np.zeros(4))
    assert (points.flagged_wrong, points.flagged_right) == ((0, 2), (0, 2))


def test_one_class_alone_is_refused() -> None:
    with pytest.raises(RecordError, match="4 of 4 are hallucinated"):
        curve("claims", "probe", np.ones(4, dtype=bool), np.zeros(4))
