"""Verb `fit`: from features to a sparse, calibrated probe.

Two heads over one set of neurons: `token`, fitted on single tokens, tints text; `answer`, fitted on
means over whole short answers, ranks responses. Budget and penalties are chosen by cross-validation
over relations and questions inside the part `fit`; the logits of the held-out folds choose pooling
and calibration and set the thresholds. The part `test` is not looked at here. Why so:
docs/decisions/two-heads.md.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
from tqdm import tqdm

from offline.calibrate import choose_calibration
from offline.dataset import Dataset
from offline.examples import Examples, answer_examples, claim_examples, token_examples
from offline.features import IntArray
from offline.fit_result import ANSWER, TOKEN, FitResult, FitSettings, Trial
from offline.flagged_spans import span_rule
from offline.heads import Weights, join, train, train_as_the_paper
from offline.metrics import Bools, Floats, rank
from offline.mixtures import JUDGED, POOLINGS, claim_means, mixture, pooled, response_mixture
from offline.records import RecordError
from offline.shards import Kind
from offline.splits import folds
from offline.stability import found_again
from probes.calibration import (
    calibrate,
    choose_operating_points,
)
from probes.spans import Pooling

log = logging.getLogger(__name__)


def fit(data: Dataset, settings: FitSettings) -> FitResult:
    """Everything on part `fit`: its folds choose, and their held-out logits calibrate."""
    examples = make_examples(data, settings)
    home = _fold_of_units(data, settings)
    rows = np.flatnonzero(data.part == "fit")
    fold = np.array([home[unit] for unit in data.unit[rows]])
    telling = _telling(data, home, fold)
    budgets = [round(share * settings.max_neurons) for share in settings.budgets]
    drafts: list[list[list[Weights]]] = []  # [folds][budgets][penalties]
    held_out: Floats | None = None  # [rows, budgets, penalties, heads]
    for number in tqdm(range(settings.folds), desc="fit", unit="fold", disable=None):
        kept = {
            head: np.array([home[unit] != number for unit in one.unit])
            for head, one in examples.items()
        }
        drafts.append(train_design(examples, kept, budgets, settings))
        read = _read_all(data, rows[fold == number], drafts[-1])
        if held_out is None:
            held_out = np.empty((len(rows), *read.shape[1:]))
        held_out[fold == number] = read
        log.info("fold %d of %d is fitted", number + 1, settings.folds)
    assert held_out is not None
    trials, logits = _judge(data, settings, tuple(examples), rows, telling, held_out, drafts)
    best = choose(trials)
    every = {head: np.ones(len(one.unit), dtype=np.bool_) for head, one in examples.items()}
    final = train_design(examples, every, budgets[best : best + 1], settings)[0]
    penalties = [settings.heads.penalties.index(p) for p in trials[best].penalty.values()]
    chosen = join([final[p].head(h) for h, p in enumerate(penalties)])
    shares = found_again(examples, chosen.columns, budgets[best], settings)
    held = _spread(logits[best], rows, data)
    return _calibrated(data, settings, chosen, shares, trials[best].penalty, trials, examples, held)


def make_examples(data: Dataset, settings: FitSettings) -> dict[str, Examples]:
    """Head -> what it is fitted on."""
    if settings.design == "tokens":
        return {TOKEN: token_examples(data, settings), ANSWER: answer_examples(data, settings)}
    if data.augmented:
        raise RecordError(
            f"--design {settings.design} is fitted on claims of the model's own answers, and the "
            f"run holds {' and '.join(data.augmented)}; delete these folders in it, or fit with "
            f"--design tokens"
        )
    return {TOKEN: claim_examples(data, around=settings.design == "3-vs-1")}


def train_design(
    examples: dict[str, Examples],
    kept: dict[str, Bools],
    budgets: Sequence[int],
    settings: FitSettings,
) -> list[list[Weights]]:
    """`[budgets][penalties]` of the settings' design; the paper's knows neither."""
    if settings.design == "tokens":
        return train(examples, kept, budgets, settings.heads)
    one = train_as_the_paper(examples[TOKEN], kept[TOKEN], TOKEN, c=settings.c)
    return [[one] * len(settings.heads.penalties)] * len(budgets)


def choose(trials: Sequence[Trial]) -> int:
    """The sparsest that is within one standard error of the best (Breiman et al. 1984).

    The error is that of the difference, fold by fold: some folds are hard for every budget.
    """
    best = max(trials, key=lambda trial: trial.merit)

    def near(trial: Trial) -> bool:
        lost = np.array(best.folds) - np.array(trial.folds)
        return bool(lost.mean() <= lost.std(ddof=1) / np.sqrt(len(lost)))

    return min(
        (i for i, trial in enumerate(trials) if trial is best or near(trial)),
        key=lambda i: trials[i].neurons,
    )


def _fold_of_units(data: Dataset, settings: FitSettings) -> dict[str, int]:
    """Unit -> fold, of the units of part `fit`; alike in answers."""
    first = data.first[:-1]
    units = data.unit[first][data.part[first] == "fit"].tolist()
    return dict(zip(units, folds(units, settings.folds, seed=settings.seed), strict=True))


def _telling(data: Dataset, home: Mapping[str, int], fold: IntArray) -> IntArray:
    """`fold`, but -1 where it has no claims of both right and wrong answers: nothing can be ranked
    there. RecordError when fewer than two are left, since choosing needs their spread."""
    answers = data.located(data.answered("fit"))
    of_answer = np.array([home[unit] for unit in data.unit[data.first[answers]]], np.int64)
    wrong = data.hallucinated(answers)
    both = np.intersect1d(of_answer[wrong], of_answer[~wrong])
    if len(both) < 2:
        raise RecordError(
            f"{len(both)} of the folds of the part `fit` have claims of right and of wrong answers "
            f"({int((~wrong).sum())} and {int(wrong.sum())} in all), two are needed; ask more "
            f"questions, or of more groups"
        )
    return np.where(np.isin(fold, both), fold, -1)


def _read_all(data: Dataset, rows: IntArray, drafts: Sequence[Sequence[Weights]]) -> Floats:
    """`[rows, budgets, penalties, heads]` logits; the features are read once for all of them."""
    columns = np.unique([column for draft in drafts for column in draft[0].columns])
    values = data.features.cett(rows, columns)
    return np.stack(
        [
            np.stack([w.read(values[:, np.searchsorted(columns, w.columns)]) for w in draft], 1)
            for draft in drafts
        ],
        axis=1,
    )


def _judge(
    data: Dataset,
    settings: FitSettings,
    heads: Sequence[str],
    rows: IntArray,
    fold: IntArray,
    held_out: Floats,
    drafts: Sequence[Sequence[Sequence[Weights]]],
) -> tuple[list[Trial], list[Floats]]:
    """Each budget with the best penalty of each head; and its held-out logits `[rows, heads]`."""
    trials: list[Trial] = []
    logits: list[Floats] = []
    for b in range(held_out.shape[1]):
        best: list[int] = []
        figures: dict[str, Floats] = {}
        for h, head in enumerate(heads):
            found = [
                _figures(data, _spread(held_out[:, b, p, h], rows, data), rows, fold, head)
                for p in range(held_out.shape[2])
            ]
            best.append(int(np.argmax([np.mean(list(one.values())) for one in found])))
            figures |= found[best[-1]]
        merit = np.mean(list(figures.values()), axis=0)  # [folds]
        trials.append(
            Trial(
                neurons=max(len(draft[b][0].columns) for draft in drafts),
                penalty={h: settings.heads.penalties[p] for h, p in zip(heads, best, strict=True)},
                figures={name: float(values.mean()) for name, values in figures.items()},
                folds=tuple(merit.tolist()),
            )
        )
        logits.append(np.stack([held_out[:, b, p, h] for h, p in enumerate(best)], axis=1))
        log.info("%s", trials[-1])
    return trials, logits


def _figures(
    data: Dataset, logits: Floats, rows: IntArray, fold: IntArray, head: str
) -> dict[str, Floats]:
    """What a head is judged by, `[folds]` AUROCs each; `fold` is that of `_telling`.

    token   claim tokens of wrong answers against all other judged ones; claims' means, wrong
            against right
    answer  means over whole answers, wrong against right
    """
    home = np.full(len(data.part), -1)
    home[rows] = fold
    found: dict[str, list[float]] = {}
    answered = data.answered("fit")
    judged = data.rows("fit", *JUDGED)
    for number in np.unique(fold[fold >= 0]):
        here = answered[home[data.first[answered]] == number]
        if head == ANSWER:
            mean = pooled(data, logits, here, Pooling("mean"))
            found.setdefault("answers", []).append(rank(data.hallucinated(here), mean))
        else:
            tokens = judged[home[judged] == number]
            wrong = data.features.kind[tokens] == Kind.WRONG
            found.setdefault("tokens", []).append(rank(wrong, logits[tokens]))
            here = data.located(here)
            means = claim_means(data, logits, here)
            found.setdefault("claims", []).append(rank(data.hallucinated(here), means))
    return {name: np.array(values) for name, values in found.items()}


def _calibrated(
    data: Dataset,
    settings: FitSettings,
    chosen: Weights,
    found_in: tuple[float, ...],
    penalty: dict[str, float],
    trials: Sequence[Trial],
    examples: dict[str, Examples],
    logits: Floats,
) -> FitResult:
    """The result, with what the held-out `logits [all rows, heads]` decide."""
    rows = mixture(data, "fit")
    wrong = data.features.kind[rows] == Kind.WRONG
    token, token_scores, _ = choose_calibration(
        logits[rows, 0], wrong, data.unit[rows].tolist(), seed=settings.seed
    )
    risk = calibrate(token, logits[rows, 0])
    token_points = choose_operating_points(risk[~wrong], risk[wrong])
    span, span_scores = span_rule(data, logits[:, 0], token, token_points, seed=settings.seed)
    answers, wrong = response_mixture(data, "fit")
    scores = {p: pooled(data, logits[:, -1], answers, p) for p in POOLINGS}
    ranks = {p: rank(wrong, score) for p, score in scores.items()}
    pooling = max(ranks, key=lambda p: ranks[p])
    units = data.unit[data.first[answers]].tolist()
    response, response_scores, _ = choose_calibration(
        scores[pooling], wrong, units, seed=settings.seed
    )
    risk = calibrate(response, scores[pooling])
    return FitResult(
        settings=settings,
        features=data.features.header,
        augmented=data.augmented,
        chosen=chosen,
        found_in=found_in,
        penalty=penalty,
        trials=tuple(trials),
        examples={
            f"{head}, {name}": int(one.weight[one.positive == side].sum())
            for head, one in examples.items()
            for name, side in (("wrong", True), ("other", False))
        },
        pooling=pooling,
        poolings={f"{p.kind} {p.window}": ranks[p] for p in POOLINGS},
        calibrations={"token": token_scores, **span_scores, "response": response_scores},
        token=token,
        span=span,
        token_points=token_points,
        response=response,
        response_points=choose_operating_points(risk[~wrong], risk[wrong]),
    )


def _spread(logits: Floats, rows: IntArray, data: Dataset) -> Floats:
    """`logits` at `rows`, nan elsewhere: a row that was not read cannot pass for a low one."""
    spread = np.full((len(data.part), *logits.shape[1:]), np.nan)
    spread[rows] = logits
    return spread
