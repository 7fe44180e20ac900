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
from offline.dataset import Dataset
from offline.evaluate import Evaluation, evaluate
from offline.fit import fit
from offline.fit_result import FitResult, FitSettings
from offline.records import Record, read_record, write_atomic
from offline.shards import FeaturesHeader
from offline.splits import folds, plain
from probes.card import EvaluationRow

log = logging.getLogger(__name__)

FOLDER = "crossvalidation"  # of a run: what each split has found
FILE = "crossvalidation.json"
CONFIDENCE = 0.95
SHOWN = ("probe", "-logprob_sum", "-logprob")


class CrossValidation(Record, frozen=True, kw_only=True):
    """Figures of the method. In `rows` a value is the mean over the splits, its interval Student's
    of that mean; `n` counts the items of all splits. The splits share most of what they are fitted
    on, so that the interval is somewhat too narrow (Bengio and Grandvalet 2004)."""

    settings: FitSettings
    features: FeaturesHeader
    splits: int
    neurons: tuple[int, ...]  # of each split's probe
    rows: tuple[EvaluationRow, ...]

    @classmethod
    def load(cls, path: Path) -> CrossValidation:
        return read_record(path, cls)

    def save(self, path: Path) -> None:
        write_atomic(path, msgspec.json.encode(self))


def crossvalidate(
    data: Dataset, settings: FitSettings, folder: Path, *, splits: int
) -> CrossValidation:
    """Fit and evaluate on each of `splits` splits; what `folder` holds of these already is kept."""
    results, evaluations = [], []
    start = time.monotonic()
    for number, outer in enumerate(outer_splits(data, splits, seed=settings.seed)):
        done = _done(folder, number, splits, data, settings)
        if done is None:
            result = fit(outer, settings)
            evaluation = evaluate(outer, result)
            result.save(_path(folder, "fit", number, splits))
            evaluation.save(_path(folder, "evaluation", number, splits))
            done = result, evaluation
        results.append(done[0])
        evaluations.append(done[1])
        left = (time.monotonic() - start) / (number + 1) * (splits - number - 1)
        log.info("split %d of %d is done, %.0f min left", number + 1, splits, left / 60)
    return CrossValidation(
        settings=settings,
        features=data.features.header,
        splits=splits,
        neurons=tuple(len(result.chosen.columns) for result in results),
        rows=tuple(mean_rows([evaluation.rows for evaluation in evaluations])),
    )


def outer_splits(data: Dataset, count: int, *, seed: int) -> Iterator[Dataset]:
    """The data `count` times, each time with another share of its units as the part `test`.

    Long ordinary answers and sources of the part `transfer` stay where they are. A question that
    the test asks in another unit is excluded from the fit.
    """
    home = data.part[data.first[:-1]].astype("U8")  # as wide as "excluded"
    judged = [
        i for i, answer in enumerate(data.answers) if answer.gold and home[i] in ("fit", "test")
    ]
    fold = np.array(folds([str(data.unit[data.first[i]]) for i in judged], count, seed=seed))
    text = np.array([plain(data.answers[i]) for i in judged])
    for number in range(count):
        held = fold == number
        part = np.where(held, "test", np.where(np.isin(text, text[held]), "excluded", "fit"))
        parts = home.copy()
        parts[judged] = part
        yield replace(data, part=parts[data.features.answer])


def mean_rows(splits: Sequence[Sequence[EvaluationRow]]) -> Iterator[EvaluationRow]:
    """Rows that every split has, in the order of the first."""
    found: dict[tuple[str, str, str], list[EvaluationRow]] = defaultdict(list)
    for rows in splits:
        for row in rows:
            found[row.dataset, row.detector, row.metric].append(row)
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(splits) - 1))
    for (dataset, detector, metric), rows in found.items():
        if len(rows) < len(splits):
            continue
        values = np.array([row.value for row in rows])
        mean, error = float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(rows)))
        yield EvaluationRow(
            dataset=dataset,
            detector=detector,
            metric=metric,
            value=mean,
            low=mean - quantile * error,
            high=mean + quantile * error,
            n=sum(row.n for row in rows),
        )


def table(found: CrossValidation) -> str:
    """What the command line prints: ranking, of the probe and of what costs nothing."""
    lines = [f"mean of {found.splits} splits [95 %], {_counts(found.neurons)} neurons"]
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


def _counts(neurons: Sequence[int]) -> str:
    return f"{min(neurons)} to {max(neurons)}"


def _path(folder: Path, what: str, number: int, splits: int) -> Path:
    return folder / f"{what}-{number + 1}-of-{splits}.json"


def _done(
    folder: Path, number: int, splits: int, data: Dataset, settings: FitSettings
) -> tuple[FitResult, Evaluation] | None:
    """What an earlier run has saved of a split, if it is of these features and settings."""
    judged = _path(folder, "evaluation", number, splits)
    if not judged.exists():
        return None
    result = FitResult.load(_path(folder, "fit", number, splits))
    if result.features != data.features.header or result.settings != settings:
        return None
    evaluation = Evaluation.load(judged)
    evaluation.check(result)
    return result, evaluation
