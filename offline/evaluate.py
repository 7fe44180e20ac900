"""Verb `evaluate`: how well the probe tells, on relations and questions it never saw, beside what
costs nothing.

Levels. Tokens: those of wrong claims against all others. Claims: mean token logit over the
known claim, wrong against right. Answers: whole short answers, pooled over all their tokens as the
server does. Baselines stand in the same tables on the same items. Intervals are resampled by unit
(relation, question).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import msgspec
import numpy as np
from tqdm import tqdm

from offline import metrics
from offline.baselines import (
    RANDOM,
    answer_detectors,
    random_answer_neurons,
    token_detectors,
)
from offline.best_of import best_of_rows
from offline.curves import Curve
from offline.dataset import FITTED, Dataset
from offline.domains import MIN_CLASS, Place, alone, places
from offline.examples import answer_examples, answer_means
from offline.features import IntArray
from offline.fit_result import FitResult
from offline.flagged_spans import runs, span_mixture, span_rows
from offline.given_rows import Given, given_rows
from offline.metrics import Floats
from offline.mixtures import JUDGED, claim_means, mixture, pooled, response_mixture
from offline.records import Record, RecordError, read_record, write_atomic
from offline.response_rows import pooling_rows, response_rows, risk_rows
from offline.shards import Kind
from offline.tables import drawn, figure, gained, has_both, ranked, table
from offline.token_rows import token_tables
from probes.calibration import calibrate
from probes.card import EvaluationRow, ReliabilityBin

log = logging.getLogger(__name__)

STRATA = 3  # of answer length
COVERAGES = (0.25, 0.5, 0.75)
COMBINED = "probe and log-probability, standardised sum"

Found = EvaluationRow | Curve


class Evaluation(Record, frozen=True, kw_only=True):
    """The tables of the card."""

    fit_sha256: str  # of the fit that was judged
    rows: tuple[EvaluationRow, ...]
    reliability: tuple[ReliabilityBin, ...]
    curves: tuple[Curve, ...]  # for the report; the card has the figures

    def check(self, result: FitResult) -> None:
        """RecordError unless these are the figures of `result`."""
        if self.fit_sha256 != result.sha256:
            raise RecordError("evaluation.json judges another fit than fit.json; `evaluate` again")

    @classmethod
    def load(cls, path: Path) -> Evaluation:
        return read_record(path, cls)

    def save(self, path: Path) -> None:
        write_atomic(path, msgspec.json.encode(self))


def evaluate(
    data: Dataset,
    result: FitResult,
    given: Given | None = None,
    samples: Dataset | None = None,
) -> Evaluation:
    """Everything on part `test`; every source, those of part `transfer` too, on its own; on texts
    of others; and what choosing among `samples` of a question gains."""
    result.check(data)
    held_out = np.flatnonzero(np.isin(data.part, ("test", "transfer")))
    logits = np.full((len(data.part), len(result.chosen.heads)), np.nan)
    logits[held_out] = result.chosen.logits(data.features, held_out)  # nan: must not be asked for
    stages = _stages(data, result, logits, given, samples)
    found: list[Found] = []
    for stage in tqdm(stages, unit="stage", desc="evaluate", disable=None):
        found += stage()
    rows = tuple(row for row in found if isinstance(row, EvaluationRow))
    for row in rows:
        log.info("%-52s %-32s %-18s %.3f", row.dataset, row.detector, row.metric, row.value)
    return Evaluation(
        fit_sha256=result.sha256,
        rows=rows,
        reliability=_reliability(data, result, logits),
        curves=tuple(row for row in found if isinstance(row, Curve)),
    )


def _stages(
    data: Dataset, result: FitResult, logits: Floats, given: Given | None, samples: Dataset | None
) -> list[Callable[[], Iterable[Found]]]:
    """What is evaluated, in the order of the card; each stage takes some seconds to a minute."""
    tokens = logits[:, 0]
    detectors = functools.cache(lambda: token_detectors(data, result))
    return [
        lambda: _folds(data, result),
        lambda: _everywhere(data, result, logits),
        lambda: token_tables(data, result, detectors(), tokens),
        lambda: span_rows(data, tokens, result.token, result.span, result.token_points),
        lambda: _claims(data, tokens),
        lambda: given_rows(given, detectors()) if given else (),
        lambda: response_rows(data, result, logits[:, result.response_head]),
        lambda: pooling_rows(data, result, logits),
        lambda: best_of_rows(samples, result) if samples else (),
    ]


def _everywhere(data: Dataset, result: FitResult, logits: Floats) -> Iterator[Found]:
    """Whole answers of every place."""
    everywhere = places(data)
    scores = _answer_scores(data, result, logits, [place.answers for place in everywhere])
    for place, score in zip(everywhere, scores, strict=True):
        yield from _answers(data, result, place, score)
        if place.as_asked:
            wrong, units = data.hallucinated(place.answers), data.unit[data.first[place.answers]]
            yield from gained(f"answers, {place.name}", score, wrong, units)
            yield from risk_rows(data, result, place, score["probe"])


def _folds(data: Dataset, result: FitResult) -> Iterator[EvaluationRow]:
    """Cross-validation inside part `fit`, each budget: what the choice was made by."""
    answers = data.answered("fit")
    judged = {
        "tokens": len(data.rows("fit", *JUDGED)),
        "claims": len(data.located(answers)),
        "answers": len(answers),
    }
    for trial in result.trials:
        for name, value in trial.figures.items():
            yield figure(
                f"{name}, folds of the fit part", f"{trial.neurons} neurons", "auroc", value,
                judged[name],
            )  # fmt: skip


def _answer_scores(
    data: Dataset, result: FitResult, logits: Floats, sets: list[IntArray]
) -> list[dict[str, Floats]]:
    """For each set of answers: detector -> `[answers]`. Every rival is fitted once, and what all of
    them read, most of the features, is read once."""
    if not sets:
        log.warning("no figures of whole answers: fewer than %d right or wrong ones", MIN_CLASS)
        return []
    every = np.unique(np.concatenate(sets))
    examples = answer_examples(data, result.settings)
    seen = examples.x[: len(data.answered(*FITTED))]  # the rest are windows of prose
    asked = answer_means(data, every)
    probe = pooled(data, logits[:, result.response_head], every, result.pooling)
    rivals = answer_detectors(data, every, seen=seen, asked=asked)
    surprise = rivals["-logprob_sum"]
    first = np.searchsorted(every, sets[0])  # one scale, whichever sets come after it
    scores = {
        "probe": probe,
        COMBINED: probe / probe[first].std() + surprise / surprise[first].std(),
        **rivals,
        **{
            f"fitted on {name} alone": score for name, score in alone(data, result, examples, asked)
        },
    }
    draws = random_answer_neurons(data, result, seen=seen, asked=asked)
    scores |= {f"{RANDOM} {i}": draw for i, draw in enumerate(draws)}
    at = [np.searchsorted(every, one) for one in sets]
    return [{name: score[where] for name, score in scores.items()} for where in at]


def _answers(
    data: Dataset, result: FitResult, place: Place, scores: Mapping[str, Floats]
) -> Iterator[Found]:
    """Whole answers of one place: ranking, length, and what is gained by staying silent."""
    name, answers = f"answers, {place.name}", place.answers
    wrong, units = data.hallucinated(answers), data.unit[data.first[answers]]
    for detector, score in scores.items():
        if not detector.startswith(RANDOM):
            yield from ranked(name, detector, wrong, score, units)
    draws = [score for detector, score in scores.items() if detector.startswith(RANDOM)]
    yield from drawn(name, RANDOM, wrong, draws)
    risk, length = scores["probe"], scores["length"]
    alike = metrics.auroc_within(wrong, risk, [f"{value:.0f}" for value in length])
    for metric, value in (
        ("rank_correlation_with_length", metrics.rank_correlation(risk, length)),
        ("auroc_at_equal_length", alike),
    ):
        if np.isfinite(value):
            yield figure(name, "probe", metric, value, len(answers))
    for i, stratum in enumerate(np.array_split(np.argsort(length, kind="stable"), STRATA)):
        if 0 < wrong[stratum].sum() < len(stratum):
            yield from table(
                {"auroc": metrics.auroc},
                f"{name}: {length[stratum[0]]:.0f} to {length[stratum[-1]]:.0f} tokens",
                f"probe, length stratum {i + 1}",
                wrong[stratum],
                risk[stratum],
                units[stratum],
            )
    selective = {f"accuracy_at_coverage_{c:g}": metrics.accuracy_at_coverage(c) for c in COVERAGES}
    for detector in ("probe", "-logprob_sum", "-logprob_mean", "entropy_mean"):
        yield from table(selective, name, detector, wrong, scores[detector], units)


def _claims(data: Dataset, logits: Floats) -> Iterator[Found]:
    """Mean token logit over the known claim, wrong against right: how well a span is ranked."""
    dataset = "claims, unseen relations and questions"
    answers = data.located(data.even(data.answered("test")))
    wrong, units = data.hallucinated(answers), data.unit[data.first[answers]]
    if not has_both(dataset, wrong):
        return
    scores = {
        "probe": claim_means(data, logits, answers),
        "-logprob": claim_means(data, -data.features.logprob.astype(np.float64), answers),
        "entropy": claim_means(data, data.features.entropy.astype(np.float64), answers),
    }
    for name, score in scores.items():
        yield from ranked(dataset, name, wrong, score, units)
    yield from gained(dataset, scores, wrong, units)


def _reliability(data: Dataset, result: FitResult, logits: Floats) -> tuple[ReliabilityBin, ...]:
    rows = mixture(data, "test")
    answers, wrong = response_mixture(data, "test")
    score = pooled(data, logits[:, result.response_head], answers, result.pooling)
    token, response = calibrate(result.token, logits[rows, 0]), calibrate(result.response, score)
    default = [p for p in result.token_points if p.name == result.settings.token_default]
    mixed, pooling = span_mixture(data, "test"), result.span.pooling
    spans = runs(data, logits[:, 0], mixed, result.token, default, pooling)
    return (
        *metrics.reliability_bins("token", token, data.features.kind[rows] == Kind.WRONG),
        *metrics.reliability_bins(
            "span", calibrate(result.span.calibration, spans.logit), spans.wrong
        ),
        *metrics.reliability_bins("response", response, wrong),
    )
