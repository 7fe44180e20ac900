"""What the server answers about its models and its probes; see `answers.py`."""

from __future__ import annotations

from typing import Literal

from server.api.answers import AnswerModel


class Model(AnswerModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(AnswerModel):
    object: Literal["list"]
    data: list[Model]


class OperatingPoint(AnswerModel):
    name: str
    threshold: float
    false_positive_rate: float
    recall: float


class Thresholds(AnswerModel):
    head: str
    default: str
    operating_points: list[OperatingPoint]


class ProbeThresholds(AnswerModel):
    token: Thresholds
    response: Thresholds


class EvaluationRow(AnswerModel):
    dataset: str
    detector: str
    metric: str
    value: float
    low: float | None
    high: float | None
    n: int


class ProbeInfo(AnswerModel):
    id: str
    object: Literal["probe"]
    name: str
    default: bool
    position: Literal["read", "write"]
    heads: list[str]
    neurons: int
    layers: int
    h_neurons: int
    suppression: bool  # requests may scale these
    thresholds: ProbeThresholds
    evaluation: list[EvaluationRow]
    not_good_for: list[str]
    created: int


class ProbeList(AnswerModel):
    object: Literal["list"]
    data: list[ProbeInfo]
