"""What `fit` is told and what it finds: fit.json, which every later verb reads."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import msgspec
import numpy as np

from offline.heads import HeadSettings, Weights
from offline.l1_path import parse_solver
from offline.records import Record, RecordError, read_record, write_atomic
from offline.shards import FeaturesHeader
from offline.splits import SPLIT_SEED
from probes.calibration import Calibration, OperatingPoint
from probes.card import SpanRule
from probes.spans import Pooling

if TYPE_CHECKING:
    from offline.dataset import Dataset

TOKEN, ANSWER = "token", "answer"  # the heads

Design = Literal["tokens", "1-vs-1", "3-vs-1"]


class FitSettings(Record, frozen=True, kw_only=True):
    """What decides a fit besides the data; recorded in the card."""

    seed: int = SPLIT_SEED  # of the split, the folds and what is drawn
    max_neurons: int = 300  # of all heads together
    budgets: tuple[float, ...] = (0.25, 0.5, 1.0)  # shares of `max_neurons` that are tried
    folds: int = 5
    resamples: int = 20  # halves of the units in which the neurons are looked for again, or none
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


NO_CHOICE = 0.0  # penalty of a head that was not fitted again with an L2 penalty


def fit_settings(
    design: str,
    *,
    seed: int,
    solver: str | None = None,
    max_neurons: int | None = None,
    c: float | None = None,
) -> FitSettings:
    """The settings of a design with what is given in their place; RecordError for what it does not
    know. The paper's designs choose nothing: one fit, with as many neurons as C leaves."""
    known = parse_design(design)
    if known == "tokens":
        if c is not None:
            raise RecordError("--c is of the paper's designs; --design tokens chooses by folds")
        heads = HeadSettings(solver=parse_solver(solver or "skglm"))
        return FitSettings(seed=seed, heads=heads, max_neurons=max_neurons or 300)
    for name, value in (("solver", solver), ("max-neurons", max_neurons)):
        if value is not None:
            raise RecordError(
                f"--{name} is not of --design {design}, which fits by liblinear and keeps what its "
                f"C leaves; give --c, or --design tokens"
            )
    heads = HeadSettings(penalties=(NO_CHOICE,))
    return FitSettings(seed=seed, design=known, heads=heads, budgets=(1.0,), c=c or 1.0)


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
    augmented: dict[str, str]  # run within the run -> digest of its labels
    chosen: Weights
    # [columns] share of fits on half of the units that found it, too; or nothing: not known
    found_in: tuple[float, ...]
    penalty: dict[str, float]  # head -> L2
    trials: tuple[Trial, ...]
    examples: dict[str, int]  # kind of example -> how many were fitted on
    pooling: Pooling
    poolings: dict[str, float]  # each one's held-out AUROC over whole responses
    calibrations: dict[str, dict[str, float]]  # level -> method -> held-out Brier score
    token: Calibration
    span: SpanRule  # of a run of flagged tokens
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

    def check(self, data: Dataset) -> None:
        """RecordError unless it was fitted on these features."""
        if self.features != data.features.header:
            raise RecordError("fit.json was made of other features than there are; `fit` again")
        if self.augmented != data.augmented:
            raise RecordError(
                f"fit.json was augmented by {', '.join(self.augmented) or 'nothing'}, and the run "
                f"holds {', '.join(data.augmented) or 'nothing'}, or what is there has changed; "
                f"`fit` again"
            )

    @classmethod
    def load(cls, path: Path) -> FitResult:
        return read_record(path, cls)

    def save(self, path: Path) -> None:
        write_atomic(path, msgspec.json.encode(self))


def parse_design(text: str) -> Design:
    """RecordError for an unknown design."""
    for known in get_args(Design):
        if text == known:
            design: Design = known
            return design
    raise RecordError(f"design {text!r} is not one of {', '.join(get_args(Design))}")
