"""What a probe must beat: detectors that are free, and other readers of the same pass.

All are oriented: higher = more likely hallucinated. Fitted ones are fitted on part `fit`, their
strength is chosen on part `calibrate`, like the probe's.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from offline.dataset import Dataset
from offline.extract import WHOLE, Kind
from offline.features import FloatArray, IntArray
from offline.fit import FitResult, choose_rows
from offline.l1_path import standardise
from offline.metrics import Floats, rank

RANDOM_DRAWS = 10
STRENGTHS = (1e-3, 1e-2, 1e-1)  # C of the dense logistic regressions, on standardised features

_LOWER_IS_WORSE = ("logprob_mean", "logprob_min", "logprob_sum")


def token_detectors(data: Dataset, result: FitResult, rows: IntArray) -> dict[str, Floats]:
    """Name -> score of each of `rows`; the probe first."""
    features = data.features
    detectors = {
        "probe": result.chosen.logits(features, rows),
        "-logprob": -features.logprob[rows].astype(np.float64),
        "entropy": features.entropy[rows].astype(np.float64),
        "random neurons, as many": _random_neurons(data, result, rows),
    }
    for layer in features.header.residual_layers:

        def read(rows: IntArray, layer: int = layer) -> FloatArray:
            return features.residual(rows, layer)

        detectors[f"residual layer {layer}, dense"] = _dense(data, result, rows, read)
    return detectors


def whole_statistics(data: Dataset, answers: IntArray) -> dict[str, Floats]:
    """Log-probability, entropy and length of whole answers, `[answers]` each."""
    values = data.features.whole[answers].astype(np.float64)
    return {
        f"-{name}" if name in _LOWER_IS_WORSE else name: (
            -values[:, i] if name in _LOWER_IS_WORSE else values[:, i]
        )
        for i, name in enumerate(WHOLE)
    }


def question_words(data: Dataset, answers: IntArray) -> Floats:
    """TF-IDF of the question alone, without any look at the model: what the wording gives away."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    fitted = data.answered("fit")
    model = make_pipeline(TfidfVectorizer(sublinear_tf=True), LogisticRegression())
    model.fit([data.answers[i].question for i in fitted], data.hallucinated(fitted))
    scores: Floats = model.decision_function([data.answers[i].question for i in answers])
    return scores


def _random_neurons(data: Dataset, result: FitResult, rows: IntArray) -> Floats:
    """As many neurons as the probe has, drawn at random, fitted densely; mean over the draws."""
    random = np.random.default_rng(result.settings.seed)
    total = np.zeros(len(rows))
    for _ in range(RANDOM_DRAWS):
        columns = np.sort(
            random.choice(data.features.width, len(result.chosen.columns), replace=False)
        )

        def read(rows: IntArray, columns: IntArray = columns) -> FloatArray:
            return data.features.cett(rows, columns)

        total += _dense(data, result, rows, read)
    return total / RANDOM_DRAWS


def _dense(
    data: Dataset, result: FitResult, rows: IntArray, read: Callable[[IntArray], FloatArray]
) -> Floats:
    """Decision function `[rows]` of an L2 logistic regression on the tokens the probe saw."""
    from sklearn.linear_model import LogisticRegression

    fitted = choose_rows(data, result.settings)
    held_out = data.rows("calibrate", Kind.WRONG, Kind.RIGHT)
    kind = data.features.kind
    x = read(fitted)
    mean, scale = standardise(x)
    check = (read(held_out) - mean) / scale
    models = [
        LogisticRegression(C=c, max_iter=300).fit(x, kind[fitted] == Kind.WRONG) for c in STRENGTHS
    ]
    best = max(models, key=lambda m: rank(kind[held_out] == Kind.WRONG, m.decision_function(check)))
    scores: Floats = best.decision_function((read(rows) - mean) / scale)
    return scores
