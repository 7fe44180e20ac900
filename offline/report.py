"""Verb `report`: everything that is known about a run, as report.json and one HTML page made of it.

The page (offline/report_page.py) holds no figure that report.json has not, and report.json none
that the run's files have not.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from offline import beside_run
from offline.answer_spans import decode, token_offsets
from offline.caveats import not_good_for
from offline.crossvalidate import CrossValidation
from offline.curves import Curve
from offline.dataset import Dataset
from offline.evaluate import Evaluation
from offline.features import IntArray
from offline.fit import choose
from offline.fit_result import TOKEN, FitResult
from offline.metrics import Floats
from offline.mixtures import pooled
from offline.models import LoadedTokenizer
from offline.publish import training_facts
from offline.records import (
    Answer,
    Label,
    Record,
    RecordError,
    read_labelled,
    read_record,
    write_atomic,
)
from offline.shards import Kind
from offline.splits import Part
from offline.sweep_figures import SweepFigures
from offline.transfer import Transfer
from probes.calibration import OperatingPoint, calibrate
from probes.card import EvaluationRow, ModelIdentity, ReliabilityBin

log = logging.getLogger(__name__)

EXCERPT = 400  # characters of an ordinary answer that an example shows
CLAIMS = (Kind.RIGHT, Kind.WRONG)
PARTS: tuple[Part, ...] = ("fit", "test", "transfer")


class Funnel(Record, frozen=True, kw_only=True):
    """What became of one source's questions."""

    source: str
    questions: int
    answers: int
    kept: dict[str, int]  # verdict -> answers that the probe was made or tested with
    dropped: dict[str, int]  # reason -> answers


class PartCounts(Record, frozen=True, kw_only=True):
    """Answers and tokens of one part of the split."""

    part: str
    right: int
    wrong: int
    ordinary: int
    tokens: dict[str, int]  # kind -> tokens


class Neuron(Record, frozen=True, kw_only=True):
    layer: int
    neuron: int
    weight: dict[str, float]  # head -> per unit of CETT; its size is no measure of importance
    found_in: float | None  # share of fits on half of the relations and questions

    @property
    def is_h_neuron(self) -> bool:
        """Positive in the token head: what alpha scales."""
        return self.weight[TOKEN] > 0


class Budget(Record, frozen=True, kw_only=True):
    """One number of neurons that was tried, judged on folds that it was not fitted on."""

    neurons: int
    figures: dict[str, float]  # AUROC of tokens, claims, answers; means over the folds
    chosen: bool


class Piece(Record, frozen=True, kw_only=True):
    """What one token wrote. `risk` higher is worse; None: not scored."""

    text: str
    risk: float | None
    claim: bool


class TintedAnswer(Record, frozen=True, kw_only=True):
    """One answer of the test part and the risk of each of its tokens."""

    what: Literal["wrong", "right", "ordinary"]
    rank: Literal["highest", "median", "lowest"]  # of its pooled risk among its like
    source: str
    prompt: str
    accepted: tuple[str, ...]
    risk: float  # of the whole answer
    pieces: tuple[Piece, ...]


class Report(Record, frozen=True, kw_only=True):
    """One run. `sweep` and `crossvalidation` are None when they were not run."""

    model: ModelIdentity
    position: str
    facts: dict[str, str]
    funnel: tuple[Funnel, ...]
    parts: tuple[PartCounts, ...]
    neurons: tuple[Neuron, ...]
    budgets: tuple[Budget, ...]
    rows: tuple[EvaluationRow, ...]
    crossvalidation: CrossValidation | None
    curves: tuple[Curve, ...]
    reliability: tuple[ReliabilityBin, ...]
    token_points: tuple[OperatingPoint, ...]
    token_default: str
    response_points: tuple[OperatingPoint, ...]
    response_default: str
    examples: tuple[TintedAnswer, ...]
    not_good_for: tuple[str, ...]
    sweep: SweepFigures | None
    transfers: tuple[Transfer, ...]

    @classmethod
    def load(cls, path: Path) -> Report:
        return read_record(path, cls)

    def save(self, path: Path) -> None:
        write_atomic(path, msgspec.json.encode(self))


def make_report(
    run: Path, result: FitResult, evaluation: Evaluation, data: Dataset, tokenizer: LoadedTokenizer
) -> Report:
    """Gather it from the files of `run`, all of which must be there but crossvalidation.json,
    sweep.json and transfer/. RecordError when they do not belong together."""
    result.check(data)
    evaluation.check(result)
    header, answers, _, labels = read_labelled(run)
    tokenizer.check(header, run / "answers.jsonl")
    facts = training_facts(run, result, data)
    own = beside_run.published(run)
    return Report(
        model=result.features.model,
        position=result.features.position,
        facts=facts,
        funnel=tuple(_funnel(answers, labels)),
        parts=tuple(_parts(data)),
        neurons=tuple(_neurons(result)),
        budgets=tuple(
            Budget(neurons=trial.neurons, figures=trial.figures, chosen=i == choose(result.trials))
            for i, trial in enumerate(result.trials)
        ),
        rows=evaluation.rows,
        crossvalidation=beside_run.crossvalidation(run, result.sha256),
        curves=evaluation.curves,
        reliability=evaluation.reliability,
        token_points=result.token_points,
        token_default=result.settings.token_default,
        response_points=result.response_points,
        response_default=result.settings.response_default,
        examples=tuple(_examples(data, result, tokenizer)),
        not_good_for=not_good_for(facts["judge"], result.pooling),
        sweep=beside_run.sweep(run / "sweep.json", own),
        transfers=tuple(beside_run.transfers(run / "transfer", own)),
    )


def _funnel(answers: list[Answer], labels: list[Label]) -> Iterator[Funnel]:
    """Per source; RecordError when an answer has no label."""
    label_of = {label.id: label for label in labels}
    by_source: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        if answer.id not in label_of:
            raise RecordError(f"answer {answer.id!r} has no label; run `label` again")
        by_source[answer.source].append(answer)
    for source, asked in sorted(by_source.items()):
        found = [label_of[answer.id] for answer in asked]
        yield Funnel(
            source=source,
            questions=len({answer.question_id for answer in asked}),
            answers=len(asked),
            kept=dict(Counter(label.verdict for label in found if not label.dropped)),
            dropped=dict(Counter(label.dropped for label in found if label.dropped).most_common()),
        )


def _parts(data: Dataset) -> Iterator[PartCounts]:
    for part in PARTS:
        answered = data.answered(part)
        wrong = int(data.hallucinated(answered).sum())
        yield PartCounts(
            part=part,
            right=len(answered) - wrong,
            wrong=wrong,
            ordinary=len(data.ordinary(part)),
            tokens={kind.name.lower(): len(data.rows(part, kind)) for kind in Kind},
        )


def _neurons(result: FitResult) -> Iterator[Neuron]:
    width = result.features.model.intermediate_size
    chosen = result.chosen
    found_in = result.found_in or [None] * len(chosen.columns)
    for column, weights, again in zip(chosen.columns, chosen.weight, found_in, strict=True):
        layer, neuron = divmod(column, width)
        by_head = dict(zip(chosen.heads, weights, strict=True))
        yield Neuron(layer=layer, neuron=neuron, weight=by_head, found_in=again)


def _examples(
    data: Dataset, result: FitResult, tokenizer: LoadedTokenizer
) -> Iterator[TintedAnswer]:
    """Of wrong, right and ordinary answers of the test part: highest, median and lowest risk."""
    answered = data.answered("test")
    wrong = data.hallucinated(answered)
    kinds: tuple[tuple[Literal["wrong", "right", "ordinary"], IntArray], ...] = (
        ("wrong", answered[wrong]),
        ("right", answered[~wrong]),
        ("ordinary", data.ordinary("test")),
    )
    ranks: tuple[tuple[Literal["highest", "median", "lowest"], Callable[[int], int]], ...] = (
        ("highest", lambda n: 0),
        ("median", lambda n: n // 2),
        ("lowest", lambda n: n - 1),
    )
    rows = np.flatnonzero(data.part == "test")
    logits = np.full((len(data.part), len(result.chosen.heads)), np.nan)  # nan: of another part
    logits[rows] = result.chosen.logits(data.features, rows)
    token_risks = np.full(len(data.part), np.nan)
    token_risks[rows] = calibrate(result.token, logits[rows, 0])
    for what, indices in kinds:
        if not len(indices):
            continue
        score = pooled(data, logits[:, result.response_head], indices, result.pooling)
        order = np.argsort(-score, kind="stable")
        risks = calibrate(result.response, score)
        for rank, place in ranks:
            at = order[place(len(order))]
            answer = data.answers[indices[at]]
            yield TintedAnswer(
                what=what,
                rank=rank,
                source=answer.source,
                prompt=answer.prompt,
                accepted=answer.gold[:5],
                risk=float(risks[at]),
                pieces=tuple(_pieces(data, int(indices[at]), token_risks, tokenizer)),
            )


def _pieces(
    data: Dataset, index: int, risks: Floats, tokenizer: LoadedTokenizer
) -> Iterator[Piece]:
    """The tokens of answer `index` that wrote something; `risks` [rows] of all data."""
    answer, rows = data.answers[index], data.rows_of(index)
    text = decode(tokenizer.tokenizer, answer.token_ids)
    risk_of = dict(zip(data.features.token[rows].tolist(), risks[rows].tolist(), strict=True))
    kind_of = dict(
        zip(data.features.token[rows].tolist(), data.features.kind[rows].tolist(), strict=True)
    )
    for token, (start, stop) in enumerate(token_offsets(tokenizer.tokenizer, answer.token_ids)):
        if start < stop <= EXCERPT:
            yield Piece(
                text=text[start:stop],
                risk=risk_of.get(token),
                claim=kind_of.get(token) in CLAIMS,
            )
