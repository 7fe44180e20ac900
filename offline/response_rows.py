"""Rows of the card about whole responses: what thresholds flag, what is gained over each rival, and
which pooling ranks them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from offline import metrics
from offline.dataset import Dataset
from offline.domains import ORDINARY_RESPONSES, Place
from offline.features import IntArray
from offline.fit_result import FitResult
from offline.metrics import Floats
from offline.mixtures import POOLINGS, pooled, response_mixture
from offline.tables import CALIBRATION, flagged, has_both, table
from probes.calibration import calibrate
from probes.card import EvaluationRow
from probes.spans import Pooling, flagged_runs


def response_rows(data: Dataset, result: FitResult, logits: Floats) -> Iterator[EvaluationRow]:
    """What the operating points of responses flag, and whether their risks hold."""
    answers, wrong = response_mixture(data, "test")
    risk = calibrate(result.response, pooled(data, logits, answers, result.pooling))
    units = data.unit[data.first[answers]]
    long = np.arange(len(answers)) >= len(answers) - len(data.ordinary("test"))
    for name, of in (
        ("wrong responses", wrong),
        ("right responses", ~wrong & ~long),
        (ORDINARY_RESPONSES, long),
        ("responses that are not wrong", ~wrong),
    ):
        yield from flagged(name, result.response_points, risk[of], units[of])
    yield from table(CALIBRATION, "response risk", "probe", wrong, risk, units)


def risk_rows(
    data: Dataset, result: FitResult, place: Place, logits: Floats
) -> Iterator[EvaluationRow]:
    """Calibration and thresholds unchanged, on answers as they come: there wrong ones are more or
    less frequent than in the mixture that was calibrated on, and a domain may be another."""
    dataset = f"response risk, {place.name}"
    wrong, units = data.hallucinated(place.answers), data.unit[data.first[place.answers]]
    risk = calibrate(result.response, logits)
    default = next(p for p in result.response_points if p.name == result.settings.response_default)
    accuracy = {f"accuracy_at_{default.name}": metrics.accuracy_at(default.threshold)}
    yield from table(CALIBRATION | accuracy, dataset, "probe", wrong, risk, units)
    for name, of in (("right", ~wrong), ("wrong", wrong)):
        answers = f"{name} responses, {place.name}"
        yield from flagged(answers, result.response_points, risk[of], units[of])


def pooling_rows(data: Dataset, result: FitResult, logits: Floats) -> Iterator[EvaluationRow]:
    """Every pooling of every head; which one is served was chosen on the fit part, among POOLINGS.
    The mean measures length, and the worst flagged span needs a threshold: both only compare."""
    answers, wrong = response_mixture(data, "test")
    units = data.unit[data.first[answers]]
    short = np.arange(len(answers)) < len(answers) - len(data.ordinary("test"))
    sets = {
        "pooling, short answers": short,
        "pooling, short and ordinary long answers": np.ones(len(short), dtype=np.bool_),
    }
    sets = {dataset: of for dataset, of in sets.items() if has_both(dataset, wrong[of])}
    for head, name in enumerate(result.chosen.heads):
        scores = {
            f"{pooling.kind} {pooling.window}": pooled(data, logits[:, head], answers, pooling)
            for pooling in (*POOLINGS, Pooling("mean"))
        }
        scores["worst flagged span"] = _worst_spans(data, result, logits, head, answers)
        for pooling, score in scores.items():
            detector = f"{name} head, {pooling}"
            for dataset, of in sets.items():
                yield from table(
                    {"auroc": metrics.auroc}, dataset, detector, wrong[of], score[of], units[of]
                )


def _worst_spans(
    data: Dataset, result: FitResult, logits: Floats, head: int, answers: IntArray
) -> Floats:
    """`[answers]`: the largest mean of a head's logits over a span that the token head flags at the
    default threshold. Answers without one are alike, and below all others."""
    default = next(p for p in result.token_points if p.name == result.settings.token_default)
    found = np.full(len(answers), np.nan)
    for i, answer in enumerate(answers):
        rows = data.rows_of(answer)
        flags = calibrate(result.token, logits[rows, 0]) >= default.threshold
        spans = flagged_runs(flags.tolist())
        if spans:
            found[i] = max(logits[rows[start:stop], head].mean() for start, stop in spans)
    lowest = np.nanmin(found) if np.isfinite(found).any() else 0.0
    return np.where(np.isnan(found), lowest - 1, found)
