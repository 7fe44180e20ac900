"""Verb `fit`: from features to a sparse, calibrated probe.

Two heads over one set of neurons: `token`, fitted on single tokens, tints text; `answer`, fitted on
means over whole short answers, ranks responses. Budget and penalties are chosen by cross-validation
over relations and questions inside the part `fit`; the logits of the held-out folds choose pooling
and calibration and set the thresholds. The part `test` is not looked at here. Why so:
docs/decisions/two-heads.md.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import msgspec
import numpy as np

from offline.calibrate import choose_calibration
from offline.dataset import Dataset
from offline.examples import Examples, answer_examples, claim_examples, sample, token_examples
from offline.extract import FeaturesHeader, Kind
from offline.features import IntArray
from offline.heads import HeadSettings, Weights, join, train, train_as_the_paper
from offline.metrics import Bools, Floats, rank
from offline.records import Record, RecordError, read_record, write_atomic
from offline.splits import SPLIT_SEED, Part, folds
from probes.calibration import Calibration, OperatingPoint, calibrate, choose_operating_points
from probes.spans import Pooling

log = logging.getLogger(__name__)

Design = Literal["tokens", "1-vs-1", "3-vs-1"]

TOKEN, ANSWER = "token", "answer"
JUDGED = (Kind.WRONG, Kind.RIGHT, Kind.SCAFFOLD, Kind.PROSE)  # all tokens that somebody has judged
POOLINGS = (
    *(Pooling("max_window", width) for width in (2, 4, 8, 16, 24, 32)),
    Pooling("max"),
    Pooling("first"),
    Pooling("last"),
)


class FitSettings(Record, frozen=True, kw_only=True):
    """What decides a fit besides the data; recorded in the card."""

    seed: int = SPLIT_SEED  # of the split, the folds and what is drawn
    transfer: tuple[str, ...] = ()  # sources that are only evaluated on
    max_neurons: int = 300  # of all heads together
    budgets: tuple[float, ...] = (0.25, 0.5, 1.0)  # shares of `max_neurons` that are tried
    folds: int = 5
    heads: HeadSettings = HeadSettings()
    right_per_wrong: float = 1.4  # weight of the tokens of right claims, by repetition
    scaffold_per_wrong: float = 2.0  # tokens of the scaffold, at most, per token of a wrong claim
    prose_per_wrong: float = 3.0
    window: int = 24  # tokens of prose that are an example of a faithful response
    windows_per_wrong: float = 0.2
    design: Design = "tokens"  # the others are the paper's: means over claims, one head, no choice
    c: float = 1.0  # of the paper's designs
    token_default: str = "fpr_1"
    response_default: str = "fpr_10"


class Trial(Record, frozen=True, kw_only=True):
    """One budget, judged on folds that it was not fitted on."""

    neurons: int  # of the largest fold
    penalty: dict[str, float]  # head -> its best L2 penalty at this budget
    figures: dict[str, float]  # see `_figures`; means over the folds
    folds: tuple[float, ...]  # mean of the figures in each fold that can judge, see `_telling`

    @property
    def merit(self) -> float:
        return float(np.mean(self.folds))


class FitResult(Record, frozen=True, kw_only=True):
    """What `fit` hands to `evaluate` and `publish`."""

    settings: FitSettings
    features: FeaturesHeader
    chosen: Weights
    penalty: dict[str, float]  # head -> L2
    trials: tuple[Trial, ...]
    examples: dict[str, int]  # kind of example -> how many were fitted on
    pooling: Pooling
    poolings: dict[str, float]  # each one's held-out AUROC over whole responses
    calibrations: dict[str, dict[str, float]]  # level -> method -> held-out Brier score
    token: Calibration
    token_points: tuple[OperatingPoint, ...]
    response: Calibration
    response_points: tuple[OperatingPoint, ...]

    @property
    def response_head(self) -> int:
        """Index of the head that ranks whole responses."""
        return len(self.chosen.heads) - 1

    @property
    def sha256(self) -> str:
        """Of the file that `save` writes: evaluation.json says by it which fit it judges."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()

    def check(self, features: FeaturesHeader) -> None:
        """RecordError unless it was fitted on these features."""
        if self.features != features:
            raise RecordError("fit.json was made of other features than there are; `fit` again")

    @classmethod
    def load(cls, path: Path) -> FitResult:
        return read_record(path, cls)

    def save(self, path: Path) -> None:
        write_atomic(path, msgspec.json.encode(self))


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
    for number in range(settings.folds):
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
    held = _spread(logits[best], rows, data)
    return _calibrated(data, settings, chosen, trials[best].penalty, trials, examples, held)


def parse_design(text: str) -> Design:
    """RecordError for an unknown design."""
    for known in get_args(Design):
        if text == known:
            design: Design = known
            return design
    raise RecordError(f"design {text!r} is not one of {', '.join(get_args(Design))}")


def make_examples(data: Dataset, settings: FitSettings) -> dict[str, Examples]:
    """Head -> what it is fitted on."""
    if settings.design == "tokens":
        return {TOKEN: token_examples(data, settings), ANSWER: answer_examples(data, settings)}
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


def mixture(data: Dataset, part: Part, *, seed: int = 0) -> IntArray:
    """Rows of a part on which token risks are calibrated and judged: every judged token of the
    short answers (right and wrong alike many) and as many tokens of ordinary prose."""
    short = data.even_rows(part, Kind.WRONG, Kind.RIGHT, Kind.SCAFFOLD)
    return np.sort(
        np.concatenate([short, sample(data.rows(part, Kind.PROSE), len(short), seed=seed)])
    )


def response_mixture(data: Dataset, part: Part) -> tuple[IntArray, Bools]:
    """`(answers, hallucinated)` on which response risks are calibrated and judged: short answers,
    right and wrong alike many, and ordinary long ones, which claim nothing false. Without these a
    response's risk would only measure its length."""
    short, long = data.even(data.answered(part)), data.ordinary(part)
    wrong = np.concatenate([data.hallucinated(short), np.zeros(len(long), dtype=np.bool_)])
    return np.concatenate([short, long]), wrong


def pooled(data: Dataset, logits: Floats, answers: IntArray, pooling: Pooling) -> Floats:
    """`[answers]` logits of whole responses, pooled over all their tokens as the server does."""
    return np.array([pooling.pool(logits[data.rows_of(i)].tolist()) for i in answers])


def claim_means(data: Dataset, logits: Floats, answers: IntArray) -> Floats:
    """`[answers]`: mean over the tokens of each answer's claim."""
    return np.array([logits[data.claim_rows(i)].mean() for i in answers])


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
    penalty: dict[str, float],
    trials: Sequence[Trial],
    examples: dict[str, Examples],
    logits: Floats,
) -> FitResult:
    """The result, with what the held-out `logits [all rows, heads]` decide."""
    rows = mixture(data, "fit")
    wrong = data.features.kind[rows] == Kind.WRONG
    token, token_scores = choose_calibration(
        logits[rows, 0], wrong, data.unit[rows].tolist(), seed=settings.seed
    )
    risk = calibrate(token, logits[rows, 0])
    token_points = choose_operating_points(risk[~wrong], risk[wrong])
    answers, wrong = response_mixture(data, "fit")
    scores = {p: pooled(data, logits[:, -1], answers, p) for p in POOLINGS}
    ranks = {p: rank(wrong, score) for p, score in scores.items()}
    pooling = max(ranks, key=lambda p: ranks[p])
    units = data.unit[data.first[answers]].tolist()
    response, response_scores = choose_calibration(
        scores[pooling], wrong, units, seed=settings.seed
    )
    risk = calibrate(response, scores[pooling])
    return FitResult(
        settings=settings,
        features=data.features.header,
        chosen=chosen,
        penalty=penalty,
        trials=tuple(trials),
        examples={
            f"{head}, {name}": int(one.weight[one.positive == side].sum())
            for head, one in examples.items()
            for name, side in (("wrong", True), ("other", False))
        },
        pooling=pooling,
        poolings={f"{p.kind} {p.window}": ranks[p] for p in POOLINGS},
        calibrations={"token": token_scores, "response": response_scores},
        token=token,
        token_points=token_points,
        response=response,
        response_points=choose_operating_points(risk[~wrong], risk[wrong]),
    )


def _spread(logits: Floats, rows: IntArray, data: Dataset) -> Floats:
    """`logits` at `rows`, nan elsewhere: a row that was not read cannot pass for a low one."""
    spread = np.full((len(data.part), *logits.shape[1:]), np.nan)
    spread[rows] = logits
    return spread
