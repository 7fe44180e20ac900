"""A probe of random neurons: it costs what a fitted one costs, and means nothing.

For benchmarks and tests, which need a probe of any model at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from probes.calibration import OperatingPoint, Platt
from probes.card import (
    SCHEMA_VERSION,
    ModelIdentity,
    ProbeCard,
    ReferenceRisks,
    ResponseRule,
    SpanRule,
    TokenRule,
)
from probes.cett import FORMULA_VERSION
from probes.probe import Probe
from probes.spans import Pooling


def random_probe(
    identity: ModelIdentity,
    column_norms: Tensor,
    *,
    name: str,
    neurons: int,
    heads: Sequence[str] = ("token", "answer"),
    seed: int = 0,
    scale: float = 1.0,
) -> Probe:
    """`neurons` of all layers with normal weights; the first head is the token's, the last the
    answer's.

    column_norms  [layers, width], ||W_down[:, j]||2 of every neuron
    scale         standard deviation of the weights
    """
    generator = torch.Generator().manual_seed(seed)
    layers, width = column_norms.shape
    chosen = torch.randperm(layers * width, generator=generator)[:neurons].sort().values
    layer, neuron = chosen // width, chosen % width
    weight = scale * torch.randn(neurons, len(heads), generator=generator)
    bias = torch.randn(len(heads), generator=generator)
    return Probe.make(
        _card(identity, name=name, heads=tuple(heads)),
        layer=layer.numpy(),
        neuron=neuron.numpy(),
        weight=weight.numpy(),
        column_norm=column_norms[layer, neuron].numpy(),
        bias=bias.numpy(),
    )


def _card(identity: ModelIdentity, *, name: str, heads: tuple[str, ...]) -> ProbeCard:
    calibration = Platt(slope=1.0, intercept=0.0)
    points = (OperatingPoint(name="half", threshold=0.5, false_positive_rate=0.1, recall=0.5),)
    return ProbeCard(
        schema_version=SCHEMA_VERSION,
        formula_version=FORMULA_VERSION,
        name=name,
        position="read",
        heads=heads,
        token=TokenRule(
            head=heads[0],
            calibration=calibration,
            span=SpanRule(pooling=Pooling("mean"), calibration=calibration),
            operating_points=points,
            default="half",
            reference=ReferenceRisks(edges=(0.5,), shares=(0.5, 0.5)),
        ),
        response=ResponseRule(
            head=heads[-1],
            pooling=Pooling(kind="max"),
            calibration=calibration,
            operating_points=points,
            default="half",
        ),
        model=identity,
        training={},
        evaluation=(),
        reliability=(),
        not_good_for=("anything: its neurons were drawn at random",),
        libraries={},
        created="2026-11-29",
        tensors_sha256="",  # written by Probe.make
        known_answers=(),
    )
