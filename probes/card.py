"""What is told about a probe: the strict, immutable records that stand in probe.json.

Every record checks itself when it is made, so a card that exists is a sound one. Knows no numbers:
they are `Probe`'s (probes/probe.py).
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from itertools import pairwise
from typing import Literal

import msgspec

from probes.calibration import Calibration, OperatingPoint
from probes.cett import FORMULA_VERSION
from probes.spans import Pooling

SCHEMA_VERSION = 3

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # fits a header, a label and a folder
_DTYPES = frozenset({"float64", "float32", "bfloat16", "float16"})


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Strict and immutable: an unknown key or a wrong type in probe.json is refused."""


class ModelIdentity(Record, frozen=True, kw_only=True):
    """Which model exactly; a difference is refused by name (probes/fingerprint.py)."""

    model_id: str  # for people; NOT compared (a folder and a hub id may hold the same model)
    revision: str  # 40-hex commit, or "" for a folder; for people, not compared
    config_digest: str
    weights_fingerprint: str  # of all parameters: tells a fine-tune or a merged adapter apart
    tokenizer_sha256: str
    chat_template_sha256: str  # "" without a template
    dtype: str  # "bfloat16", "float32": of the weights
    num_layers: int
    intermediate_size: int
    hidden_size: int
    vocab_size: int

    def __post_init__(self) -> None:
        for field in ("config_digest", "weights_fingerprint", "tokenizer_sha256"):
            if not getattr(self, field):
                raise ValueError(f"{field} must not be empty")
        for field in ("num_layers", "intermediate_size", "hidden_size", "vocab_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, not {getattr(self, field)}")
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {sorted(_DTYPES)}, not {self.dtype!r}")


class ReferenceRisks(Record, frozen=True, kw_only=True):
    """How the token risks of the calibration mixture were distributed: drift is measured from it.

    edges   ascending, cut [0, 1] into bins; a risk equal to an edge lies in the bin above it
    shares  of the risks in each bin, one more than edges, none zero
    """

    edges: tuple[float, ...]
    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        if any(a >= b for a, b in pairwise((0.0, *self.edges, 1.0))):
            raise ValueError("edges of reference risks must rise strictly inside (0, 1)")
        if len(self.shares) != len(self.edges) + 1 or not all(share > 0 for share in self.shares):
            raise ValueError("reference risks need one share > 0 per bin")
        if not math.isclose(math.fsum(self.shares), 1.0, abs_tol=1e-6):
            raise ValueError(f"shares must add up to 1, not {math.fsum(self.shares)}")

    def bin(self, risk: float) -> int:
        """Index of the bin in which `risk` lies."""
        return bisect_right(self.edges, risk)


class SpanRule(Record, frozen=True, kw_only=True):
    """How the logits of a run of flagged tokens become the risk that the run touches a wrong
    claim: pool, then calibrate."""

    pooling: Pooling
    calibration: Calibration


class TokenRule(Record, frozen=True, kw_only=True):
    """How one head's logit of one token becomes the token's risk, and those of a run the run's."""

    head: str
    calibration: Calibration
    span: SpanRule
    operating_points: tuple[OperatingPoint, ...]
    default: str  # name of the operating point that is used when a request sets no threshold
    reference: ReferenceRisks

    def __post_init__(self) -> None:
        _require_operating_points(self.operating_points, self.default)


class ResponseRule(Record, frozen=True, kw_only=True):
    """How the token logits of a response become its risk: pool, then calibrate."""

    head: str
    pooling: Pooling
    calibration: Calibration
    operating_points: tuple[OperatingPoint, ...]
    default: str

    def __post_init__(self) -> None:
        _require_operating_points(self.operating_points, self.default)


class KnownAnswer(Record, frozen=True, kw_only=True):
    """Token ids in, logits out: `logits[i]` are those of the heads at token `i`."""

    token_ids: tuple[int, ...]
    logits: tuple[tuple[float, ...], ...]  # [tokens][heads]

    def __post_init__(self) -> None:
        if not self.token_ids or len(self.token_ids) != len(self.logits):
            raise ValueError("a known answer needs as many rows of logits as token ids, at least 1")
        if not all(math.isfinite(value) for row in self.logits for value in row):
            raise ValueError("the logits of a known answer must be finite")


class EvaluationRow(Record, frozen=True, kw_only=True):
    """One figure with its 95 % interval; the card's table is made of these."""

    dataset: str  # e.g. "wikidata, unseen relations"
    detector: str  # "probe" or a baseline
    metric: str  # "auroc", "ece", ...
    value: float
    low: float | None = None
    high: float | None = None
    n: int


class ReliabilityBin(Record, frozen=True, kw_only=True):
    """Mean predicted risk against observed frequency; one bin of a calibration plot."""

    level: Literal["token", "span", "response"]
    mean_risk: float
    frequency: float
    n: int


class ProbeCard(Record, frozen=True, kw_only=True):
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
    tensors_sha256: str  # of probe.safetensors; `Probe.make` fills it in
    known_answers: tuple[KnownAnswer, ...]

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise ValueError(other_schema(self.schema_version))
        if self.formula_version != FORMULA_VERSION:
            raise ValueError(
                f"formula_version is {self.formula_version}, expected {FORMULA_VERSION}"
            )
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"name must match {_NAME.pattern}, not {self.name!r}")
        if not self.heads or len(set(self.heads)) != len(self.heads):
            raise ValueError(f"heads must be different names, at least one, not {self.heads}")
        for rule in (self.token, self.response):
            if rule.head not in self.heads:
                raise ValueError(f"head {rule.head!r} is none of the heads {self.heads}")
        for answer in self.known_answers:
            if any(len(row) != len(self.heads) for row in answer.logits):
                raise ValueError(f"known answers need {len(self.heads)} logits per token")
            if not all(0 <= token < self.model.vocab_size for token in answer.token_ids):
                raise ValueError(f"token ids must be in [0, {self.model.vocab_size})")


def other_schema(found: int) -> str:
    """Why a card of schema `found` cannot be read, and what to do."""
    return (
        f"schema_version is {found}, expected {SCHEMA_VERSION}: fit and publish the probe again "
        f"(`python -m offline train` goes on from the features that are there)"
    )


def _require_operating_points(points: tuple[OperatingPoint, ...], default: str) -> None:
    names = [point.name for point in points]
    if len(set(names)) != len(names):
        raise ValueError(f"operating points must have different names, not {names}")
    if default not in names:
        raise ValueError(f"the default operating point {default!r} is none of {names}")
