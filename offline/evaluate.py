"""Verb `evaluate`: how well the probe tells, on relations and questions it never saw, beside what
costs nothing.

Three levels. Tokens: those of wrong claims against all others. Claims: mean token logit over the
known claim, wrong against right. Responses: answers of which every token is judged, pooled over all
their tokens as the server does. Baselines stand in the same tables on the same items. Intervals are
resampled by unit (relation, question).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from offline import metrics
from offline.baselines import question_words, token_detectors, whole_statistics
from offline.curves import Curve, curve
from offline.dataset import Dataset
from offline.extract import Kind
from offline.features import IntArray
from offline.fit import TOKEN_KINDS, FitResult, mixture, response_mixture
from offline.metrics import Bools, Floats, Metric
from offline.records import Record, read_bytes, write_atomic
from probes.calibration import OperatingPoint, calibrate
from probes.card import EvaluationRow, ReliabilityBin

log = logging.getLogger(__name__)

MIN_CLASS = 15  # a source with fewer right or wrong answers gives no rows of its own

RANKING: dict[str, Metric] = {
    "auroc": metrics.auroc,
    "auprc": metrics.auprc,
    "recall_at_1_fpr": metrics.recall_at_fpr(0.01),
    "recall_at_5_fpr": metrics.recall_at_fpr(0.05),
    "recall_at_10_fpr": metrics.recall_at_fpr(0.10),
}
CALIBRATION: dict[str, Metric] = {
    "ece": metrics.expected_calibration_error(),
    "brier": metrics.brier,
}
FLAGGED_KINDS = {
    Kind.PROSE: "tokens of ordinary long answers",
    Kind.WRONG: "tokens of wrong claims",
    Kind.RIGHT: "tokens of right claims",
    Kind.SCAFFOLD: "scaffold tokens of short answers",
}


class Evaluation(Record, frozen=True, kw_only=True):
    """The tables of the card."""

    rows: tuple[EvaluationRow, ...]
    reliability: tuple[ReliabilityBin, ...]
    curves: tuple[Curve, ...]  # for the report; the card has the figures

    @classmethod
    def load(cls, path: Path) -> Evaluation:
        return msgspec.json.decode(read_bytes(path), type=cls)

    def save(self, path: Path) -> None:
        write_atomic(path, msgspec.json.encode(self))


def evaluate(data: Dataset, result: FitResult) -> Evaluation:
    """Everything on part `test`; every source, those of part `transfer` too, on its own."""
    held_out = np.flatnonzero(np.isin(data.part, ("test", "transfer")))
    detectors = {
        name: _spread(scores, held_out, len(data.part))
        for name, scores in token_detectors(data, result, held_out).items()
    }
    found: list[EvaluationRow | Curve] = [
        *_tokens(data, result, detectors),
        *_flagged_tokens(data, result, detectors["probe"]),
    ]
    answered = data.answered("test")
    found += _responses(data, result, detectors, data.judged(answered))
    found += _claims(data, detectors, answered, "claims, unseen relations and questions")
    for source in sorted({answer.source for answer in data.answers}):
        for part in ("test", "transfer"):
            answers = data.answered(part, source=source)
            wrong = data.hallucinated(answers)
            if min(wrong.sum(), (~wrong).sum()) >= MIN_CLASS:
                found += _claims(data, detectors, answers, f"claims, {source}, {part}")
    rows = tuple(row for row in found if isinstance(row, EvaluationRow))
    for row in rows:
        log.info("%-44s %-28s %-18s %.3f", row.dataset, row.detector, row.metric, row.value)
    return Evaluation(
        rows=rows,
        reliability=_reliability(data, result, detectors["probe"]),
        curves=tuple(row for row in found if isinstance(row, Curve)),
    )


def _tokens(
    data: Dataset, result: FitResult, detectors: Mapping[str, Floats]
) -> Iterator[EvaluationRow | Curve]:
    """Single tokens: wrong claims against every other judged token, and against right claims."""
    kind = data.features.kind
    for dataset, kinds in (
        ("tokens, wrong claims against all others", TOKEN_KINDS),
        ("tokens, wrong against right claims", (Kind.WRONG, Kind.RIGHT)),
    ):
        chosen = data.rows("test", *kinds)
        for name, score in detectors.items():
            wrong, units = kind[chosen] == Kind.WRONG, data.unit[chosen]
            yield from _table(RANKING, dataset, name, wrong, score[chosen], units)
            yield curve(dataset, name, wrong, score[chosen])
    chosen = mixture(data, "test")
    risk = calibrate(result.token, detectors["probe"][chosen])
    yield from _table(
        CALIBRATION, "token risk", "probe", kind[chosen] == Kind.WRONG, risk, data.unit[chosen]
    )


def _flagged_tokens(data: Dataset, result: FitResult, logits: Floats) -> Iterator[EvaluationRow]:
    """What each operating point flags of prose, of wrong and right claims, of their scaffold."""
    for kind, dataset in FLAGGED_KINDS.items():
        chosen = data.rows("test", kind)
        risk = calibrate(result.token, logits[chosen])
        yield from _flagged(dataset, result.token_points, risk, data.unit[chosen])


def _responses(
    data: Dataset, result: FitResult, detectors: Mapping[str, Floats], answers: IntArray
) -> Iterator[EvaluationRow | Curve]:
    """Whole responses, wrong against right; and what of ordinary long answers is flagged."""
    wrong, units = data.hallucinated(answers), data.unit[data.first[answers]]
    pooling = result.settings.pooling

    def pool(score: Floats, answers: IntArray) -> Floats:
        return np.array([pooling.pool(score[data.rows_of(i)].tolist()) for i in answers])

    scores = {
        **{name: pool(score, answers) for name, score in detectors.items()},
        **whole_statistics(data, answers),
        "words of the question": question_words(data, answers),
    }
    dataset = "responses, unseen relations and questions"
    for name, score in scores.items():
        yield from _ranked(dataset, name, wrong, score, units)
    risk = calibrate(result.response, scores["probe"])
    for name, of in (("wrong", wrong), ("right", ~wrong)):
        yield from _flagged(f"{name} responses", result.response_points, risk[of], units[of])
    long = data.ordinary("test")
    risk = calibrate(result.response, pool(detectors["probe"], long))
    units = data.unit[data.first[long]]
    yield from _flagged("ordinary long responses", result.response_points, risk, units)
    mixed, wrong = response_mixture(data, "test")
    risk = calibrate(result.response, pool(detectors["probe"], mixed))
    units = data.unit[data.first[mixed]]
    yield from _table(CALIBRATION, "response risk", "probe", wrong, risk, units)


def _claims(
    data: Dataset, detectors: Mapping[str, Floats], answers: IntArray, dataset: str
) -> Iterator[EvaluationRow | Curve]:
    """Mean token score over the known claim, wrong against right: how well a span is ranked."""
    wrong, units = data.hallucinated(answers), data.unit[data.first[answers]]
    claims = [data.claim_rows(i) for i in answers]
    scores = {
        **{n: np.array([score[rows].mean() for rows in claims]) for n, score in detectors.items()},
        **whole_statistics(data, answers),
        "words of the question": question_words(data, answers),
    }
    for name, score in scores.items():
        yield from _ranked(dataset, name, wrong, score, units)


def _reliability(data: Dataset, result: FitResult, logits: Floats) -> tuple[ReliabilityBin, ...]:
    rows = mixture(data, "test")
    answers, wrong = response_mixture(data, "test")
    pooling = result.settings.pooling
    pooled = np.array([pooling.pool(logits[data.rows_of(i)].tolist()) for i in answers])
    token, response = calibrate(result.token, logits[rows]), calibrate(result.response, pooled)
    return (
        *metrics.reliability_bins("token", token, data.features.kind[rows] == Kind.WRONG),
        *metrics.reliability_bins("response", response, wrong),
    )


def _ranked(
    dataset: str, detector: str, wrong: Bools, score: Floats, units: NDArray[np.str_]
) -> Iterator[EvaluationRow | Curve]:
    yield from _table(RANKING, dataset, detector, wrong, score, units)
    yield curve(dataset, detector, wrong, score)
    within = metrics.auroc_within(wrong, score, units.tolist())
    if np.isfinite(within):  # undefined where each question is a unit of its own
        yield EvaluationRow(
            dataset=dataset,
            detector=detector,
            metric="auroc_within_units",
            value=within,
            n=len(wrong),
        )


def _flagged(
    dataset: str,
    points: tuple[OperatingPoint, ...],
    risk: Floats,
    units: NDArray[np.str_],
) -> Iterator[EvaluationRow]:
    """Share of the items that each operating point flags."""
    every = np.ones(len(risk), dtype=np.bool_)
    for point in points if len(risk) else ():
        flagged = (risk >= point.threshold).astype(np.float64)
        share: dict[str, Metric] = {f"flagged_at_{point.name}": metrics.mean_of_positives}
        yield from _table(share, dataset, "probe", every, flagged, units)


def _table(
    wanted: Mapping[str, Metric],
    dataset: str,
    detector: str,
    positive: Bools,
    score: Floats,
    units: NDArray[np.str_],
) -> Iterator[EvaluationRow]:
    """One row per metric, each with its interval."""
    for name, metric in wanted.items():
        figure = metrics.with_interval(metric, positive, score, units.tolist())
        yield EvaluationRow(
            dataset=dataset,
            detector=detector,
            metric=name,
            value=figure.value,
            low=figure.low,
            high=figure.high,
            n=figure.n,
        )


def _spread(values: Floats, rows: IntArray, size: int) -> Floats:
    """`values` at `rows`, nan elsewhere: a row that was not read cannot pass for a low score."""
    spread = np.full(size, np.nan)
    spread[rows] = values
    return spread
