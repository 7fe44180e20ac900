"""Runs of flagged tokens, as the server shows them: how often one holds a wrong claim.

A token's risk says it for the token. A run is another unit: a wrong claim is several tokens and
one run, a false alarm mostly one token, so that the share of runs that hold one is smaller than
that of tokens.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from offline import metrics
from offline.calibrate import choose_calibration
from offline.dataset import Dataset, Names
from offline.features import IntArray
from offline.metrics import Bools, Floats
from offline.mixtures import JUDGED
from offline.records import RecordError
from offline.shards import Kind
from offline.splits import Part
from offline.tables import CALIBRATION, table
from probes.calibration import Calibration, OperatingPoint, calibrate
from probes.card import EvaluationRow, SpanRule
from probes.spans import Pooling, flagged_runs

log = logging.getLogger(__name__)

# The mean of a run falls with the threshold that delimits it, its largest logit hardly does.
SPAN_POOLINGS = (Pooling("mean"), Pooling("max"))


class Runs(NamedTuple):
    """Runs of flagged tokens; all arrays `[runs]`."""

    logit: Floats  # pooled over the run
    wrong: Bools  # it touches a wrong claim
    unit: Names


def span_mixture(data: Dataset, part: Part) -> IntArray:
    """Answers of a part on which risks of spans are calibrated and judged, whole: short ones of
    which something is judged, at most three wrong to two right, and ordinary long ones with as many
    tokens as are judged of the short ones.

    Of every kind of prose one answer in turn: false alarms gather in a few kinds (other languages),
    and a draw that misses these flatters.
    """
    judged = np.isin(data.features.kind, JUDGED)
    count = np.add.reduceat(judged.astype(np.int64), data.first[:-1])
    short = data.even(data.answered(part))
    short = short[count[short] > 0]  # of a wrong answer whose claim was not found, nothing is
    turn: Counter[str] = Counter()
    order = []
    for i in data.ordinary(part).tolist():
        group = data.answers[i].group
        order.append((turn[group], group, i))
        turn[group] += 1
    long = np.array([i for _, _, i in sorted(order)], dtype=np.int64)
    taken = int(np.searchsorted(np.cumsum(count[long]), count[short].sum())) + 1
    return np.concatenate([short, long[:taken]])


def runs(
    data: Dataset,
    logits: Floats,
    answers: Iterable[int],
    rule: Calibration,
    points: Sequence[OperatingPoint],
    pooling: Pooling,
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
                    logit = pooling.pool(logits[rows[start:stop]].tolist())
                    wrong = bool((of_run == Kind.WRONG).any())
                    found.append((logit, wrong, str(data.unit[rows[0]])))
    pooled, hits, unit = zip(*found, strict=True) if found else ((), (), ())
    return Runs(np.array(pooled, np.float64), np.array(hits, np.bool_), np.array(unit, np.str_))


def span_rule(
    data: Dataset,
    logits: Floats,
    token: Calibration,
    points: Sequence[OperatingPoint],
    *,
    seed: int,
) -> tuple[SpanRule, dict[str, dict[str, float]]]:
    """Of runs of the part `fit` at every operating point, since a client may set another threshold
    than the default; with the Brier scores of each pooling, of which the best one's is taken.

    Where runs cannot tell, having no false alarms among them say, the tokens' calibration stands.
    """
    answers = span_mixture(data, "fit")
    best: tuple[float, SpanRule] | None = None
    scores: dict[str, dict[str, float]] = {}
    reason = "no run is wrong, or all are"
    for pooling in SPAN_POOLINGS:
        found = runs(data, logits, answers, token, points, pooling)
        if not metrics.has_both(found.wrong):
            continue
        try:
            chosen = choose_calibration(found.logit, found.wrong, found.unit.tolist(), seed=seed)
        except RecordError as error:  # too few, in too few units
            reason = str(error)
            continue
        scores[f"span, {pooling.kind}"] = chosen.scores
        if best is None or chosen.score < best[0]:
            rule = SpanRule(pooling=pooling, calibration=chosen.calibration)
            best = chosen.score, rule
    if best is None:
        log.warning("spans keep the calibration of tokens: %s", reason)
        return SpanRule(pooling=SPAN_POOLINGS[0], calibration=token), {}
    return best[1], scores


def span_rows(
    data: Dataset,
    logits: Floats,
    rule: Calibration,
    span_rule: SpanRule,
    points: Sequence[OperatingPoint],
) -> Iterator[EvaluationRow]:
    """At each operating point: what share of the runs hold a wrong claim, and whether their risks
    say so."""
    answers = span_mixture(data, "test")
    for point in points:
        found = runs(data, logits, answers, rule, (point,), span_rule.pooling)
        dataset = f"flagged spans, {point.name}"
        every = np.ones(len(found.wrong), dtype=np.bool_)
        share = {"hold_a_wrong_claim": metrics.mean_of_positives}
        yield from table(share, dataset, "probe", every, found.wrong.astype(float), found.unit)
        risk = calibrate(span_rule.calibration, found.logit)
        yield from table(CALIBRATION, dataset, "probe", found.wrong, risk, found.unit)
