"""Runs of flagged tokens, as the server shows them: how often one holds a wrong claim.

A token's risk says it for the token. A run is another unit: a wrong claim is several tokens and
one run, a false alarm mostly one token, so that of the runs fewer are right than of their tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from offline import metrics
from offline.dataset import Dataset, Names
from offline.examples import sample
from offline.features import IntArray
from offline.metrics import Bools, Floats
from offline.shards import Kind
from offline.splits import Part
from offline.tables import CALIBRATION, table
from probes.calibration import Calibration, OperatingPoint, calibrate
from probes.card import EvaluationRow
from probes.spans import flagged_runs


class Runs(NamedTuple):
    """Runs of flagged tokens; all arrays `[runs]`."""

    logit: Floats  # mean over the run
    wrong: Bools  # it touches a wrong claim
    unit: Names


def span_mixture(data: Dataset, part: Part, *, seed: int = 0) -> IntArray:
    """Answers of a part on which risks of spans are calibrated and judged, whole: short ones, right
    and wrong alike many, and ordinary long ones until they have as many tokens."""
    short = data.even(data.answered(part))
    long = data.ordinary(part)
    long = sample(long, len(long), seed=seed)
    length = np.diff(data.first)
    taken = np.searchsorted(np.cumsum(length[long]), length[short].sum()) + 1
    return np.concatenate([short, long[:taken]])


def runs(
    data: Dataset,
    logits: Floats,
    answers: Iterable[int],
    rule: Calibration,
    points: Sequence[OperatingPoint],
) -> Runs:
    """Of `answers`, by the token head's `logits` `[rows]`, at each of `points`. A run in what a
    short answer adds after its claim is left out: nobody has judged it."""
    found: list[tuple[float, bool, str]] = []
    for answer in answers:
        rows = data.rows_of(answer)
        kind, risk = data.features.kind[rows], calibrate(rule, logits[rows])
        for point in points:
            for start, stop in flagged_runs((risk >= point.threshold).tolist()):
                of_run = kind[start:stop]
                if (of_run != Kind.UNJUDGED).any():
                    mean = float(logits[rows[start:stop]].mean())
                    wrong = bool((of_run == Kind.WRONG).any())
                    found.append((mean, wrong, str(data.unit[rows[0]])))
    logit, hits, unit = zip(*found, strict=True) if found else ((), (), ())
    return Runs(np.array(logit, np.float64), np.array(hits, np.bool_), np.array(unit, np.str_))


def span_rows(
    data: Dataset,
    logits: Floats,
    rule: Calibration,
    span_rule: Calibration,
    points: Sequence[OperatingPoint],
) -> Iterator[EvaluationRow]:
    """At each operating point: what share of the runs hold a wrong claim, and whether their risks
    say so."""
    answers = span_mixture(data, "test")
    for point in points:
        found = runs(data, logits, answers, rule, (point,))
        dataset = f"flagged spans, {point.name}"
        every = np.ones(len(found.wrong), dtype=np.bool_)
        share = {"hold_a_wrong_claim": metrics.mean_of_positives}
        yield from table(share, dataset, "probe", every, found.wrong.astype(float), found.unit)
        risk = calibrate(span_rule, found.logit)
        yield from table(CALIBRATION, dataset, "probe", found.wrong, risk, found.unit)
