"""Figures against scikit-learn; intervals by unit; orientation: higher is worse."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from offline import metrics
from offline.calibrate import choose_calibration, isotonic, platt, temperature
from offline.metrics import Weighed
from offline.records import RecordError
from probes.calibration import calibrate


@pytest.fixture
def scored() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    positive = random.random(500) < 0.3
    score = np.sort(np.round(random.normal(size=500), 1))  # with ties, ascending
    weight = random.integers(0, 4, 500).astype(np.float64)
    return positive, score, weight


def test_auroc_and_auprc_are_scikit_learns_with_ties_and_weights(
    scored: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    positive, score, weight = scored
    assert metrics.auroc(Weighed.of(*scored)) == pytest.approx(
        roc_auc_score(positive, score, sample_weight=weight)
    )
    assert metrics.auprc(Weighed.of(*scored)) == pytest.approx(
        average_precision_score(positive, score, sample_weight=weight)
    )


def test_rank_does_not_depend_on_the_order_of_rows(
    scored: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    positive, score, _ = scored
    order = np.random.default_rng(1).permutation(len(score))
    assert metrics.rank(positive[order], score[order]) == pytest.approx(
        metrics.auroc(Weighed.of(positive, score, np.ones(500)))
    )


def test_recall_at_a_rate_flags_no_more_negatives_than_that() -> None:
    positive = np.array([False] * 100 + [True] * 4)
    score = np.r_[np.arange(100), [50, 94.5, 95.5, 200]].astype(np.float64)
    order = np.argsort(score, kind="stable")
    recall = metrics.recall_at_fpr(0.05)(Weighed.of(positive[order], score[order], np.ones(104)))
    assert recall == 0.75


def test_the_interval_grows_when_rows_come_in_few_units() -> None:
    """Resampling rows of 6 relations as if each were its own pretends to certainty."""
    random = np.random.default_rng(0)
    group = np.repeat(np.arange(6), 100)
    positive = random.random(600) < 0.5
    score = random.normal(size=600) + positive * random.normal(size=6)[group]
    by_row = metrics.with_interval(metrics.auroc, positive, score, [str(i) for i in range(600)])
    by_group = metrics.with_interval(metrics.auroc, positive, score, [str(g) for g in group])
    assert by_row.value == by_group.value
    assert by_group.high - by_group.low > 1.5 * (by_row.high - by_row.low)
    assert by_group.low <= by_group.value <= by_group.high


def test_telling_groups_apart_earns_nothing_within_them() -> None:
    """The relation alone reached .739: the figure inside relations shows what is left."""
    units = ["easy"] * 100 + ["hard"] * 100
    positive = np.r_[np.arange(100) < 10, np.arange(100) < 90]
    score = np.r_[np.zeros(100), np.ones(100)]
    assert metrics.rank(positive, score) > 0.8
    assert metrics.auroc_within(positive, score, units) == 0.5


def test_platt_and_isotonic_recover_the_probabilities() -> None:
    random = np.random.default_rng(0)
    logits = random.normal(size=20_000) * 3
    risk = 1 / (1 + np.exp(-(0.7 * logits - 1)))
    hallucinated = random.random(20_000) < risk
    fitted = platt(logits, hallucinated)
    assert fitted.slope == pytest.approx(0.7, abs=0.05)
    assert fitted.intercept == pytest.approx(-1, abs=0.08)
    for calibration in (fitted, isotonic(logits, hallucinated)):
        found = calibrate(calibration, logits)
        assert np.abs(found - risk).mean() < 0.02
        order = np.argsort(found, kind="stable")
        ece = metrics.expected_calibration_error()
        assert ece(Weighed.of(hallucinated[order], found[order], np.ones(20_000))) < 0.02


def test_a_wrong_risk_has_a_calibration_error() -> None:
    positive = np.arange(1000) % 2 == 0
    ece = metrics.expected_calibration_error()
    assert ece(Weighed.of(positive, np.full(1000, 0.9), np.ones(1000))) == pytest.approx(0.4)


def test_a_calibration_with_more_freedom_must_earn_it() -> None:
    """Relations differ in what the same logit is worth: here the freest method leads by a hair."""
    random = np.random.default_rng(7)
    logits = random.normal(size=900)
    relation = np.arange(900) % 30
    wrong = random.random(900) < 1 / (1 + np.exp(-(logits + random.normal(size=30)[relation])))
    fitted, scores, _ = choose_calibration(logits, wrong, relation.astype(str).tolist(), seed=0)
    assert min(scores, key=lambda name: scores[name]) == "isotonic"
    assert fitted == temperature(logits, wrong)


def test_the_calibration_that_fits_unseen_units_best_is_taken() -> None:
    """A step in the data is no logistic curve; a shifted one is not through its own zero."""
    random = np.random.default_rng(0)
    logits = random.normal(size=6000)
    units = [str(i % 60) for i in range(6000)]
    step = random.random(6000) < np.where(logits > 1, 0.95, 0.3)
    fitted, scores, _ = choose_calibration(logits, step, units, seed=0)
    assert min(scores, key=lambda name: scores[name]) == "isotonic"
    assert fitted == isotonic(logits, step)
    shifted = random.random(6000) < 1 / (1 + np.exp(-(2 * logits - 3)))
    fitted, scores, _ = choose_calibration(logits, shifted, units, seed=0)
    assert scores["platt"] < scores["temperature"]
    assert np.isfinite(list(scores.values())).all()


def test_a_method_that_the_logits_rule_out_is_not_taken() -> None:
    """Temperature alone would turn logits of one sign upside down."""
    random = np.random.default_rng(0)
    logits = random.normal(size=2000) + 5
    rare = random.random(2000) < 1 / (1 + np.exp(-(logits - 8)))
    fitted, scores, _ = choose_calibration(logits, rare, [str(i % 50) for i in range(2000)], seed=0)
    assert set(scores) == {"platt", "isotonic"}  # a file of JSON could not hold an infinite score
    assert calibrate(fitted, logits).mean() == pytest.approx(rare.mean(), abs=0.01)


def test_accuracy_at_coverage_answers_the_least_risky() -> None:
    positive = np.array([False, False, True, True])
    score = np.arange(4.0)
    rows = Weighed.of(positive, score, np.ones(4))
    assert metrics.accuracy_at_coverage(0.5)(rows) == 1.0
    assert metrics.accuracy_at_coverage(0.75)(rows) == pytest.approx(2 / 3)


def test_rank_correlation_is_of_ranks_and_ties_share_theirs() -> None:
    first = np.array([1.0, 2.0, 2.0, 100.0])
    assert metrics.rank_correlation(first, first**3) == pytest.approx(1.0)
    assert metrics.rank_correlation(first, -first) == pytest.approx(-1.0)
    # ranks 1, 2.5, 2.5, 4 against 2, 1, 3, 4: products 3, squares 4.5 and 5
    found = metrics.rank_correlation(first, np.array([20.0, 10.0, 30.0, 40.0]))
    assert found == pytest.approx(3.0 / np.sqrt(4.5 * 5))
    assert np.isnan(metrics.rank_correlation(first, np.ones(4)))


def test_a_probe_that_ranks_upside_down_is_refused() -> None:
    """Trap 20: a swapped polarity must not be calibrated away."""
    logits = np.linspace(-1, 1, 100)
    with pytest.raises(RecordError, match="less risk"):
        platt(logits, logits < 0.1)


def test_one_class_is_refused() -> None:
    with pytest.raises(RecordError, match="both classes"):
        platt(np.arange(3.0), np.ones(3, dtype=bool))


def test_what_is_gained_over_a_rival_is_the_difference_of_the_same_resamples() -> None:
    """Two detectors of overlapping intervals may differ for certain, as a copy that is a little
    worse everywhere does; and nothing is gained over oneself."""
    random = np.random.default_rng(0)
    units = np.repeat(np.arange(20), 100).astype(str)
    wrong = random.random(2000) < 0.5
    hard = np.repeat(random.normal(0, 1, 20), 100)  # relations differ, for both alike
    score = wrong * 1.0 + hard + random.normal(0, 1, 2000)
    worse = score + random.normal(0, 0.7, 2000)
    found = metrics.auroc_gained(wrong, score, {"itself": score, "copy": worse}, units)
    assert (found["itself"].value, found["itself"].low, found["itself"].high) == (0, 0, 0)
    own, other = (metrics.with_interval(metrics.auroc, wrong, s, units) for s in (score, worse))
    assert found["copy"].value == pytest.approx(own.value - other.value)
    assert own.low < other.high, "the intervals do not overlap: nothing is shown"
    assert 0 < found["copy"].low < found["copy"].value < found["copy"].high


def test_accuracy_at_a_threshold_counts_both_kinds_of_mistakes() -> None:
    wrong, risk = np.array([True, True, False, False, False]), np.array([0.9, 0.2, 0.1, 0.5, 0.4])
    found = metrics.with_interval(metrics.accuracy_at(0.5), wrong, risk, list("abcde"))
    assert found.value == pytest.approx(3 / 5)
