"""Logits are pooled, never risks; runs are half-open."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probes.spans import Pooling, flagged_runs

LOGITS = [1.0, -2.0, 3.0, 5.0, -4.0]


@pytest.mark.parametrize(
    ("kind", "window", "expected"),
    [
        ("first", 1, 1.0),
        ("last", 1, -4.0),
        ("mean", 1, 0.6),
        ("max", 1, 5.0),
        ("max_window", 2, 4.0),
        ("max_window", 1, 5.0),
        ("max_window", 99, 0.6),
    ],
)
def test_pooling(kind, window, expected):
    assert Pooling(kind=kind, window=window).pool(LOGITS) == pytest.approx(expected)


def test_nothing_scored_has_no_score():
    """A default of 0 would read as a risk."""
    with pytest.raises(ValueError, match="at least one logit"):
        Pooling(kind="max").pool([])


def test_window_is_at_least_one():
    with pytest.raises(ValueError, match="window must be at least 1, not 0"):
        Pooling(kind="max_window", window=0)


@given(st.lists(st.booleans(), max_size=40))
def test_runs_cover_exactly_the_flagged(flags):
    """Off by one at the end loses the last token of an answer."""
    runs = flagged_runs(flags)
    covered = [any(start <= at < stop for start, stop in runs) for at in range(len(flags))]
    assert covered == flags
    assert all(a[1] < b[0] for a, b in pairwise(runs))
    assert all(start < stop for start, stop in runs)
