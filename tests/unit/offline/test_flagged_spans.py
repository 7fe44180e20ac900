"""Runs of flagged tokens: what the server underlines, judged as a whole."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from offline.dataset import Dataset
from offline.flagged_spans import runs, span_mixture, span_rows, span_rule
from offline.metrics import Floats
from offline.shards import Kind
from probes.calibration import OperatingPoint, Platt, calibrate
from probes.card import SpanRule
from probes.spans import Pooling
from tests.unit.offline.conftest import MakeAnswer
from tests.unit.offline.test_fit import _dataset

MEAN = Pooling("mean")
RULE = Platt(slope=1.0, intercept=0.0)
POINT = OperatingPoint(name="fpr_1", threshold=0.5, false_positive_rate=0.01, recall=0.5)
LOW, HIGH = -2.0, 2.0


@pytest.fixture
def data(tmp_path: Path, make_answer: MakeAnswer) -> Dataset:
    return _dataset(tmp_path / "features", make_answer, ordinary=60)


def low(data: Dataset) -> Floats:
    return np.full(len(data.part), LOW)


def test_a_run_is_wrong_when_it_touches_a_wrong_claim(data: Dataset) -> None:
    """Five tokens, the last of them the claim: two runs, of which one ends in it."""
    wrong = next(i for i in range(len(data.answers)) if data.labels[i].verdict == "wrong")
    logits = low(data)
    first = data.first[wrong]
    logits[[first, first + 3, first + 4]] = [HIGH, HIGH, HIGH + 1]
    found = runs(data, logits, [wrong], RULE, [POINT], MEAN)
    assert found.logit.tolist() == [HIGH, HIGH + 0.5]
    highest = runs(data, logits, [wrong], RULE, [POINT], Pooling("max"))
    assert highest.logit.tolist() == [HIGH, HIGH + 1]
    assert found.wrong.tolist() == [False, True]
    assert set(found.unit) == {data.unit[first]}
    twice = runs(data, logits, [wrong], RULE, [POINT, POINT], MEAN)
    assert len(twice.wrong) == 4


def test_what_nobody_has_judged_is_no_false_alarm(data: Dataset) -> None:
    """What an answer adds after its claim may be as wrong as the claim."""
    wrong = next(i for i in range(len(data.answers)) if data.labels[i].verdict == "wrong")
    logits, first = low(data), data.first[wrong]
    logits[first] = HIGH
    data.features.kind[first] = Kind.UNJUDGED
    assert len(runs(data, logits, [wrong], RULE, [POINT], MEAN).wrong) == 0
    logits[first + 1] = HIGH  # a run that begins there and goes on into what was judged
    assert runs(data, logits, [wrong], RULE, [POINT], MEAN).wrong.tolist() == [False]


def test_the_mixture_has_as_many_tokens_of_prose_as_of_short_answers(data: Dataset) -> None:
    """Whole answers: of single tokens of prose there are no runs."""
    answers = span_mixture(data, "fit")
    rows = np.concatenate([data.rows_of(i) for i in answers])
    prose = (data.features.kind[rows] == Kind.PROSE).sum()
    assert 0 <= prose - (len(rows) - prose) <= 40  # one answer more at most
    assert len(set(answers.tolist())) == len(answers)
    assert span_mixture(data, "fit").tolist() == answers.tolist()


def test_every_kind_of_prose_has_its_turn_and_what_is_unjudged_none(data: Dataset) -> None:
    """A draw once missed all of two languages, in which most false alarms lie."""
    ordinary = data.ordinary("fit")
    rare = set(ordinary[-3:].tolist())
    named = tuple(
        msgspec.structs.replace(answer, group="rare" if i in rare else "common")
        if i in ordinary
        else answer
        for i, answer in enumerate(data.answers)
    )
    object.__setattr__(data, "answers", named)
    short = data.answered("fit")
    data.features.kind[data.rows_of(short[0])] = Kind.UNJUDGED
    taken = set(span_mixture(data, "fit").tolist())
    assert rare <= taken
    assert not set(ordinary.tolist()) <= taken, "all were taken: nothing was shown"
    assert short[0] not in taken


def test_runs_get_the_risk_that_they_have_and_not_that_of_their_tokens(data: Dataset) -> None:
    """Every wrong claim is flagged, and as many single tokens of prose with the same logit: of the
    runs one half is right, whatever the tokens' curve says of the logit."""
    logits, random = low(data), np.random.default_rng(0)
    claims = np.flatnonzero(data.features.kind == Kind.WRONG)
    prose = np.flatnonzero(data.features.kind == Kind.PROSE)[::10]
    for rows in (claims, prose):
        logits[rows] = random.normal(2.0, 0.3, len(rows)).clip(0.5)
    span, scores = span_rule(data, logits, RULE, [POINT], seed=0)
    found = runs(data, logits, span_mixture(data, "fit"), RULE, [POINT], span.pooling)
    risk = calibrate(span.calibration, found.logit)
    assert set(scores) == {"span, mean", "span, max"}
    assert risk.mean() == pytest.approx(found.wrong.mean(), abs=0.02)
    assert calibrate(RULE, found.logit).mean() > found.wrong.mean() + 0.2
    rows = {row.metric: row for row in span_rows(data, logits, RULE, span, [POINT])}
    assert rows["hold_a_wrong_claim"].dataset == "flagged spans, fpr_1"
    assert 0.2 < rows["hold_a_wrong_claim"].value < 0.8
    as_tokens = SpanRule(pooling=span.pooling, calibration=RULE)
    of_tokens = {row.metric: row for row in span_rows(data, logits, RULE, as_tokens, [POINT])}
    assert rows["ece"].value < of_tokens["ece"].value


def test_runs_without_a_false_alarm_keep_the_calibration_of_tokens(
    data: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    """A perfect detector is no reason to end the fit."""
    logits = low(data)
    logits[data.features.kind == Kind.WRONG] = HIGH
    kept = SpanRule(pooling=MEAN, calibration=RULE)
    assert span_rule(data, logits, RULE, [POINT], seed=0) == (kept, {})
    assert "spans keep the calibration of tokens" in caplog.text
    assert span_rule(data, low(data), RULE, [POINT], seed=0) == (kept, {})


def test_the_pooling_is_the_one_that_tells_runs_apart(data: Dataset) -> None:
    """One high token makes a wrong claim, four middling ones a false alarm of a higher mean."""
    logits = low(data)
    for answer in range(len(data.answers)):
        rows = data.rows_of(answer)
        claim = rows[data.features.kind[rows] == Kind.WRONG]
        if len(claim):
            logits[rows[-2:]] = [0.1, 4.0 + 0.01 * (answer % 7)]
        elif data.labels[answer].verdict == "ordinary":
            logits[rows[:4]] = 2.5 + 0.01 * (answer % 7)
    span, scores = span_rule(data, logits, RULE, [POINT], seed=0)
    assert span.pooling == Pooling("max")
    assert min(scores["span, max"].values()) < 0.1
