"""What a probe must beat: detectors that are free, and other readers of the same pass.

All are oriented: higher = more likely hallucinated. Fitted ones see what the probe's head saw, and
choose their penalty on one fold of the part `fit`: as the probe does, by the run's own answers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeAlias

import numpy as np

from offline.dataset import FITTED, Dataset
from offline.examples import Stored, token_rows
from offline.features import Features, FloatArray, IntArray
from offline.fit_result import FitResult
from offline.l1_path import standardise
from offline.metrics import Bools, Floats, has_both, rank
from offline.shards import WHOLE, Kind
from offline.splits import folds

RANDOM = "random neurons, as many"
RANDOM_DRAWS = 20
PENALTIES = (3.0, 0.3, 0.03, 0.003, 0.0003)  # L2, per example, on standardised features
JITTER = 1e-5  # of a row's length, and of their mean: equal rows and float32 leave no last digits
BLOCK_ROWS = 4096  # that are read at a time

_LOWER_IS_WORSE = ("logprob_mean", "logprob_min", "logprob_sum")


TokenDetector: TypeAlias = Callable[[Features, IntArray], Floats]


class _Fitted(NamedTuple):
    """A dense logistic regression on standardised features, the scaler folded in."""

    weight: Floats
    bias: float

    def read(self, x: FloatArray) -> Floats:
        scores: Floats = x.astype(np.float64) @ self.weight + self.bias
        return scores


def token_detectors(data: Dataset, result: FitResult) -> dict[str, TokenDetector]:
    """Name -> scores of any rows; the probe's token head first. Fitted ones are fitted here."""
    features = data.features
    fitted, weight = token_rows(data, result.settings)
    wrong, units = features.kind[fitted] == Kind.WRONG, data.unit[fitted].tolist()
    detectors: dict[str, TokenDetector] = {
        "probe": lambda asked, rows: result.chosen.logits(asked, rows)[:, 0],
        "-logprob": lambda asked, rows: -asked.logprob[rows].astype(np.float64),
        "entropy": lambda asked, rows: asked.entropy[rows].astype(np.float64),
        # Short answers end where long ones go on: much of "claims against prose" is free.
        "place in the text, first is highest": lambda asked, rows: (
            -asked.token[rows].astype(np.float64)
        ),
    }
    for layer in features.header.residual_layers:
        model = _dense(features.residual(fitted, layer), wrong, units, weight=weight)
        detectors[f"residual layer {layer}, dense"] = partial(_read_residual, model, layer)
    return detectors


def _read_residual(model: _Fitted, layer: int, asked: Features, rows: IntArray) -> Floats:
    return model.read(asked.residual(rows, layer))


def random_neurons(data: Dataset, result: FitResult, rows: IntArray) -> Floats:
    """`[draws, rows]`: as many neurons as the probe has, drawn at random, each draw fitted on the
    tokens that the probe saw."""
    random = np.random.default_rng(result.settings.seed)
    features = data.features
    fitted, weight = token_rows(data, result.settings)
    wrong, units = features.kind[fitted] == Kind.WRONG, data.unit[fitted].tolist()
    draws = [
        np.sort(random.choice(features.width, len(result.chosen.columns), replace=False))
        for _ in range(RANDOM_DRAWS)
    ]
    columns = np.unique(np.concatenate(draws))
    at = [np.searchsorted(columns, draw) for draw in draws]
    seen = features.cett(fitted, columns)
    models = [_dense(seen[:, where], wrong, units, weight=weight) for where in at]
    scores = np.empty((len(draws), len(rows)))
    for block in np.array_split(np.arange(len(rows)), -(-len(rows) // BLOCK_ROWS)):
        values = features.cett(rows[block], columns)
        for d, (where, model) in enumerate(zip(at, models, strict=True)):
            scores[d, block] = model.read(values[:, where])
    return scores


def answer_detectors(
    data: Dataset, answers: IntArray, *, seen: Stored, asked: Stored
) -> dict[str, Floats]:
    """Name -> score of whole answers: what is free, and dense readers of the same pass.

    seen, asked: `answer_means` of the answers to fit on and of `answers`.
    """
    fitted = data.answered(*FITTED)
    wrong, units = data.hallucinated(fitted), data.unit[data.first[fitted]].tolist()
    own = fitted < data.own
    detectors = {
        **whole_statistics(data, answers),
        "words of the question": _words(data, answers, with_answer=False),
        "words of question and answer": _words(data, answers, with_answer=True),
    }
    for layer in data.features.header.residual_layers:
        model = _dense(_residual_means(data, fitted, layer), wrong, units, own=own)
        scores = model.read(_residual_means(data, answers, layer))
        detectors[f"residual layer {layer}, dense"] = scores
    detectors["CETT of all neurons, dense"] = _dense_cett(seen, asked, wrong, units, own)
    return detectors


def random_answer_neurons(
    data: Dataset, result: FitResult, *, seen: Stored, asked: Stored
) -> Floats:
    """`[draws, answers]`: as many neurons as the probe has, drawn at random, fitted on answers."""
    random = np.random.default_rng(result.settings.seed)
    fitted = data.answered(*FITTED)
    wrong, units = data.hallucinated(fitted), data.unit[data.first[fitted]].tolist()
    own = fitted < data.own
    scores = []
    for _ in range(RANDOM_DRAWS):
        columns = random.choice(data.features.width, len(result.chosen.columns), replace=False)
        model = _dense(seen[:, columns].astype(np.float32), wrong, units, own=own)
        scores.append(model.read(asked[:, columns].astype(np.float32)))
    return np.array(scores)


def whole_statistics(data: Dataset, answers: IntArray) -> dict[str, Floats]:
    """Log-probability, entropy and length of whole answers, `[answers]` each."""
    values = data.features.whole[answers].astype(np.float64)
    return {
        f"-{name}" if name in _LOWER_IS_WORSE else name: (
            -values[:, i] if name in _LOWER_IS_WORSE else values[:, i]
        )
        for i, name in enumerate(WHOLE)
    }


def _words(data: Dataset, answers: IntArray, *, with_answer: bool) -> Floats:
    """TF-IDF of the texts, without any look at the model: what the wording gives away."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    def texts(indices: IntArray) -> list[str]:
        chosen = [data.answers[i] for i in indices]
        return [f"{a.question} {a.text}" if with_answer else a.question for a in chosen]

    fitted = data.answered(*FITTED)
    model = make_pipeline(TfidfVectorizer(sublinear_tf=True), LogisticRegression())
    model.fit(texts(fitted), data.hallucinated(fitted))
    scores: Floats = model.decision_function(texts(answers))
    return scores


def _residual_means(data: Dataset, answers: IntArray, layer: int) -> FloatArray:
    rows = [data.rows_of(i) for i in answers]
    sizes = np.array([len(one) for one in rows])
    values = data.features.residual(np.concatenate(rows), layer)
    sums: FloatArray = np.add.reduceat(values, np.cumsum([0, *sizes[:-1]]), axis=0)
    return np.asfortranarray(sums / sizes[:, None].astype(np.float32))


def _dense_cett(seen: Stored, asked: Stored, wrong: Bools, units: list[str], own: Bools) -> Floats:
    """Every neuron: far more columns than rows, so the fit is done in the span of the rows, where
    the solution of an L2 fit lies. The Cholesky factor of their inner products has their
    coordinates there; an eigendecomposition gives the same fit and takes ten times as long."""
    from scipy.linalg import solve_triangular

    x = np.asfortranarray(seen, dtype=np.float32)
    mean, scale = standardise(x)
    root = _factor((x @ x.T).astype(np.float64))
    across = (x @ ((asked.astype(np.float32) - mean) / scale).T).astype(np.float64)
    del x
    turned = solve_triangular(root, across, lower=True).T.astype(np.float32)
    model = _dense(root.astype(np.float32), wrong, units, scaled=False, own=own)
    return model.read(turned)


def _factor(products: Floats) -> Floats:
    """The Cholesky factor of inner products, of rows that stand off each other by a jitter."""
    from scipy.linalg import cholesky

    lengths = products.diagonal().copy()
    products[np.diag_indices(len(products))] = lengths * (1 + JITTER) + JITTER * lengths.mean()
    root: Floats = cholesky(products, lower=True)
    return root


def _dense(
    x: FloatArray,
    wrong: Bools,
    units: list[str],
    *,
    weight: IntArray | None = None,
    scaled: bool = True,
    own: Bools | None = None,
) -> _Fitted:
    """L2 logistic regression; the penalty is the best on one fold of the units, the largest where
    no fold can rank. own: the rows that may judge; None: all"""
    from sklearn.linear_model import LogisticRegression

    x = np.asfortranarray(x)
    mean, scale = standardise(x) if scaled else (np.zeros(x.shape[1]), np.ones(x.shape[1]))
    each = np.ones(len(x)) if weight is None else weight.astype(np.float64)

    def fitted(x: FloatArray, rows: Bools, penalty: float) -> LogisticRegression:
        c = 1 / (penalty * each[rows].sum())
        return LogisticRegression(C=c, max_iter=300).fit(x, wrong[rows], each[rows])

    fold = np.array(folds(units, 4, seed=0))
    judging = np.ones(len(x), dtype=np.bool_) if own is None else own
    telling = [
        n for n in range(4) if has_both(wrong[(fold == n) & judging]) and has_both(wrong[fold != n])
    ]
    best = PENALTIES[0]
    if telling:
        out = fold == telling[0]
        # In rows, as scikit-learn wants them: it would copy them again for each penalty.
        asked = out & judging
        inside, outside = np.ascontiguousarray(x[~out]), np.ascontiguousarray(x[asked])

        def merit(penalty: float) -> float:
            return rank(wrong[asked], fitted(inside, ~out, penalty).decision_function(outside))

        best = max(PENALTIES, key=merit)
    model = fitted(x, np.ones(len(x), dtype=np.bool_), best)
    folded = model.coef_[0].astype(np.float64) / scale
    return _Fitted(folded, float(model.intercept_[0]) - float(mean @ folded))
