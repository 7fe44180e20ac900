"""Verb `crossvalidate`: nested cross-validation; every relation and question is unseen once.

`evaluate` judges the probe that is served, on one draw of relations. With twenty of them the draw
decides more than the method does. Here the whole fit (neurons, budget, penalties, pooling and
calibration, by its own folds) runs again without each part of the units in turn and is evaluated
on that part: how good probes are that are made like this one. Every figure of the card is averaged
over the splits.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
from scipy import stats

from offline.card import evaluation_tables
from offline.dataset import FITTED, Dataset
from offline.domains import NEVER_TRAINED_ON, ORDINARY_RESPONSES, ORDINARY_TOKENS
from offline.evaluate import Evaluation, evaluate
from offline.fit import fit
from offline.fit_result import FitResult, FitSettings
from offline.records import Record, read_record, write_atomic
from offline.splits import folds, plain
from probes.card import EvaluationRow

log = logging.getLogger(__name__)

FOLDER = "crossvalidation"  # of a run: what each split has found
FILE = "crossvalidation.json"
CONFIDENCE = 0.95
SIGNED = ("rank_correlation_with_length", "auroc_gained")  # all others lie in [0, 1]
SHOWN = ("probe", "-logprob_sum", "-logprob")


class CrossValidation(Record, frozen=True, kw_only=True):
    """Figures of the method. In `rows` a value is the mean over the splits, its interval Student's
    of that mean; `n` counts the items of all splits.

    The splits share most of what they are fitted on, and all of their ordinary long answers, so
    that the intervals are somewhat too narrow (Bengio and Grandvalet 2004). What people have
    decided after they had seen such figures is not held out either. "As asked" is so of the run's
    test part alone: of what was to be fitted on, `label` has kept some wrong answers per right one.
    """

    fit_sha256: str  # of the run's fit, whose method this is
    splits: int
    neurons: tuple[int, ...]  # of each split's probe
    rows: tuple[EvaluationRow, ...]

    @classmethod
    def load(cls, path: Path) -> CrossValidation:
        return read_record(path, cls)

    def save(self, path: Path) -> None:
        write_atomic(path, msgspec.json.encode(self))


def crossvalidate(data: Dataset, like: FitResult, run: Path, *, splits: int) -> CrossValidation:
    """Fit as `like` was, and evaluate, on each of `splits` splits; of these, what `run` holds
    already is kept."""
    like.check(data)
    folder = run / FOLDER / like.sha256[:12]  # another fit: anew
    results, evaluations = [], []
    start = time.monotonic()
    for number, outer in enumerate(outer_splits(data, like.settings, splits)):
        fitted, judged = (
            folder / f"{what}-{number + 1}-of-{splits}.json" for what in ("fit", "evaluation")
        )
        done = _done(fitted, judged)
        if done is None:
            # How stable its neurons are is nobody's question here.
            result = fit(outer, msgspec.structs.replace(like.settings, resamples=0))
            evaluation = evaluate(outer, result)
            result.save(fitted)
            evaluation.save(judged)
            done = result, evaluation
        results.append(done[0])
        evaluations.append(done[1])
        left = (time.monotonic() - start) / (number + 1) * (splits - number - 1)
        log.info("split %d of %d is done, %.0f min left", number + 1, splits, left / 60)
    return CrossValidation(
        fit_sha256=like.sha256,
        splits=splits,
        neurons=tuple(len(result.chosen.columns) for result in results),
        rows=tuple(mean_rows([evaluation.rows for evaluation in evaluations])),
    )


def outer_splits(data: Dataset, settings: FitSettings, count: int) -> Iterator[Dataset]:
    """The data `count` times, each time with another share of its units as the part `test`.

    Long ordinary answers and sources of the part `transfer` stay where they are. What the test asks
    in another unit, or as ordinary prose, is excluded from the fit; so are augmented answers of its
    units. Nothing augments the units of the run's own test where they are fitted on.
    """
    home = data.part[data.first[:-1]].astype("U9")  # as wide as "augmented"
    unit = data.unit[data.first[:-1]]
    judged = [
        i
        for i, answer in enumerate(data.answers[: data.own])
        if answer.gold and answer.source not in data.split.transfer
    ]
    units = unit[judged].tolist()
    fold = np.array(folds(units, count, seed=settings.seed))
    text = np.array([plain(answer) for answer in data.answers])
    for number in range(count):
        parts = home.copy()
        parts[judged] = np.where(fold == number, "test", "fit")
        tested = np.isin(text, text[parts == "test"])
        parts[tested & np.isin(parts, FITTED)] = "excluded"
        fitted = np.isin(unit, unit[parts == "fit"])
        parts[(parts == "augmented") & ~fitted] = "excluded"
        yield replace(data, part=parts[data.features.answer])


def mean_rows(splits: Sequence[Sequence[EvaluationRow]]) -> Iterator[EvaluationRow]:
    """Rows of data sets that differ from split to split, in the order of the first. One split may
    lack a row: a source with few right answers has none where they are fewer than it takes."""
    found: dict[tuple[str, str, str], dict[int, EvaluationRow]] = defaultdict(dict)
    for number, rows in enumerate(splits):
        for row in rows:
            if not _is_the_same_everywhere(row.dataset):
                found[row.dataset, row.detector, row.metric][number] = row
    for (dataset, detector, metric), of_split in found.items():
        count = len(of_split)
        if count < max(2, len(splits) - 1):
            continue
        values = np.array([row.value for row in of_split.values()])
        quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1))
        mean, error = float(values.mean()), quantile * float(values.std(ddof=1) / np.sqrt(count))
        least = -1.0 if metric in SIGNED else 0.0
        yield EvaluationRow(
            dataset=dataset,
            detector=detector,
            metric=metric,
            value=mean,
            low=max(mean - error, least),
            high=min(mean + error, 1.0),
            n=sum(row.n for row in of_split.values()),
        )


def _is_the_same_everywhere(dataset: str) -> bool:
    """Of what no split holds out, the spread is that of the fit alone, which is no interval."""
    return NEVER_TRAINED_ON in dataset or dataset.startswith((ORDINARY_TOKENS, ORDINARY_RESPONSES))


def table(found: CrossValidation) -> str:
    """What the command line prints: ranking, of the probe and of what costs nothing."""
    neurons = f"{min(found.neurons)} to {max(found.neurons)} neurons"
    lines = [f"mean of {found.splits} splits [95 %], {neurons}"]
    for dataset in evaluation_tables(found.rows):
        if dataset.metrics[0] != "auroc":
            continue
        for detector in SHOWN:
            if (figures := dataset.figures.get(detector)) and (row := figures[0]):
                lines.append(
                    f"{dataset.dataset:<70} {detector:<14} {row.value:.3f} "
                    f"[{row.low:.3f}, {row.high:.3f}]"
                )
    return "\n".join(lines)


def _done(fitted: Path, judged: Path) -> tuple[FitResult, Evaluation] | None:
    """What an earlier run has saved of a split."""
    if not judged.exists():
        return None
    result, evaluation = FitResult.load(fitted), Evaluation.load(judged)
    evaluation.check(result)
    return result, evaluation
