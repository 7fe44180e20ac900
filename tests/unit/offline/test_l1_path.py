"""The article's synthetic check, and that a working set solves the full problem."""

from __future__ import annotations

import numpy as np
import pytest

from offline.features import FloatArray
from offline.l1_path import Solver, l1_path, standardise
from offline.metrics import Bools

ROWS, COLUMNS, PLANTED = 2000, 3072, 20


@pytest.fixture(scope="module")
def synthetic() -> tuple[FloatArray, Bools]:
    """2,000 answers x 3,072 neurons, all noise but 20: ten fire more where the answer is wrong, ten
    less."""
    random = np.random.default_rng(0)
    wrong = random.random(ROWS) < 0.5
    x = np.asfortranarray(random.gamma(2.0, 0.01, (ROWS, COLUMNS)).astype(np.float32))
    x[:, : PLANTED // 2] += 0.03 * wrong[:, None]
    x[:, PLANTED // 2 : PLANTED] += 0.03 * ~wrong[:, None]
    standardise(x)
    return x, wrong


@pytest.mark.parametrize("solver", ["skglm", "liblinear"])
def test_all_planted_neurons_are_found_and_nothing_else_matters(
    synthetic: tuple[FloatArray, Bools], solver: Solver
) -> None:
    """20 of 20 with their signs, and the other 3,052 together weigh less than any one of them."""
    x, wrong = synthetic
    *_, point = l1_path(x, wrong, (0.5, 0.2), solver=solver)
    planted, others = point.weight[:PLANTED], point.weight[PLANTED:]
    assert (planted[:10] > 0).all()
    assert (planted[10:] < 0).all()
    assert np.abs(others).sum() < np.abs(planted).min()


def test_cross_validated_accuracy_is_one(synthetic: tuple[FloatArray, Bools]) -> None:
    x, wrong = synthetic
    fold = np.arange(ROWS) % 5
    for k in range(5):
        fitted, held_out = fold != k, fold == k
        *_, point = l1_path(np.asfortranarray(x[fitted]), wrong[fitted], (0.2,))
        said = x[held_out] @ point.weight + point.bias > 0
        assert (said == wrong[held_out]).all()


def test_a_working_set_solves_the_full_problem() -> None:
    """No column that was left out may want a weight: the condition of the optimum, on all columns,
    where correlated ones come and go along the path."""
    random = np.random.default_rng(1)
    factors = random.standard_normal((400, 5))
    x = factors @ random.standard_normal((5, 900)) + random.standard_normal((400, 900))
    x = np.asfortranarray(x.astype(np.float32))
    standardise(x)
    positive = factors[:, 0] + x[:, 7] + random.logistic(size=400) > 0
    y = np.where(positive, 1.0, -1.0)
    prior = y / (1 + np.exp(y * np.log(positive.mean() / (1 - positive.mean()))))
    largest = np.abs(x.T @ prior).max() / len(x)
    sizes = []
    for strength, weight, bias in l1_path(x, positive, (0.05, 0.6, 0.2)):
        pull = x.T @ (y / (1 + np.exp(y * (x @ weight + bias)))) / len(x)
        sizes.append(int((weight != 0).sum()))
        alpha, slack = strength * largest, 5e-3 * largest
        assert np.abs(pull).max() < alpha + slack
        assert np.abs(pull[weight != 0] - alpha * np.sign(weight[weight != 0])).max() < slack
    assert sizes == sorted(sizes)
    assert sizes[-1] > 20


def test_one_column_in_the_working_set_needs_no_case_of_its_own() -> None:
    x = np.asfortranarray(np.random.default_rng(0).standard_normal((300, 40)).astype(np.float32))
    standardise(x)
    (point,) = l1_path(x, x[:, 3] > 0, (0.9,))
    assert np.flatnonzero(point.weight).tolist() == [3]


def test_standardising_block_by_block_is_standardising(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks keep half a million columns within memory; their seams must not show."""
    monkeypatch.setattr("offline.l1_path.BLOCK_BYTES", 50 * 4 * 7)
    raw = np.random.default_rng(0).gamma(2.0, 1.0, (50, 23)).astype(np.float32)
    raw[:, 5] = 0.25
    x = np.asfortranarray(raw)
    mean, scale = standardise(x)
    assert mean == pytest.approx(raw.mean(axis=0), rel=1e-5)
    expected = raw.std(axis=0)
    expected[5] = 1.0
    assert scale == pytest.approx(expected, rel=1e-4)
    assert x == pytest.approx((raw - mean) / expected, abs=1e-4)
    assert (x[:, 5] == 0).all()
