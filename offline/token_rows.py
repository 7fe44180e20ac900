"""Rows of the card about single tokens: how they are ranked, and what thresholds flag."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from offline.baselines import RANDOM, TokenDetector, random_neurons
from offline.curves import Curve
from offline.dataset import Dataset
from offline.domains import NEVER_TRAINED_ON, ORDINARY_TOKENS
from offline.features import IntArray
from offline.fit_result import FitResult
from offline.metrics import Floats
from offline.mixtures import JUDGED, mixture
from offline.shards import Kind
from offline.tables import CALIBRATION, drawn, flagged, gained, has_both, ranked, table
from probes.calibration import calibrate
from probes.card import EvaluationRow

SMOOTHED = 3  # neighbouring tokens
AGAINST_PROSE = (Kind.WRONG, Kind.PROSE)
OTHERS = {
    "tokens, wrong claims against all others": JUDGED,
    "tokens, wrong against right claims": (Kind.WRONG, Kind.RIGHT),
    "tokens, wrong claims against ordinary long answers": AGAINST_PROSE,
}
FLAGGED_KINDS = {
    Kind.PROSE: ORDINARY_TOKENS,
    Kind.WRONG: "tokens of wrong claims",
    Kind.RIGHT: "tokens of right claims",
    Kind.SCAFFOLD: "scaffold tokens of short answers",
}

Found = EvaluationRow | Curve


def token_tables(
    data: Dataset, result: FitResult, detectors: Mapping[str, TokenDetector], logits: Floats
) -> Iterator[Found]:
    """Wrong claims against every other judged token, against right claims and against prose; the
    risks of tokens; and what each operating point flags."""
    yield from _ranked(data, result, detectors, logits)
    for kind, dataset in FLAGGED_KINDS.items():
        yield from _flagged(data, result, logits, dataset, data.rows("test", kind))
    long = data.ordinary("test")
    group = np.array([data.answers[i].group for i in long])
    for name in sorted(set(group.tolist())):
        chosen = np.concatenate([data.rows_of(i) for i in long[group == name]])
        yield from _flagged(
            data, result, logits, f"{ORDINARY_TOKENS}: {name}", chosen, default_only=True
        )
    yield from _elsewhere(data, result, detectors, logits)


def _ranked(
    data: Dataset, result: FitResult, detectors: Mapping[str, TokenDetector], logits: Floats
) -> Iterator[Found]:
    kind = data.features.kind
    rows = mixture(data, "test")
    if not has_both("tokens", kind[rows] == Kind.WRONG):
        return
    scores = {name: read(data.features, rows) for name, read in detectors.items()}
    draws = random_neurons(data, result, rows)
    smooth = _smoothed(data, logits, rows)
    for dataset, kinds in OTHERS.items():
        chosen = np.isin(kind[rows], kinds)
        wrong, units = kind[rows[chosen]] == Kind.WRONG, data.unit[rows[chosen]]
        if not has_both(dataset, wrong):
            continue
        for name, score in {**scores, f"probe, mean of {SMOOTHED} neighbours": smooth}.items():
            yield from ranked(dataset, name, wrong, score[chosen], units)
        yield from drawn(dataset, RANDOM, wrong, [draw[chosen] for draw in draws])
        of_these = {name: score[chosen] for name, score in scores.items()}
        yield from gained(dataset, of_these, wrong, units)
    yield from _risks(data, result, scores["probe"], rows, "token risk")
    others = rows[kind[rows] != Kind.WRONG]
    yield from _flagged(data, result, logits, "tokens that make no wrong claim", others)


def _elsewhere(
    data: Dataset, result: FitResult, detectors: Mapping[str, TokenDetector], logits: Floats
) -> Iterator[Found]:
    """Tokens of short answers in domains that nothing was fitted on, thresholds unchanged."""
    kind = data.features.kind
    rows = data.even_rows("transfer", Kind.WRONG, Kind.RIGHT, Kind.SCAFFOLD)
    if not len(rows):
        return
    scores = {name: read(data.features, rows) for name, read in detectors.items()}
    for dataset, kinds in OTHERS.items():
        if kinds == AGAINST_PROSE:  # there is none
            continue
        name = f"{dataset}, {NEVER_TRAINED_ON}"
        chosen = np.isin(kind[rows], kinds)
        wrong, units = kind[rows[chosen]] == Kind.WRONG, data.unit[rows[chosen]]
        if has_both(name, wrong):
            for detector, score in scores.items():
                yield from ranked(name, detector, wrong, score[chosen], units)
            of_these = {detector: score[chosen] for detector, score in scores.items()}
            yield from gained(name, of_these, wrong, units)
    yield from _risks(data, result, scores["probe"], rows, f"token risk, {NEVER_TRAINED_ON}")
    for of, dataset in FLAGGED_KINDS.items():
        name = f"{dataset}, {NEVER_TRAINED_ON}"
        yield from _flagged(data, result, logits, name, rows[kind[rows] == of])


def _risks(
    data: Dataset, result: FitResult, scores: Floats, rows: IntArray, dataset: str
) -> Iterator[EvaluationRow]:
    wrong, units = data.features.kind[rows] == Kind.WRONG, data.unit[rows]
    risk = calibrate(result.token, scores)
    yield from table(CALIBRATION, dataset, "probe", wrong, risk, units)


def _flagged(
    data: Dataset,
    result: FitResult,
    logits: Floats,
    dataset: str,
    rows: IntArray,
    *,
    default_only: bool = False,
) -> Iterator[EvaluationRow]:
    points = [
        point
        for point in result.token_points
        if not default_only or point.name == result.settings.token_default
    ]
    yield from flagged(dataset, points, calibrate(result.token, logits[rows]), data.unit[rows])


def _smoothed(data: Dataset, logits: Floats, rows: IntArray) -> Floats:
    """Mean token logit over a small window inside the answer."""
    means = np.full(len(data.part), np.nan)
    kernel = np.ones(SMOOTHED)
    for i in np.unique(data.features.answer[rows]):
        here = data.rows_of(i)
        sizes = np.convolve(np.ones(len(here)), kernel, "same")
        means[here] = np.convolve(logits[here], kernel, "same") / sizes
    return means[rows]
