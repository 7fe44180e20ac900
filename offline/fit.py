"""Verb `fit`: from features to a sparse, calibrated probe.

Standardise, fit an L1 logistic path over strengths, fold the scaler, choose the strength on units
that were not fitted on, calibrate there, set thresholds there. One head, fitted on single tokens:
positive are the claims of wrong answers; negative the claims of right ones, the scaffold of both
and ordinary prose (docs/decisions/one-head-fitted-on-tokens.md).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from offline.calibrate import operating_points, platt
from offline.dataset import Dataset
from offline.extract import FeaturesHeader, Kind
from offline.features import Features, IntArray
from offline.l1_path import Solver, l1_path, standardise
from offline.metrics import Bools, Floats, rank
from offline.records import Record, RecordError, read_bytes, write_atomic
from offline.splits import Part
from probes.calibration import Calibration, OperatingPoint
from probes.probe import fold_scaler
from probes.spans import Pooling

log = logging.getLogger(__name__)

TOKEN_KINDS = (Kind.WRONG, Kind.RIGHT, Kind.SCAFFOLD, Kind.PROSE)  # all that somebody has judged
# Standard deviation of the logits over the tokens that were fitted on. The scale of a logit is
# free, since the calibration absorbs it; this one keeps what bfloat16 kernels and batch shapes
# disagree about (up to 3.5 % of the spread, measured) inside the known-answer test's 0.03.
LOGIT_SPREAD = 0.5
TIE = 0.002  # of two candidates that differ by less the sparser one is taken


class FitSettings(Record, frozen=True, kw_only=True):
    """What decides a fit besides the data; recorded in the card."""

    seed: int = 0
    transfer: tuple[str, ...] = ()  # sources that are only evaluated on
    solver: Solver = "skglm"
    max_neurons: int = 350
    strengths: tuple[float, ...] = (0.3, 0.2, 0.14, 0.1, 0.085, 0.07, 0.06, 0.05)  # of the largest
    right_per_wrong: float = 1.4  # weight of the tokens of right claims, by repetition
    scaffold_per_wrong: float = 2.0  # tokens of the scaffold, at most, per token of a wrong claim
    prose_per_wrong: float = 3.0
    token_default: str = "fpr_1"
    response_default: str = "fpr_10"
    pooling: Pooling = Pooling("max_window", 2)


class Candidate(Record, frozen=True, kw_only=True):
    """One point of the path, scaler folded in, with how it does on units it was not fitted on."""

    strength: float
    columns: tuple[int, ...]  # of `Features.cett`
    weight: tuple[float, ...]  # [columns]
    bias: float
    auroc: float  # mean token logit of the claim, wrong against right answers
    token_auroc: float  # claim tokens of wrong answers against all other tokens

    def logits(self, features: Features, rows: IntArray) -> Floats:
        """`[rows]` float64: the probe as it will be served, on stored features."""
        values = features.cett(rows, np.array(self.columns)).astype(np.float64)
        logits: Floats = values @ np.array(self.weight) + self.bias
        return logits


class FitResult(Record, frozen=True, kw_only=True):
    """What `fit` hands to `evaluate` and `publish`."""

    settings: FitSettings
    features: FeaturesHeader
    chosen: Candidate
    path: tuple[Candidate, ...]
    fitted_tokens: dict[str, int]  # kind -> how many tokens of it were fitted on
    token: Calibration
    token_points: tuple[OperatingPoint, ...]
    response: Calibration
    response_points: tuple[OperatingPoint, ...]

    @classmethod
    def load(cls, path: Path) -> FitResult:
        return msgspec.json.decode(read_bytes(path), type=cls)

    def save(self, path: Path) -> None:
        write_atomic(path, msgspec.json.encode(self))


def fit(data: Dataset, settings: FitSettings) -> FitResult:
    """Fit on part `fit`; choose, calibrate and set thresholds on part `calibrate`."""
    rows = choose_rows(data, settings)
    kinds = data.features.kind[rows]
    x = data.features.cett(rows)
    mean, scale = standardise(x)
    log.info("fitting on %d tokens of %d neurons", *x.shape)
    path: list[Candidate] = []
    for strength, weight, bias in l1_path(
        x, kinds == Kind.WRONG, settings.strengths, solver=settings.solver
    ):
        columns = np.flatnonzero(weight)
        log.info("strength %.3f: %d neurons", strength, len(columns))
        if len(columns) > settings.max_neurons:
            break
        folded, folded_bias = fold_scaler(
            weight[columns, None],
            np.array([bias]),
            mean=mean[columns].astype(np.float64),
            scale=scale[columns].astype(np.float64),
        )
        if len(columns):
            unit = LOGIT_SPREAD / float((x[:, columns] @ weight[columns]).std())
            folded, folded_bias = unit * folded, unit * folded_bias
            path.append(_candidate(data, strength, columns, folded[:, 0], float(folded_bias[0])))
    chosen = choose(path)
    token, token_points = _token_rule(data, chosen)
    response, response_points = _response_rule(data, chosen, settings.pooling)
    return FitResult(
        settings=settings,
        features=data.features.header,
        chosen=chosen,
        path=tuple(path),
        fitted_tokens={kind.name.lower(): int((kinds == kind).sum()) for kind in TOKEN_KINDS},
        token=token,
        token_points=token_points,
        response=response,
        response_points=response_points,
    )


def choose_rows(data: Dataset, settings: FitSettings) -> IntArray:
    """Rows to fit on: every claim, and a sample of scaffold and prose in proportion to the wrong
    ones. Right claims are few and the hardest to tell from wrong ones, so they are repeated."""
    wrong, right = data.rows("fit", Kind.WRONG), data.rows("fit", Kind.RIGHT)
    if not len(wrong) or not len(right):
        raise RecordError(
            f"{len(wrong)} tokens of wrong claims and {len(right)} of right ones to fit on: both "
            f"are needed; ask more questions, or others (see the counts of `label`)"
        )
    repeats = max(1, round(settings.right_per_wrong * len(wrong) / len(right)))
    sampled = (
        sample(data.rows("fit", kind), round(share * len(wrong)), seed=settings.seed)
        for kind, share in (
            (Kind.SCAFFOLD, settings.scaffold_per_wrong),
            (Kind.PROSE, settings.prose_per_wrong),
        )
    )
    return np.sort(np.concatenate([wrong, np.repeat(right, repeats), *sampled]))


def sample(rows: IntArray, most: int, *, seed: int) -> IntArray:
    """At most `most` of `rows`, drawn without replacement."""
    return np.random.default_rng(seed).permutation(rows)[:most]


def choose(path: Sequence[Candidate]) -> Candidate:
    """The best mean of both figures on held-out units; among equals the sparsest."""
    if not path:
        raise RecordError("no strength gave a probe within the neuron budget: raise max_neurons")
    merits = [(candidate.auroc + candidate.token_auroc) / 2 for candidate in path]
    return next(c for c, merit in zip(path, merits, strict=True) if merit >= max(merits) - TIE)


def mixture(data: Dataset, part: Part, *, seed: int = 0) -> IntArray:
    """Rows of a part on which token risks are calibrated and judged: every judged token of the
    short answers (right and wrong alike many) and as many tokens of ordinary prose."""
    short = data.rows(part, Kind.WRONG, Kind.RIGHT, Kind.SCAFFOLD)
    return np.sort(
        np.concatenate([short, sample(data.rows(part, Kind.PROSE), len(short), seed=seed)])
    )


def response_mixture(data: Dataset, part: Part) -> tuple[IntArray, Bools]:
    """`(answers, hallucinated)` on which response risks are calibrated and judged: short answers
    that are judged to the end, and ordinary long answers, which claim nothing false. Without these
    a response's risk would only measure its length."""
    short, long = data.judged(data.answered(part)), data.ordinary(part)
    wrong = np.concatenate([data.hallucinated(short), np.zeros(len(long), dtype=np.bool_)])
    return np.concatenate([short, long]), wrong


def pooled(data: Dataset, candidate: Candidate, answers: IntArray, pooling: Pooling) -> Floats:
    """`[answers]` logits of whole responses, pooled over all their tokens as the server does."""
    rows = np.concatenate([data.rows_of(i) for i in answers])
    logits = candidate.logits(data.features, rows)
    ends = np.cumsum([data.first[i + 1] - data.first[i] for i in answers])
    return np.array([pooling.pool(part.tolist()) for part in np.split(logits, ends[:-1])])


def _candidate(
    data: Dataset, strength: float, columns: IntArray, weight: Floats, bias: float
) -> Candidate:
    draft = Candidate(
        strength=strength,
        columns=tuple(columns.tolist()),
        weight=tuple(weight.tolist()),
        bias=bias,
        auroc=0.0,
        token_auroc=0.0,
    )
    rows = data.rows("calibrate", *TOKEN_KINDS)
    logit = np.full(len(data.part), np.nan)
    logit[rows] = draft.logits(data.features, rows)
    answered = data.answered("calibrate")
    means = np.array([logit[data.claim_rows(i)].mean() for i in answered])
    return msgspec.structs.replace(
        draft,
        auroc=rank(data.hallucinated(answered), means),
        token_auroc=rank(data.features.kind[rows] == Kind.WRONG, logit[rows]),
    )


def _token_rule(
    data: Dataset, candidate: Candidate
) -> tuple[Calibration, tuple[OperatingPoint, ...]]:
    rows = mixture(data, "calibrate")
    logits, wrong = candidate.logits(data.features, rows), data.features.kind[rows] == Kind.WRONG
    calibration = platt(logits, wrong)
    return calibration, operating_points(calibration, logits, wrong)


def _response_rule(
    data: Dataset, candidate: Candidate, pooling: Pooling
) -> tuple[Calibration, tuple[OperatingPoint, ...]]:
    answers, wrong = response_mixture(data, "calibrate")
    logits = pooled(data, candidate, answers, pooling)
    calibration = platt(logits, wrong)
    return calibration, operating_points(calibration, logits, wrong)
