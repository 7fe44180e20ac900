"""The artifact: a folder with `probe.json` (card), `probe.safetensors` (numbers) and README.md.

`Probe` is frozen; it is fitted elsewhere (`offline/fit.py`), saved once, and loaded by reading
bytes. Nothing here executes what it loads.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
from torch import Tensor

from probes.calibration import Calibration, OperatingPoint
from probes.spans import Pooling

SCHEMA_VERSION = 1


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Strict and immutable: an unknown key or a wrong type in probe.json is refused."""


class ModelIdentity(_Record, frozen=True, kw_only=True):
    """Which model exactly; every field is compared, a difference is refused by name.

    `weights_fingerprint` is a digest of down-projection weights (probes/fingerprint.py): it tells a
    fine-tune, a merged adapter or another revision from the model of the same shape.
    """

    model_id: str  # for people; NOT compared (a folder and a hub id may hold the same model)
    revision: str  # 40-hex commit, or "" for a folder; for people, not compared
    config_digest: str
    weights_fingerprint: str
    tokenizer_sha256: str
    chat_template_sha256: str
    dtype: str  # "bfloat16", "float32": of the weights
    num_layers: int
    intermediate_size: int
    hidden_size: int
    vocab_size: int


class TokenRule(_Record, frozen=True, kw_only=True):
    """How one head's logit of one token becomes the token's risk."""

    head: str
    calibration: Calibration
    operating_points: tuple[OperatingPoint, ...]
    default: str  # name of the operating point that is used when a request sets no threshold


class ResponseRule(_Record, frozen=True, kw_only=True):
    """How the token logits of a response become its risk: pool, then calibrate."""

    head: str
    pooling: Pooling
    calibration: Calibration
    operating_points: tuple[OperatingPoint, ...]
    default: str


class KnownAnswer(_Record, frozen=True, kw_only=True):
    """Token ids in, logits out: `logits[i]` are those of the heads at token `i`."""

    token_ids: tuple[int, ...]
    logits: tuple[tuple[float, ...], ...]  # [tokens][heads]


class EvaluationRow(_Record, frozen=True, kw_only=True):
    """One figure with its 95 % interval; the card's table is made of these."""

    dataset: str  # e.g. "wikidata, unseen relations"
    detector: str  # "probe" or a baseline
    metric: str  # "auroc", "ece", ...
    value: float
    low: float | None = None
    high: float | None = None
    n: int


class ReliabilityBin(_Record, frozen=True, kw_only=True):
    """Mean predicted risk against observed frequency; one bin of a calibration plot."""

    level: Literal["token", "response"]
    mean_risk: float
    frequency: float
    n: int


class ProbeCard(_Record, frozen=True, kw_only=True):
    """Everything about a probe but its numbers."""

    schema_version: int
    formula_version: int
    name: str
    position: Literal["read", "write"]
    heads: tuple[str, ...]  # the columns of `weight`
    token: TokenRule
    response: ResponseRule
    model: ModelIdentity
    training: dict[str, str]  # data files' sha256, rule, seed, command, ...: free, for people
    evaluation: tuple[EvaluationRow, ...]
    reliability: tuple[ReliabilityBin, ...]
    not_good_for: tuple[str, ...]
    libraries: dict[str, str]
    created: str  # ISO date
    tensors_sha256: str
    known_answers: tuple[KnownAnswer, ...]


@dataclass(frozen=True, eq=False)
class Probe:
    """A sparse linear reader of `neurons` = len(layer) neurons with `heads` outputs.

    layer        [neurons] int64, 0-based, ascending with `neuron`; each pair once
    neuron       [neurons] int64, column of the down projection
    weight       [neurons, heads] float32, scaler folded in
    column_norm  [neurons] float32
    suppress     [neurons] bool, the suppression set (H-Neurons: positive token weight)
    bias         [heads] float32
    """

    card: ProbeCard
    layer: Tensor
    neuron: Tensor
    weight: Tensor
    column_norm: Tensor
    suppress: Tensor
    bias: Tensor

    @property
    def id(self) -> str:
        """`name@sha`: what responses and metrics call this probe."""
        return f"{self.card.name}@{self.card.tensors_sha256[:12]}"

    # load(path), save(path), head(name) -> column, fold_scaler(...): see the brief
    @classmethod
    def load(cls, path: Path) -> Probe:
        """Read, verify and freeze; ProbeFormatError says what is wrong."""
        raise NotImplementedError

    def save(self, path: Path) -> None:
        """Write atomically; the sha256 of the tensors must already stand in the card."""
        raise NotImplementedError
